"""Dict observations of images, vectors and classes: policies, replay data, stacking, and extractors of one's own."""

import pathlib
from typing import Any

import numpy as np
import pytest
import torch as th
from both import ALGORITHMS, MIXED, SpaceEnv, both, error_of, mode, observations_of, reward_of, silent, small, space_envs
from gymnasium import spaces
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_dipo import DIPO


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("n_envs", [1, 2])
@both
def test_images_vectors_and_classes(
    algorithm: type[Any], n_envs: int, share_features_extractor: bool, tmp_path: pathlib.Path
) -> None:
    policy_kwargs = {"share_features_extractor": share_features_extractor}
    model = small(algorithm, space_envs(MIXED, n_envs), "MultiInputPolicy", policy_kwargs)
    model.learn(24)
    assert model.observation_space["camera"].shape == (2, 36, 36)
    assert model.actor.features_extractor.features_dim == 8 + 4 + 3 + 3
    observations = observations_of(model)
    actions = mode(model, observations)
    assert actions.shape == (5, 2) and np.ptp(actions, axis=0).max() > 0
    # alone, with the camera's channels last, and in another order of the keys
    alone = {key: value[0] for key, value in observations.items()}
    np.testing.assert_allclose(mode(model, alone), actions[0], atol=1e-6)
    last = {**observations, "camera": np.moveaxis(observations["camera"], 1, -1)}
    np.testing.assert_array_equal(mode(model, last), actions)
    np.testing.assert_array_equal(mode(model, dict(reversed(observations.items()))), actions)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=space_envs(MIXED))
    np.testing.assert_array_equal(mode(loaded, observations), actions)
    loaded.learn(14, reset_num_timesteps=False)
    assert reward_of(loaded, SpaceEnv(MIXED)) <= 0


def test_every_part_matters() -> None:
    """Actor, critics and action gradient see each key."""
    model = small(DIPO, space_envs(MIXED), "MultiInputPolicy")
    observations = observations_of(model, 4)
    actions = th.zeros(4, 2)
    for key in MIXED:
        changed = {**observations, key: np.roll(observations[key], 1, axis=0)}
        assert not np.array_equal(changed[key], observations[key])
        tensors = [model.policy.obs_to_tensor(given)[0] for given in (observations, changed)]
        with th.no_grad():
            for function in (
                lambda given: model.actor(given, deterministic=True),
                lambda given: model.critic.next_value(given, actions),
                lambda given: model.critic.objective(given)(actions),
            ):
                assert not th.equal(function(tensors[0]), function(tensors[1])), key


@pytest.mark.parametrize("n_envs", [1, 2])
def test_both_minibatches_hold_the_same_kind_of_observations(n_envs: int) -> None:
    model = small(DIPO, space_envs(MIXED, n_envs), "MultiInputPolicy")
    model.learn(24)
    of_critic = model.replay_buffer.sample(6).observations
    of_actor = model.replay_buffer.sample_improved(6).observations
    assert set(of_critic) == set(of_actor) == set(MIXED)
    for key in MIXED:
        assert (of_critic[key].shape, of_critic[key].dtype) == (of_actor[key].shape, of_actor[key].dtype)


@pytest.mark.parametrize("channel_last", [True, False])
@both
def test_sb3s_environment(algorithm: type[Any], channel_last: bool) -> None:
    env = SimpleMultiObsEnv(random_start=False, discrete_actions=False, channel_last=channel_last)
    model = small(algorithm, env, "MultiInputPolicy")
    model.learn(20)
    assert mode(model).shape == (5, 4)


@both
def test_stacked(algorithm: type[Any]) -> None:
    space = spaces.Dict({"camera": MIXED["camera"], "vector": MIXED["vector"]})
    order: Any = {"camera": "last", "vector": None}
    env = VecFrameStack(space_envs(space, 2), 3, channels_order=order)
    model = small(algorithm, env, "MultiInputPolicy")
    model.learn(24)
    shapes = {key: subspace.shape for key, subspace in model.observation_space.items()}
    assert shapes == {"camera": (6, 36, 36), "vector": (9,)}
    assert model.predict(env.reset())[0].shape == (2, 2)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"only": spaces.Box(-1.0, 1.0, (3,))}),
        spaces.Dict({"only": MIXED["camera"]}),
        spaces.Dict({"a": spaces.Discrete(3), "b": spaces.MultiDiscrete([2, 3]), "c": spaces.MultiBinary(2)}),
        spaces.Dict({"z": spaces.Box(-1.0, 1.0, (2, 2)), "a": spaces.Box(-1, 1, (1,), dtype=np.float64)}),
    ],
    ids=["vector", "image", "classes", "shapes"],
)
@both
def test_other_dicts(algorithm: type[Any], space: Any) -> None:
    model = small(algorithm, space_envs(space, 2), "MultiInputPolicy")
    model.learn(24)
    assert mode(model).shape == (5, 2)


class MeanExtractor(BaseFeaturesExtractor):
    """The mean of each part, through one linear layer."""

    def __init__(self, observation_space: spaces.Dict, features_dim: int = 4):
        super().__init__(observation_space, features_dim)
        self.linear = th.nn.Linear(len(observation_space.spaces), features_dim)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return self.linear(th.stack([part.flatten(1).mean(dim=1) for part in observations.values()], dim=1))


@pytest.mark.parametrize("share_features_extractor", [False, True])
@both
def test_extractor_of_ones_own(algorithm: type[Any], share_features_extractor: bool, tmp_path: pathlib.Path) -> None:
    policy_kwargs = {
        "features_extractor_class": MeanExtractor,
        "features_extractor_kwargs": {"features_dim": 6},
        "share_features_extractor": share_features_extractor,
    }
    model = small(algorithm, space_envs(MIXED, 2), "MultiInputPolicy", policy_kwargs)
    assert (model.actor.features_extractor is model.critic.features_extractor) == share_features_extractor
    before = {name: getattr(model, name).features_extractor.linear.weight.clone() for name in ("actor", "critic")}
    model.learn(24)
    for name, weight in before.items():
        assert not th.equal(getattr(model, name).features_extractor.linear.weight, weight)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(mode(algorithm.load(tmp_path / "model")), mode(model))


def test_wrong_observations_are_refused_as_by_sac() -> None:
    models = [small(algorithm, space_envs(MIXED), "MultiInputPolicy") for algorithm in ALGORITHMS]
    observations = observations_of(models[0])
    without = {key: value for key, value in observations.items() if key != "vector"}
    for wrong in (without, {**observations, "vector": np.zeros((5, 4))}, np.zeros(3, dtype=np.float32)):
        errors = [error_of(lambda m=model, w=wrong: m.predict(w)) for model in models]  # type: ignore[misc]
        assert errors[0] == errors[1] != ""


def test_improvements_of_one_environment_stay_with_it() -> None:
    """The observations that the actor's minibatch gets are those of the place that it is written back to."""
    model = small(DIPO, space_envs(MIXED, 3), "MultiInputPolicy")
    model.learn(30)
    buffer = model.replay_buffer
    batch = buffer.sample_improved(50)
    for key in MIXED:
        stored = buffer.observations[key][batch.rows, batch.envs]
        np.testing.assert_array_equal(batch.observations[key].numpy(), stored)
    before = buffer.improved_actions.copy()
    silent(model).train(1, 8)
    assert 1 <= (buffer.improved_actions != before).any(axis=-1).sum() <= 8
