"""
The faster paths equal the plain one: eager and compiled kernels on the CPU, and what is captured in CUDA graphs. Where there
is no GPU, a recorder takes the graph's place: it keeps the operators that a capture would keep and replays them without
Python, so that a number that was baked in, or a tensor that has moved, shows as a difference.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TinyEnv, differences, everything_learned, small_dipo
from helpers import fill, make_agent
from sb3_dipo.accelerate import CudaGraphs, map_tensors, move_towards, prepare_optimizer, set_learning_rate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sb3_dipo.guard
import sb3_dipo.networks
from sb3_dipo import DIPO, DIPODeviceReplayBuffer
from sb3_dipo.arithmetic import PLAIN, choose_arithmetic

READS = (th.ops.aten._local_scalar_dense.default, th.ops.aten.nonzero.default, th.ops.aten.is_nonzero.default)
FLOAT32_ROUNDING = 1e-5


class Recorder(TorchDispatchMode):
    """
    Keeps every operator with its tensors. What a capture cannot do is an error: to read a value, to copy one from the host,
    to make a tensor without saying on which device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError(f"{func} waits for the device")
        if func is th.ops.aten.lift_fresh.default:
            raise RuntimeError("a tensor made of Python numbers is a copy from the host")
        tensors = any(isinstance(leaf, th.Tensor) for leaf in tree_leaves((args, kwargs)))
        if func.namespace == "aten" and not tensors and not (kwargs or {}).get("device"):
            raise RuntimeError(f"{func} makes a tensor on the host")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @th.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, th.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class RecordedGraphs(CudaGraphs):
    """As CudaGraphs, on the CPU."""

    replays = 0

    def _aside(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)

    def _capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recorder = Recorder()
        with recorder:
            outputs = function()
        done = [True]  # a capture only records; the recorder has run it once, too

        def replay() -> None:
            self.replays += 1
            if not done:
                recorder.replay()
            done.clear()

        return replay, outputs


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that runs on a GPU, on the CPU."""
    for module in (sb3_dipo.guard, sb3_dipo.networks):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


def record(model: DIPO, capture: bool = True) -> RecordedGraphs:
    """Let an agent on the CPU capture as on a GPU, or do all that belongs to it, such as learning rates in tensors, only."""
    graphs = RecordedGraphs(th.device("cpu"))
    graphs._failed = not capture
    model._graphs = graphs
    model.policy.set_accelerate("auto", graphs)
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        prepare_optimizer(optimizer, capturable=False)
        for group in optimizer.param_groups:
            group["lr"] = th.tensor(float(group["lr"]))
    return graphs


def filled(seed: int = 0, rows: int = 64, obs_dim: int = 5, action_dim: int = 2, **kwargs: Any) -> DIPO:
    """An agent with full-size parts and made-up data."""
    th.manual_seed(seed)
    kwargs.setdefault("policy_kwargs", {"net_arch": [256, 256], "num_train_timesteps": 4})
    model = make_agent(obs_dim, action_dim, 1, **kwargs)
    generator = np.random.default_rng(seed)
    fill(
        model,
        observations=generator.normal(size=(rows, 1, obs_dim)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(rows, 1, action_dim)).astype(np.float32),
        rewards=generator.normal(size=(rows, 1)).astype(np.float32),
        next_observations=generator.normal(size=(rows, 1, obs_dim)).astype(np.float32),
        terminals=(generator.random((rows, 1)) < 0.1).astype(np.float32),
    )
    return model


def train(model: DIPO, updates: int, batch_size: int = 32, seed: int = 0, progress: float = 1.0) -> None:
    """Updates under given random numbers."""
    th.manual_seed(seed)
    np.random.seed(seed)
    model._current_progress_remaining = progress
    model.train(updates, batch_size)


def largest_difference(first: DIPO, second: DIPO) -> float:
    """Of any weight or stored action."""
    ours, theirs = everything_learned(first), everything_learned(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


# ------------------------------------------------------------------------------------------------- the CPU's fast paths


@pytest.mark.parametrize("accelerate", ["auto", "compile"])
@pytest.mark.parametrize("batch_size", [8, 32])
@th.no_grad()
def test_fifty_updates_equal_the_plain_path(accelerate: str, batch_size: int) -> None:
    """Also across a change of the learning rates. A difference of 1e-7 in an update grows over fifty; Adam's first steps move
    weights by the learning rate whatever the gradient's size, so that one of almost 0 may go either way."""
    settings: dict[str, Any] = {"learning_rate": lambda progress: 3e-4 * progress, "qf_learning_rate": lambda p: 1e-3 * p}
    plain, fast = filled(accelerate="off", **settings), filled(accelerate=accelerate, **settings)
    start = [parameter.clone() for parameter in plain.policy.parameters()]
    for seed, progress in enumerate([1.0, 0.3]):
        for model in (plain, fast):
            with th.enable_grad():
                train(model, 25, batch_size, seed, progress)
    moved = sum(float((now - then).square().sum()) for now, then in zip(plain.policy.parameters(), start, strict=True))
    pairs = zip(plain.policy.parameters(), fast.policy.parameters(), strict=True)
    apart = sum(float((now - other).square().sum()) for now, other in pairs)
    assert moved > 1 and apart < 1e-5 * moved
    for name in ("train/critic_loss", "train/actor_loss", "train/improved_q_gain"):
        assert fast.logger.name_to_value[name] == pytest.approx(plain.logger.name_to_value[name], rel=1e-3)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 20, 40])
def test_samples_equal_the_plain_paths(solver: str, clip_sample: bool, rows: int) -> None:
    policy_kwargs = {"num_train_timesteps": 20, "beta_schedule": "vp", "solver": solver, "clip_sample": clip_sample}
    actor = filled(policy_kwargs=policy_kwargs).actor
    generator = th.Generator().manual_seed(1)
    features, initial_noise = th.randn((rows, 5), generator=generator), th.randn((rows, 2), generator=generator)
    noise = th.randn((20, rows, 2), generator=generator)
    for scale in (None, 0.0, 0.5):
        results = []
        for accelerate in ("off", "auto", "compile"):
            actor.accelerate = accelerate
            with th.no_grad():
                results.append(actor.sample(features, initial_noise, noise, scale))
        assert rows == 1 or results[0].std() > 0.01
        for result in results[1:]:
            th.testing.assert_close(result, results[0], rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("net_arch", [[], [7], [40, 17, 64]])
def test_any_widths(net_arch: list[int]) -> None:
    plain = filled(accelerate="off", policy_kwargs={"net_arch": net_arch, "num_train_timesteps": 6})
    for accelerate in ("auto", "compile"):
        fast = filled(accelerate=accelerate, policy_kwargs={"net_arch": net_arch, "num_train_timesteps": 6})
        for rows in (2, 50):
            observations = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)
            expected, _ = plain.predict(observations, deterministic=True)
            np.testing.assert_allclose(fast.predict(observations, deterministic=True)[0], expected, rtol=0, atol=1e-5)
        train(fast, 2)


def test_other_activations_and_actors_take_the_plain_path() -> None:
    for policy_kwargs in ({"activation_fn": th.nn.ReLU}, {"activation_fn": th.nn.Mish}, {"actor": "vae"}, {"actor": "mlp"}):
        kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [256, 256], **policy_kwargs}}
        plain, fast = filled(accelerate="off", **kwargs), filled(accelerate="compile", **kwargs)
        for model in (plain, fast):
            train(model, 1)
        assert largest_difference(plain, fast) < 1e-4


def test_other_types_than_float32_take_the_plain_path() -> None:
    """Kernels read memory as float32."""
    for rows in (2, 64):
        for accelerate in ("auto", "compile"):
            assert choose_arithmetic(th.zeros(rows, 5, dtype=th.float64), accelerate) is PLAIN
    assert choose_arithmetic(th.zeros(64, 5), "auto") is not PLAIN
    assert choose_arithmetic(th.zeros(64, 5), "off") is PLAIN


def test_training_products_have_the_gradients_of_pytorchs() -> None:
    generator = th.Generator().manual_seed(0)
    model = filled()
    observations, actions = th.randn((64, 5), generator=generator), th.rand((64, 2), generator=generator)
    gradients = []
    for accelerate in ("off", "auto", "compile"):
        model.policy.set_accelerate(accelerate)
        x = actions.clone().requires_grad_()
        th.cat(model.critic(observations, x)).square().mean().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.critic.parameters())])
        model.critic.zero_grad(set_to_none=True)
    for fast in gradients[1:]:
        for gradient, expected in zip(fast, gradients[0], strict=True):
            assert gradient is not None and expected is not None and expected.abs().max() > 0
            th.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accelerate", ["off", "auto", "compile"])
def test_nan_is_not_hidden(accelerate: str) -> None:
    model = filled(accelerate=accelerate)
    for rows in (1, 64):
        features = th.zeros(rows, 5)
        features[0, 0] = th.nan
        with th.no_grad():
            actions = model.actor.sample(features)
        assert actions[0].isnan().all() and not actions[1:].isnan().any()


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_dipo.kernels import KernelError, load_kernels

    for compiler, message in (("no-such-compiler", "no-such-compiler"), ("false", "false failed")):
        monkeypatch.setenv("CXX", compiler)
        load_kernels.cache_clear()
        with pytest.raises(KernelError, match=message):
            load_kernels()
        with pytest.warns(UserWarning, match="`accelerate='compile'`.*runs as \"auto\""):
            model = filled(accelerate="compile")
        train(model, 1)
        assert model.accelerate == "compile"
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    load_kernels.cache_clear()
    with pytest.raises(KernelError, match="no C\\+\\+ compiler was found: set CXX"):
        load_kernels()
    monkeypatch.undo()
    load_kernels.cache_clear()


def test_bfloat16_moves_actions_little_and_is_saved(tmp_path: Any) -> None:
    policy_kwargs = {"net_arch": [256, 256], "num_train_timesteps": 20, "inference_dtype": "bfloat16"}
    rounded = filled(policy_kwargs=policy_kwargs)
    exact = filled(policy_kwargs={**policy_kwargs, "inference_dtype": "float32"})
    rounded.set_parameters(exact.get_parameters())
    observations = np.random.default_rng(0).normal(size=(256, 5)).astype(np.float32)
    moved = np.abs(rounded.predict(observations, deterministic=True)[0] - exact.predict(observations, deterministic=True)[0])
    assert 0 < moved.mean() < 0.01
    train(rounded, 3)
    rounded.save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model")
    assert loaded.policy.actor.inference_dtype == loaded.policy.critic.inference_dtype == "bfloat16"


# ------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("on_device", [True, False], ids=["device storage", "host storage"])
@pytest.mark.parametrize("persist", [True, False])
def test_replayed_updates_are_eager_ones_to_the_bit(on_device: bool, persist: bool, as_on_a_gpu: None) -> None:
    """Across changes of the learning rate, of the batch size, of the sampler, of gamma, and of the data."""
    kwargs: dict[str, Any] = {
        "learning_rate": lambda progress: 1e-3 * progress,
        "actor_target_update_interval": 2,
        "persist_improved_actions": persist,
    }
    if on_device:
        kwargs["replay_buffer_class"] = DIPODeviceReplayBuffer
    eager, captured = filled(**kwargs), filled(**kwargs)
    graphs = record(captured)
    record(eager, capture=False)
    assert differences(everything_learned(eager), everything_learned(captured)) == []

    def both(change: Callable[[DIPO], object], updates: int = 12, **given: Any) -> None:
        for model in (eager, captured):
            change(model)
            train(model, updates, **given)
        assert differences(everything_learned(eager), everything_learned(captured)) == []
        logged = [dict(model.logger.name_to_value) for model in (eager, captured)]
        assert logged[0] == logged[1]

    def more_data(model: DIPO) -> None:
        ones = np.ones((20, 1, 5), np.float32)
        rewards = np.ones((20, 1), np.float32)
        fill(model, ones, 0.5 * ones[:, :, :2], rewards, ones, 0 * rewards)

    both(lambda model: None)
    assert graphs.replays > 0
    both(lambda model: None, seed=1, progress=0.2)
    before = graphs.replays
    both(lambda model: None, seed=2, batch_size=16)
    both(more_data, seed=3, batch_size=16)
    both(lambda model: model.policy.set_sampler("target", num_inference_steps=2), seed=4)
    both(lambda model: setattr(model, "gamma", 0.5), seed=5)
    assert graphs.replays > before


def test_fifty_replayed_updates_also_across_save_and_load(as_on_a_gpu: None, tmp_path: Any) -> None:
    eager, captured = filled(), filled()
    record(captured)
    record(eager, capture=False)
    for model in (eager, captured):
        train(model, 25)
    captured.save(tmp_path / "model")
    captured.save_replay_buffer(tmp_path / "buffer")
    loaded = DIPO.load(tmp_path / "model", env=captured.get_env())
    loaded.set_logger(captured.logger)
    loaded.load_replay_buffer(tmp_path / "buffer")
    record(loaded)
    for model in (eager, captured, loaded):
        train(model, 25, seed=1)
    assert differences(everything_learned(eager), everything_learned(captured)) == []
    assert differences(everything_learned(eager), everything_learned(loaded)) == []
    # parameters put back into an agent that has captured already
    captured.set_parameters(copy.deepcopy(eager.get_parameters()))
    for optimizer in (captured.actor.optimizer, captured.critic.optimizer):
        for group in optimizer.param_groups:
            group["lr"] = th.tensor(float(group["lr"]))
    for model in (eager, captured):
        train(model, 8, seed=2)
    assert differences(everything_learned(eager), everything_learned(captured)) == []


def test_acting_is_captured_for_each_batch_size(as_on_a_gpu: None) -> None:
    """Not to the bit: products round by where in memory their numbers lie."""
    eager, captured = filled(), filled()
    graphs = record(captured)
    generator = np.random.default_rng(0)
    for call in range(8):
        for rows in (1, 16):
            observations = generator.normal(size=(rows, 5)).astype(np.float32)
            for deterministic in (True, False):
                results = []
                for model in (eager, captured):
                    th.manual_seed(call)
                    results.append(model.predict(observations, deterministic=deterministic)[0])
                np.testing.assert_allclose(
                    results[1], results[0], rtol=0, atol=1e-6
                )  # products round by where their numbers lie
    assert graphs.replays == 4 * 5
    # what acts next has learned, and samples otherwise
    for model in (eager, captured):
        train(model, 6)
        model.policy.set_sampler("behaviour", noise_scale=0.5, num_inference_steps=3)
    for call in range(6):
        results = []
        for model in (eager, captured):
            th.manual_seed(call)
            results.append(model.predict(observations)[0])
        np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_leaves_no_trace_when_replayed(as_on_a_gpu: None) -> None:
    from sb3_dipo.guard import NonFiniteLossError

    for on_device in (True, False):
        captured = filled(replay_buffer_class=DIPODeviceReplayBuffer if on_device else None)
        graphs = record(captured)
        train(captured, 10)
        assert graphs.replays > 0
        before, buffer = everything_learned(captured), captured.replay_buffer
        assert buffer is not None
        buffer.rewards[:] = np.nan if not on_device else th.nan
        updates = captured._n_updates
        with pytest.raises(NonFiniteLossError, match=rf"`critic_loss`.* in update {updates + 1} "):
            train(captured, 5, seed=1)
        assert captured._n_updates == updates
        assert differences(before, everything_learned(captured)) == []
        buffer.rewards[:] = 1.0
        train(captured, 3, seed=2)
        assert captured._n_updates == updates + 3


def test_a_capture_that_fails_falls_back_with_one_warning(as_on_a_gpu: None) -> None:
    """Such as that of an optimizer whose step must be decided on the host."""
    policy_kwargs = {"net_arch": [16], "num_train_timesteps": 3, "optimizer_class": th.optim.RMSprop}
    eager, captured = filled(policy_kwargs=policy_kwargs), filled(policy_kwargs=policy_kwargs)
    graphs = RecordedGraphs(th.device("cpu"))
    captured._graphs = graphs
    train(eager, 10)
    with pytest.warns(UserWarning, match="CUDA graphs cannot be used here, everything runs eagerly.*waits for the device"):
        train(captured, 10)
    assert graphs.replays == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(eager, 5, batch_size=16)
        train(captured, 5, batch_size=16)
    assert eager._n_updates == captured._n_updates == 15


def test_an_agent_with_graphs_can_be_copied_and_saved(tmp_path: Any, as_on_a_gpu: None) -> None:

    model = small_dipo(TinyEnv())
    graphs = record(model)
    model.learn(60)
    assert graphs.replays > 0
    copied = pickle.loads(pickle.dumps(graphs))
    assert copied._captured == {} and copied.device == graphs.device
    policy = copy.deepcopy(model.policy)
    assert policy._graphs is not graphs
    model.save(tmp_path / "model")
    assert DIPO.load(tmp_path / "model")._graphs is None


def test_more_shapes_than_graphs_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_dipo.accelerate.MAX_GRAPHS", 2)
    graphs = RecordedGraphs(th.device("cpu"))
    for _ in range(6):
        for size in (1, 2, 3):
            assert th.equal(graphs(lambda x: 2 * x, "double", th.ones(size)), 2 * th.ones(size))
    assert len(graphs._captured) == 2


def test_map_tensors() -> None:
    tree = ({"a": th.ones(2), "b": None}, (th.zeros(1), 3))
    doubled = map_tensors(lambda x, y: x + y, tree, tree)
    assert th.equal(doubled[0]["a"], 2 * th.ones(2)) and doubled[0]["b"] is None and doubled[1][1] == 3


# ------------------------------------------------------------------------------------------------- optimizers


def test_polyak_averaging_is_sb3s() -> None:
    from stable_baselines3.common.utils import polyak_update

    generator = th.Generator().manual_seed(0)
    tensors = [th.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    for tau in (0.005, 1.0, 0.3):
        ours, theirs = ([th.ones_like(tensor) / 3 for tensor in tensors] for _ in range(2))
        move_towards(ours, tensors, tau, th.tensor(True))
        polyak_update(tensors, theirs, tau)
        th.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        before = [tensor.clone() for tensor in ours]
        move_towards(ours, tensors, tau, th.tensor(False))
        assert all(th.equal(first, second) for first, second in zip(ours, before, strict=True))
    move_towards([], [], 0.5, th.tensor(True))


def test_fused_steps_equal_the_plain_ones() -> None:
    """And take learning rates that are tensors."""
    results = []
    for fused in (False, True):
        parameter = th.nn.Parameter(th.linspace(-1, 1, 50))
        optimizer = th.optim.Adam([parameter], lr=1e-2, eps=1e-5)
        if fused:
            prepare_optimizer(optimizer, capturable=False)
            optimizer.param_groups[0]["lr"] = th.tensor(1e-2)
        for step in range(20):
            set_learning_rate(optimizer, 1e-2 / (step + 1))
            parameter.grad = th.sin(parameter.detach() * (step + 1))
            optimizer.step()
        results.append(parameter.detach())
    th.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_options_that_the_user_chose_for_the_optimizer_stay() -> None:
    model = filled(policy_kwargs={"net_arch": [8], "optimizer_kwargs": {"foreach": True, "eps": 1e-5}})
    group = model.actor.optimizer.param_groups[0]
    assert group["foreach"] is True and not group["fused"]
    train(model, 2)


def test_optimizer_state_of_a_gpu_is_of_use_on_the_cpu_and_back() -> None:
    """What a saved file of the other device holds: learning rates and flags."""
    model = filled()
    train(model, 2)
    parameters = model.get_parameters()
    group = parameters["actor.optimizer"]["param_groups"][0]
    group.update(capturable=True, fused=True, lr=th.tensor(1e-3))
    model.set_parameters(parameters)
    group = model.actor.optimizer.param_groups[0]
    assert group["capturable"] is False and isinstance(group["lr"], float)
    train(model, 2)
    plain = filled(accelerate="off")
    plain.set_parameters(parameters)
    train(plain, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [True, False], ids=["device storage", "host storage"])
def test_captured_updates_equal_eager_ones_on_a_gpu(on_device: bool) -> None:
    kwargs: dict[str, Any] = {"device": "cuda", "learning_rate": lambda progress: 1e-3 * progress}
    if not on_device:
        kwargs["replay_buffer_kwargs"] = {}
    kwargs["replay_buffer_class"] = DIPODeviceReplayBuffer if on_device else None
    eager, captured = filled(accelerate="off", **kwargs), filled(accelerate="cudagraphs", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, progress in enumerate([1.0, 0.3]):
            for model in (eager, captured):
                train(model, 25, seed=seed, progress=progress)
    assert captured._graphs is not None and len(captured._graphs._captured) > 0
    assert largest_difference(eager, captured) < 1e-3
    observations = np.zeros((4, 5), np.float32)
    for _ in range(6):
        actions = [model.predict(observations, deterministic=True)[0] for model in (eager, captured)]
    np.testing.assert_allclose(actions[1], actions[0], rtol=0, atol=1e-3)
