"""What the experiments share: the paper's agents, training that goes on where it was cut off, and figures of one style."""

import argparse
import importlib.resources
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch as th
import yaml
from gymnasium.envs.mujoco import MujocoEnv
from matplotlib.figure import Figure
from PIL import Image
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from tqdm import tqdm

from sb3_dipo import DIPO, ExactCheckpointCallback, load_checkpoint
from sb3_dipo.envs import MujocoState

CLASSES: dict[str, type[BaseAlgorithm]] = dict(dipo=DIPO, sac=SAC, td3=TD3, ppo=PPO)
NAMES = dict(dipo="DIPO", sac="SAC", td3="TD3", ppo="PPO")
COLORS = dict(dipo="tab:blue", sac="tab:orange", td3="tab:green", ppo="tab:red")
# Table 2; what is not named is DIPO's default, which is the paper's, too. Table 3 is in DIPO's YAML.
# `exploration_noise` is the standard deviation of an `action_noise`.
WIDE = dict(net_arch=[256, 256])
PAPER: dict[str, dict[str, Any]] = dict(
    dipo=dict(),
    sac=dict(learning_rate=3e-4, batch_size=256, ent_coef=0.2, policy_kwargs={**WIDE, "activation_fn": th.nn.ReLU}),
    td3=dict(
        learning_rate=3e-4,
        exploration_noise=0.1,
        batch_size=256,
        target_policy_noise=0.2,
        target_noise_clip=0.5,
        policy_kwargs={**WIDE, "activation_fn": th.nn.ReLU},
    ),
    # Table 2 has no rollout length and no epochs: the length is near that of the code it names, the epochs are SB3's.
    ppo=dict(
        learning_rate=7e-4,
        n_steps=256,
        batch_size=256,
        max_grad_norm=0.5,
        ent_coef=0.01,
        vf_coef=0.5,
        policy_kwargs={**WIDE, "activation_fn": th.nn.Tanh},
    ),
)
TABLE_3 = ("max_grad_norm", "action_grad_norm_ratio", "action_gradient_steps", "actor_target_update_interval")


@dataclass(frozen=True)
class Training:
    """
    One agent that is trained in a folder of its own, which keeps its policy after each of some numbers of steps.

    :param folder: of this run alone
    :param algorithm: a key of ``CLASSES``
    :param env_id: task, as Gymnasium has it
    :param seed: of the agent and the environment
    :param snapshots: environment steps after which the policy is kept, rising; the last one ends the training
    :param learning_starts: environment steps of random actions before (PPO: none)
    :param settings: of the agent, beside the paper's
    :param machine: how it is computed (``device``, ``accelerate``), which changes no result but for rounding
    """

    folder: Path
    algorithm: str
    env_id: str
    seed: int
    snapshots: tuple[int, ...]
    learning_starts: int
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.snapshots[-1]

    @property
    def reached(self) -> int:
        """The last snapshot that is there."""
        return max((step for step in self.snapshots if self.path(step).exists()), default=0)

    def path(self, step: int) -> Path:
        return self.folder / f"{step}.zip"

    def agent(self, step: int) -> BaseAlgorithm:
        """As it was after so many environment steps."""
        return CLASSES[self.algorithm].load(self.path(step), device=self.machine.get("device", "cpu"))

    def train(self, bar: "tqdm[Any]") -> None:
        """Train to the end, from where it was cut off: on the CPU the snapshots are the same to the bit as without a cut."""
        self.claim_folder()
        if self.reached == self.steps:
            bar.update(self.steps)
            return
        env, exact = make_vec_env(self.env_id, seed=self.seed, wrapper_class=resumable), self.folder / "exact"
        if any(exact.glob("*/manifest.json")):
            model = load_checkpoint(exact, env, CLASSES[self.algorithm], device=self.machine.get("device", "cpu"))
        else:
            model = self.new_agent(env)
        bar.update(model.num_timesteps)
        every = max(1_000, self.steps // 20)
        callback = [Keep(self, bar), ExactCheckpointCallback(every, exact)]
        model.learn(self.steps - model.num_timesteps, callback, log_interval=1_000_000, reset_num_timesteps=False)
        shutil.rmtree(exact)

    def new_agent(self, env: Any) -> BaseAlgorithm:
        cls, noise = CLASSES[self.algorithm], "exploration_noise"
        settings = PAPER[self.algorithm] | (table_3(self.env_id) if cls is DIPO else {}) | self.settings
        settings = deepcopy(settings)  # SB3 writes into what it is given
        if issubclass(cls, OffPolicyAlgorithm):
            settings |= dict(buffer_size=min(self.steps, 1_000_000), learning_starts=self.learning_starts)
        if noise in settings:
            size = env.action_space.shape
            settings["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, settings.pop(noise)))
        machine = {name: value for name, value in self.machine.items() if name == "device" or cls is DIPO}
        return cls("MlpPolicy", env, seed=self.seed, **settings, **machine)

    def claim_folder(self) -> None:
        """Write what is trained here, or see that it is the same as what was."""
        mine = json.dumps({**asdict(self), "folder": None, "machine": None}, indent=1)
        file = self.folder / "training.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write(file, mine)
        if file.read_text() != mine:
            raise SystemExit(f"{self.folder} holds a training with other settings (training.json): choose another --out")


class Keep(BaseCallback):
    """Keep the policy at a training's snapshots, between rollouts, and move its bar."""

    def __init__(self, training: Training, bar: "tqdm[Any]"):
        super().__init__()
        self.training, self.bar, self.shown = training, bar, 0
        self.missing = [step for step in training.snapshots if not training.path(step).exists()]

    def _on_training_start(self) -> None:
        self.shown = self.num_timesteps

    def _on_rollout_start(self) -> None:
        self.bar.update(self.num_timesteps - self.shown)
        self.shown = self.num_timesteps
        while self.missing and self.missing[0] <= self.num_timesteps:
            unfinished = self.training.folder / "unfinished.zip"
            self.model.save(unfinished)
            unfinished.replace(self.training.path(self.missing.pop(0)))

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def table_3(env_id: str) -> dict[str, Any]:
    """DIPO's own for a task, from its YAML; none for a task that is not there, as the defaults are the paper's."""
    entries = yaml.safe_load((importlib.resources.files("sb3_dipo.hyperparams") / "dipo.yml").read_text())
    entry = entries.get(env_id, {})
    return {name: entry[name] for name in TABLE_3 if name in entry}


def resumable(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """The task, with a state that checkpoints can hold."""
    return MujocoState(env) if isinstance(env.unwrapped, MujocoEnv) else env


def train_all(trainings: Sequence[Training]) -> None:
    """Train one after the other, with one bar."""
    th.set_num_threads(1)  # the networks are too small for more
    total = sum(training.steps for training in trainings)
    with tqdm(total=total, unit="step", smoothing=0.02, dynamic_ncols=True) as bar:
        for training in trainings:
            bar.set_description(f"{NAMES[training.algorithm]}, seed {training.seed}")
            training.train(bar)


def log_to(folder: Path) -> None:
    """Send what MuJoCo has to say to a file, as otherwise it writes one wherever it is started from."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(handlers=[logging.FileHandler(folder / "warnings.log", delay=True)])
    mujoco.set_mju_user_warning(logging.warning)


def write(path: Path, content: str | bytes) -> None:
    """All of it, or nothing."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(unfinished, path)


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a PNG with a palette of 128 colours, a third of the size, the same bytes for the same figure."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    small = io.BytesIO()
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True)
    write(path, small.getvalue())


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """With the first column to the left, the others to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def arguments(description: str, out: str, quick: str, algorithms: Iterable[str] = CLASSES) -> argparse.ArgumentParser:
    """A parser with the options that every experiment has; by default it runs those algorithms that the paper does."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=text)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        choices=list(algorithms),
        default=list(CLASSES),
        help=f"of {', '.join(algorithms)} ({' '.join(CLASSES)})",
    )
    parser.add_argument("--device", default="cpu", help="of PyTorch (%(default)s)")
    parser.add_argument("--accelerate", default="auto", help="as DIPO takes it (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for everything (%(default)s)")
    return parser
