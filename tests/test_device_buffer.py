"""Replay on the device: it holds, draws and writes what the NumPy buffer does, without a word to the host."""

import io
import pathlib
import pickle
import warnings
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TinyEnv, small_dipo, tiny_envs
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import VecNormalize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_dipo import DIPO, DIPONStepReplayBuffer, DIPOReplayBuffer, load_checkpoint, save_checkpoint
from sb3_dipo.fast.device_buffer import COLUMNS, DIPODeviceReplayBuffer, as_storage, fits_on_device

OBSERVATION_SPACE = spaces.Box(-1e6, 1e6, (2, 3))
ACTION_SPACE = spaces.Box(-1.0, 1.0, (2, 1))
VALUES = st.floats(-1, 1, width=32)
OLD_FILES = pathlib.Path(__file__).parent / "data" / "version_0_1"


def make(
    buffer_class: type[Any] = DIPODeviceReplayBuffer,
    rows: int = 10,
    n_envs: int = 1,
    observation_space: spaces.Space = OBSERVATION_SPACE,
    **kwargs: Any,
) -> Any:
    return buffer_class(rows * n_envs, observation_space, ACTION_SPACE, **{"device": "cpu", "n_envs": n_envs, **kwargs})


def fill(transitions: int, *buffers: Any, seed: int = 0) -> None:
    """Add the same random transitions to each buffer, of the types that environments give; no two alike."""
    rng = np.random.default_rng(seed)
    n_envs = buffers[0].n_envs
    for _ in range(transitions):
        done = rng.random(n_envs) < 0.5
        arguments: list[Any] = [
            rng.normal(50, 3, (n_envs, *OBSERVATION_SPACE.shape)).astype(buffers[0].observation_space.dtype),
            rng.normal(50, 3, (n_envs, *OBSERVATION_SPACE.shape)).astype(buffers[0].observation_space.dtype),
            rng.uniform(-1, 1, (n_envs, *ACTION_SPACE.shape)).astype(np.float32),
            rng.normal(-100, 9, n_envs),
            done,
            [{"TimeLimit.truncated": True} if end and rng.random() < 0.5 else {} for end in done],
        ]
        for buffer in buffers:
            buffer.add(*arguments)


def pair(transitions: int = 0, rows: int = 10, n_envs: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    """A buffer on the device, and one of NumPy that holds the same."""
    ours, oracle = make(DIPODeviceReplayBuffer, rows, n_envs, **kwargs), make(DIPOReplayBuffer, rows, n_envs, **kwargs)
    fill(transitions, ours, oracle)
    return ours, oracle


def assert_same(ours: Any, oracle: Any) -> None:
    assert (ours.pos, ours.full, ours.size(), ours.buffer_size) == (oracle.pos, oracle.full, oracle.size(), oracle.buffer_size)
    for name in COLUMNS:
        values, expected = np.asarray(getattr(ours, name)), np.asarray(getattr(oracle, name))
        assert values.shape == expected.shape and values.dtype == np.float32
        np.testing.assert_array_equal(values, expected.astype(np.float32))


def places_of(actions: th.Tensor, buffer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where the actions of a minibatch are stored."""
    alike = (np.asarray(buffer.actions)[None] == actions.numpy()[:, None, None]).all(axis=-1)
    assert (alike.sum(axis=(1, 2)) == 1).all()
    _, rows, envs = alike.nonzero()
    return rows, envs


# ------------------------------------------------------------------------------------------------- as the NumPy buffer


@pytest.mark.parametrize("timeouts", [True, False])
@pytest.mark.parametrize("transitions", [0, 1, 7, 10, 23])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_it_holds_what_the_numpy_buffer_holds(n_envs: int, transitions: int, timeouts: bool) -> None:
    ours, oracle = pair(transitions, n_envs=n_envs, handle_timeout_termination=timeouts)
    assert_same(ours, oracle)
    if transitions > 1:
        assert ours.dones.any() and ours.timeouts.any() == timeouts


def test_float64_observations_are_stored_in_float32() -> None:
    ours, oracle = pair(13, observation_space=spaces.Box(-1e6, 1e6, (2, 3), np.float64))
    assert oracle.observations.dtype == np.float64 and ours.sample(3).observations.dtype == th.float32
    assert_same(ours, oracle)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_shapes_of_observations(shape: tuple[int, ...]) -> None:
    space = spaces.Box(-1.0, 1.0, shape)
    ours, oracle = make(observation_space=space), make(DIPOReplayBuffer, observation_space=space)
    for buffer in (ours, oracle):
        space.seed(0)
        for _ in range(4):
            observations = space.sample()[None], space.sample()[None]
            buffer.add(*observations, np.zeros((1, 2, 1)), np.zeros(1), np.zeros(1), [{}])
    assert_same(ours, oracle)
    for drawn, expected in zip(ours.sample(5), oracle.sample(5), strict=True):
        assert drawn is expected is None or drawn.shape == expected.shape


OPERATIONS = st.lists(
    st.one_of(
        *[st.tuples(st.just("add"), st.integers(1, 3), st.booleans())] * 2,
        *[
            st.tuples(
                st.just("write"),
                st.lists(st.tuples(st.integers(-2, 9), st.integers(0, 2), VALUES), max_size=8),
                st.booleans(),
            )
        ]
        * 2,
        st.tuples(st.sampled_from(["copy", "convert"]), st.just(None), st.booleans()),
        st.tuples(st.sampled_from(["reset", "reset_improved"]), st.just(None), st.just(False)),
    ),
    min_size=3,
    max_size=15,
)


@given(operations=OPERATIONS, rows=st.integers(1, 5), n_envs=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_any_sequence(operations: list[Any], rows: int, n_envs: int) -> None:
    ours, oracle = pair(rows=rows, n_envs=n_envs)
    for number, (operation, content, flag) in enumerate(operations):
        if operation == "add":
            fill(content, ours, oracle, seed=number)
        elif operation == "write":
            places = [(row if row < 0 else row % rows, env % n_envs, value) for row, env, value in content]
            row_list, env_list, values = ([place[i] for place in places] for i in range(3))
            actions = np.array([[value, -value] for value in values], np.float64).reshape(-1, 2)
            where = np.array(row_list, dtype=np.int64), np.array(env_list, dtype=np.int64)
            oracle.update_improved(*where, actions)
            if flag:
                ours.update_improved(*map(th.from_numpy, where), th.from_numpy(actions).requires_grad_())
            else:
                ours.update_improved(*where, actions)
        elif operation == "copy":
            oracle = pickle.loads(pickle.dumps(oracle)) if flag else deepcopy(oracle)
            ours = pickle.loads(pickle.dumps(ours)) if flag else deepcopy(ours)
        elif operation == "convert":
            ours = as_storage(as_storage(ours, DIPOReplayBuffer), DIPODeviceReplayBuffer)
            oracle = deepcopy(oracle)  # here, too, what is not filled is left behind
        elif operation == "reset":
            ours.reset()
            oracle.reset()
        elif operation == "reset_improved":
            ours.reset_improved()
            oracle.reset_improved()
        assert_same(ours, oracle)
        if ours.size():
            assert (ours.sample_improved(20).rows < ours.size()).all()


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("transitions", [4, 10, 23])
def test_minibatches_are_what_was_added(n_envs: int, transitions: int) -> None:
    ours, oracle = pair(transitions, n_envs=n_envs)
    improved = th.rand(10, n_envs, 2)
    ours.improved_actions.copy_(improved)

    th.manual_seed(0)
    drawn = ours.sample(400)
    rows, envs = places_of(drawn.actions, oracle)
    assert set(zip(rows, envs, strict=True)) == {(row, env) for row in range(oracle.size()) for env in range(n_envs)}
    dones = oracle.dones * (1 - oracle.timeouts)
    expected = {
        "observations": oracle.observations[rows, envs],
        "actions": oracle.actions[rows, envs],
        "next_observations": oracle.next_observations[rows, envs],
        "dones": dones[rows, envs][:, None],
        "rewards": oracle.rewards[rows, envs][:, None],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(drawn, name).numpy(), values)
        assert getattr(drawn, name).dtype == th.float32
    assert drawn.discounts is None

    batch = ours.sample_improved(200)
    assert batch.rows.dtype == batch.envs.dtype == th.int64 and batch.rows.shape == batch.envs.shape == (200,)
    np.testing.assert_array_equal(batch.observations, oracle.observations[batch.rows, batch.envs])
    np.testing.assert_array_equal(batch.actions, oracle.actions[batch.rows, batch.envs])
    np.testing.assert_array_equal(batch.improved_actions, improved[batch.rows, batch.envs])
    # they are copies
    for tensor in (*drawn[:5], *batch[:3]):
        tensor.fill_(9)
    ours.improved_actions.copy_(ours.actions)
    assert_same(ours, oracle)


def test_rows_that_sb3_asks_for() -> None:
    ours, oracle = pair(10, n_envs=2)
    rows = np.array([3, 0, 3, 9])
    drawn = ours._get_samples(rows)  # a method of SB3's interface
    found, _ = places_of(drawn.actions, oracle)
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("transitions", [1, 9, 31, 32, 50])
def test_every_filled_place_is_equally_likely(transitions: int, n_envs: int, device: str = "cpu") -> None:
    ours = make(rows=32, n_envs=n_envs, device=device)
    fill(transitions, ours)
    th.manual_seed(0)
    draws = 64_000
    batch = ours.sample_improved(draws)
    counts = np.bincount((batch.rows * n_envs + batch.envs).cpu().numpy(), minlength=32 * n_envs)
    filled = ours.size() * n_envs
    assert counts[filled:].sum() == 0 and counts.sum() == draws
    chi_square = ((counts[:filled] - draws / filled) ** 2).sum() / (draws / filled)
    # mean and variance are (filled - 1) and 2 (filled - 1)
    assert abs(chi_square - (filled - 1)) <= 5 * np.sqrt(2 * (filled - 1))


def test_draws_are_uniform_far_beyond_the_resolution_of_float32() -> None:
    """Of 2**25 + 1 rows float32 could not tell neighbours apart; each residue of the row must be equally likely."""
    ours = make(rows=2**25 + 1, observation_space=spaces.Box(-1, 1, ()))
    ours.pos = ours.buffer_size - 1
    ours.add(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
    assert ours.size() == 2**25 + 1
    th.manual_seed(0)
    rows = th.cat([ours.sample_improved(50_000).rows for _ in range(10)]).numpy()
    assert rows.min() >= 0 and rows.max() < 2**25 + 1
    for residues, groups in ((rows % 8, 8), (rows // 2**20, 32)):  # of neighbours, and of wide ranges
        counts = np.bincount(residues, minlength=groups)[:groups]
        expected = len(rows) / groups
        assert ((counts - expected) ** 2 / expected).sum() <= groups - 1 + 5 * np.sqrt(2 * (groups - 1))


def test_draws_are_those_of_torchs_seed() -> None:
    ours, _ = pair(10)
    th.manual_seed(3)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    first, other = ours.sample_improved(50).rows, ours.sample_improved(50).rows
    th.manual_seed(3)
    assert th.equal(ours.sample_improved(50).rows, first) and not th.equal(first, other)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]


def test_of_a_place_drawn_twice_the_last_is_kept() -> None:
    ours, oracle = pair(10, n_envs=2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, envs = rng.integers(-1, 4, 64), rng.integers(0, 2, 64)
        values = rng.uniform(-1, 1, (64, 2)).astype(np.float32)
        ours.update_improved(th.from_numpy(rows), th.from_numpy(envs), th.from_numpy(values))
        oracle.update_improved(rows, envs, values)
        assert_same(ours, oracle)


def test_actions_never_change() -> None:
    ours, _ = pair(10, n_envs=2)
    before = {name: getattr(ours, name).clone() for name in COLUMNS}
    for _ in range(5):
        batch = ours.sample_improved(16)
        ours.update_improved(batch.rows, batch.envs, th.rand(16, 2))
    assert [name for name in COLUMNS if not th.equal(getattr(ours, name), before[name])] == ["improved_actions"]


def test_other_methods_of_sb3() -> None:
    ours, oracle = make(n_envs=2), make(DIPOReplayBuffer, n_envs=2)
    fill(3, source := make(DIPOReplayBuffer, n_envs=2))
    transitions = [getattr(source, name)[:3] for name in COLUMNS[:5]]
    for buffer in (ours, oracle):
        buffer.extend(*transitions, [[{}, {}]] * 3)
    assert_same(ours, oracle)
    for name in COLUMNS:
        flat = ours.swap_and_flatten(getattr(ours, name))
        np.testing.assert_array_equal(flat, oracle.swap_and_flatten(getattr(oracle, name)))
    assert th.equal(ours.to_torch(oracle.rewards), ours.rewards)


def test_sampling_an_empty_buffer_is_an_error() -> None:
    ours = make()
    for transitions in (0, 3):
        fill(transitions, ours)
        ours.reset()
        for sample in (ours.sample, ours.sample_improved):
            with pytest.raises(ValueError, match="empty"):
                sample(4)
    ours = make()
    ours.reset_improved()


# ------------------------------------------------------------------------------------------------- VecNormalize


def normalizer(**kwargs: Any) -> Any:
    """With statistics that are not those at the start."""
    env: Any = VecNormalize(tiny_envs(2), **kwargs)
    rng = np.random.default_rng(0)
    if env.norm_obs:
        env.obs_rms = RunningMeanStd(shape=OBSERVATION_SPACE.shape)
        env.obs_rms.update(rng.normal(49, 2, (100, 2, 3)))
    env.ret_rms.update(rng.normal(0, 30, 100))
    return env


ROUNDING: dict[str, Any] = {"rtol": 3e-7, "atol": 0.0}
"""SB3 normalises in float64 and rounds; we do it in float32."""


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"clip_obs": 0.5, "clip_reward": 0.75}, {"norm_obs": False}, {"norm_reward": False}, {"training": False}],
    ids=str,
)
def test_normalization_is_that_of_sb3(kwargs: dict[str, Any]) -> None:
    ours, oracle = pair(10, n_envs=2)
    env = normalizer(**kwargs)
    drawn = ours.sample(100, env)
    places = places_of(drawn.actions, oracle)  # actions stay as they are
    for name in ("observations", "next_observations"):
        expected = env.normalize_obs(getattr(oracle, name)[places])
        np.testing.assert_allclose(getattr(drawn, name), expected, **ROUNDING)
    np.testing.assert_allclose(drawn.rewards, env.normalize_reward(oracle.rewards[places])[:, None], **ROUNDING)
    np.testing.assert_array_equal(drawn.dones, (oracle.dones * (1 - oracle.timeouts))[places][:, None])
    batch = ours.sample_improved(100, env)
    expected = env.normalize_obs(oracle.observations[batch.rows, batch.envs])
    np.testing.assert_allclose(batch.observations, expected, **ROUNDING)
    np.testing.assert_array_equal(batch.improved_actions, oracle.actions[batch.rows, batch.envs])
    # and without it they are as they came
    assert (ours.sample(50).observations > 30).all()
    assert_same(ours, oracle)


@pytest.mark.parametrize("mean", [1e6, -3e8, 1e-3])
def test_normalization_of_observations_far_from_zero(mean: float) -> None:
    """Near a mean that float32 cannot hold, too, the result is SB3's to rounding."""
    ours, oracle = make(), make(DIPOReplayBuffer)
    deviation = abs(mean) * 1e-6
    for observations in np.random.default_rng(0).normal(mean, deviation, (10, 2, 1, 2, 3)).astype(np.float32):
        for buffer in (ours, oracle):
            buffer.add(*observations, np.zeros((1, 2, 1)), np.zeros(1), np.zeros(1), [{}])
    env = normalizer(clip_obs=1e9)
    env.obs_rms.mean = np.full((2, 3), mean + deviation / 7)
    env.obs_rms.var = np.full((2, 3), deviation**2)
    env.epsilon = 0.0
    batch = ours.sample_improved(50, env)
    expected = env.normalize_obs(oracle.observations[batch.rows, batch.envs])
    np.testing.assert_allclose(batch.observations, expected, **ROUNDING)


def test_statistics_are_taken_when_asked_for() -> None:
    ours, oracle = pair(10, n_envs=2)
    env = normalizer()
    ours.refresh_statistics(env)
    before = deepcopy(env.obs_rms)
    env.obs_rms.update(np.full((1000, 2, 3), 70.0))
    batch = ours.sample_improved(50, env)
    raw = oracle.observations[batch.rows, batch.envs]
    np.testing.assert_allclose(batch.observations, env._normalize_obs(raw, before).astype(np.float32), **ROUNDING)
    ours.refresh_statistics(env)
    ours.refresh_statistics(None)
    batch = ours.sample_improved(50, env)
    expected = env.normalize_obs(oracle.observations[batch.rows, batch.envs])
    np.testing.assert_allclose(batch.observations, expected, **ROUNDING)
    oracle.refresh_statistics(env)


# ------------------------------------------------------------------------------------------------- no word to the host


class NoHost(TorchDispatchMode):
    """Refuses whatever waits for the device, brings tensors of two devices together, or needs float64, which MPS has not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal"), func
        if name in ("index", "index_put", "index_put_"):  # by a mask it counts first
            assert th.bool not in {index.dtype for index in tree_leaves(args[1]) if isinstance(index, th.Tensor)}, func
        result = func(*args, **(kwargs or {}))
        assert th.float64 not in {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, th.Tensor)}, func
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, th.Tensor)}
        assert len(devices) <= 1, func
        return result


@pytest.mark.parametrize("kind", ["meta", "cuda:0"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_updates_say_nothing_to_the_host(n_envs: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = normalizer()
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    # storage that is no memory of the host's, or that of a GPU, which only says which tensors would lie there
    with FakeTensorMode() if kind == "cuda:0" else nullcontext():
        ours = make(n_envs=n_envs, device=kind)
        ours.pos = 4
        if kind == "meta":
            ours.refresh_statistics(env)
        for given_env in (None, env) if kind == "meta" else (None,):
            with NoHost():
                drawn = ours.sample(8, given_env)
                batch = ours.sample_improved(8, given_env)
                ours.update_improved(batch.rows, batch.envs, batch.improved_actions)
            assert {tensor.device for tensor in (*drawn[:5], *batch)} == {th.device(kind)}
            assert [tuple(tensor.shape) for tensor in drawn[:5]] == [(8, 2, 3), (8, 2), (8, 2, 3), (8, 1), (8, 1)]
            assert [tuple(tensor.shape) for tensor in batch] == [(8, 2, 3), (8, 2), (8, 2), (8,), (8,)]
            assert batch.rows.dtype == batch.envs.dtype == th.int64


def test_no_float64_at_all() -> None:
    """Neither where minibatches are drawn, nor where transitions, statistics and other buffers come from the host."""
    source = make(DIPOReplayBuffer, observation_space=spaces.Box(-1e6, 1e6, (2, 3), np.float64))
    fill(4, source)
    env = normalizer()
    with NoHost():
        ours: Any = as_storage(source, DIPODeviceReplayBuffer)
        fill(3, ours)
        ours.refresh_statistics(env)
        ours.sample(8, env)
        batch = ours.sample_improved(8, env)
        ours.update_improved(batch.rows, batch.envs, batch.improved_actions)
        deepcopy(ours).sample(8)


@pytest.mark.parametrize(
    "call",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.to("meta"), lambda x: bool(x[0]), lambda x: x.double()],
)
def test_what_says_something_is_noticed(call: Any) -> None:
    with NoHost(), pytest.raises(AssertionError):
        call(th.ones(3))


def test_what_a_graph_would_hold_stays_true_while_the_buffer_fills() -> None:
    """No tensor is replaced: a captured graph knows them by their place in memory."""
    ours = make(rows=8)
    fill(2, ours)
    env = normalizer()
    ours.refresh_statistics(env)
    held = {name: value for name, value in vars(ours).items() if isinstance(value, th.Tensor)}
    assert set(COLUMNS) <= set(held)
    pointers = {name: value.data_ptr() for name, value in held.items()}
    for transitions in (0, 3, 6):
        fill(transitions, ours, seed=1)
        env.obs_rms.update(np.full((9, 2, 3), 70.0))
        ours.refresh_statistics(env)
        batch = ours.sample_improved(400, env)
        assert set(batch.rows.tolist()) == set(range(ours.size()))
        ours.update_improved(batch.rows, batch.envs, th.zeros(400, 2))
        assert all(vars(ours)[name] is value and value.data_ptr() == pointers[name] for name, value in held.items())
    ours.device = "cpu"
    assert all(vars(ours)[name] is value for name, value in held.items())


@pytest.mark.parametrize(
    "default", [{"device": "meta"}, {"dtype": th.float64}, {"dtype": th.bfloat16}, {"device": "meta", "dtype": th.float64}]
)
def test_torchs_defaults_change_nothing(default: dict[str, Any]) -> None:
    """Every tensor has the dtype and the device of the buffer, whatever torch's defaults are."""

    def everything() -> list[th.Tensor]:
        ours, source = make(n_envs=2), make(DIPOReplayBuffer, n_envs=2)
        fill(4, ours, source)
        env = normalizer()
        found = []
        for buffer in (ours, as_storage(source, DIPODeviceReplayBuffer), pickle.loads(pickle.dumps(ours)), deepcopy(ours)):
            th.manual_seed(0)
            batch: Any = buffer.sample_improved(8, env)
            buffer.update_improved(np.array([0, 2]), np.array([1, 1]), np.ones((2, 2)))
            buffer.update_improved(batch.rows, batch.envs, batch.improved_actions / 2)
            found += [*buffer.sample(8, env)[:5], *batch, *(getattr(buffer, name) for name in COLUMNS)]
            as_storage(buffer, DIPOReplayBuffer).sample_improved(8)
        return found

    expected = everything()
    device, dtype = th.get_default_device(), th.get_default_dtype()
    try:
        th.set_default_device(default.get("device", device))
        th.set_default_dtype(default.get("dtype", dtype))
        found = everything()
    finally:
        th.set_default_device(None)
        th.set_default_dtype(dtype)
    assert all(th.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True))


def test_a_transition_is_one_copy() -> None:
    copied: list[Any] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "copy" in func.overloadpacket.__name__:
                copied.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    ours = make(n_envs=3)
    fill(1, ours)
    with Copies():
        fill(1, ours)
    assert copied == [(3, 6 + 6 + 2 + 1 + 1 + 1 + 2)]


# ------------------------------------------------------------------------------------------------- memory, files


def test_arrays_exist_before_the_first_transition() -> None:
    ours = make()
    assert ours.size() == 0 and ours.observations.shape == (10, 1, 2, 3) and ours.improved_actions.shape == (10, 1, 2)


def test_all_columns_lie_in_one_storage() -> None:
    ours = make(rows=10, n_envs=2)
    assert len({getattr(ours, name).untyped_storage().data_ptr() for name in COLUMNS}) == 1
    assert ours.actions.untyped_storage().nbytes() == 10 * 2 * 19 * 4


def test_memory_of_the_host_is_not_missed_for_storage_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_buffers.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(rows=1000, device="meta")


@pytest.mark.parametrize("transitions", [0, 4, 23])
def test_pickling(transitions: int) -> None:
    ours, oracle = pair(transitions, n_envs=2)
    if transitions:
        where = np.arange(4), np.ones(4, dtype=int)
        for buffer in (ours, oracle):
            buffer.update_improved(*where, np.zeros((4, 2)))
    ours.refresh_statistics(normalizer())
    file = io.BytesIO()
    save_to_pkl(file, ours)
    assert b"torch._utils" not in file.getvalue()  # NumPy's only
    assert len(file.getvalue()) < 3000 + ours.size() * 2 * 19 * 4
    file.seek(0)
    loaded: Any = load_from_pkl(file)
    assert loaded.device == ours.device
    loaded.device = th.device("cpu")
    assert_same(loaded, oracle)
    fill(9, loaded, oracle, seed=1)
    assert_same(loaded, oracle)
    loaded.sample(3, normalizer())


class WeightedBuffer(DIPODeviceReplayBuffer):
    """A user's own, with a tensor and an array of its own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weights = th.ones(self.buffer_size, self.n_envs)
        self.counts = np.arange(self.buffer_size)


@pytest.mark.parametrize("copied", [deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_what_a_subclass_adds_is_kept(copied: Any) -> None:
    ours = make(WeightedBuffer, n_envs=2)
    fill(4, ours)
    ours.weights[2:] = 3
    copy = copied(ours)
    assert type(copy) is WeightedBuffer and th.equal(copy.weights, ours.weights) and copy.weights is not ours.weights
    np.testing.assert_array_equal(copy.counts, ours.counts)
    assert_same(copy, ours)


def test_a_file_of_the_old_version() -> None:
    """It names the module where the class was then."""
    loaded: Any = load_from_pkl(OLD_FILES / "device_replay_buffer.pkl")
    assert type(loaded) is DIPODeviceReplayBuffer and loaded.size() == 3 and loaded.device == th.device("cpu")
    expected = np.repeat(np.arange(3) / 4, 4).reshape(3, 2, 2)
    np.testing.assert_array_equal(loaded.observations[:3], expected)
    np.testing.assert_array_equal(loaded.actions[:3], -expected)
    np.testing.assert_array_equal(loaded.improved_actions[1], [[0.5, 0.5], [-0.25, -0.25]])
    space = spaces.Box(-1.0, 1.0, (2,))
    assert vars(loaded).keys() == vars(DIPODeviceReplayBuffer(20, space, space, device="cpu", n_envs=2)).keys()
    loaded.sample(3)


def test_a_device_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, oracle = pair(4)
    on_a_gpu = {**ours.__getstate__(), "_device": th.device("cuda:1")}
    monkeypatch.setattr(DIPODeviceReplayBuffer, "__getstate__", lambda buffer: on_a_gpu)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 1)
    loaded = pickle.loads(pickle.dumps(ours))
    assert loaded.device == th.device("cpu")
    assert_same(loaded, oracle)


def test_setting_the_device_moves_the_storage() -> None:
    ours = make()
    fill(4, ours)
    ours.refresh_statistics(normalizer())
    ours.device = "meta"
    assert {value.device.type for value in vars(ours).values() if isinstance(value, th.Tensor)} == {"meta"}
    assert ours.actions.shape == (10, 1, 2)
    assert ours.sample(3, normalizer()).observations.device.type == "meta"


@pytest.mark.parametrize("buffer_class", [ReplayBuffer, DIPOReplayBuffer])
@pytest.mark.parametrize("transitions", [0, 4, 23])
def test_conversion_both_ways(transitions: int, buffer_class: type[Any]) -> None:
    source = make(buffer_class, n_envs=2, handle_timeout_termination=False)
    fill(transitions, source)
    if buffer_class is DIPOReplayBuffer and transitions:
        source.update_improved(np.arange(4), np.ones(4, dtype=int), np.zeros((4, 2)))
    converted: Any = as_storage(source, DIPODeviceReplayBuffer)
    assert type(converted) is DIPODeviceReplayBuffer and not converted.handle_timeout_termination
    oracle: Any = as_storage(source, ReplayBuffer)
    assert type(oracle) is DIPOReplayBuffer and (oracle is source) == (buffer_class is DIPOReplayBuffer)
    assert_same(converted, oracle)
    back: Any = as_storage(converted, ReplayBuffer)
    assert type(back) is DIPOReplayBuffer and as_storage(converted, DIPODeviceReplayBuffer) is converted
    assert_same(converted, back)
    for name in ("n_envs", "device", "observation_space", "action_space", "handle_timeout_termination", "obs_shape"):
        assert getattr(back, name) == getattr(source, name)
    before = deepcopy(converted)
    fill(5, back, seed=1)
    assert_same(converted, before)  # they share no memory
    fill(5, converted, seed=1)
    assert_same(converted, back)
    converted.sample(5)


def test_what_cannot_be_converted() -> None:
    space = spaces.Dict({"place": OBSERVATION_SPACE})
    with pytest.raises(ValueError, match="A DIPODictReplayBuffer cannot be converted to a DIPODeviceReplayBuffer"):
        as_storage(make(DictReplayBuffer, observation_space=space), DIPODeviceReplayBuffer)
    with pytest.raises(ValueError, match="A DIPODeviceReplayBuffer cannot be converted to a DIPONStepReplayBuffer"):
        as_storage(make(), DIPONStepReplayBuffer)
    optimized = make(DIPOReplayBuffer, optimize_memory_usage=True, handle_timeout_termination=False)
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        as_storage(optimized, DIPODeviceReplayBuffer)
    n_step = make(DIPONStepReplayBuffer)
    assert as_storage(n_step, DIPOReplayBuffer) is n_step


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("optimize_memory_usage", {"optimize_memory_usage": True, "handle_timeout_termination": False}),
        ("observation_space", {"observation_space": spaces.Dict({"place": OBSERVATION_SPACE})}),
        ("observation_space", {"observation_space": spaces.Box(0, 255, (1, 36, 36), np.uint8)}),
        ("observation_space", {"observation_space": spaces.Discrete(3)}),
        ("action_space", {"action_space": spaces.Box(-1, 1, (2,), np.int64)}),
    ],
)
def test_what_is_refused(name: str, kwargs: dict[str, Any]) -> None:
    arguments = {"observation_space": OBSERVATION_SPACE, "action_space": ACTION_SPACE, "device": "cpu", **kwargs}
    with pytest.raises(ValueError, match=f"`{name}` must be .* with DIPODeviceReplayBuffer"):
        DIPODeviceReplayBuffer(10, **arguments)


def test_what_fits_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * 333 * (19 * 4 + 8)
    monkeypatch.setattr(th.cuda, "mem_get_info", lambda device: (2 * needed, 10 * needed))
    assert fits_on_device(OBSERVATION_SPACE, ACTION_SPACE, 1000, 3, "cuda")
    assert not fits_on_device(OBSERVATION_SPACE, ACTION_SPACE, 1002, 3, th.device("cuda:0"))
    assert not fits_on_device(OBSERVATION_SPACE, ACTION_SPACE, 1000, 3, "cpu")
    assert not fits_on_device(spaces.Box(0, 255, (6,), np.uint8), ACTION_SPACE, 1, 1, "cuda")
    assert not fits_on_device(spaces.Dict({"place": OBSERVATION_SPACE}), ACTION_SPACE, 1, 1, "cuda")
    # what it counts is what there is
    tensors = [value for value in vars(make(rows=333, n_envs=3)).values() if isinstance(value, th.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == needed + 8  # and one number


# ------------------------------------------------------------------------------------------------- with an agent


def test_an_agent_learns_from_it(tmp_path: pathlib.Path) -> None:
    settings_: dict[str, Any] = {"replay_buffer_class": DIPODeviceReplayBuffer, "learning_starts": 50, "buffer_size": 80}
    policy_kwargs = {"net_arch": [16], "num_train_timesteps": 3}
    model = DIPO("MlpPolicy", "Pendulum-v1", **settings_, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    model.learn(100)
    buffer: Any = model.replay_buffer
    assert type(buffer) is DIPODeviceReplayBuffer and buffer.full and model._n_updates == 50
    moved = (buffer.improved_actions != buffer.actions).any(dim=-1)
    assert moved.float().mean() > 0.5 and buffer.improved_actions.abs().max() <= 1

    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert type(loaded.replay_buffer) is DIPODeviceReplayBuffer and loaded.replay_buffer.size() == 0
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert_same(loaded.replay_buffer, buffer)
    loaded.learn(20, reset_num_timesteps=False)


def test_an_agent_with_several_environments_and_its_checkpoint(tmp_path: pathlib.Path) -> None:
    model = small_dipo(tiny_envs(3), replay_buffer_class=DIPODeviceReplayBuffer, persist_improved_actions=False)
    model.learn(60)
    buffer: Any = model.replay_buffer
    assert th.equal(buffer.actions, buffer.improved_actions)
    model.persist_improved_actions = True
    model.train(1, 8)
    assert not th.equal(buffer.actions, buffer.improved_actions)
    save_checkpoint(model, tmp_path)
    loaded = load_checkpoint(tmp_path, tiny_envs(3), device="cpu")
    assert_same(loaded.replay_buffer, buffer)


def test_an_agent_with_normalization() -> None:
    model = small_dipo(VecNormalize(tiny_envs(2)), replay_buffer_class=DIPODeviceReplayBuffer)
    model.learn(40)
    assert model._n_updates > 0


def test_what_an_agent_refuses() -> None:
    with pytest.raises(ValueError, match="`n_steps` must be 1 with `replay_buffer_class=DIPODeviceReplayBuffer`"):
        small_dipo(replay_buffer_class=DIPODeviceReplayBuffer, n_steps=3)
    with pytest.raises(ValueError, match="observation_space"):
        small_dipo(TinyEnv(observation="image"), "CnnPolicy", replay_buffer_class=DIPODeviceReplayBuffer)


def test_a_buffer_of_sac_on_the_device(tmp_path: pathlib.Path) -> None:
    sac = SAC("MlpPolicy", TinyEnv(), buffer_size=24, learning_starts=100, device="cpu", seed=0).learn(40)
    sac.save_replay_buffer(tmp_path / "sac.pkl")
    converted: Any = as_storage(load_from_pkl(tmp_path / "sac.pkl"), DIPODeviceReplayBuffer)
    sacs: Any = sac.replay_buffer
    np.testing.assert_array_equal(converted.improved_actions, sacs.actions)
    np.testing.assert_array_equal(converted.next_observations, sacs.next_observations)


@pytest.mark.gpu
def test_a_captured_graph_goes_on_while_the_buffer_fills() -> None:
    ours, oracle = make(rows=50, n_envs=2, device="cuda"), make(DIPOReplayBuffer, 50, 2)
    fill(3, ours, oracle)
    env = normalizer()
    ours.refresh_statistics(env)
    values = th.rand(64, 2, device="cuda")

    def update() -> Any:
        drawn, batch = ours.sample(64, env), ours.sample_improved(64, env)
        ours.update_improved(batch.rows, batch.envs, values)
        return drawn, batch

    side = th.cuda.Stream()
    side.wait_stream(th.cuda.current_stream())
    with th.cuda.stream(side):
        update()
    th.cuda.current_stream().wait_stream(side)
    ours.reset_improved()
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        drawn, batch = update()
    seen = set()
    for _ in range(60):
        graph.replay()
        rows, envs = batch.rows.cpu().numpy(), batch.envs.cpu().numpy()
        assert rows.max() < ours.size()
        seen |= set(rows)
        expected = env.normalize_obs(oracle.observations[rows, envs])
        np.testing.assert_allclose(batch.observations.cpu(), expected, **ROUNDING)
        oracle.update_improved(rows, envs, values)
        np.testing.assert_array_equal(ours.improved_actions.cpu(), oracle.improved_actions)
        assert drawn.observations.shape == (64, 2, 3)
        fill(1, ours, oracle, seed=len(seen))
    assert seen == set(range(50))
    copied = pickle.loads(pickle.dumps(ours))
    assert copied.device.type == "cuda" and all(th.equal(getattr(copied, name), getattr(ours, name)) for name in COLUMNS)


@pytest.mark.gpu
@pytest.mark.parametrize("transitions", [1, 9, 50])
def test_every_filled_place_is_equally_likely_on_a_gpu(transitions: int) -> None:
    test_every_filled_place_is_equally_likely(transitions, 4, device="cuda")


@pytest.mark.gpu
def test_an_agent_saved_on_a_cpu_has_its_replay_data_on_the_gpu(tmp_path: pathlib.Path) -> None:
    model = small_dipo(accelerate="cudagraphs")
    model.learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    assert type(model.replay_buffer) is DIPOReplayBuffer
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), device="cuda")
    assert type(loaded.replay_buffer) is DIPODeviceReplayBuffer
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert type(loaded.replay_buffer) is DIPODeviceReplayBuffer and loaded.replay_buffer.device.type == "cuda"
    np.testing.assert_array_equal(loaded.replay_buffer.actions.cpu(), model.replay_buffer.actions)
    loaded.learn(20, reset_num_timesteps=False)
