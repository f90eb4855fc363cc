"""The training of the RL Zoo, with its options, which goes on where it was cut off: what `grid.py` starts for each run.

    python examples/paper/grid_train.py --algo dipo --env Hopper-v5 --seed 0 -n 50000 --eval-freq 2500 -f runs/hopper

The zoo's own `-i` counts from zero again and starts a new folder. Here, everything is in <log folder>/<algo>/<env>_1. After
each evaluation (or every `--save-freq` steps) an exact checkpoint is written there, and the same command continues from the
last one, on the CPU to the same curve as if nothing had happened. A `spec.json` in the log folder may list `snapshots`:
numbers of environment steps after which the agent is kept, as snapshots/<steps>.zip.
"""

import importlib
import json
import os
import platform
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from experiments import log_to, write
from gymnasium.envs.mujoco import MujocoEnv
from rl_zoo3 import exp_manager
from rl_zoo3 import train as zoo
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_dipo import ExactCheckpointCallback, load_checkpoint
from sb3_dipo.envs import MujocoState
from sb3_dipo.zoo import MODULES, register

EVALUATION_SEED = 1_000  # every evaluation of every run starts its episodes from the same states
for name in MODULES:
    register(importlib.import_module(name))  # where the start-up file is switched off


class Stopwatch:
    """Counts the seconds of training. What happens in ``paused()``, evaluations and checkpoints, does not count."""

    def __init__(self) -> None:
        self.set(0.0)

    def set(self, seconds: float) -> None:
        self.started = time.perf_counter() - seconds

    def read(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        seconds = self.read()
        yield
        self.set(seconds)


WATCH = Stopwatch()  # of the one agent that this process trains


class Evaluation(EvalCallback):
    """The zoo's evaluation, with the same episodes each time, which is kept in ``evaluations.json``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.file = Path(self.log_path or "").with_name("evaluations.json")
        self.rows: list[dict[str, Any]] = []

    def _on_training_start(self) -> None:
        """Go on counting from a checkpoint, and forget the evaluations that came after it."""
        super()._on_training_start()
        rows = json.loads(self.file.read_text()) if self.num_timesteps and self.file.exists() else []
        self.rows = [row for row in rows if row["steps"] <= self.num_timesteps]
        self.n_calls = self.num_timesteps // self.model.n_envs
        self.evaluations_timesteps = [row["steps"] for row in self.rows]
        self.evaluations_results = [row["returns"] for row in self.rows]
        self.evaluations_length = [row["lengths"] for row in self.rows]
        self.best_mean_reward = max((sum(row["returns"]) / len(row["returns"]) for row in self.rows), default=-float("inf"))
        WATCH.set(self.rows[-1]["seconds"] if self.rows else 0.0)

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq:
            return True
        seconds = round(WATCH.read(), 2)
        with WATCH.paused():
            self.eval_env.seed(EVALUATION_SEED)
            go_on = super()._on_step()
            results: dict[str, Any] = dict(returns=self.evaluations_results[-1], lengths=self.evaluations_length[-1])
            results = {key: [float(value) for value in values] for key, values in results.items()}
            self.rows.append(dict(steps=self.num_timesteps, seconds=seconds, **results))
            write(self.file, json.dumps(self.rows))
        return go_on


class Progress(BaseCallback):
    """Tells in ``progress.json`` how far the training is, and keeps the agent at some steps, between two rollouts."""

    def __init__(self, folder: Path, snapshots: Sequence[int]):
        super().__init__()
        self.folder, self.shown = folder, 0.0
        self.missing = [step for step in sorted(snapshots) if not self.path(step).exists()]

    def path(self, step: int) -> Path:
        return self.folder / "snapshots" / f"{step}.zip"

    def _on_training_start(self) -> None:
        self.show()

    def _on_rollout_start(self) -> None:
        while self.missing and self.missing[0] <= self.num_timesteps:
            path = self.path(self.missing.pop(0))
            path.parent.mkdir(exist_ok=True)
            self.model.save(path.with_name("unfinished.zip"))
            path.with_name("unfinished.zip").replace(path)

    def _on_step(self) -> bool:
        if time.perf_counter() - self.shown > 1:
            self.show()
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def show(self) -> None:
        self.shown = time.perf_counter()
        progress = dict(steps=self.num_timesteps, process=os.getpid(), machine=platform.node())
        write(self.folder / "progress.json", json.dumps(progress))


class Checkpoint(ExactCheckpointCallback):
    """The package's, which does not count as training."""

    def _on_rollout_start(self) -> None:
        with WATCH.paused():
            super()._on_rollout_start()


class Resumable(exp_manager.ExperimentManager):
    """The zoo's experiment, in one folder, which goes on from the last checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.save_path = f"{self.log_path}{self.env_name}_1"
        self.params_path = f"{self.save_path}/{self.env_name}"
        self.folder = Path(self.save_path)
        self.exact = self.folder / "exact"
        self.begun = any(self.exact.glob("*/manifest.json"))

    def create_callbacks(self) -> None:
        every = next((freq for freq in (self.save_freq, self.eval_freq) if freq > 0), 10_000)
        self.save_freq = -1
        super().create_callbacks()
        spec = Path(self.log_folder, "spec.json")
        snapshots = json.loads(spec.read_text())["run"].get("snapshots", []) if spec.exists() else []
        self.callbacks += [Progress(self.folder, snapshots), Checkpoint(every, self.exact)]

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """Environments whose state a checkpoint can hold; what Monitor wrote before the cut stays."""
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
        result = dict(
            steps=model.num_timesteps,
            updates_per_step=round(gradient_steps(model) / model.num_timesteps, 4),
            device=device_name(model.device),
            machine=platform.node(),
        )
        write(self.folder / "finished.json", json.dumps(result, indent=1))
        shutil.rmtree(self.exact, ignore_errors=True)


def resumable(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """The task, with a state that checkpoints can hold."""
    return MujocoState(env) if isinstance(env.unwrapped, MujocoEnv) else env


def gradient_steps(model: Any) -> int:
    """PPO counts passes over its rollouts, the others minibatches."""
    passes = isinstance(model, PPO)
    return int(model._n_updates * (-(-model.n_steps * model.n_envs // model.batch_size) if passes else 1))


def device_name(device: th.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return th.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "CPU")


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
