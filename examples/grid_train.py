"""The training of the RL Zoo, with its options, which goes on where it was cut off: what `grid.py` starts for each run.

    python examples/grid_train.py --algo dipo --env Hopper-v5 --seed 0 -n 50000 --eval-freq 2500 -f runs/hopper

The zoo's `-i` counts from zero again and starts a new folder. Here the folder is <log folder>/<algo>/<env>_1; after each
evaluation a checkpoint is written into it, and the same command again continues from that, to the same curve.
"""

import importlib
import json
import os
import platform
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any

import torch as th
from experiments import log_to, resumable, write
from rl_zoo3 import exp_manager
from rl_zoo3 import train as zoo
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_dipo import load_checkpoint, save_checkpoint
from sb3_dipo.zoo import MODULES, register

EVALUATION_SEED = 1_000  # the same starts in every evaluation, of every run
for name in MODULES:
    register(importlib.import_module(name))  # where the start-up file is switched off


class Evaluation(EvalCallback):
    """The zoo's, which plays the same episodes each time, keeps the time, and writes a checkpoint after it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder = Path(self.log_path or "").parent
        self.rows: list[dict[str, Any]] = []
        self.unsaved = False
        self.shown = 0.0

    def _on_training_start(self) -> None:
        """Go on counting from a checkpoint, and forget the evaluations after it."""
        super()._on_training_start()
        file = self.folder / "evaluations.json"
        rows = json.loads(file.read_text()) if self.num_timesteps else []
        self.rows = [row for row in rows if row["steps"] <= self.num_timesteps]
        self.n_calls = self.num_timesteps // self.model.n_envs
        self.evaluations_timesteps = [row["steps"] for row in self.rows]
        self.evaluations_results = [row["returns"] for row in self.rows]
        self.evaluations_length = [row["lengths"] for row in self.rows]
        self.best_mean_reward = max((sum(row["returns"]) / len(row["returns"]) for row in self.rows), default=-float("inf"))
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.show()

    def _on_step(self) -> bool:
        if time.perf_counter() - self.shown > 1:
            self.show()
        if self.n_calls % self.eval_freq:
            return True
        paused = time.perf_counter()
        self.eval_env.seed(EVALUATION_SEED)
        go_on = super()._on_step()
        results: dict[str, Any] = dict(returns=self.evaluations_results[-1], lengths=self.evaluations_length[-1])
        results = {key: [float(value) for value in values] for key, values in results.items()}
        self.rows.append(dict(steps=self.num_timesteps, seconds=round(paused - self.started, 2), **results))
        write(self.folder / "evaluations.json", json.dumps(self.rows))
        self.unsaved = True
        self.started += time.perf_counter() - paused
        return go_on

    def _on_rollout_start(self) -> None:
        """Between rollouts an agent is whole."""
        if self.unsaved:
            paused = time.perf_counter()
            save_checkpoint(self.model, self.folder / "exact")
            self.unsaved = False
            self.started += time.perf_counter() - paused

    def show(self) -> None:
        self.shown = time.perf_counter()
        progress = dict(steps=self.num_timesteps, process=os.getpid(), machine=platform.node())
        write(self.folder / "progress.json", json.dumps(progress))


class Resumable(exp_manager.ExperimentManager):
    """The zoo's, in one folder, from the last checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.save_path = f"{self.log_path}{self.env_name}_1"
        self.params_path = f"{self.save_path}/{self.env_name}"
        self.exact = Path(self.save_path, "exact")
        self.begun = any(self.exact.glob("*/manifest.json"))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """With a state that checkpoints can hold; what Monitor wrote before the cut stays."""
        wrapper = self.env_wrapper
        if not eval_env:
            self.env_wrapper = lambda env: resumable(wrapper(env) if wrapper else env)
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": not self.begun}
        try:
            return super().create_envs(n_envs, eval_env, no_log)
        finally:
            self.env_wrapper = wrapper

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]]:
        experiment = super().setup_experiment()
        assert experiment, "This script does not tune: see rl_zoo3.train."
        model, hyperparams = experiment
        if self.begun:
            assert model.env
            model = load_checkpoint(self.exact, model.env, ALGOS[self.algo], self.device)
            print(f"Going on after {model.num_timesteps} steps")
        return model, hyperparams

    def learn(self, model: BaseAlgorithm) -> None:
        """Unlike the zoo's, an interrupted training does not pass for a finished one."""
        left = max(0, self.n_timesteps - model.num_timesteps)
        model.learn(left, self.callbacks, log_interval=max(1, self.log_interval), reset_num_timesteps=False)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        super().save_trained_model(model)
        cuda = model.device.type == "cuda"
        result = dict(
            steps=model.num_timesteps,
            updates_per_step=round(gradient_steps(model) / model.num_timesteps, 4),
            device=th.cuda.get_device_name(model.device) if cuda else "CPU",
            machine=platform.node(),
        )
        write(Path(self.save_path, "finished.json"), json.dumps(result, indent=1))
        shutil.rmtree(self.exact, ignore_errors=True)


def gradient_steps(model: Any) -> int:
    """PPO counts passes over its rollouts, the others minibatches."""
    passes = isinstance(model, PPO)
    return int(model._n_updates * (-(-model.n_steps * model.n_envs // model.batch_size) if passes else 1))


def end_with_parent() -> None:
    """Whoever started this holds the other end of its standard input: where that is gone, nobody waits for the result."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        os.read(0, 1)
        os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    log_to(Path.cwd())
    vars(exp_manager)["EvalCallback"], vars(zoo)["ExperimentManager"] = Evaluation, Resumable
    zoo.train()
