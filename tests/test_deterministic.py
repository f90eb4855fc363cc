"""The same seed gives the same run, in each kind of environment and policy; what else changes nothing."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from both import CHANNELS_LAST, MIXED, SpaceEnv, both, mode, parameters_of, same, small, space_envs
from envs import TinyEnv, goal_envs, tiny_envs
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

VECTOR = spaces.Box(-1.0, 1.0, (3,))


def noise() -> Any:
    return OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.3))


RUNS: dict[str, Any] = {
    "vector": lambda algorithm, **kwargs: small(algorithm, space_envs(VECTOR), **kwargs),
    "image": lambda algorithm, **kwargs: small(algorithm, space_envs(CHANNELS_LAST, 2), "CnnPolicy", **kwargs),
    "dict": lambda algorithm, **kwargs: small(algorithm, space_envs(MIXED, 2), "MultiInputPolicy", **kwargs),
    "noise": lambda algorithm, **kwargs: small(algorithm, tiny_envs(2), action_noise=noise(), **kwargs),
    "n-step": lambda algorithm, **kwargs: small(algorithm, tiny_envs(2), n_steps=3, **kwargs),
    "normalized": lambda algorithm, **kwargs: small(algorithm, VecNormalize(tiny_envs(2)), **kwargs),
    "goals": lambda algorithm, **kwargs: small(
        algorithm, goal_envs(2), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, **kwargs
    ),
}


@pytest.mark.parametrize("name", RUNS)
@both
def test_same_seed_same_run(algorithm: type[Any], name: str) -> None:
    learned, predicted = [], []
    for seed in (1, 1, 2):
        model = RUNS[name](algorithm, seed=seed)
        model.learn(24)
        learned.append({**parameters_of(model), "actions": th.from_numpy(model.replay_buffer.actions)})
        predicted.append(mode(model))
    assert same(learned[0], learned[1]) and not same(learned[0], learned[2])
    np.testing.assert_array_equal(predicted[0], predicted[1])


def make_tiny() -> TinyEnv:
    return TinyEnv()


@both
def test_processes(algorithm: type[Any]) -> None:
    """Environments in processes of their own: the same run as those in this one."""
    learned = []
    for envs in (tiny_envs(2), SubprocVecEnv([make_tiny] * 2)):
        model = small(algorithm, envs, train_freq=3, gradient_steps=-1)
        model.learn(36)
        assert model._n_updates > 0
        learned.append({**parameters_of(model), "observations": th.from_numpy(model.replay_buffer.observations)})
        model.learn(12, reset_num_timesteps=False)
        envs.close()
    assert same(*learned)


@pytest.mark.parametrize("n_envs", [1, 3])
@both
def test_vectorized_noise(algorithm: type[Any], n_envs: int) -> None:
    """Noise is one for each environment, given so or made so, and starts again with each episode."""
    actions = []
    for given in (noise(), VectorizedActionNoise(noise(), n_envs)):
        model = small(algorithm, tiny_envs(n_envs), action_noise=given)
        model.learn(30)
        assert n_envs == 1 or isinstance(model.action_noise, VectorizedActionNoise)
        actions.append(model.replay_buffer.actions.copy())
    np.testing.assert_array_equal(*actions)
    # each environment has its own, and a mean of 50 leads to the corner
    model = small(algorithm, tiny_envs(n_envs), action_noise=NormalActionNoise(np.full(2, 50.0), np.zeros(2)))
    model.learn(30)
    assert (model.replay_buffer.actions[: 30 // n_envs] == 1).all()


class ResetNoise(NormalActionNoise):
    """Counts its resets."""

    resets = 0

    def reset(self) -> None:
        type(self).resets += 1


@both
def test_noise_is_reset_with_each_episode(algorithm: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResetNoise, "resets", 0)
    small(algorithm, action_noise=ResetNoise(np.zeros(2), np.full(2, 0.1))).learn(22)
    assert ResetNoise.resets == 1 + 4  # at the start of learn(), too


@both
def test_noise_is_saved(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, tiny_envs(2), action_noise=noise())
    model.learn(22)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=tiny_envs(2))
    np.testing.assert_array_equal(loaded.action_noise.noises[1].noise_prev, model.action_noise.noises[1].noise_prev)
    loaded.learn(12, reset_num_timesteps=False)


@both
def test_seed_on_load(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    small(algorithm, seed=None).save(tmp_path / "model")
    learned = []
    for seed in (5, 5, 6):
        loaded = algorithm.load(tmp_path / "model", env=TinyEnv(), seed=seed)
        loaded.learn(24)
        learned.append(parameters_of(loaded))
    assert same(learned[0], learned[1]) and not same(learned[0], learned[2])


@both
def test_set_random_seed(algorithm: type[Any]) -> None:
    """Without a seed of its own, the agent follows the global generators, as they are set later."""
    learned = []
    for seed in (5, 5, 6):
        model = small(algorithm, SpaceEnv(VECTOR), seed=3)
        model.set_random_seed(seed)
        model.learn(24)
        learned.append(parameters_of(model))
    assert same(learned[0], learned[1]) and not same(learned[0], learned[2])


@both
def test_one_agent_does_not_depend_on_another(algorithm: type[Any]) -> None:
    """Agents share nothing: what one learns in between leaves the other's weights alone."""
    first, second = small(algorithm), small(algorithm, seed=1)
    first.learn(20)
    before = parameters_of(first)
    second.learn(20)
    assert same(parameters_of(first), before)
