"""Images, channels first and last, stacked; features extractors of one's own, and how often they are asked."""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from both import CHANNELS_FIRST, CHANNELS_LAST, MIXED, both, mode, observations_of, policy_for, silent, small, space_envs
from envs import small_dipo
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from sb3_dipo import DIPO

LAYOUTS = {"first": CHANNELS_FIRST, "last": CHANNELS_LAST}


@pytest.mark.parametrize("layout", LAYOUTS)
@both
def test_images(algorithm: type[Any], layout: str, tmp_path: pathlib.Path) -> None:
    env = space_envs(LAYOUTS[layout], 2)
    model = small(algorithm, env, "CnnPolicy")
    model.learn(24)
    assert model.observation_space.shape == (2, 36, 36)  # the networks' order
    assert model.replay_buffer.observations.shape[2:] == (2, 36, 36)
    assert model.replay_buffer.observations.dtype == np.uint8
    observations = observations_of(model)
    actions = mode(model, observations)
    # an image is taken in either order, alone or in a batch
    last = np.moveaxis(observations, 1, -1)
    np.testing.assert_array_equal(mode(model, last), actions)
    np.testing.assert_allclose(mode(model, last[0]), actions[0], atol=1e-6)
    assert not np.allclose(actions[0], actions[1], atol=1e-8)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=space_envs(LAYOUTS[layout]))
    np.testing.assert_array_equal(mode(loaded, observations), actions)
    loaded.learn(14, reset_num_timesteps=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@both
def test_stacked_frames(algorithm: type[Any], layout: str, tmp_path: pathlib.Path) -> None:
    env = VecFrameStack(space_envs(LAYOUTS[layout], 2), 3, channels_order=layout)
    model = small(algorithm, env, "CnnPolicy")
    model.learn(24)
    assert model.observation_space.shape == (6, 36, 36)
    assert isinstance(model.get_env(), VecTransposeImage) == (layout == "last")
    assert model.predict(env.reset())[0].shape == (2, 2)
    # the newest frame but one of what follows is the newest of what was seen
    rows = np.flatnonzero(model.replay_buffer.dones[:11, 0] == 0)
    seen, next_seen = model.replay_buffer.observations[rows, 0], model.replay_buffer.next_observations[rows, 0]
    np.testing.assert_array_equal(next_seen[:, 2:4], seen[:, 4:6])
    model.save(tmp_path / "model")
    algorithm.load(tmp_path / "model", env=VecFrameStack(space_envs(LAYOUTS[layout]), 3, channels_order=layout)).learn(14)


@both
def test_stacked_vectors(algorithm: type[Any]) -> None:
    model = small(algorithm, VecFrameStack(space_envs(spaces.Box(-1.0, 1.0, (3,)), 2), 4))
    model.learn(24)
    assert model.observation_space.shape == (12,) and mode(model).shape == (5, 2)


class Watched(BaseFeaturesExtractor):
    """Notes the shape and the largest value of what it is given."""

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int = 4):
        super().__init__(observation_space, features_dim)
        self.given: list[tuple[int, float]] = []
        self.linear = th.nn.LazyLinear(features_dim)
        self(th.zeros(1, *observation_space.shape))  # type: ignore[misc]

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.given.append((len(observations), float(observations.max())))
        return self.linear(observations.float().flatten(1))


@pytest.mark.parametrize("normalize_images", [True, False])
@both
def test_scale_of_images(algorithm: type[Any], normalize_images: bool) -> None:
    policy_kwargs = {
        "features_extractor_class": Watched,
        "features_extractor_kwargs": {},
        "normalize_images": normalize_images,
    }
    model = small(algorithm, space_envs(CHANNELS_FIRST), "CnnPolicy", policy_kwargs)
    model.learn(14)
    for network in (model.actor, model.critic, model.critic_target):
        largest = max(value for _, value in network.features_extractor.given)
        assert largest == pytest.approx(1 if normalize_images else 255, rel=0.02)


@both
def test_images_that_are_in_order_already(algorithm: type[Any]) -> None:
    space = spaces.Box(0.0, 1.0, (1, 36, 36))
    extractor = {"features_dim": 8, "normalized_image": True}
    model = small(
        algorithm, space_envs(space), "CnnPolicy", {"normalize_images": False, "features_extractor_kwargs": extractor}
    )
    model.learn(14)
    assert model.replay_buffer.observations.dtype == np.float32
    with pytest.raises(AssertionError, match="NatureCNN"):
        small(algorithm, space_envs(space), "CnnPolicy")
    with pytest.raises(AssertionError, match="NatureCNN"):
        small(algorithm, space_envs(spaces.Box(-1.0, 1.0, (3,))), "CnnPolicy")


@both
def test_images_stored_once(algorithm: type[Any]) -> None:
    kwargs: dict[str, Any] = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = small(algorithm, space_envs(CHANNELS_LAST), "CnnPolicy", buffer_size=20, **kwargs)
    model.learn(30)
    assert model.replay_buffer.full and not hasattr(model.replay_buffer, "next_observations")


# ------------------------------------------------------------------------------------------------- how often it is asked


def calls_in(model: DIPO, action: Callable[[], Any]) -> dict[str, list[int]]:
    """The batch sizes that each extractor is given; one that is shared has the names of all its networks."""
    owners: dict[Any, list[str]] = {}
    for name in ("actor", "actor_target", "critic", "critic_target"):
        owners.setdefault(getattr(model, name).features_extractor, []).append(name)
    calls: dict[str, list[int]] = {" ".join(names): [] for names in owners.values()}

    def note(module: Any, arguments: Any, features: th.Tensor) -> None:
        calls[" ".join(owners[module])].append(len(features))

    handles = [extractor.register_forward_hook(note) for extractor in owners]
    action()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("space", [CHANNELS_LAST, MIXED], ids=["image", "dict"])
@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_features_are_computed_once(actor: str, space: Any, steps: int) -> None:
    """However many steps the reverse process and the action gradient have."""
    length = {"num_train_timesteps": steps} if actor == "diffusion" else {}
    policy_kwargs = {"net_arch": [8], "actor": actor, "n_critics": 3, **length}
    model = small_dipo(space_envs(space), policy_for(space), policy_kwargs, action_gradient_steps=steps)
    model.learn(12)
    # the actor's loss; the target policy; Q of the actions taken and the action gradient; Q of the target
    expected = {"actor": [8], "actor_target": [8], "critic": [8, 8], "critic_target": [8]}
    assert calls_in(model, lambda: silent(model).train(1, 8)) == expected
    for deterministic in (True, False):
        predict = partial(model.predict, observations_of(model, 3), deterministic=deterministic)
        assert calls_in(model, predict) == {"actor": [3], "actor_target": [], "critic": [], "critic_target": []}


@pytest.mark.parametrize("space", [CHANNELS_LAST, MIXED], ids=["image", "dict"])
def test_features_of_a_shared_extractor_are_computed_once_for_each_use(space: Any) -> None:
    policy_kwargs = {"net_arch": [8], "num_train_timesteps": 6, "share_features_extractor": True}
    model = small_dipo(space_envs(space), policy_for(space), policy_kwargs, action_gradient_steps=6)
    model.learn(12)
    calls = calls_in(model, lambda: silent(model).train(1, 8))
    assert calls == {"actor critic": [8, 8, 8], "actor_target critic_target": [8, 8]}
    assert calls_in(model, lambda: model.predict(observations_of(model, 3)))["actor critic"] == [3]
