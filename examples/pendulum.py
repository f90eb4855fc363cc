"""Learn Pendulum-v1 with several seeds; write each curve, a table and a figure.

    python examples/pendulum.py
    python examples/pendulum.py --no-persist --folder examples/results/pendulum_no_persist

Full networks, K = 20, the rest as in the paper but for 1,000 random steps at the start. Each evaluation plays the same 20
episodes. Curves are kept as they come, and a finished seed is not run again. Needs the extra `plots`.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch as th
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dipo import DIPO

EPISODES = 20
EVERY = 1_000  # environment steps between evaluations
EVALUATION_SEED = 1_000  # the same starts in every evaluation, of every seed
COLUMNS = ("steps", "mean_return", "worst_return", "train_minutes")


class Evaluate(BaseCallback):
    """Play the same episodes each time it is called, and append their returns to a file."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.env = make_vec_env("Pendulum-v1")
        self.started = time.monotonic()
        path.write_text(",".join(COLUMNS) + "\n")

    def _on_step(self) -> bool:
        minutes = (time.monotonic() - self.started) / 60
        self.env.seed(EVALUATION_SEED)
        returns, _ = evaluate_policy(self.model, self.env, EPISODES, deterministic=True, return_episode_rewards=True)
        with self.path.open("a") as file:
            csv.writer(file).writerow(
                [self.num_timesteps, f"{np.mean(returns):.1f}", f"{np.min(returns):.1f}", f"{minutes:.1f}"]
            )
        return True


def read_curve(path: Path) -> np.ndarray:
    """The curve's columns by name, one row per evaluation."""
    return np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))


def draw(curves: dict[str, np.ndarray], path: Path, title: str) -> None:
    """Each seed's mean return over environment steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve["steps"], curve["mean_return"], marker="o", markersize=3, label=name)
    axes.axhline(-250, color="grey", linestyle=":", label="solved, for our purposes (-250)")
    axes.set(title=title, xlabel="environment steps", ylabel=f"mean return of {EPISODES} episodes")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--timesteps", type=int, default=8_000, help="environment steps of each seed (%(default)s)")
    parser.add_argument("--no-persist", action="store_true", help="forget improved actions, as the released code does")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (its default)")
    parser.add_argument("--folder", type=Path, default=Path("examples/results/pendulum"), help="(%(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.threads:
        th.set_num_threads(args.threads)

    curves = {}
    for seed in args.seeds:
        path = args.folder / f"seed_{seed}.csv"
        if not path.exists() or read_curve(path)["steps"].max(initial=0) <= args.timesteps - EVERY:
            model = DIPO(
                "MlpPolicy",
                "Pendulum-v1",
                learning_starts=1_000,
                persist_improved_actions=not args.no_persist,
                policy_kwargs={"num_train_timesteps": 20},
                seed=seed,
            )
            model.learn(args.timesteps, EveryNTimesteps(EVERY, Evaluate(path)), log_interval=1_000, progress_bar=True)
        curves[f"seed {seed}"] = read_curve(path)

    persistence = "forgotten" if args.no_persist else "written back"
    draw(curves, args.folder / "curves.png", f"DIPO on Pendulum-v1, K = 20, improved actions {persistence}")
    rows = [
        f"| {name} | {c['mean_return'][-1]} | {c['worst_return'][-1]} | {c['train_minutes'][-1]} |"
        for name, c in curves.items()
    ]
    head = [f"| after {args.timesteps} steps | mean return | worst of {EPISODES} | minutes |", "|---|---|---|---|"]
    (args.folder / "table.md").write_text("\n".join([*head, *rows]) + "\n")
    print((args.folder / "table.md").read_text())


if __name__ == "__main__":
    main()
