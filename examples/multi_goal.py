"""Train DIPO, SAC, TD3 and PPO where four goals are equally good, and see how evenly each goes to them (Figures 5, 11-14).

    python examples/multi_goal.py --quick
    python examples/multi_goal.py --out runs/multi_goal

An iteration is one update at one environment step, after 1,000 random steps (PPO: as many environment steps). Writes, of 400
rollouts every 1,000 iterations, evenness.csv; at the end, multi_goal.md (a table), evenness.png, policies.png (Figure 5: each
agent at the end, first seed), and <agent>.png (Figures 11-14: the first seed every 1,000 iterations).

A seed takes DIPO about 10 minutes on one thread with --accelerate compile, SAC and TD3 two, PPO less than one, and to measure
each takes one more. Cut off and started again, it goes on, to the same files. Several processes may share a folder if each has
its own --seeds or --algorithms; once more without them draws all.
"""

import argparse
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from experiments import Training, arguments, log_to, markdown_table, train_all, write
from multi_goal_figures import draw_evenness, draw_policies, label
from scipy.stats import entropy  # type: ignore[import-untyped]
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed

from sb3_dipo import improve_actions
from sb3_dipo.envs.multi_goal import GOALS

ENV = "sb3_dipo/MultiGoal-v0"
ROLLOUTS = 400
GOAL_NAMES = ("up", "down", "right", "left")
STARTS = (
    "Start: `origin`, the policy from exactly there; `spread`, from N(0, 0.1^2 I), as in training; `climb`, no policy, but "
    "uniform actions at the origin that are moved uphill on the agent's own Q, and the goals that they point to then."
)
DIPO: dict[str, Any] = dict(policy_kwargs=dict(num_train_timesteps=20))
# By name: algorithm, settings beside the paper's, random steps. After the paper's four: what may make DIPO spread, or not.
AGENTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "dipo": ("dipo", DIPO, 1_000),
    "sac": ("sac", {}, 1_000),
    "td3": ("td3", {}, 1_000),
    "ppo": ("ppo", {}, 1_000),
    "dipo-no-write-back": ("dipo", {**DIPO, "persist_improved_actions": False}, 1_000),
    "dipo-long-steps": ("dipo", {**DIPO, "action_gradient_steps": 5, "action_lr": 0.12}, 1_000),
    "dipo-noise-0.5": ("dipo", {**DIPO, "exploration_noise": 0.5}, 1_000),
    "dipo-noise-1": ("dipo", {**DIPO, "exploration_noise": 1.0}, 1_000),
    "dipo-10,000-random": ("dipo", DIPO, 10_000),
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
    Move 400 uniform actions at the origin uphill on min_i Q_i, until they are at the top.

    :return: index of the goal that each then points to, or -1 if it points between two (30 to 60 degrees), shape (400,)
    """
    critic: Any = model.policy.critic
    origin = th.zeros(ROLLOUTS, 2, device=model.device)
    start = th.rand(ROLLOUTS, 2).to(model.device) * 2 - 1
    ends = improve_actions(lambda a: th.cat(critic(origin, a), 1).min(1, keepdim=True).values, start, 0.03, 200).cpu().numpy()
    ways = ends / np.linalg.norm(ends, axis=1, keepdims=True) @ (GOALS.T / 5)
    return np.where(ways.max(axis=1) > np.cos(np.pi / 6), ways.argmax(axis=1), -1)


def evenness(goals: np.ndarray) -> tuple[np.ndarray, float]:
    """
    :param goals: index of the goal that each rollout reached or -1
    :return: share of the rollouts at each goal, shape (4,), and the entropy of those that reached one, over its largest: 1 if
        the goals are reached equally often, 0 if all rollouts go to one, or none to any
    """
    counts = np.bincount(goals[goals >= 0], minlength=len(GOALS))
    return counts / len(goals), float(entropy(counts, base=len(GOALS))) if counts.any() else 0.0


def measure(training: Training) -> pd.DataFrame:
    """How evenly each of the agents that were kept goes to the goals, and its critics lead there: rows, kept beside them."""
    file = training.folder / "evenness.csv"
    if not file.exists():
        rows: list[dict[str, Any]] = []
        for step in training.snapshots:
            model = training.agent(step)
            for start in ("origin", "spread", "climb")[: 2 if training.algorithm == "ppo" else 3]:
                set_random_seed(0)
                goals, returns = rollouts(model, start) if start != "climb" else (climbs(model), np.full(ROLLOUTS, np.nan))
                shares, even = evenness(goals)
                of = dict(agent=name_of(training), seed=training.seed, iteration=step - training.learning_starts, start=start)
                found = dict(none=1 - shares.sum(), evenness=even, rarest=shares.min(), mean_return=returns.mean())
                rows.append(of | dict(zip(GOAL_NAMES, shares, strict=True)) | found)
        write(file, to_csv(pd.DataFrame(rows)))
    return pd.read_csv(file)


def to_csv(rows: pd.DataFrame) -> str:
    return str(rows.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def name_of(training: Training) -> str:
    return training.folder.parent.name


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


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "", "runs/multi_goal", "300 iterations, one seed, K = 3: under a minute", AGENTS)
    parser.add_argument("--iterations", type=int, default=10_000, help="a multiple of ten (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(0 1 2 3 4)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    iterations, seeds, every = args.iterations, args.seeds, args.iterations // 10
    if args.quick:
        iterations, seeds, every = 300, [0], 100
        DIPO["policy_kwargs"]["num_train_timesteps"] = 3
    log_to(args.out)
    machine, trainings = dict(device=args.device, accelerate=args.accelerate), []
    for seed in seeds:
        for name in args.algorithms:
            algorithm, settings, starts = AGENTS[name]
            starts = min(starts, 100) if args.quick else starts
            snapshots = tuple(starts + done for done in range(every, iterations + 1, every))
            folder = args.out / name / f"seed{seed}"
            trainings.append(Training(folder, algorithm, ENV, seed, snapshots, starts, settings, machine))
    train_all(trainings)

    trainings.sort(key=lambda training: args.algorithms.index(name_of(training)))
    rows = pd.concat([measure(training) for training in trainings])
    write(args.out / "evenness.csv", to_csv(rows))
    text = table(rows[rows["iteration"] == iterations])
    write(
        args.out / "multi_goal.md",
        f"After {iterations:,} iterations, {ROLLOUTS} rollouts each; mean and range:\n\n{text}\n{STARTS}\n",
    )
    draw_evenness(rows[rows["start"] == "origin"], args.out / "evenness.png")
    first = {name_of(training): training for training in trainings if training.seed == seeds[0]}
    final = {label(name): training.agent(training.steps) for name, training in first.items()}
    draw_policies(final, args.out / "policies.png", f"Actions and values after {iterations:,} iterations, seed {seeds[0]}")
    for name, training in first.items():
        agents = {f"{step - training.learning_starts:,} iterations": training.agent(step) for step in training.snapshots}
        draw_policies(agents, args.out / f"{name}.png", f"{label(name)}, seed {seeds[0]}")
    print(text)


if __name__ == "__main__":
    main()
