"""Replay with two action columns, in the plain, dict, n-step and HER forms."""

import io
import pathlib
import pickle
import warnings
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import TinyEnv, differences, everything_learned, goal_envs, small_dipo, tiny_envs
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.buffers import (
    DictReplayBuffer,
    NStepReplayBuffer,
    ReplayBuffer,
    RolloutBuffer,
)
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

import sb3_dipo.dipo
from sb3_dipo import DIPO, DIPODictReplayBuffer, DIPOHerReplayBuffer, DIPONStepReplayBuffer, DIPOReplayBuffer
from sb3_dipo.buffers import with_improved_actions

OBSERVATION_SPACE = spaces.Box(-1e6, 1e6, (2,))
DICT_SPACE = spaces.Dict({"place": spaces.Box(-1e6, 1e6, (2,)), "image": spaces.Box(0, 255, (1, 2, 2), dtype=np.uint8)})
ACTION_SPACE = spaces.Box(-1.0, 1.0, (3,))
CLASSES = [DIPOReplayBuffer, DIPODictReplayBuffer, DIPONStepReplayBuffer]
PLAIN: dict[str, Any] = {"device": "cpu"}
OPTIMIZED: dict[str, Any] = {"device": "cpu", "optimize_memory_usage": True, "handle_timeout_termination": False}


def make(buffer_class: type[Any], rows: int = 10, n_envs: int = 1, **kwargs: Any) -> Any:
    observation_space = DICT_SPACE if issubclass(buffer_class, DictReplayBuffer) else OBSERVATION_SPACE
    return buffer_class(rows * n_envs, observation_space, ACTION_SPACE, n_envs=n_envs, **{**PLAIN, **kwargs})


def action_of(number: int, n_envs: int) -> np.ndarray:
    """The actions of the transition with this number, all different, (n_envs, 3)."""
    return (np.arange(3 * n_envs).reshape(n_envs, 3) + 3 * n_envs * number) / 1e4 - 0.5


def fill(buffer: Any, transitions: int, first: int = 0) -> None:
    """Add transitions whose observations are (number, environment)."""
    for number in range(first, first + transitions):
        observation: Any = np.array([[number, env] for env in range(buffer.n_envs)], dtype=np.float32)
        next_observation: Any = observation + np.array([1, 0], dtype=np.float32)
        if isinstance(buffer.observation_space, spaces.Dict):
            image = np.full((buffer.n_envs, 1, 2, 2), number % 256, dtype=np.uint8)
            observation = {"place": observation, "image": image}
            next_observation = {"place": next_observation, "image": image}
        done = np.zeros(buffer.n_envs)
        infos: list[dict[str, Any]] = [{} for _ in range(buffer.n_envs)]
        buffer.add(observation, next_observation, action_of(number, buffer.n_envs), done + number, done, infos)


def places(batch: Any) -> np.ndarray:
    """(number, environment) of each drawn transition, read from its observation."""
    observations = batch.observations["place"] if isinstance(batch.observations, dict) else batch.observations
    return observations.numpy().astype(int)


def play(vec_env: DummyVecEnv, buffer: Any, steps: int, seed: int = 0) -> None:
    """Fill a replay buffer with random actions, as SB3 does."""
    rng = np.random.default_rng(seed)
    observations: Any = deepcopy(vec_env.reset())
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (vec_env.num_envs, *buffer.action_space.shape)).astype(np.float32)
        next_observations, rewards, dones, infos = vec_env.step(actions)
        last = deepcopy(next_observations)
        for i in np.flatnonzero(dones):
            for key, value in infos[i]["terminal_observation"].items():
                last[key][i] = value
        buffer.add(observations, last, actions, rewards, dones, infos)
        observations = deepcopy(next_observations)


def her_buffer(vec_env: DummyVecEnv, rows: int = 200, **kwargs: Any) -> DIPOHerReplayBuffer:
    return DIPOHerReplayBuffer(
        rows * vec_env.num_envs,
        vec_env.observation_space,
        vec_env.action_space,
        env=vec_env,
        device="cpu",
        n_envs=vec_env.num_envs,
        **kwargs,
    )


def silent(model: DIPO) -> DIPO:
    """Give the agent a logger, so that train() can be called without learn()."""
    model.set_logger(Logger(None, []))
    return model


# ------------------------------------------------------------------------------------------------- two columns


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_class", CLASSES)
def test_improved_actions_start_as_the_actions_and_again_at_wrap_around(buffer_class: type[Any], n_envs: int) -> None:
    buffer = make(buffer_class, 10, n_envs)
    fill(buffer, 10)
    assert buffer.full and buffer.pos == 0
    assert buffer.actions.shape == buffer.improved_actions.shape == (10, n_envs, 3)
    np.testing.assert_array_equal(buffer.improved_actions, buffer.actions)

    rows, envs = np.repeat(np.arange(10), n_envs), np.tile(np.arange(n_envs), 10)
    buffer.update_improved(rows, envs, th.full((10 * n_envs, 3), 0.875))
    assert (buffer.improved_actions == 0.875).all()
    fill(buffer, 4, first=10)
    for row in range(4):
        np.testing.assert_array_equal(buffer.improved_actions[row], action_of(10 + row, n_envs).astype(np.float32))
    assert (buffer.improved_actions[4:] == 0.875).all()
    np.testing.assert_array_equal(buffer.actions[4:], [action_of(n, n_envs).astype(np.float32) for n in range(4, 10)])


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_class", CLASSES)
def test_sampled_rows_and_environments_are_where_the_data_came_from(buffer_class: type[Any], n_envs: int) -> None:
    buffer = make(buffer_class, 20, n_envs)
    fill(buffer, 13)
    batch = buffer.sample_improved(500)
    assert batch.improved_actions.shape == (500, 3) and batch.improved_actions.dtype == th.float32
    assert batch.rows.shape == batch.envs.shape == (500,)
    assert batch.rows.dtype == batch.envs.dtype == np.int64
    np.testing.assert_array_equal(places(batch), np.stack([batch.rows, batch.envs], axis=1))
    expected = np.stack([action_of(row, n_envs)[env] for row, env in zip(batch.rows, batch.envs, strict=True)])
    for actions in (batch.actions, batch.improved_actions):
        np.testing.assert_array_equal(actions.numpy(), expected.astype(np.float32))
    # every place is drawn, and none that was not filled
    assert set(zip(batch.rows, batch.envs, strict=True)) == {(row, env) for row in range(13) for env in range(n_envs)}
    if isinstance(batch.observations, dict):
        np.testing.assert_array_equal(batch.observations["image"][:, 0, 0, 0].numpy(), batch.rows)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("buffer_class", CLASSES)
def test_write_back_round_trip(buffer_class: type[Any], n_envs: int, as_tensor: bool) -> None:
    buffer = make(buffer_class, 20, n_envs)
    fill(buffer, 20)
    actions = buffer.actions.tobytes()
    expected = buffer.improved_actions.copy()
    for _ in range(3):
        batch = buffer.sample_improved(16)
        values = th.rand(16, 3) * 2 - 1
        for row, env, value in zip(batch.rows, batch.envs, values.numpy(), strict=True):
            expected[row, env] = value
        buffer.update_improved(batch.rows, batch.envs, values.requires_grad_() if as_tensor else values.numpy())
        np.testing.assert_array_equal(buffer.improved_actions, expected)
    again = buffer.sample_improved(300)
    np.testing.assert_array_equal(again.improved_actions.numpy(), expected[again.rows, again.envs])
    np.testing.assert_array_equal(again.actions.numpy(), buffer.actions[again.rows, again.envs])
    assert buffer.actions.tobytes() == actions
    # the critic reads the actions taken
    sampled = buffer.sample(300)
    row, env = places(sampled).T
    np.testing.assert_array_equal(sampled.actions.numpy(), buffer.actions[row, env])


def test_of_a_place_drawn_twice_the_last_is_kept() -> None:
    buffer = make(DIPOReplayBuffer, 5, 2)
    fill(buffer, 5)
    rows, envs = np.array([2, 2, 3, 2]), np.array([1, 0, 1, 1])
    values = th.tensor([0.1, 0.2, 0.3, 0.4]).unsqueeze(1).expand(4, 3)
    before = buffer.improved_actions.copy()
    buffer.update_improved(rows, envs, values)
    assert buffer.improved_actions[2, 1] == pytest.approx(0.4)
    assert buffer.improved_actions[2, 0] == pytest.approx(0.2)
    assert buffer.improved_actions[3, 1] == pytest.approx(0.3)
    untouched = np.ones((5, 2), dtype=bool)
    untouched[rows, envs] = False
    np.testing.assert_array_equal(buffer.improved_actions[untouched], before[untouched])


def test_rows_of_minus_one_are_not_written() -> None:
    buffer = make(DIPOReplayBuffer, 5, 2)
    fill(buffer, 5)
    before = buffer.improved_actions.copy()
    buffer.update_improved(np.array([-1, 0, -1]), np.array([1, 1, 0]), th.full((3, 3), 0.75))
    before[0, 1] = 0.75
    np.testing.assert_array_equal(buffer.improved_actions, before)


def test_sampled_actions_are_copies() -> None:
    buffer = make(DIPOReplayBuffer, 5)
    fill(buffer, 5)
    before = deepcopy(buffer)
    batch = buffer.sample_improved(8)
    batch.actions.fill_(9.0)
    batch.improved_actions.fill_(9.0)
    assert same_state(buffer, before)


def test_minibatches_of_critic_and_actor_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = silent(small_dipo())
    model.learn(30)
    drawn: list[np.ndarray] = []
    buffer: Any = model.replay_buffer
    sample, sample_improved = buffer.sample, buffer.sample_improved

    def watched_sample(*args: Any, **kwargs: Any) -> Any:
        drawn.append((batch := sample(*args, **kwargs)).observations.numpy())
        return batch

    def watched_sample_improved(*args: Any, **kwargs: Any) -> Any:
        drawn.append((batch := sample_improved(*args, **kwargs)).observations.numpy())
        return batch

    monkeypatch.setattr(buffer, "sample", watched_sample)
    monkeypatch.setattr(buffer, "sample_improved", watched_sample_improved)
    model.train(2, 8)
    assert len(drawn) == 4
    assert len({batch.tobytes() for batch in drawn}) == 4


@pytest.mark.parametrize(
    "env, policy, kwargs",
    [
        (lambda: TinyEnv(), "MlpPolicy", {}),
        (lambda: tiny_envs(3), "MlpPolicy", {}),
        (lambda: TinyEnv(), "MlpPolicy", {"n_steps": 3}),
        (lambda: TinyEnv(), "MlpPolicy", OPTIMIZED),
        (lambda: tiny_envs(3, observation="dict"), "MultiInputPolicy", {}),
        (lambda: goal_envs(2), "MultiInputPolicy", {"replay_buffer_class": HerReplayBuffer}),
    ],
    ids=["plain", "envs", "n-step", "optimized", "dict", "her"],
)
@pytest.mark.parametrize("buffer_size", [30, 500])
def test_training_never_changes_the_actions_taken(env: Any, policy: str, kwargs: dict[str, Any], buffer_size: int) -> None:
    if kwargs is OPTIMIZED:
        kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = small_dipo(env(), policy, buffer_size=buffer_size, **kwargs)
    model.learn(60)
    buffer: Any = model.replay_buffer
    taken = buffer.actions.copy()
    assert np.abs(taken).max() <= 1
    improved = buffer.improved_actions.copy()
    for _ in range(20):
        model.train(1, 8)
    assert buffer.actions.tobytes() == taken.tobytes()
    filled = buffer.size()
    moved = (buffer.improved_actions[:filled] != improved[:filled]).any(axis=-1)
    assert moved.mean() > 0.2
    assert np.abs(buffer.improved_actions).max() <= 1


def starts_of_ascents(model: DIPO, updates: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, np.ndarray]]:
    """Train, and tell of each update the minibatch of the action gradient and the actions that the ascent started from."""
    batches: list[Any] = []
    starts: list[np.ndarray] = []
    buffer: Any = model.replay_buffer
    sample_improved, ascend = buffer.sample_improved, sb3_dipo.dipo.improve_actions

    def watched_sample(*args: Any, **kwargs: Any) -> Any:
        batches.append(sample_improved(*args, **kwargs))
        return batches[-1]

    def watched_ascent(q_fn: Any, actions: th.Tensor, *args: Any, **kwargs: Any) -> Any:
        starts.append(actions.detach().numpy().copy())
        return ascend(q_fn, actions, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(buffer, "sample_improved", watched_sample)
        patched.setattr(sb3_dipo.dipo, "improve_actions", watched_ascent)
        model.train(updates, 8)
    return list(zip(batches, starts, strict=True))


@pytest.mark.parametrize("make_env, kwargs", [(TinyEnv, {}), (goal_envs, {"replay_buffer_class": HerReplayBuffer})])
def test_persistence_is_switched_on_a_running_agent(
    make_env: Any, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_dipo(make_env(), "MultiInputPolicy" if kwargs else "MlpPolicy", **kwargs)
    model.learn(40)
    buffer: Any = model.replay_buffer
    improved = buffer.improved_actions.copy()
    assert (improved != buffer.actions).any()

    model.persist_improved_actions = False
    for batch, start in starts_of_ascents(model, 5, monkeypatch):
        real = batch.rows >= 0
        np.testing.assert_array_equal(start, batch.actions)
        np.testing.assert_array_equal(start[real], buffer.actions[batch.rows[real], batch.envs[real]])
    assert buffer.improved_actions.tobytes() == improved.tobytes()  # nothing is written

    model.persist_improved_actions = True
    for batch, start in starts_of_ascents(model, 5, monkeypatch):
        np.testing.assert_array_equal(start, batch.improved_actions)
    assert buffer.improved_actions.tobytes() != improved.tobytes()


def test_without_persistence_loaded_improvements_are_not_used(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    improving = small_dipo()
    improving.learn(40)
    improving.save_replay_buffer(tmp_path / "buffer.pkl")
    model = small_dipo(persist_improved_actions=False)
    model.learn(40)
    model.train(10, 8)
    buffer: Any = model.replay_buffer
    assert buffer.improved_actions.tobytes() == buffer.actions.tobytes()
    assert model.logger.name_to_value["train/action_shift"] > 0
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    for batch, start in starts_of_ascents(model, 5, monkeypatch):
        assert isinstance(model.replay_buffer, DIPOReplayBuffer)
        np.testing.assert_array_equal(start, model.replay_buffer.actions[batch.rows, batch.envs])


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("buffer_class", CLASSES)
def test_arrays_exist_before_the_first_transition(buffer_class: type[Any]) -> None:
    buffer = make(buffer_class, 10, 2)
    observations = buffer.observations["place"] if isinstance(buffer.observations, dict) else buffer.observations
    assert buffer.size() == 0 and observations.shape == (10, 2, 2)
    assert buffer.improved_actions.shape == buffer.actions.shape == (10, 2, 3)
    assert buffer.improved_actions.dtype == np.float32
    buffer.reset_improved()


def test_an_agents_arrays_exist_before_the_first_transition() -> None:
    model: Any = small_dipo()
    assert model.replay_buffer.observations.shape == (1000, 1, 3)
    model = small_dipo(goal_envs(2), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    assert model.replay_buffer.observations["desired_goal"].shape == (500, 2, 2)
    assert model.replay_buffer.ep_length.shape == model.replay_buffer.infos.shape == (500, 2)


@pytest.mark.parametrize(
    "buffer_class, sb3_class, kwargs",
    [
        (DIPOReplayBuffer, ReplayBuffer, {}),
        (DIPOReplayBuffer, ReplayBuffer, OPTIMIZED),
        (DIPODictReplayBuffer, DictReplayBuffer, {}),
        (DIPONStepReplayBuffer, NStepReplayBuffer, {}),
    ],
)
def test_arrays_are_those_of_sb3(buffer_class: type[Any], sb3_class: type[Any], kwargs: dict[str, Any]) -> None:
    ours, theirs = make(buffer_class, 7, 2, **kwargs), make(sb3_class, 7, 2, **kwargs)
    fill(ours, 10)
    fill(theirs, 10)
    assert set(vars(ours)) - set(vars(theirs)) == {"improved_actions"}
    for name, value in vars(theirs).items():
        for key, array in value.items() if name.endswith("observations") and isinstance(value, dict) else [("", value)]:
            own = vars(ours)[name][key] if key else vars(ours)[name]
            assert getattr(own, "dtype", None) == getattr(array, "dtype", None)
            np.testing.assert_array_equal(own, array)


@pytest.mark.parametrize("buffer_class", CLASSES)
def test_sb3s_warning_of_low_memory_stays(buffer_class: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_buffers.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.warns(UserWarning, match="does not have apparently enough memory"):
        make(buffer_class, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(buffer_class, 2)


def test_sampling_an_empty_buffer_is_an_error() -> None:
    for sample in ("sample", "sample_improved"):
        with pytest.raises((ValueError, RuntimeError)):
            getattr(make(DIPOReplayBuffer), sample)(4)


# ------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("n_envs", [1, 3])
def test_memory_efficient_variant_never_draws_the_overwritten_row(n_envs: int) -> None:
    buffer = make(DIPOReplayBuffer, 8, n_envs, **OPTIMIZED)
    assert not hasattr(buffer, "next_observations")
    fill(buffer, 5)
    assert set(buffer.sample_improved(400).rows) == set(range(5))
    fill(buffer, 6, first=5)
    assert buffer.full and buffer.pos == 3
    batch = buffer.sample_improved(1000)
    assert set(batch.rows) == set(range(8)) - {3}
    assert set(places(batch)[:, 0]) == set(range(4, 11))
    assert not hasattr(buffer, "next_observations")


def test_full_buffer_draws_every_row() -> None:
    buffer = make(DIPOReplayBuffer, 8)
    fill(buffer, 11)
    assert set(buffer.sample_improved(1000).rows) == set(range(8))


@pytest.mark.parametrize(
    "observation, policy, norm_obs_keys",
    [("vector", "MlpPolicy", None), ("dict", "MultiInputPolicy", None), ("dict", "MultiInputPolicy", ["speed"])],
)
def test_observations_are_normalized(observation: str, policy: str, norm_obs_keys: list[str] | None) -> None:
    env = VecNormalize(tiny_envs(2, observation=observation), norm_obs_keys=norm_obs_keys, clip_obs=1.5)
    model = small_dipo(env, policy)
    model.learn(40)
    buffer: Any = model.replay_buffer
    batch = buffer.sample_improved(64, env)
    if observation == "vector":
        raw = buffer.observations[batch.rows, batch.envs]
        expected: Any = env.normalize_obs(raw)
        assert not np.allclose(raw, expected)
        np.testing.assert_array_equal(batch.observations.numpy(), expected)
        assert buffer.sample_improved(64).observations.abs().max() <= 1  # and without env they are as they came
    else:
        raw = {key: values[batch.rows, batch.envs] for key, values in buffer.observations.items()}
        expected = env.normalize_obs(raw)
        assert not np.allclose(raw["speed"], expected["speed"])
        for key in raw:
            np.testing.assert_array_equal(batch.observations[key].numpy(), expected[key])


def test_training_passes_the_normalization_on(monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(tiny_envs(2))
    model = small_dipo(env)
    model.learn(30)
    buffer: Any = model.replay_buffer
    given: list[Any] = []
    sample_improved = buffer.sample_improved

    def watched(batch_size: int, env: VecNormalize | None = None) -> Any:
        given.append(env)
        return sample_improved(batch_size, env)

    monkeypatch.setattr(buffer, "sample_improved", watched)
    model.train(1, 8)
    assert given == [env]


def test_n_step_returns_are_those_of_sb3() -> None:
    ours, theirs = make(DIPONStepReplayBuffer, 10, n_steps=3, gamma=0.9), make(NStepReplayBuffer, 10, n_steps=3, gamma=0.9)
    for buffer in (ours, theirs):
        fill(buffer, 14)
    np.random.seed(0)
    expected = theirs.sample(50)
    np.random.seed(0)
    drawn = ours.sample(50)
    for value, wanted in zip(drawn, expected, strict=True):
        assert th.equal(value, wanted)
    assert drawn.discounts is not None and drawn.discounts.min() == pytest.approx(0.9**3)


# ------------------------------------------------------------------------------------------------- files, copies


def same_state(first: Any, second: Any) -> bool:
    """Whether two buffers hold the same, whatever it is, in arrays of the same shape and type."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, np.ndarray) and one.dtype == object:
            return one.shape == other.shape and all(map(same, one.flat, other.flat))
        if isinstance(one, np.ndarray):
            return one.dtype == other.dtype and np.array_equal(one, other)
        return bool(one == other)

    return type(first) is type(second) and same(vars(first), vars(second))


def pickled(buffer: Any) -> Any:
    return pickle.loads(pickle.dumps(buffer))


@pytest.mark.parametrize("copied", [pickled, deepcopy])
@pytest.mark.parametrize("transitions", [0, 3, 5, 6, 8])
@pytest.mark.parametrize("buffer_class, kwargs", [*[(each, {}) for each in CLASSES], (DIPOReplayBuffer, OPTIMIZED)])
def test_copies(buffer_class: type[Any], kwargs: dict[str, Any], transitions: int, copied: Any) -> None:
    buffer = make(buffer_class, 6, 2, **kwargs)
    fill(buffer, transitions)
    if transitions:
        batch = buffer.sample_improved(5)
        buffer.update_improved(batch.rows, batch.envs, th.zeros(5, 3))
    copy = copied(buffer)
    assert same_state(copy, buffer)
    # they share no memory, and go on alike, also where they wrap around
    fill(copy, 4, first=transitions)
    assert not same_state(copy, buffer)
    fill(buffer, 4, first=transitions)
    assert same_state(copy, buffer)
    drawn = []
    for each in (buffer, copy):
        np.random.seed(0)
        drawn.append(np.stack([places(each.sample(50)), places(each.sample_improved(50))]))
    np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("copied", [pickled, deepcopy])
@pytest.mark.parametrize("rows, steps", [(3, 1), (200, 0), (200, 20), (17, 16), (17, 60)])
def test_copies_of_her(rows: int, steps: int, copied: Any) -> None:
    vec_env = goal_envs(3)
    buffer: Any = her_buffer(vec_env, rows, copy_info_dict=True)
    play(vec_env, buffer, steps)
    if (buffer.ep_length > 0).any():
        batch = buffer.sample_improved(20)
        buffer.update_improved(batch.rows, batch.envs, th.zeros(20, 2))
        assert (buffer.improved_actions != buffer.actions).any()
    copy = copied(buffer)
    assert copy.env is None
    copy.set_env(vec_env)
    assert same_state(copy, buffer)
    continued = deepcopy(vec_env.envs)
    for each in (buffer, copy):
        vec_env.envs = deepcopy(continued)
        play(vec_env, each, 12, seed=1)
    assert same_state(copy, buffer)
    copy.sample(8)
    copy.sample_improved(8)


@pytest.mark.parametrize("buffer_class", [*CLASSES, DIPOHerReplayBuffer])
def test_only_filled_rows_are_saved(buffer_class: type[Any]) -> None:
    if buffer_class is DIPOHerReplayBuffer:
        vec_env = goal_envs()
        buffer: Any = her_buffer(vec_env, 100_000)
        play(vec_env, buffer, 20)
    else:
        buffer = make(buffer_class, 100_000)
        fill(buffer, 20)
    assert len(pickle.dumps(buffer)) < 10_000
    assert len(pickled(buffer).improved_actions) == 100_000


def test_an_agents_file_holds_only_filled_rows(tmp_path: pathlib.Path) -> None:
    model = small_dipo(buffer_size=1_000_000)
    model.learn(20)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    assert (tmp_path / "buffer.pkl").stat().st_size < 10_000
    before = model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is not before and same_state(model.replay_buffer, before)


class WeightedBuffer(DIPOReplayBuffer):
    """A user's own, with an array of its own that is not empty where no transition is stored."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weights = np.ones((self.buffer_size, self.n_envs))


@pytest.mark.parametrize("copied", [pickled, deepcopy])
def test_what_a_subclass_adds_is_copied_as_it_is(copied: Any) -> None:
    buffer = make(WeightedBuffer, 6, 2)
    fill(buffer, 3)
    assert same_state(copied(buffer), buffer)


OLD_FILES = pathlib.Path(__file__).parent / "data" / "version_0_1"


def test_a_file_of_the_old_version() -> None:
    model = small_dipo(gym.make("Pendulum-v1"), buffer_size=60)
    model.load_replay_buffer(OLD_FILES / "replay_buffer.pkl")
    buffer: Any = model.replay_buffer
    expected = np.load(OLD_FILES / "expected.npz")
    np.testing.assert_array_equal(buffer.actions, expected["taken"])
    np.testing.assert_array_equal(buffer.improved_actions, expected["improved"])
    assert (expected["improved"] != expected["taken"]).any() and buffer.size() == 40
    assert vars(buffer).keys() == vars(make(DIPOReplayBuffer)).keys()
    model.learn(30)
    assert buffer.full


def test_an_empty_file_of_the_old_version() -> None:
    """It holds no arrays, which that version allocated at the first transition."""
    vec_env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=True)] * 2)
    buffer = load_from_pkl(OLD_FILES / "empty_her_replay_buffer.pkl")
    buffer.set_env(vec_env)
    assert same_state(buffer, her_buffer(vec_env, 10, copy_info_dict=True))
    play(vec_env, buffer, 30)
    buffer.sample(8)


# ------------------------------------------------------------------------------------------------- HER


@pytest.mark.parametrize("rows", [200, 17], ids=["", "wrapped"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_her_relabels_with_goals_of_the_same_episodes_future(n_envs: int, rows: int) -> None:
    vec_env = goal_envs(n_envs)
    buffer = her_buffer(vec_env, rows)
    play(vec_env, buffer, 60)
    assert buffer.full == (rows == 17)
    taken = buffer.actions.copy()
    filled = np.indices((buffer.size(), n_envs)).reshape(2, -1)
    buffer.update_improved(filled[0], filled[1], np.full((filled.shape[1], 2), 0.125, dtype=np.float32))

    offsets = set()
    for _ in range(5):
        batch = buffer.sample_improved(100)
        assert isinstance(batch.observations, dict)
        achieved, desired = (batch.observations[key].numpy() for key in ("achieved_goal", "desired_goal"))
        relabelled = batch.rows == -1
        assert relabelled.sum() == 80  # 4 of 5
        # a goal that is reached later in the same episode
        np.testing.assert_array_equal(desired[relabelled, 0], achieved[relabelled, 0])
        offset = desired[relabelled, 1] - achieved[relabelled, 1]
        assert (offset >= 1).all() and (desired[relabelled, 1] <= 2 + achieved[relabelled, 0] % 4).all()
        offsets |= set(offset)
        # which climbs from the action taken there
        stored = {tuple(goal): taken[place] for place, goal in _stored_goals(buffer)}
        start = batch.improved_actions.numpy()
        expected = np.array([stored[tuple(goal)] for goal in achieved[relabelled]])
        np.testing.assert_array_equal(start[relabelled], expected)
        np.testing.assert_array_equal(batch.actions[relabelled], expected)
        # real ones keep their goal and their improvement, and say where they came from
        assert (desired[~relabelled] == [-1, 0]).all()
        assert (start[~relabelled] == 0.125).all()
        kept, envs = batch.rows[~relabelled], batch.envs[~relabelled]
        np.testing.assert_array_equal(batch.actions[~relabelled], taken[kept, envs])
        np.testing.assert_array_equal(achieved[~relabelled], buffer.observations["achieved_goal"][kept, envs])
        # and only whole episodes are drawn
        assert (buffer.ep_length[kept, envs] > 0).all()
    assert offsets == {1, 2, 3, 4, 5}
    assert set(np.unique(buffer.observations["desired_goal"][: buffer.size()])) == {-1, 0}  # the stored goals stay

    improved = buffer.improved_actions.copy()
    batch = buffer.sample_improved(100)
    buffer.update_improved(batch.rows, batch.envs, th.full((100, 2), -0.25))
    real = batch.rows >= 0
    improved[batch.rows[real], batch.envs[real]] = -0.25
    np.testing.assert_array_equal(buffer.improved_actions, improved)
    np.testing.assert_array_equal(buffer.actions, taken)


def _stored_goals(buffer: DIPOHerReplayBuffer) -> list[tuple[tuple[int, int], np.ndarray]]:
    places = [(row, env) for row in range(buffer.size()) for env in range(buffer.n_envs)]
    return [(place, buffer.observations["achieved_goal"][place]) for place in places]


def test_her_without_relabelling() -> None:
    vec_env = goal_envs()
    buffer = her_buffer(vec_env, n_sampled_goal=0)
    play(vec_env, buffer, 20)
    assert (buffer.sample_improved(50).rows >= 0).all()


def test_her_relabels_the_same_share_as_sb3() -> None:
    vec_env = goal_envs()
    buffer = her_buffer(vec_env, n_sampled_goal=2)
    play(vec_env, buffer, 20)
    for batch_size in (1, 2, 10, 100):
        desired = buffer.sample(batch_size).observations["desired_goal"]
        assert (buffer.sample_improved(batch_size).rows == -1).sum() == (desired[:, 0] != -1).sum()


def test_her_normalizes_the_relabelled_goals() -> None:
    vec_env = goal_envs()
    env = VecNormalize(vec_env, clip_obs=1e9)
    env.reset()
    for _ in range(30):
        env.step(np.zeros((1, 2)))
    buffer = her_buffer(vec_env)
    play(vec_env, buffer, 30)
    batch = buffer.sample_improved(50, env)
    assert isinstance(batch.observations, dict)
    back = env.unnormalize_obs({key: value.numpy() for key, value in batch.observations.items()})
    assert isinstance(back, dict)
    relabelled = batch.rows == -1
    np.testing.assert_allclose(back["desired_goal"][relabelled, 0], back["achieved_goal"][relabelled, 0], atol=1e-2)
    assert env.obs_rms["achieved_goal"].mean[0] > 1


@pytest.mark.parametrize("sample", ["sample", "sample_improved"])
def test_her_cannot_sample_before_the_end_of_the_first_episode(sample: str) -> None:
    vec_env = goal_envs()
    buffer = her_buffer(vec_env)
    with pytest.raises(RuntimeError, match="before the end of the first episode"):
        getattr(buffer, sample)(4)
    play(vec_env, buffer, 1)
    with pytest.raises(RuntimeError, match="before the end of the first episode"):
        getattr(buffer, sample)(4)
    play(vec_env, buffer, 5)
    getattr(buffer, sample)(4)


def test_her_keeps_the_infos_where_asked_to() -> None:
    vec_env = goal_envs()
    buffer = her_buffer(vec_env, copy_info_dict=True)
    play(vec_env, buffer, 10)
    assert buffer.sample(16).rewards.shape == (16, 1)


# ------------------------------------------------------------------------------------------------- choice of the class


@pytest.mark.parametrize(
    "given, kwargs, expected",
    [
        (None, {}, DIPOReplayBuffer),
        (ReplayBuffer, {}, DIPOReplayBuffer),
        (DIPOReplayBuffer, {}, DIPOReplayBuffer),
        (None, {"n_steps": 3}, DIPONStepReplayBuffer),
        (ReplayBuffer, {"n_steps": 3}, DIPONStepReplayBuffer),
        (NStepReplayBuffer, {"n_steps": 3}, DIPONStepReplayBuffer),
        (DIPONStepReplayBuffer, {"n_steps": 3}, DIPONStepReplayBuffer),
        (NStepReplayBuffer, {"replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.9}, "gamma": 0.9}, DIPONStepReplayBuffer),
    ],
)
def test_class_for_vectors(given: type[ReplayBuffer] | None, kwargs: dict[str, Any], expected: type[ReplayBuffer]) -> None:
    model = small_dipo(replay_buffer_class=given, **kwargs)  # a warning would be an error here
    assert type(model.replay_buffer) is expected
    assert model.replay_buffer_class is (None if given is None else expected)
    if isinstance(model.replay_buffer, DIPONStepReplayBuffer):
        assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, model.gamma)
    model.learn(20)


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, DIPODictReplayBuffer),
        (DictReplayBuffer, DIPODictReplayBuffer),
        (DIPODictReplayBuffer, DIPODictReplayBuffer),
        (HerReplayBuffer, DIPOHerReplayBuffer),
        (DIPOHerReplayBuffer, DIPOHerReplayBuffer),
    ],
)
def test_class_for_dicts(given: type[ReplayBuffer] | None, expected: type[ReplayBuffer]) -> None:
    model = small_dipo(goal_envs(2), "MultiInputPolicy", replay_buffer_class=given)
    assert type(model.replay_buffer) is expected
    assert model.replay_buffer_class is (None if given is None else expected)
    model.learn(20)


def test_arguments_of_the_buffer_are_passed_on() -> None:
    kwargs = {"n_sampled_goal": 2, "goal_selection_strategy": "final"}
    before = dict(kwargs)
    model = small_dipo(
        goal_envs(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=kwargs, buffer_size=77
    )
    assert isinstance(model.replay_buffer, DIPOHerReplayBuffer)
    assert model.replay_buffer.n_sampled_goal == 2 and model.replay_buffer.buffer_size == 77
    assert kwargs == before
    model = small_dipo(n_steps=2, replay_buffer_kwargs=(n_step_kwargs := {"handle_timeout_termination": False}))
    assert model.replay_buffer is not None and not model.replay_buffer.handle_timeout_termination
    assert n_step_kwargs == {"handle_timeout_termination": False}


@pytest.mark.parametrize("given, named", [(None, False), (ReplayBuffer, True), (DIPOReplayBuffer, True)])
def test_a_class_that_was_not_named_is_chosen_again_where_the_agent_is_loaded(
    given: type[ReplayBuffer] | None, named: bool, tmp_path: pathlib.Path
) -> None:
    """So an agent saved on a CPU can have its replay data on the device where it is loaded."""
    model = small_dipo(replay_buffer_class=given)
    for number in range(2):
        assert (model.replay_buffer_class is DIPOReplayBuffer) == named
        model.save(tmp_path / str(number))
        model = DIPO.load(tmp_path / str(number), env=TinyEnv())
        assert type(model.replay_buffer) is DIPOReplayBuffer


class OtherBuffer(ReplayBuffer):
    """Stores no improved actions."""


@pytest.mark.parametrize("given", [OtherBuffer, RolloutBuffer])
def test_class_without_improved_actions(given: type[Any]) -> None:
    with pytest.raises(
        ValueError, match="`replay_buffer_class` must store improved actions.*DIPOReplayBuffer.*not " + given.__name__
    ):
        small_dipo(replay_buffer_class=given)


class CountingBuffer(DIPOReplayBuffer):
    """A user's own."""


def test_users_own_subclass_is_kept() -> None:
    model = small_dipo(replay_buffer_class=CountingBuffer)
    model.learn(20)
    assert type(model.replay_buffer) is CountingBuffer


def test_what_sac_refuses() -> None:
    def error_of(make_model: Any, *args: Any, **kwargs: Any) -> BaseException:
        with pytest.raises((AssertionError, ValueError, NotImplementedError)) as caught:
            make_model(*args, **kwargs)
        return caught.value

    refused: list[tuple[tuple[TinyEnv, str], dict[str, Any]]] = [
        ((TinyEnv(), "MlpPolicy"), {"optimize_memory_usage": True}),
        ((TinyEnv(observation="dict"), "MultiInputPolicy"), {"n_steps": 3}),
        (
            (TinyEnv(), "MlpPolicy"),
            {"n_steps": 3, "optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        ),
    ]
    for (env, policy), kwargs in refused:
        ours = error_of(small_dipo, env, policy, **deepcopy(kwargs))
        theirs = error_of(SAC, policy, env, device="cpu", **deepcopy(kwargs))
        assert type(ours) is type(theirs) and str(ours).split("\n")[0] == str(theirs).split("\n")[0]


def test_arguments_given_for_the_n_step_buffer_survive_save_and_load(tmp_path: pathlib.Path) -> None:
    model = small_dipo(n_steps=3, gamma=0.99, replay_buffer_kwargs={"gamma": 0.5})
    model.save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv())
    assert isinstance(model.replay_buffer, DIPONStepReplayBuffer) and isinstance(loaded.replay_buffer, DIPONStepReplayBuffer)
    assert loaded.replay_buffer.gamma == model.replay_buffer.gamma


# ------------------------------------------------------------------------------------------------- loading a buffer


@pytest.mark.parametrize(
    "make_env, policy, kwargs",
    [
        (TinyEnv, "MlpPolicy", {}),
        (lambda: tiny_envs(3), "MlpPolicy", {}),
        (TinyEnv, "MlpPolicy", {"n_steps": 3}),
        (lambda: TinyEnv(observation="dict"), "MultiInputPolicy", {}),
        (goal_envs, "MultiInputPolicy", {"replay_buffer_class": HerReplayBuffer}),
    ],
    ids=["plain", "envs", "n-step", "dict", "her"],
)
@pytest.mark.parametrize("buffer_size", [1000, 24], ids=["", "full"])
@pytest.mark.filterwarnings("ignore:The last trajectory in the replay buffer will be truncated")
def test_buffer_saved_by_sac(
    make_env: Any, policy: str, kwargs: dict[str, Any], buffer_size: int, tmp_path: pathlib.Path
) -> None:
    sac = SAC(policy, make_env(), buffer_size=buffer_size, learning_starts=100, device="cpu", seed=0, **deepcopy(kwargs))
    sac.learn(40)
    sac.save_replay_buffer(tmp_path / "sac.pkl")
    model = small_dipo(make_env(), policy, buffer_size=buffer_size, **deepcopy(kwargs))
    expected_class = type(model.replay_buffer)
    model.load_replay_buffer(tmp_path / "sac.pkl")
    buffer: Any = model.replay_buffer
    assert sac.replay_buffer is not None and type(model.replay_buffer) is expected_class
    np.testing.assert_array_equal(buffer.actions, sac.replay_buffer.actions)
    np.testing.assert_array_equal(buffer.improved_actions, buffer.actions)
    assert buffer.improved_actions is not buffer.actions
    silent(model).train(5, 8)
    assert (buffer.improved_actions != buffer.actions).any()
    np.testing.assert_array_equal(buffer.actions, sac.replay_buffer.actions)
    model.learn(20)


@pytest.mark.parametrize(
    "make_env, policy, sb3_class, kwargs",
    [
        (lambda: tiny_envs(2), "MlpPolicy", ReplayBuffer, {}),
        (lambda: tiny_envs(2), "MlpPolicy", NStepReplayBuffer, {"n_steps": 3}),
        (lambda: tiny_envs(2, observation="dict"), "MultiInputPolicy", DictReplayBuffer, {}),
        (lambda: goal_envs(2), "MultiInputPolicy", HerReplayBuffer, {"replay_buffer_class": HerReplayBuffer}),
    ],
    ids=["plain", "n-step", "dict", "her"],
)
def test_a_buffer_of_sb3_that_is_put_into_an_agent(
    make_env: Any, policy: str, sb3_class: type[Any], kwargs: dict[str, Any]
) -> None:
    model: Any = small_dipo(make_env(), policy, **kwargs)
    expected_class = type(model.replay_buffer)
    of_her = {"env": model.env} if sb3_class is HerReplayBuffer else {}
    buffer = sb3_class(100, model.observation_space, model.action_space, n_envs=2, device="cpu", **of_her)
    model.replay_buffer = buffer
    model.learn(60)
    ours = model.replay_buffer
    assert type(ours) is expected_class and ours.actions is buffer.actions and ours.rewards is buffer.rewards
    assert (ours.improved_actions != ours.actions).any()


def test_a_buffer_that_cannot_be_converted_is_refused_by_name() -> None:
    model = small_dipo()
    model.learn(20)
    model.replay_buffer = OtherBuffer(100, model.observation_space, model.action_space, device="cpu")
    with pytest.raises(ValueError, match="A OtherBuffer stores no improved actions and cannot be converted"):
        model.learn(20)


def test_a_converted_buffer_shares_its_arrays() -> None:
    source = make(ReplayBuffer, 6, 2)
    fill(source, 4)
    converted = with_improved_actions(source)
    assert type(converted) is DIPOReplayBuffer and converted.observations is source.observations
    np.testing.assert_array_equal(converted.improved_actions, source.actions)
    converted.update_improved(np.array([0]), np.array([0]), np.ones((1, 3)))
    assert (source.actions != 1).all()
    assert with_improved_actions(converted) is converted


def test_saved_improvements_are_loaded(tmp_path: pathlib.Path) -> None:
    model = small_dipo()
    model.learn(40)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = small_dipo(seed=1)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    names = ("actions", "improved_actions")
    first, second = everything_learned(model), everything_learned(other)
    assert not differences({name: first[name] for name in names}, {name: second[name] for name in names})
    assert not th.equal(first["actions"], first["improved_actions"])


def test_buffer_from_an_open_file() -> None:
    model, file = small_dipo(), io.BytesIO()
    model.learn(20)
    model.save_replay_buffer(file)
    file.seek(0)
    model.load_replay_buffer(file)


@pytest.mark.parametrize(
    "other, name",
    [
        (lambda: tiny_envs(2), "n_envs"),
        (lambda: TinyEnv(spaces.Box(-2.0, 2.0, (2,))), "action_space"),
        (lambda: TinyEnv(spaces.Box(-1.0, 1.0, (3,))), "action_space"),
        (lambda: TinyEnv(observation="image"), "observation_space"),
    ],
)
@pytest.mark.parametrize("algorithm", [DIPO, SAC])
def test_buffer_that_does_not_fit_is_refused(other: Any, name: str, algorithm: type[Any], tmp_path: pathlib.Path) -> None:
    algorithm("MlpPolicy", other(), learning_starts=100, buffer_size=50, device="cpu").save_replay_buffer(tmp_path / "b.pkl")
    model = small_dipo()
    model.learn(20)
    own, before = model.replay_buffer, everything_learned(model)
    with pytest.raises(ValueError, match=name):
        model.load_replay_buffer(tmp_path / "b.pkl")
    assert model.replay_buffer is own and not differences(before, everything_learned(model))
    model.train(1, 8)


@pytest.mark.parametrize("content", [{"not": "a buffer"}, OtherBuffer, RolloutBuffer])
def test_file_that_holds_no_usable_buffer(content: Any, tmp_path: pathlib.Path) -> None:
    if isinstance(content, type):
        content = content(5, TinyEnv().observation_space, TinyEnv().action_space, device="cpu")
    save_to_pkl(tmp_path / "b.pkl", content)
    model = small_dipo()
    own = model.replay_buffer
    with pytest.raises((AssertionError, ValueError), match=r"[Bb]uffer"):
        model.load_replay_buffer(tmp_path / "b.pkl")
    assert model.replay_buffer is own


def test_file_that_is_no_pickle() -> None:
    model = small_dipo()
    own = model.replay_buffer
    with pytest.raises(pickle.UnpicklingError):
        model.load_replay_buffer(io.BytesIO(b"hello"))
    assert model.replay_buffer is own


def test_her_truncates_the_last_episode_as_sb3(tmp_path: pathlib.Path) -> None:
    model = small_dipo(goal_envs(), "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    model.learn(31)
    assert isinstance(model.replay_buffer, DIPOHerReplayBuffer)
    assert model.replay_buffer._current_ep_start[0] != model.replay_buffer.pos
    model.save_replay_buffer(tmp_path / "b.pkl")
    with pytest.warns(UserWarning, match="The last trajectory in the replay buffer will be truncated"):
        model.load_replay_buffer(tmp_path / "b.pkl")
    assert model.replay_buffer._current_ep_start[0] == model.replay_buffer.pos
    model.load_replay_buffer(tmp_path / "b.pkl", truncate_last_traj=False)
    assert model.replay_buffer._current_ep_start[0] != model.replay_buffer.pos
    model.train(1, 8)


class BufferWithItsOwn(DIPOReplayBuffer):
    """What it keeps has the names of what SB3's buffers for hindsight keep, but not their shapes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ep_length = np.zeros(self.n_envs)
        self.infos: list[Any] = []

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
        super().add(obs, next_obs, action, reward, done, infos)
        self.ep_length += 1
        self.infos.append(infos)


def test_what_a_buffer_of_ones_own_holds_is_saved_as_it_is() -> None:
    buffer = make(BufferWithItsOwn, n_envs=2)
    fill(buffer, 3)
    for copied in (pickle.loads(pickle.dumps(buffer)), deepcopy(buffer)):
        np.testing.assert_array_equal(copied.ep_length, [3.0, 3.0])
        assert len(copied.infos) == 3
        np.testing.assert_array_equal(copied.observations, buffer.observations)
