"""predict() and evaluate_policy(): what goes in, what comes out, and what stays as it was; copies of agents and policies."""

import io
import pathlib
import pickle
from copy import deepcopy
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch as th
from both import (
    ALGORITHMS,
    CHANNELS_LAST,
    MIXED,
    SpaceEnv,
    both,
    error_of,
    mode,
    observations_of,
    parameters_of,
    policy_for,
    reward_of,
    same,
    silent,
    small,
    space_envs,
)
from envs import BatchNormExtractor, TinyEnv, tiny_envs
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dipo import DIPO

VECTOR = spaces.Box(-1.0, 1.0, (3,))
SPACES = pytest.mark.parametrize("space", [VECTOR, CHANNELS_LAST, MIXED], ids=["vector", "image", "dict"])


@SPACES
@pytest.mark.parametrize("deterministic", [True, False])
@both
def test_types_and_shapes(algorithm: type[Any], deterministic: bool, space: Any) -> None:
    model = small(algorithm, SpaceEnv(space), policy_for(space))
    observations = observations_of(model)
    before = deepcopy(observations)
    for predict in (model.predict, model.policy.predict):
        actions, state = predict(observations, deterministic=deterministic)
        assert isinstance(actions, np.ndarray) and actions.dtype == np.float32 and actions.shape == (5, 2)
        assert state is None
        # what recurrent policies need is taken and given back
        assert predict(observations, state=(mark := (np.zeros(1),)), episode_start=np.ones(5, dtype=bool))[1] is mark
    np.testing.assert_equal(observations, before)
    tensor = model.policy.obs_to_tensor(observations)[0]
    with th.no_grad():
        assert model.policy(tensor, deterministic).shape == (5, 2)
    assert all(parameter.grad is None for parameter in model.policy.parameters())


@both
def test_vectors_of_other_types(algorithm: type[Any]) -> None:
    model = small(algorithm)
    observations = np.array([[0.25, -0.5, 1.0], [0.0, 0.5, 0.125]])
    expected = mode(model, observations.astype(np.float32))
    for given in (observations, observations.tolist(), np.asfortranarray(observations), observations[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(mode(model, given), expected)
    assert mode(model, np.zeros((0, 3), dtype=np.float32)).shape == (0, 2)


@pytest.mark.parametrize(
    "given",
    [
        np.zeros(4, dtype=np.float32),
        np.zeros((2, 2, 3), dtype=np.float32),
        0.0,
        None,
        {"a": np.zeros(3)},
        (np.zeros(3), {}),
    ],
    ids=["length", "axes", "number", "nothing", "dict", "what reset() returns"],
)
def test_wrong_observations_are_refused_as_by_sac(given: Any) -> None:
    errors = [error_of(lambda a=algorithm: small(a).predict(given)) for algorithm in ALGORITHMS]  # type: ignore[misc]
    assert errors[0] == errors[1] != ""


@both
def test_predictions_leave_the_generators_alone_where_deterministic(algorithm: type[Any]) -> None:
    model = small(algorithm)
    for deterministic in (True, False):
        before = th.get_rng_state()
        numpy_before = deepcopy(np.random.get_state())
        model.predict(np.zeros((2, 3)), deterministic=deterministic)
        assert th.equal(before, th.get_rng_state()) == deterministic
        np.testing.assert_equal(np.random.get_state(), numpy_before)


@both
def test_actions_are_scaled_to_the_box(algorithm: type[Any]) -> None:
    low, high = np.array([-2.0, 5.0], dtype=np.float32), np.array([0.0, 9.0], dtype=np.float32)
    model = small(algorithm, TinyEnv(spaces.Box(low, high)))
    observations = observations_of(model)
    with th.no_grad():
        inner = model.policy(model.policy.obs_to_tensor(observations)[0], deterministic=True).numpy()
    assert np.abs(inner).max() <= 1
    np.testing.assert_allclose(mode(model, observations), low + (inner + 1) / 2 * (high - low), rtol=1e-5)


# ------------------------------------------------------------------------------------------------- evaluate_policy


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("deterministic", [True, False])
@both
def test_evaluate_policy(algorithm: type[Any], deterministic: bool, n_envs: int) -> None:
    model = small(algorithm, tiny_envs(n_envs))
    model.learn(20)
    before = parameters_of(model)
    env = Monitor(TinyEnv()) if n_envs == 1 else VecNormalize(tiny_envs(2), training=False, norm_reward=False)
    steps: list[int] = []
    rewards, lengths = evaluate_policy(
        model,
        env,
        n_eval_episodes=4,
        deterministic=deterministic,
        return_episode_rewards=True,
        warn=False,
        callback=lambda variables, _: steps.append(variables["current_lengths"].max()),
    )
    assert lengths == [5, 5, 5, 5] and isinstance(rewards, list) and all(-5 <= reward <= 0 for reward in rewards)
    assert len(steps) == 20
    # the policy alone is enough
    assert reward_of(model.policy, Monitor(TinyEnv())) <= 0
    assert same(parameters_of(model), before) and model.num_timesteps == 20
    with pytest.raises(AssertionError, match="below threshold"):
        evaluate_policy(model, Monitor(TinyEnv()), n_eval_episodes=1, reward_threshold=1.0)


# ------------------------------------------------------------------------------------------------- copies


COPIES: dict[str, Any] = {
    "deepcopy": deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "cloudpickle": lambda thing: pickle.loads(cloudpickle.dumps(thing)),
}


@pytest.mark.parametrize("how", COPIES)
@both
def test_copies_of_agents(algorithm: type[Any], how: str) -> None:
    # SB3 cannot copy the wrapper that it puts around environments of images, but without environment agents of any can be
    model = small(algorithm)
    model.learn(20)
    copied = COPIES[how](model)
    assert same(parameters_of(copied), parameters_of(model))
    np.testing.assert_array_equal(mode(copied), mode(model))
    # whole: what learns is what acts
    assert copied.actor is copied.policy.actor and copied.critic is copied.policy.critic
    before, original = parameters_of(copied), parameters_of(model)
    for agent in (copied, model):
        np.random.seed(1)
        th.manual_seed(1)
        silent(agent).train(3, 8)
    assert same(parameters_of(copied), parameters_of(model))  # with the optimizers' state
    assert not same(parameters_of(copied), before)
    # of its own: the other stays
    mine = parameters_of(model)
    assert not same(mine, original)
    copied.learn(14, reset_num_timesteps=False)
    assert same(parameters_of(model), mine) and not same(parameters_of(copied), mine)


@SPACES
@pytest.mark.parametrize("how", COPIES)
@both
def test_copies_of_agents_without_environment(algorithm: type[Any], how: str, space: Any, tmp_path: pathlib.Path) -> None:
    small(algorithm, SpaceEnv(space), policy_for(space)).save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model")
    copied = COPIES[how](model)
    np.testing.assert_array_equal(mode(copied), mode(model))
    copied.set_env(space_envs(space))
    copied.learn(14)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "cloudpickle"])
def test_copies_keep_their_running_statistics(how: str) -> None:
    """The targets of a copy go on following what it has learned of its observations."""
    model = small(DIPO, policy_kwargs={"features_extractor_class": BatchNormExtractor})
    model.learn(20)
    copied = silent(COPIES[how](model))
    copied.train(3, 8)
    for network, target in ((copied.actor, copied.actor_target), (copied.critic, copied.critic_target)):
        own, others = network.features_extractor.norm, target.features_extractor.norm
        assert th.equal(own.running_mean, others.running_mean)


@pytest.mark.parametrize("how", COPIES)
@both
def test_copies_of_policies(algorithm: type[Any], how: str) -> None:
    model = small(algorithm)
    model.learn(20)
    copied = COPIES[how](model.policy)
    np.testing.assert_array_equal(mode(copied, observations_of(model)), mode(model))


@SPACES
@both
def test_policy_alone(algorithm: type[Any], space: Any, tmp_path: pathlib.Path) -> None:
    model = small(algorithm, SpaceEnv(space), policy_for(space))
    model.learn(14)
    model.policy.save(str(tmp_path / "policy"))
    loaded = type(model.policy).load(str(tmp_path / "policy"))
    np.testing.assert_array_equal(mode(loaded, observations_of(model)), mode(model))
    assert reward_of(loaded, space_envs(loaded.observation_space)) <= 0


@both
def test_parameters_and_custom_objects(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, learning_rate=lambda progress: 1e-3 * progress)
    model.learn(20)
    observations = observations_of(model)
    other = small(algorithm, seed=4)
    assert not np.array_equal(mode(other, observations), mode(model, observations))
    other.set_parameters(model.get_parameters())
    np.testing.assert_array_equal(mode(other, observations), mode(model, observations))
    model.save(file := io.BytesIO())
    file.seek(0)
    objects = {"learning_rate": 0.25, "lr_schedule": lambda _: 0.25, "gamma": 0.5}
    loaded = algorithm.load(file, env=TinyEnv(), custom_objects=objects)
    assert loaded.gamma == 0.5
    loaded.learn(12, reset_num_timesteps=False)
    assert {group["lr"] for net in (loaded.actor, loaded.critic) for group in net.optimizer.param_groups} == {0.25}


@both
def test_going_on_after_load(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, tiny_envs(2))
    model.learn(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=tiny_envs(2), print_system_info=False, device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer.size() == 15
    loaded.learn(20, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded.replay_buffer.size()) == (50, 25)
    assert loaded._n_updates == model._n_updates + 10
    # 4 episodes in 15 steps of 2 environments are 6, and 4 more
    assert loaded._episode_num == model._episode_num + 4


@pytest.mark.gpu
@both
def test_onto_another_device(algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    model = small(algorithm, device="cuda")
    model.learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    observations = observations_of(model)
    for device in ("cpu", "cuda", "auto"):
        loaded = algorithm.load(tmp_path / "model", env=TinyEnv(), device=device)
        loaded.load_replay_buffer(tmp_path / "buffer")
        assert loaded.device.type == ("cpu" if device == "cpu" else "cuda")
        np.testing.assert_allclose(mode(loaded, observations), mode(model, observations), atol=1e-4)
        loaded.learn(14, reset_num_timesteps=False)
