"""The same small agent of DIPO and of SB3's SAC: where a user sees a difference between the two, it is a finding."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TinyEnv
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dipo import DIPO

ALGORITHMS = [DIPO, SAC]
both = pytest.mark.parametrize("algorithm", ALGORITHMS)

CHANNELS_LAST = spaces.Box(0, 255, (36, 36, 2), dtype=np.uint8)
CHANNELS_FIRST = spaces.Box(0, 255, (2, 36, 36), dtype=np.uint8)
MIXED = spaces.Dict(
    {
        "vector": spaces.Box(-1.0, 1.0, (3,)),
        "camera": CHANNELS_LAST,
        "gear": spaces.Discrete(4),
        "lamps": spaces.MultiBinary(3),
    }
)


class SpaceEnv(TinyEnv):
    """
    A :class:`TinyEnv` with any observation space.

    :param observation_space: what observations are drawn from
    :param kwargs: as :class:`TinyEnv`
    """

    def __init__(self, observation_space: spaces.Space[Any], **kwargs: Any):
        super().__init__(**kwargs)
        self.observation_space = observation_space


def space_envs(observation_space: spaces.Space[Any], n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    """Several :class:`SpaceEnv`."""
    make: Callable[[], SpaceEnv] = lambda: SpaceEnv(observation_space, **kwargs)  # noqa: E731
    return DummyVecEnv([make] * n_envs)


def policy_for(observation_space: spaces.Space[Any]) -> str:
    """The name of the policy for a space: "MultiInputPolicy", "CnnPolicy" or "MlpPolicy"."""
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(observation_space.shape or ()) == 3 else "MlpPolicy"


def small(algorithm: type[Any], env: Any = None, policy: Any = "MlpPolicy", policy_kwargs: Any = None, **kwargs: Any) -> Any:
    """A DIPO or SAC agent that learns within milliseconds; on a new :class:`TinyEnv` where no environment is given."""
    own: dict[str, Any] = {"action_gradient_steps": 2} if algorithm is DIPO else {}
    # little noise, so that deterministic actions are not all in the corners of their box
    of_policy: dict[str, Any] = {"num_train_timesteps": 3, "beta_schedule": "ou", "horizon": 0.3} if algorithm is DIPO else {}
    if policy == "CnnPolicy":
        of_policy["features_extractor_kwargs"] = {"features_dim": 8}
    elif policy == "MultiInputPolicy":
        of_policy["features_extractor_kwargs"] = {"cnn_output_dim": 8}
    settings: dict[str, Any] = {
        "learning_starts": 10,
        "batch_size": 8,
        "buffer_size": 200,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"net_arch": [8], **of_policy, **(policy_kwargs or {})},
    }
    return algorithm(policy, TinyEnv() if env is None else env, **{**settings, **own, **kwargs})


def silent(model: Any) -> Any:
    """Give the agent a logger, so that train() can be called without learn()."""
    model.set_logger(Logger(None, []))
    return model


def observations_of(model: Any, number: int = 5) -> Any:
    """A batch of observations, always the same."""
    space = model.observation_space
    space.seed(3)
    samples = [space.sample() for _ in range(number)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack(samples)


def mode(model: Any, observations: Any = None) -> np.ndarray:
    """Deterministic actions, for :func:`observations_of` where no observations are given."""
    return model.predict(observations_of(model) if observations is None else observations, deterministic=True)[0]


def parameters_of(model: Any) -> dict[str, th.Tensor]:
    """A copy of all that the policy saves."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """Whether two of :func:`parameters_of` are bit for bit the same."""
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


def reward_of(model: Any, env: Any) -> float:
    """Mean reward of two episodes."""
    reward, _ = evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    assert isinstance(reward, float)
    return reward


def error_of(action: Callable[[], Any]) -> str:
    """The type and message of the error that an action raises; "" where it raises none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
