"""Train DIPO, SAC, TD3 and PPO where four goals are equally good, and see how evenly each goes to them (Figures 5, 11-14).

    python examples/paper/multi_goal.py --quick
    python examples/paper/multi_goal.py --out runs/multi_goal

An iteration is one update at one environment step, after 1,000 random steps (PPO: as many environment steps). The script plays
400 rollouts every 1,000 iterations and writes evenness.csv, and at the end multi_goal.md (a table), evenness.png, policies.png
(Figure 5: each agent at the end, first seed), and <agent>.png (Figures 11-14: the first seed every 1,000 iterations).

A seed takes DIPO about 10 minutes on one thread with --accelerate compile, SAC and TD3 two minutes, PPO less than one, and the
rollouts of each take one more. Cut off and started again, the script goes on, to the same files. Several processes may share a
folder if each has its own --seeds or --algorithms; started once more without them, the script draws all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from experiments import markdown_table, palette, save_figure, write
from grid import K20, VARIANTS, Run, Variant, arguments, check, choose, failures, make_run, parse, positive, train_or_exit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed

from sb3_dipo import RECOMMENDED, improve_actions, plots
from sb3_dipo.envs.multi_goal import GOALS, LIMIT

ENV = "sb3_dipo/MultiGoal-v0"
ROLLOUTS = 400
GOAL_NAMES = ("up", "down", "right", "left")
STARTS = (
    "Start: `origin`, the policy from exactly there; `spread`, from N(0, 0.1^2 I), as in training; `climb`, no policy, but "
    "uniform actions at the origin that are moved uphill on the agent's own Q, and the goals that they point to then."
)
ENDS = dict(up="#4477aa", down="#66ccee", right="#228833", left="#ccbb44", none="#dddddd")
QUANTILE = dict(critic="quantile", layer_norm=True)
BEST_OF_4 = dict(behaviour=dict(num_candidates=4))
# What may make DIPO spread, or not. The entry of this task in dipo.yml is the paper's setting with K = 20.
AGENTS = {name: VARIANTS[name] for name in ("dipo", "sac", "td3", "ppo")} | {
    "dipo-no-write-back": Variant("dipo", dict(persist_improved_actions=False), "DIPO, no write-back"),
    "dipo-long-steps": Variant("dipo", dict(action_lr=0.12, action_gradient_steps=5), "DIPO, long steps"),
    "dipo-noise-0.5": Variant("dipo", dict(noise_type="normal", noise_std=0.5), "DIPO, noise 0.5"),
    "dipo-noise-1": Variant("dipo", dict(noise_type="normal", noise_std=1.0), "DIPO, noise 1"),
    "dipo-10,000-random": Variant("dipo", dict(learning_starts=10_000), "DIPO, 10,000 random"),
    "dipo-flow": Variant("dipo", dict(policy_kwargs=dict(actor="flow")), "DIPO, flow"),
    "dipo-flow-quantile": Variant("dipo", dict(policy_kwargs=dict(actor="flow", **QUANTILE)), "DIPO, flow and quantiles"),
    "dipo-recommended": Variant("dipo", RECOMMENDED, "DIPO, RECOMMENDED"),
    "dipo-candidates": Variant("dipo", dict(policy_kwargs=dict(**K20, samplers=BEST_OF_4)), "DIPO, best of 4"),
}


def rollouts(model: BaseAlgorithm, start: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Play one episode in each of 400 environments, with actions that the policy samples.

    :param start: "origin", or "spread" for the environment's own starts
    :return: index of the goal that each reached or -1, and the returns, both of shape (400,), as the episodes ended
    """
    goals = []

    def note(now: dict[str, Any], _: dict[str, Any]) -> None:
        if now["done"]:
            goals.append(now["info"]["goal"])

    env = make_vec_env(ENV, ROLLOUTS, seed=0)
    env.set_options({"position": (0.0, 0.0)} if start == "origin" else {})
    returns, _ = evaluate_policy(model, env, ROLLOUTS, deterministic=False, callback=note, return_episode_rewards=True)
    return np.array(goals), np.array(returns)


def climbs(model: BaseAlgorithm) -> np.ndarray:
    """
    Move 400 uniform actions at the origin uphill on what DIPO's action gradient climbs, or else min_i Q_i, to the top.

    :return: index of the goal that each then points to, or -1 if it points between two (30 to 60 degrees), shape (400,)
    """
    critic: Any = model.policy.critic
    origin = th.zeros(ROLLOUTS, 2, device=model.device)
    start = th.rand(ROLLOUTS, 2).to(model.device) * 2 - 1

    def smallest(actions: th.Tensor) -> th.Tensor:
        return th.cat(critic(origin, actions), dim=1).min(dim=1, keepdim=True).values

    objective = critic.objective(origin) if hasattr(critic, "objective") else smallest
    ends = improve_actions(objective, start, 0.03, 200).cpu().numpy()
    ways = ends / np.linalg.norm(ends, axis=1, keepdims=True) @ (GOALS.T / 5)
    return np.where(ways.max(axis=1) > np.cos(np.pi / 6), ways.argmax(axis=1), -1)


def evenness(goals: np.ndarray) -> tuple[np.ndarray, float]:
    """
    :param goals: index of the goal that each rollout reached or -1
    :return: share of the rollouts at each goal, shape (4,), and the entropy of those that reached one, over its largest: 1 if
        the goals are reached equally often, 0 if all rollouts go to one, or none to any
    """
    counts = np.bincount(goals[goals >= 0], minlength=len(GOALS))
    return counts / len(goals), plots.evenness(counts)


def measure(run: Run, random_steps: int) -> pd.DataFrame:
    """How evenly each of the agents that were kept goes to the goals, and its critics lead there: rows, kept beside them."""
    file = run.results / "evenness.csv"
    if not file.exists():
        rows: list[dict[str, Any]] = []
        for step in run.snapshots:
            model = run.agent(step)
            for start in ("origin", "spread", "climb")[: 2 if run.algo == "ppo" else 3]:
                set_random_seed(0)
                goals, returns = rollouts(model, start) if start != "climb" else (climbs(model), np.full(ROLLOUTS, np.nan))
                shares, even = evenness(goals)
                of = dict(agent=run.name, seed=run.seed, iteration=step - random_steps, start=start)
                found = dict(none=1 - shares.sum(), evenness=even, rarest=shares.min(), mean_return=returns.mean())
                rows.append(of | dict(zip(GOAL_NAMES, shares, strict=True)) | found)
        write(file, to_csv(pd.DataFrame(rows)))
    return pd.read_csv(file)


def to_csv(rows: pd.DataFrame) -> str:
    return str(rows.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def table(rows: pd.DataFrame) -> str:
    """Means over seeds, and their range."""
    columns = dict(evenness=2, rarest=3, none=3, mean_return=1)
    lines = []
    for start in ("origin", "spread", "climb"):
        for agent, own in rows[rows["start"] == start].groupby("agent", sort=False):
            own = own.dropna(axis=1)  # what climbs has no return
            spread = {c: (own[c].mean(), own[c].min(), own[c].max(), d) for c, d in columns.items() if c in own}
            cells = ["{0:.{3}f} ({1:.{3}f} to {2:.{3}f})".format(*spread[c]) if c in spread else "" for c in columns]
            lines.append((label(agent), start, len(own), *cells))
    head = ("agent", "start", "seeds", "evenness", "share of the rarest goal", "share at none", "mean return")
    return markdown_table(head, lines)


# ------------------------------------------------------------------------------------------------- figures


def label(agent: str) -> str:
    """Of an agent, as tables and figures have it."""
    return AGENTS[agent].label if agent in AGENTS else agent


def actions(model: BaseAlgorithm, states: np.ndarray, deterministic: bool) -> np.ndarray:
    """Of shape (n, 2), at states of shape (n, 2)."""
    set_random_seed(0)
    return model.predict(states.astype(np.float32), deterministic=deterministic)[0]


def values(model: BaseAlgorithm, states: np.ndarray) -> np.ndarray:
    """min_i Q_i(s, a), a the policy's deterministic action, or V(s); states of shape (n, 2), values of shape (n,)."""
    if isinstance(model, PPO):
        with th.no_grad():
            observations = th.as_tensor(states, dtype=th.float32, device=model.device)
            return model.policy.predict_values(observations).cpu().numpy()[:, 0]
    return plots.q_values(model, states.astype(np.float32), actions(model, states, True))


def square(limit: float, points: int) -> np.ndarray:
    """States on a square, shape (points * points, 2)."""
    line = np.linspace(-limit, limit, points)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def draw_arrows(axes: Axes, model: BaseAlgorithm, samples: int = 10) -> None:
    """Actions that the policy samples at the 49 states {-3, ..., 3}^2."""
    states = np.repeat(square(3, 7), samples, axis=0)
    sampled = actions(model, states, False)
    axes.quiver(*states.T, *sampled.T, color="tab:red", alpha=0.4, angles="xy", scale_units="xy", scale=1.25, width=0.005)
    axes.plot(*GOALS.T, "*", color="tab:blue", markersize=10, clip_on=False)
    axes.set(xlim=(-5.4, 5.4), ylim=(-5.4, 5.4), xticks=(-3, 0, 3), yticks=(-3, 0, 3), aspect="equal")


def draw_surface(axes: Any, model: BaseAlgorithm, points: int = 100) -> None:
    states = square(LIMIT, points)
    surface = [each.reshape(points, points) for each in (*states.T, values(model, states))]
    axes.plot_surface(*surface, rcount=50, ccount=50, cmap="viridis", linewidth=0)
    axes.view_init(40, -60)
    axes.set(xticks=(-5, 0, 5), yticks=(-5, 0, 5))
    axes.tick_params(labelsize="x-small", pad=-2)
    axes.set_title("V(s)" if isinstance(model, PPO) else "Q(s, a)", fontsize="small", y=0.95)


def draw_policies(agents: dict[str, BaseAlgorithm], path: Path, title: str) -> None:
    """For each agent, by its title, the arrows and beneath them the surface."""
    columns = min(5, len(agents))
    rows = -(-len(agents) // columns)
    figure = Figure(figsize=(max(2.7 * columns, 6), 5.4 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    for index, (name, model) in enumerate(agents.items()):
        place = 2 * columns * (index // columns) + index % columns + 1
        draw_arrows(figure.add_subplot(2 * rows, columns, place, title=name), model)
        draw_surface(figure.add_subplot(2 * rows, columns, place + columns, projection="3d"), model)
    save_figure(figure, path, dpi=80)


def draw_evenness(rows: pd.DataFrame, path: Path) -> None:
    """Where rollouts ended, a bar for each seed, and the evenness over the iterations."""
    names = list(dict.fromkeys(rows["agent"]))
    final = rows[rows["iteration"] == rows["iteration"].max()].reset_index(drop=True)
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1.3, 1))
    places = final.index + final["agent"].map(names.index)  # a gap between agents
    bottom = np.zeros(len(final))
    for end, color in ENDS.items():
        bars.bar(places, final[end], bottom=bottom, width=0.9, color=color, label=end)
        bottom += final[end]
    bars.set_xticks(places.groupby(final["agent"], sort=False).mean(), [label(name).replace(", ", ",\n") for name in names])
    bars.set(ylabel="share of the rollouts, a bar for each seed", ylim=(0, 1))
    bars.set_title(f"Which goal a policy reaches from the origin,\nafter {final['iteration'].max():,} iterations")
    bars.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, handlelength=1)
    for name, color in palette(names).items():
        mean = rows[rows["agent"] == name].groupby("iteration")["evenness"].mean()
        curves.plot(mean.index, mean, color=color, label=label(name), linewidth=2)
    curves.set(xlabel="iterations", ylabel="entropy / log 4, mean over seeds", ylim=(-0.03, 1.03))
    curves.set_title("Evenness: 1 for all four alike,\n0 for one only")
    curves.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------- the command


def main() -> None:
    quick = "tiny networks, 300 iterations, one seed: under a minute"
    parser = arguments(__doc__ or "", "runs/multi_goal", quick, seeds=range(5))
    parser.set_defaults(learning_starts=1_000)
    names = f"of {', '.join(AGENTS)} (%(default)s)"
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", default=["dipo", "sac", "td3", "ppo"], help=names)
    parser.add_argument("--iterations", type=positive, default=10_000, help="after the random steps (%(default)s)")
    parser.add_argument("--every", type=positive, help="iterations from one measurement to the next (a tenth of all)")
    args = parse(parser, dict(seeds=[0], learning_starts=100, iterations=300, every=100))
    iterations, every = args.iterations, args.every or max(1, args.iterations // 10)
    if iterations < every or iterations % every:
        parser.error(f"--iterations must be a multiple of --every, {every}, not {iterations}")
    check(parser, args, [ENV])
    agents, runs = choose(parser, args, args.algorithms, AGENTS), {}
    for seed in args.seeds:
        for name, variant in agents.items():
            starts = variant.settings.get("learning_starts", args.learning_starts)
            snapshots = tuple(starts + done for done in range(every, iterations + 1, every))
            runs[make_run(args, ENV, name, variant, seed, steps=snapshots[-1], snapshots=snapshots)] = starts
    failures(train_or_exit(list(runs), args))

    in_order = sorted(runs, key=lambda run: args.algorithms.index(run.name))
    rows = pd.concat([measure(run, runs[run]) for run in in_order])
    write(args.out / "evenness.csv", to_csv(rows))
    text = table(rows[rows["iteration"] == iterations])
    write(
        args.out / "multi_goal.md",
        f"After {iterations:,} iterations, {ROLLOUTS} rollouts each; mean and range:\n\n{text}\n{STARTS}\n",
    )
    draw_evenness(rows[rows["start"] == "origin"], args.out / "evenness.png")
    first = [run for run in in_order if run.seed == args.seeds[0]]
    final = {label(run.name): run.agent(run.steps) for run in first}
    title = f"Actions and values after {iterations:,} iterations, seed {args.seeds[0]}"
    draw_policies(final, args.out / "policies.png", title)
    for run in first:
        kept = {f"{step - runs[run]:,} iterations": run.agent(step) for step in run.snapshots}
        draw_policies(kept, args.out / f"{run.name}.png", f"{label(run.name)}, seed {run.seed}")
    print(text)


if __name__ == "__main__":
    main()
