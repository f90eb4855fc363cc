"""Train DIPO, SAC and TD3 on Pendulum-v1 with the same seeds, print their returns and draw their curves.

    python examples/compare.py --folder runs/compare

DIPO has its recommended setting; SAC's, TD3's and the layout of the folder are the RL Zoo's. Needs the extra `plots`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_dipo import DIPO, RECOMMENDED

ENV = "Pendulum-v1"
NOISE = NormalActionNoise(np.zeros(1), np.full(1, 0.1))
WIDE = dict(net_arch=[400, 300])
SETTINGS: dict[Any, dict[str, Any]] = {
    DIPO: dict(learning_starts=1_000, **RECOMMENDED),
    SAC: dict(learning_rate=1e-3),
    TD3: dict(learning_rate=1e-3, gamma=0.98, learning_starts=10_000, action_noise=NOISE, policy_kwargs=WIDE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timesteps", type=int, default=20_000, help="environment steps of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (0 1 2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="for all that is written (%(default)s)")
    args = parser.parse_args()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for algorithm, settings in SETTINGS.items():
        name, returns = algorithm.__name__, []
        for seed in args.seeds:
            folder = args.folder / name.lower() / f"{ENV}_{seed + 1}"
            evaluate = EvalCallback(make_vec_env(ENV, seed=1_000), log_path=str(folder), eval_freq=1_000, n_eval_episodes=20)
            model = algorithm("MlpPolicy", make_vec_env(ENV, seed=seed), seed=seed, **settings)
            model.learn(args.timesteps, callback=evaluate)
            model.save(folder / ENV)
            evaluations = np.load(folder / "evaluations.npz")
            returns.append(evaluations["results"].mean(axis=1))
        curves, steps = np.stack(returns), evaluations["timesteps"]
        print(f"{name}: {', '.join(f'{last:.1f}' for last in curves[:, -1])} after {steps[-1]:,} steps")
        axes.plot(steps, curves.mean(axis=0), label=name)
        axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), alpha=0.25)

    axes.set(title=f"{ENV}: mean and range of {len(args.seeds)} seeds", xlabel="environment steps", ylabel="mean return")
    axes.legend()
    figure.savefig(args.folder / "curves.png", dpi=150)


if __name__ == "__main__":
    main()
