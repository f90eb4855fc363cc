"""See which states the policies of DIPO, SAC, TD3 and PPO visit as they learn (Figures 7, 8, 15-19).

    python examples/paper/state_visits.py --quick
    python examples/paper/state_visits.py --envs HalfCheetah-v5 --algorithms dipo_paper sac td3 ppo --out runs/state_visits

Every snapshot of every algorithm plays ten episodes from the same ten seeds, and one t-SNE with the paper's parameters puts
states of all of them on one plane. For each task, the script writes <env>.png (a panel for each algorithm, a colour for each
snapshot), <env>.csv (how much of the plane each snapshot covers) and <env>.md (a summary). Cut off and started again, it goes
on, to the same files; several processes may share a folder if each has its own --envs or --algorithms, and started once more
with all of them, the script draws all.

What the paper leaves open: policies act as they do in training, with deterministic=False, and TD3 with its noise. There is no
snapshot before the random steps are over, and one right then is of an untrained policy, but for PPO. Of each snapshot's states
at most --states over the number of snapshots are drawn at random, and each coordinate is scaled to variance 1 over all that
are drawn. What the paper does not say about t-SNE is scikit-learn's default.

The area is the share of cells of a 25 x 25 grid around all points that are occupied. Short episodes give few states, and few
states fill few cells, so the area is what as many states as the smallest snapshot has would occupy on average (rarefaction);
for an algorithm's snapshots together, as many of each. As t-SNE stretches dense places, the area is given for the two
principal components, too, where far states make the rest look small.

On one core a step of training takes DIPO with the paper's setting about 130 ms (190 on HalfCheetah-v5), SAC 14, TD3 9 and PPO
1: at the paper's scale 40 hours for DIPO (55) and 7 for the others. Ten episodes of 1,000 steps take DIPO 12 s a snapshot and
the others 2, t-SNE of 10,000 states a minute.
"""

import io
import itertools
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from experiments import command, markdown_table, palette, save_figure, write
from grid import VARIANTS, Run, arguments, check, choose, failures, make_run, parse, positive, train_or_exit
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import hypergeom  # type: ignore[import-untyped]
from sklearn.decomposition import PCA  # type: ignore[import-untyped]
from sklearn.manifold import TSNE  # type: ignore[import-untyped]
from sklearn.preprocessing import MinMaxScaler, StandardScaler  # type: ignore[import-untyped]
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

EPISODES = 10
SEED = 1_000  # of the first episode, each has the next; and of what policies draw
CELLS = 25  # along each side of the grid
QUICK = dict(steps=400, every=200, learning_starts=200, states=800)


def visits(run: Run, step: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Play ten episodes, from the same starts for every snapshot. What came of it is kept beside the snapshot.

    :return: all states in which the policy acted, a row each, and the returns, of shape (10,)
    """
    file = run.results / f"visits-{step}.npz"
    if not file.exists():
        model, env = run.agent(step), make_vec_env(run.env, EPISODES, seed=SEED)
        set_random_seed(SEED)
        observations: Any = env.reset()
        states, returns, running = [], np.zeros(EPISODES), np.full(EPISODES, True)
        while running.any():
            states.append(observations[running])
            actions, _ = model.predict(observations, deterministic=False)
            if isinstance(model, TD3) and model.action_noise is not None:
                noise = [model.action_noise() for _ in range(EPISODES)]
                actions = model.policy.unscale_action(np.clip(model.policy.scale_action(actions) + noise, -1, 1))
            observations, rewards, dones, _ = env.step(actions)
            returns += rewards * running
            running &= ~dones
        content = io.BytesIO()
        np.savez(content, states=np.concatenate(states), returns=returns)
        write(file, content.getvalue())
    with np.load(file) as kept:
        return kept["states"], kept["returns"]


def embed(groups: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Put groups of states on unit squares. On one thread, as several would add up in any order."""
    scaled = StandardScaler().fit_transform(np.concatenate(groups).astype(np.float64))
    with threadpool_limits(1):
        planes = dict(
            tsne=TSNE(perplexity=50, early_exaggeration=12, random_state=33).fit_transform(scaled),
            pca=PCA(2).fit_transform(scaled),
        )
    cuts = np.cumsum([len(group) for group in groups])[:-1]
    return {name: np.split(MinMaxScaler(clip=True).fit_transform(plane), cuts) for name, plane in planes.items()}


def area(groups: list[np.ndarray], number: int) -> float:
    """
    :param groups: points on the unit square, each of shape (at least ``number``, 2)
    :param number: of points to take of each group, at random and without replacement
    :return: share of the grid's cells that these occupy together, on average
    """
    empty = np.ones((CELLS, CELLS))  # the chance that a cell has none of them
    for points in groups:
        inside, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=CELLS, range=[[0, 1], [0, 1]])
        empty *= hypergeom.pmf(0, len(points), inside, number)
    return float(1 - empty.mean())


def measure(runs: list[Run], states: int) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """
    Play all snapshots, put at most so many states on planes and see how much of them is covered.

    :return: a row for each snapshot, and its points of t-SNE
    """
    rows, groups = [], []
    jobs = [(run, step) for run in runs for step in run.snapshots]
    for run, step in tqdm(jobs, "playing", unit="snapshot", dynamic_ncols=True):
        visited, returns = visits(run, step)
        number = min(len(visited), states // len(jobs))
        groups.append(np.random.default_rng(SEED).choice(visited, number, replace=False))
        of = dict(algorithm=run.name, step=step, mean_return=returns.mean())
        rows.append(of | dict(visited=len(visited), drawn=number))
    table = pd.DataFrame(rows)
    print(f"embedding {table.drawn.sum():,} states")
    planes, number, each = embed(groups), table.drawn.min(), len(runs[0].snapshots)
    for name, points in planes.items():
        table[name] = [area([own], number) for own in points]
        table[f"{name}_so_far"] = [area(points[index - index % each : index + 1], number) for index in range(len(jobs))]
    return table, planes["tsne"]


def draw(table: pd.DataFrame, groups: list[np.ndarray], env: str, labels: dict[str, str]) -> Figure:
    """A panel for each algorithm, and one with the areas."""
    last = table.groupby("algorithm", sort=False).last()
    names, steps = list(last.index), sorted(set(table.step))
    lines, colors = palette(labels), ListedColormap(colormaps["plasma"](np.linspace(0, 0.9, len(steps))))
    figure = Figure(figsize=(3.1 * len(names) + 4, 4.4), layout="constrained")
    shares = ", ".join(f"{labels[name]} {share:.0%}" for name, share in last.tsne_so_far.sort_values(ascending=False).items())
    figure.suptitle(f"{env}: how much of the plane of visited states does each algorithm cover? {shares}")
    *panels, curves = figure.subplots(1, len(names) + 1, width_ratios=[*[1] * len(names), 1.1])
    for panel, name in zip(panels, names, strict=True):
        own = table[table.algorithm == name]
        points = np.concatenate([groups[index] for index in own.index])
        color = np.repeat([steps.index(step) for step in own.step], own.drawn)
        order = np.random.default_rng(SEED).permutation(len(points))  # so that no snapshot is on top
        panel.scatter(*np.concatenate(groups).T, s=3, color="0.88", linewidths=0)
        panel.scatter(*points[order].T, s=3, c=color[order], cmap=colors, vmin=-0.5, vmax=len(steps) - 0.5, linewidths=0)
        panel.set_title(f"{labels[name]}: {last.tsne_so_far[name]:.0%}\nlast return {last.mean_return[name]:,.0f}")
        panel.set(xticks=[], yticks=[])
        curves.plot(own.step, own.tsne, "o-", color=lines[name], label=labels[name])
    scale = ScalarMappable(BoundaryNorm(np.arange(len(steps) + 1) - 0.5, len(steps)), colors)
    text = "environment steps of the snapshot (grey: where others are)"
    bar = figure.colorbar(scale, ax=panels, location="bottom", aspect=80, pad=0.02, label=text)
    bar.set_ticks(range(len(steps)), labels=[f"{step:,}" for step in steps])
    curves.set(title="each snapshot's share", xlabel="environment steps", ylim=(0, None))
    curves.yaxis.set_major_formatter(PercentFormatter(1))
    curves.legend(frameon=False)
    return figure


def summary(table: pd.DataFrame, labels: dict[str, str]) -> str:
    """A line for each algorithm, and what was asked for."""
    lines = []
    for name, own in table.groupby("algorithm", sort=False):
        first, last = own.iloc[0], own.iloc[-1]
        areas = (first.tsne, last.tsne, last.tsne_so_far, first.pca, last.pca, last.pca_so_far)
        cells = [f"{one.mean_return:,.0f}" for one in (first, last)] + [f"{share:.1%}" for share in areas]
        lines.append((labels[name], *cells))
    head = ("algorithm", "return, first", "last", "t-SNE, first", "last", "all", "PCA, first", "last", "all")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "stable_baselines3", "gymnasium", "scikit-learn"))
    number, states = table.drawn.min(), f"{table.drawn.sum():,} of {table.visited.sum():,} visited states"
    text = f"""\
Mean return of {EPISODES} episodes, and share of the cells of a {CELLS} x {CELLS} grid that {number:,} states occupy:
of the first snapshot, of the last, and of each of all. On the plane are {states}.
"""
    return f"{text}\n{markdown_table(head, lines)}\n`{command()}`\n\n{versions}\n"


def main() -> None:
    quick = "tiny networks, two snapshots, after 200 and 400 steps: about half a minute"
    parser = arguments(__doc__ or "", "runs/state_visits", quick, seeds=[0])
    parser.set_defaults(learning_starts=10_000)
    names = f"of {', '.join(VARIANTS)} (%(default)s)"
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", default=["dipo_paper", "sac", "td3", "ppo"], help=names)
    parser.add_argument("--envs", nargs="+", metavar="ENV", default=["HalfCheetah-v5"], help="(%(default)s)")
    parser.add_argument("--steps", type=positive, default=1_000_000, help="environment steps of a training (%(default)s)")
    parser.add_argument("--every", type=positive, default=100_000, help="steps from one snapshot to the next (%(default)s)")
    parser.add_argument("--states", type=positive, default=10_000, help="on the plane, at most (%(default)s)")
    args = parse(parser, QUICK)
    check(parser, args, args.envs)
    snapshots = tuple(step for step in range(args.every, args.steps + 1, args.every) if step >= args.learning_starts)
    if not snapshots:
        parser.error("there is no snapshot: --every and --learning-starts must be at most --steps")
    variants = choose(parser, args, args.algorithms)
    labels = {name: variant.label or name for name, variant in variants.items()}
    what: dict[str, Any] = dict(steps=snapshots[-1], snapshots=snapshots)
    figures = {
        (env, seed): [make_run(args, env, name, variant, seed, **what) for name, variant in variants.items()]
        for env, seed in itertools.product(args.envs, args.seeds)
    }
    failures(train_or_exit([run for runs in figures.values() for run in runs], args))
    for (env, seed), runs in figures.items():
        table, groups = measure(runs, args.states)
        name = env if len(args.seeds) == 1 else f"{env}-seed{seed}"
        write(args.out / f"{name}.csv", table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
        save_figure(draw(table, groups, env, labels), args.out / f"{name}.png")
        write(args.out / f"{name}.md", summary(table, labels))
        print(summary(table, labels))


if __name__ == "__main__":
    main()
