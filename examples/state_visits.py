"""See which states the policies of DIPO, SAC, TD3 and PPO visit as they learn (Figures 7, 8, 15-19).

    python examples/state_visits.py --quick
    python examples/state_visits.py --env HalfCheetah-v5 --out runs/state_visits

Every snapshot of every algorithm plays ten episodes from the same ten seeds, and one t-SNE with the paper's parameters puts
states of all of them on one plane. Writes <env>.png (a panel for each algorithm, a colour for each snapshot), <env>.csv (how
much of the plane each snapshot covers) and <env>.md (a summary). Cut off and started again, it goes on, to the same files;
several processes may share a folder if each has its own --env or --algorithms, and once more with all of them draws all.

What the paper leaves open: policies act as they do in training, with deterministic=False, and TD3's with its noise. There is
no snapshot before the random steps are over, and one right then is of an untrained policy, but for PPO. Of each snapshot's
states at most --states over the number of snapshots are drawn at random, and each coordinate is scaled to variance 1 over all
that are drawn. What the paper does not name about t-SNE is scikit-learn's default.

The area is the share of cells of a 25 x 25 grid around all points that are occupied. Short episodes give few states, and few
states fill few cells, so it is what as many states as the smallest snapshot has would occupy on average (rarefaction); for an
algorithm's snapshots together, as many of each. As t-SNE stretches dense places, it is given for the two principal
components, too, where far states make the rest look small.

On one core a step of training takes DIPO about 130 ms (K = 100; 190 on HalfCheetah-v5), SAC 14, TD3 9 and PPO 1: at the
paper's scale 40 hours for DIPO (55) and 7 for the others. Ten episodes of 1,000 steps take DIPO 12 s a snapshot and the others
2, t-SNE of 10,000 states a minute.
"""

import argparse
import io
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from experiments import COLORS, NAMES, Training, arguments, log_to, markdown_table, save_figure, train_all, write
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
QUICK = dict(steps=400, every=200, learning_starts=200, states=800, num_train_timesteps=3, action_gradient_steps=5)


def visits(training: Training, step: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Play ten episodes, from the same starts for every snapshot. What came of it is kept beside the snapshot.

    :return: all states in which the policy acted, a row each, and the returns, of shape (10,)
    """
    file = training.folder / f"visits-{step}.npz"
    if not file.exists():
        model, env = training.agent(step), make_vec_env(training.env_id, EPISODES, seed=SEED)
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


def measure(trainings: list[Training], states: int) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """
    Play all snapshots, put at most so many states on planes and see how much of them is covered.

    :return: a row for each snapshot, and its points of t-SNE
    """
    rows, groups = [], []
    jobs = [(training, step) for training in trainings for step in training.snapshots]
    for training, step in tqdm(jobs, "playing", unit="snapshot", dynamic_ncols=True):
        visited, returns = visits(training, step)
        number = min(len(visited), states // len(jobs))
        groups.append(np.random.default_rng(SEED).choice(visited, number, replace=False))
        of = dict(algorithm=training.algorithm, step=step, mean_return=returns.mean())
        rows.append(of | dict(visited=len(visited), drawn=number))
    table = pd.DataFrame(rows)
    print(f"embedding {table.drawn.sum():,} states")
    planes, number, each = embed(groups), table.drawn.min(), len(trainings[0].snapshots)
    for name, points in planes.items():
        table[name] = [area([own], number) for own in points]
        table[f"{name}_so_far"] = [area(points[index - index % each : index + 1], number) for index in range(len(jobs))]
    return table, planes["tsne"]


def draw(table: pd.DataFrame, groups: list[np.ndarray], env: str) -> Figure:
    """A panel for each algorithm, and one with the areas."""
    last = table.groupby("algorithm", sort=False).last()
    names, steps = list(last.index), sorted(set(table.step))
    colors = ListedColormap(colormaps["plasma"](np.linspace(0, 0.9, len(steps))))
    figure = Figure(figsize=(3.1 * len(names) + 4, 4.4), layout="constrained")
    shares = ", ".join(f"{NAMES[name]} {share:.0%}" for name, share in last.tsne_so_far.sort_values(ascending=False).items())
    figure.suptitle(f"{env}: how much of the plane of visited states does each algorithm cover? {shares}")
    *panels, curves = figure.subplots(1, len(names) + 1, width_ratios=[*[1] * len(names), 1.1])
    for panel, name in zip(panels, names, strict=True):
        own = table[table.algorithm == name]
        points = np.concatenate([groups[index] for index in own.index])
        color = np.repeat([steps.index(step) for step in own.step], own.drawn)
        order = np.random.default_rng(SEED).permutation(len(points))  # so that no snapshot is on top
        panel.scatter(*np.concatenate(groups).T, s=3, color="0.88", linewidths=0)
        panel.scatter(*points[order].T, s=3, c=color[order], cmap=colors, vmin=-0.5, vmax=len(steps) - 0.5, linewidths=0)
        panel.set_title(f"{NAMES[name]}: {last.tsne_so_far[name]:.0%}\nlast return {last.mean_return[name]:,.0f}")
        panel.set(xticks=[], yticks=[])
        curves.plot(own.step, own.tsne, "o-", color=COLORS[name], label=NAMES[name])
    scale = ScalarMappable(BoundaryNorm(np.arange(len(steps) + 1) - 0.5, len(steps)), colors)
    text = "environment steps of the snapshot (grey: where others are)"
    bar = figure.colorbar(scale, ax=panels, location="bottom", aspect=80, pad=0.02, label=text)
    bar.set_ticks(range(len(steps)), labels=[f"{step:,}" for step in steps])
    curves.set(title="each snapshot's share", xlabel="environment steps", ylim=(0, None))
    curves.yaxis.set_major_formatter(PercentFormatter(1))
    curves.legend(frameon=False)
    return figure


def summary(table: pd.DataFrame, args: argparse.Namespace) -> str:
    """A line for each algorithm, and what was asked for."""
    lines = []
    for name, own in table.groupby("algorithm", sort=False):
        first, last = own.iloc[0], own.iloc[-1]
        areas = (first.tsne, last.tsne, last.tsne_so_far, first.pca, last.pca, last.pca_so_far)
        cells = [f"{one.mean_return:,.0f}" for one in (first, last)] + [f"{share:.1%}" for share in areas]
        lines.append((NAMES[name], *cells))
    head = ("algorithm", "return, first", "last", "t-SNE, first", "last", "all", "PCA, first", "last", "all")
    options = {name: value for name, value in vars(args).items() if name not in ("out", "quick") and value is not None}
    options["algorithms"] = " ".join(args.algorithms)
    command = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "stable_baselines3", "gymnasium", "scikit-learn"))
    number, states = table.drawn.min(), f"{table.drawn.sum():,} of {table.visited.sum():,} visited states"
    text = f"""\
Mean return of {EPISODES} episodes, and share of the cells of a {CELLS} x {CELLS} grid that {number:,} states occupy:
of the first snapshot, of the last, and of each of all. On the plane are {states}.
"""
    return f"{text}\n{markdown_table(head, lines)}\n`python examples/state_visits.py {command}`\n\n{versions}\n"


def main() -> None:
    quick = "two snapshots, after 200 and 400 steps, with K = 3: about half a minute"
    parser = arguments(__doc__ or "", "runs/state_visits", quick)
    parser.add_argument("--env", default="HalfCheetah-v5", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps of each training (%(default)s)")
    parser.add_argument("--every", type=int, default=100_000, help="steps from one snapshot to the next (%(default)s)")
    parser.add_argument("--learning-starts", type=int, default=10_000, help="random steps before, but for PPO (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings (%(default)s)")
    parser.add_argument("--states", type=int, default=10_000, help="on the plane, at most (%(default)s)")
    parser.add_argument("--num-train-timesteps", type=int, default=100, help="DIPO's K (%(default)s)")
    parser.add_argument("--action-gradient-steps", type=int, help="of DIPO (the paper's)")
    parser.add_argument("--action-lr", type=float, help="of DIPO (the paper's)")
    args = parser.parse_args()
    vars(args).update(QUICK if args.quick else {})
    snapshots = tuple(step for step in range(args.every, args.steps + 1, args.every) if step >= args.learning_starts)
    if not snapshots:
        parser.error("there is no snapshot: --every and --learning-starts must be at most --steps")
    log_to(args.out)
    given = {name: vars(args)[name] for name in ("action_gradient_steps", "action_lr") if vars(args)[name] is not None}
    dipo: dict[str, Any] = dict(policy_kwargs=dict(num_train_timesteps=args.num_train_timesteps), **given)
    machine = dict(device=args.device, accelerate=args.accelerate)
    trainings = []
    for name in args.algorithms:
        folder, settings = args.out / args.env / name / f"seed{args.seed}", dipo if name == "dipo" else {}
        trainings.append(Training(folder, name, args.env, args.seed, snapshots, args.learning_starts, settings, machine))
    train_all(trainings)
    table, groups = measure(trainings, args.states)
    write(args.out / f"{args.env}.csv", table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    save_figure(draw(table, groups, args.env), args.out / f"{args.env}.png")
    write(args.out / f"{args.env}.md", summary(table, args))
    print(summary(table, args))


if __name__ == "__main__":
    main()
