"""
A training run that is made to be killed: with the same folder it goes on from its newest checkpoint.

    python tests/checkpoint_run.py FOLDER STEPS

It prints a line when it starts to train, and at its end what was learned, as a hash.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_dipo import DIPO, ExactCheckpointCallback, load_checkpoint


class WalkEnv(gym.Env[np.ndarray, np.ndarray]):
    """A random walk that actions push, and which can give and take its state."""

    observation_space = spaces.Box(-10.0, 10.0, (2,))
    action_space = spaces.Box(-2.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        push = 0.1 * (action + self.np_random.normal(size=2))
        self.place = np.clip(self.place + push, -10, 10).astype(np.float32)
        distance = float(np.linalg.norm(self.place))
        return self.place.copy(), -distance, distance > 3, False, {}

    def get_env_state(self) -> Any:
        return self.place.copy(), self.np_random.bit_generator.state

    def set_env_state(self, state: Any) -> None:
        self.place, self.np_random.bit_generator.state = state


class WalkWithoutState(WalkEnv):
    """The same, as most environments are."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("get_env_state", "set_env_state"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def make_env(env_class: type[WalkEnv] = WalkEnv, n_envs: int = 2, normalize: bool = True) -> VecEnv:
    """Episodes of at most 7 steps; by default normalised."""
    env = DummyVecEnv([lambda: Monitor(TimeLimit(env_class(), 7))] * n_envs)
    return VecNormalize(env) if normalize else env


def make_model(env: VecEnv, **kwargs: Any) -> DIPO:
    """A small agent with all that has a state: noise, schedules, targets at their own intervals."""
    settings: dict[str, Any] = {
        "learning_rate": lambda remaining: 1e-2 * remaining,
        "learning_starts": 12,
        "batch_size": 8,
        "buffer_size": 100,
        "train_freq": 2,
        "gradient_steps": 3,
        "action_gradient_steps": 2,
        "actor_target_update_interval": 2,
        "action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.3)),
        "policy_kwargs": {"net_arch": [8], "num_train_timesteps": 3},
        "seed": 5,
        "device": "cpu",
        **kwargs,
    }
    return DIPO("MlpPolicy", env, **settings)


def fingerprint(model: Any) -> dict[str, str]:
    """Hashes of all that learns and of all that decides what happens next."""
    buffer: Any = getattr(model, "replay_buffer", None)
    parameters = model.get_parameters()
    columns = ("actions", "improved_actions", "rewards", "dones", "timeouts", "observations")
    parts: dict[str, list[Any]] = {
        "weights": _values({name: value for name, value in parameters.items() if "optimizer" not in name}),
        "optimizers": _values({name: value["state"] for name, value in parameters.items() if "optimizer" in name}),
        "buffer": [value for name in columns for value in _values(getattr(buffer, name, None))],
        "counters": [model.num_timesteps, model._n_updates, model._episode_num, buffer and (buffer.pos, buffer.full)],
        "random": [th.get_rng_state(), np.random.get_state()[1], model.action_space.np_random.bit_generator.state],  # type: ignore[index]
    }
    vec_normalize = model.get_vec_normalize_env()
    if vec_normalize is not None:
        statistics: Any = (vec_normalize.obs_rms, vec_normalize.ret_rms)
        parts["statistics"] = [value for each in statistics for value in (each.mean, each.var, each.count)]
        parts["statistics"].append(vec_normalize.returns)
    return {
        name: hashlib.sha256(b"".join(_bytes(value) for value in values)).hexdigest()[:16] for name, values in parts.items()
    }


def _values(nested: Any) -> list[Any]:
    return [inner for value in nested.values() for inner in _values(value)] if isinstance(nested, dict) else [nested]


def _bytes(value: Any) -> bytes:
    if isinstance(value, th.Tensor):
        value = value.detach().numpy()
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


def main() -> None:
    th.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    env = make_env()
    model = load_checkpoint(folder, env) if list(folder.glob("*/manifest.json")) else make_model(env)
    print(f"from {model.num_timesteps}", flush=True)
    model.learn(steps - model.num_timesteps, callback=ExactCheckpointCallback(8, folder), reset_num_timesteps=False)
    print(json.dumps(fingerprint(model)), flush=True)


if __name__ == "__main__":
    main()
