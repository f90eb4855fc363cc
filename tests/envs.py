"""Small environments, and the small agents that the tests train on them."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_dipo import DIPO


class TinyEnv(gym.Env[Any, np.ndarray]):
    """
    Observations are random, the reward is highest where the action is the middle of its box.

    :param action_space: bounded Box
    :param observation: "vector", "image" (36 x 36, channels last) or "dict"
    :param episode_length: steps of each episode
    :param truncate: whether episodes end by a time limit (True) or in a terminal state
    """

    def __init__(
        self,
        action_space: spaces.Box | None = None,
        observation: str = "vector",
        episode_length: int = 5,
        truncate: bool = True,
    ):
        self.action_space = spaces.Box(-1.0, 1.0, (2,)) if action_space is None else action_space
        observation_spaces: dict[str, spaces.Space[Any]] = {
            "vector": spaces.Box(-1.0, 1.0, (3,)),
            "image": spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8),
            "dict": spaces.Dict({"position": spaces.Box(-1.0, 1.0, (2,)), "speed": spaces.Box(-9.0, 9.0, (3,))}),
        }
        self.observation_space = observation_spaces[observation]
        self.episode_length = episode_length
        self.truncate = truncate
        self.steps = 0
        self.received: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.received.append(np.array(action))
        self.steps += 1
        ended = self.steps >= self.episode_length
        reward = -float(np.mean(np.square(action)))
        return self.observation_space.sample(), reward, ended and not self.truncate, ended and self.truncate, {}


class GoalEnv(gym.Env[Any, np.ndarray]):
    """
    For hindsight replay: what is achieved tells where one is, (number of the episode, step in it), and the desired goal,
    (-1, 0), can never be reached. Episodes last 2 to 5 steps.

    :param first_episode: number of the first episode, to tell several environments apart
    """

    def __init__(self, first_episode: int = 0):
        goal_space = spaces.Box(-1.0, 1e6, (2,))
        self.observation_space = spaces.Dict(
            {"observation": spaces.Box(-1.0, 1e6, (2,)), "achieved_goal": goal_space, "desired_goal": goal_space}
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.episode, self.steps = first_episode - 1, 0

    def _observe(self) -> dict[str, np.ndarray]:
        here = np.array([self.episode, self.steps], dtype=np.float32)
        return {"observation": here, "achieved_goal": here.copy(), "desired_goal": np.array([-1, 0], dtype=np.float32)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation = self._observe()
        reward = float(self.compute_reward(observation["achieved_goal"], observation["desired_goal"], {}))
        return observation, reward, False, self.steps >= 2 + self.episode % 4, {}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        """0 at the goal, -1 elsewhere; for one goal or a batch."""
        return -(np.abs(achieved_goal - desired_goal).sum(axis=-1) > 0.5).astype(np.float32)


def goal_envs(n_envs: int = 1) -> DummyVecEnv:
    """Goal environments whose episodes are numbered 0, 1, ... in the first, 1000, 1001, ... in the second, and so on."""
    return DummyVecEnv([lambda first=1000 * i: GoalEnv(first) for i in range(n_envs)])  # type: ignore[misc]


def tiny_envs(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    """Several :class:`TinyEnv`."""
    return DummyVecEnv([lambda: TinyEnv(**kwargs)] * n_envs)


class LinearExtractor(BaseFeaturesExtractor):
    """One linear layer: features with parameters."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 4):
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(int(np.prod(observation_space.shape)), features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations.flatten(1))


class BatchNormExtractor(LinearExtractor):
    """Features with running statistics."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 4):
        super().__init__(observation_space, features_dim)
        self.norm = nn.BatchNorm1d(features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


def small_dipo(env: Any = None, policy: Any = "MlpPolicy", policy_kwargs: Any = None, **kwargs: Any) -> DIPO:
    """A DIPO agent that learns within milliseconds; on a new :class:`TinyEnv` where no environment is given."""
    actor = (policy_kwargs or {}).get("actor", "diffusion")
    own: dict[str, Any] = {"diffusion": {"num_train_timesteps": 5}, "vae": {"latent_dim": 4}, "mlp": {}}.get(actor, {})
    settings: dict[str, Any] = {
        "learning_starts": 10,
        "batch_size": 8,
        "buffer_size": 1000,
        "action_gradient_steps": 2,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"net_arch": [16, 16], **own, **(policy_kwargs or {})},
    }
    return DIPO(policy, TinyEnv() if env is None else env, **{**settings, **kwargs})


def everything_learned(model: DIPO) -> dict[str, Any]:
    """A copy of all that training changes: weights, targets, optimizers, both action columns."""
    parts: dict[str, Any] = dict(model.policy.state_dict())
    for name, optimizer in (("actor", model.actor.optimizer), ("critic", model.critic.optimizer)):
        for index, state in optimizer.state_dict()["state"].items():
            parts.update({f"{name} optimizer {index} {key}": value for key, value in state.items()})
    assert model.replay_buffer is not None
    for name in ("actions", "improved_actions"):
        if hasattr(model.replay_buffer, name):
            parts[name] = th.as_tensor(getattr(model.replay_buffer, name))
    return {name: th.as_tensor(part).clone() for name, part in parts.items()}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The names of what is not bit for bit the same in two of :func:`everything_learned` (NaN equals NaN)."""
    names = sorted({*first, *second})
    return [
        name
        for name in names
        if name not in first
        or name not in second
        or not np.array_equal(first[name].numpy(), second[name].numpy(), equal_nan=first[name].is_floating_point())
    ]
