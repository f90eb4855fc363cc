"""Observation and action spaces: what SAC takes DIPO takes, and what SAC refuses DIPO refuses with the same words."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from both import ALGORITHMS, SpaceEnv, both, error_of, mode, observations_of, small, space_envs
from envs import TinyEnv, tiny_envs
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.preprocessing import get_flattened_obs_dim

OBSERVATIONS = {
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([4, 3]),
    "multi-binary": spaces.MultiBinary(4),
    "binary matrix": spaces.MultiBinary([3, 2]),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3)),
    "float64": spaces.Box(-1.0, 1.0, (3,), dtype=np.float64),
    "unbounded": spaces.Box(-np.inf, np.inf, (3,)),
    "integers": spaces.Box(-5, 5, (3,), dtype=np.int32),
}


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("name", OBSERVATIONS)
@both
def test_observations(algorithm: type[Any], name: str, n_envs: int, tmp_path: pathlib.Path) -> None:
    space = OBSERVATIONS[name]
    model = small(algorithm, space_envs(space, n_envs))
    model.learn(24)
    assert model._n_updates > 0
    # the features are the observation itself, with a column for each class
    observations = observations_of(model)
    features = model.actor.extract_features(model.policy.obs_to_tensor(observations)[0], model.actor.features_extractor)
    assert features.shape == (5, get_flattened_obs_dim(space))
    if "discrete" in name:
        assert features.sum(dim=1).tolist() == [len(np.atleast_1d(observations[0]))] * 5
    actions = mode(model)
    assert actions.shape == (5, 2)
    assert mode(model, observations[0]).shape == (2,)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=SpaceEnv(space))
    np.testing.assert_array_equal(mode(loaded), actions)


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_both_minibatches_hold_the_same_kind_of_observations(name: str) -> None:
    model = small(ALGORITHMS[0], space_envs(OBSERVATIONS[name], 2))
    model.learn(24)
    of_critic = model.replay_buffer.sample(6).observations
    of_actor = model.replay_buffer.sample_improved(6).observations
    assert (of_critic.shape, of_critic.dtype) == (of_actor.shape, of_actor.dtype)


REFUSED: dict[str, Any] = {
    "tuple": spaces.Tuple((spaces.Box(-1.0, 1.0, (2,)),)),
    "nested": spaces.Dict({"a": spaces.Dict({"b": spaces.Box(-1.0, 1.0, (2,))})}),
    "matrix of classes": spaces.MultiDiscrete(np.array([[4, 3], [2, 2]])),
    "classes that do not start at 0": spaces.Discrete(5, start=2),
    "text": spaces.Text(3),
}


@pytest.mark.parametrize("space", REFUSED.values(), ids=REFUSED)
def test_observations_that_are_refused(space: Any) -> None:
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    errors = [error_of(lambda a=a: small(a, SpaceEnv(space), policy).learn(15)) for a in ALGORITHMS]  # type: ignore[misc]
    assert errors[0] == errors[1] != ""


ACTIONS: dict[str, spaces.Box] = {
    "matrix": spaces.Box(-1.0, 1.0, (2, 3)),
    "three axes": spaces.Box(-2.0, 1.0, (2, 1, 3)),
    "asymmetric": spaces.Box(np.array([-2.0, 0.0, 5.0], dtype=np.float32), np.array([1.0, 0.5, 9.0], dtype=np.float32)),
    "narrow": spaces.Box(-1e-6, 1e-6, (2,)),
    "wide": spaces.Box(-1e6, 1e6, (2,)),
    "float64": spaces.Box(-3.0, 1.0, (2,), dtype=np.float64),
}


@pytest.mark.parametrize("name", ACTIONS)
@both
def test_actions(algorithm: type[Any], name: str, tmp_path: pathlib.Path) -> None:
    space = ACTIONS[name]
    env = tiny_envs(2, action_space=space)  # refuses what is not in the box
    model = small(algorithm, env)
    model.learn(40)
    for deterministic in (True, False):
        actions, _ = model.predict(np.zeros((7, 3), dtype=np.float32), deterministic=deterministic)
        assert actions.shape == (7, *space.shape) and actions.dtype == space.dtype
        assert (actions >= space.low).all() and (actions <= space.high).all()
    stored = model.replay_buffer.actions[:20]
    assert stored.shape == (20, 2, int(np.prod(space.shape))) and np.abs(stored).max() <= 1
    received = np.stack([tiny.received for tiny in env.envs], axis=1)  # type: ignore[attr-defined]
    unscaled = space.low + (stored.reshape(received.shape) + 1) / 2 * (space.high - space.low)
    np.testing.assert_allclose(received, unscaled, rtol=1e-5, atol=1e-5 * float((space.high - space.low).max()))
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(mode(algorithm.load(tmp_path / "model")), mode(model))


@pytest.mark.parametrize(
    "space",
    [spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,))}), spaces.Tuple((spaces.Box(-1.0, 1.0, (2,)),))],
    ids=["dict", "tuple"],
)
def test_actions_that_are_refused(space: Any) -> None:
    # the others are in test_bad_input.py
    errors = [error_of(lambda a=a: small(a, TinyEnv(space))) for a in ALGORITHMS]  # type: ignore[misc]
    assert errors[0] == errors[1] and errors[0].startswith("AssertionError")


@pytest.mark.parametrize("env", ["Pendulum-v1", "MountainCarContinuous-v0"])
@both
def test_registered_environments(algorithm: type[Any], env: str) -> None:
    model = small(algorithm, make_vec_env(env, n_envs=2, seed=1))
    model.learn(24)
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


@both
def test_environment_of_other_spaces_is_refused(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    small(algorithm).save(tmp_path / "model")
    for env in (SpaceEnv(spaces.Box(-1.0, 1.0, (4,))), SpaceEnv(spaces.Box(-2.0, 2.0, (3,))), SpaceEnv(spaces.Discrete(3))):
        with pytest.raises(ValueError, match="Observation spaces do not match"):
            algorithm.load(tmp_path / "model", env=env)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        algorithm.load(tmp_path / "model", env=TinyEnv(spaces.Box(-1.0, 2.0, (2,))))
