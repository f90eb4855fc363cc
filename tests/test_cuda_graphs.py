"""
CUDA graphs. Where there is no GPU, a recorder takes the graph's place: it keeps the operators that a capture would keep and
replays them without Python, so that a number that was baked in, or a tensor that has moved, shows as a difference.

The device can be emulated, too: a mode refuses float64, which not all devices have. The tests that are marked ``gpu`` run the
real thing.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import BatchNormExtractor, LinearExtractor, TinyEnv, differences, everything_learned, small_dipo
from fast_and_plain import OBS_DIM, STEPS, Inputs, assert_same, computed, filled, largest_difference, train
from helpers import fill
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sb3_dipo.fast
from sb3_dipo import DIPO, NonFiniteLossError
from sb3_dipo.fast import DIPODeviceReplayBuffer
from sb3_dipo.fast.cuda_graphs import MAX_GRAPHS, WARM_UP, CapturableGuard, CudaGraphs, map_tensors
from sb3_dipo.fast.guard import FusedGuard
from sb3_dipo.fast.ops import SINGLE, Arithmetic, FastOps
from sb3_dipo.guard import Guard
from sb3_dipo.networks import PLAIN, Ops

READS = (th.ops.aten._local_scalar_dense.default, th.ops.aten.nonzero.default, th.ops.aten.is_nonzero.default)
CPU = th.device("cpu")
SET_UP, MAKE_OPS, TENSOR = sb3_dipo.fast.set_up, sb3_dipo.fast.make_ops, th.tensor


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
        # what is kept are places in memory: a tensor of Python's may be given another one
        self.calls.append((func, *tree_map_only(th.Tensor, th.Tensor.detach, (args, kwargs or {}, result))))
        return result

    @th.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, th.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class WithoutFloat64(TorchDispatchMode):
    """Refuses what MPS refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if leaf is th.float64 or (isinstance(leaf, th.Tensor) and leaf.dtype == th.float64):
                raise TypeError(f"{func}: this device has no float64")
        return result


class RecordedGraphs(CudaGraphs):
    """As CudaGraphs, on the CPU."""

    replays = 0
    captures = 0

    def _warm_up(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)

    def _capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recorder = Recorder()
        with recorder:
            outputs = function()
        self.captures += 1
        done = [True]  # a capture only records; the recorder has run it once, too

        def replay() -> None:
            self.replays += 1
            if not done:
                recorder.replay()
            done.clear()

        return replay, outputs


class EagerGraphs(RecordedGraphs):
    """Does all that belongs to it, and captures nothing."""

    def __call__(self, function: Callable[..., Any], key: Any, *inputs: Any) -> Any:
        return function(*inputs)


class AsOnAGpu(FastOps):
    """Computes as on a GPU, though on the CPU: steps' constants are made before, operators are PyTorch's own."""

    def arithmetic(self, x: th.Tensor, rounded: bool = False) -> Arithmetic:
        return SINGLE

    def mlp(self, layers: th.nn.Module, x: th.Tensor) -> th.Tensor:
        return Ops.mlp(self, layers, x)

    def objective(self, q_networks: Any, features: th.Tensor, reduce: Any) -> Any:
        return Ops.objective(self, q_networks, features, reduce)  # sizes of the CPU's gradient depend on values


@pytest.fixture(autouse=True)
def as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``accelerate="cudagraphs"`` on the CPU does what it does on a GPU, and does not see who listens."""
    if request.node.get_closest_marker("gpu"):
        return
    mode = th.utils._python_dispatch._get_current_dispatch_mode

    def set_up_as_on_a_gpu(policy: Any, accelerate: str) -> tuple[Guard, CudaGraphs | None]:
        if accelerate != "cudagraphs" or policy.device != CPU:
            return SET_UP(policy, accelerate)
        return CapturableGuard(policy.device), RecordedGraphs(policy.device)

    def make_ops_as_on_a_gpu(device: th.device, accelerate: str, inference_dtype: str) -> Ops:
        as_on_a_gpu = accelerate == "cudagraphs" and device == CPU
        return AsOnAGpu(inference_dtype) if as_on_a_gpu else MAKE_OPS(device, accelerate, inference_dtype)

    monkeypatch.setattr(sb3_dipo.fast, "set_up", set_up_as_on_a_gpu)
    monkeypatch.setattr(sb3_dipo.fast, "make_ops", make_ops_as_on_a_gpu)
    monkeypatch.setattr(
        th.utils._python_dispatch,
        "_get_current_dispatch_mode",
        lambda: None if isinstance(mode(), Recorder | WithoutFloat64) else mode(),
    )


def graphs_of(model: DIPO) -> RecordedGraphs:
    assert isinstance(model._graphs, RecordedGraphs)
    return model._graphs


def recorded(**kwargs: Any) -> DIPO:
    return filled(accelerate="cudagraphs", **kwargs)


def eager(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> DIPO:
    """The same agent, whose every update runs in Python."""
    model = filled(accelerate="cudagraphs", **kwargs)
    model._graphs = model.policy._graphs = EagerGraphs(CPU)
    return model


class Both:
    """An agent that captures, and one that does not; what is done to one is done to the other, and both stay the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **kwargs: Any):
        self.captured, self.eager = recorded(**kwargs), eager(monkeypatch, **kwargs)
        self.graphs = graphs_of(self.captured)
        assert differences(everything_learned(self.eager), everything_learned(self.captured)) == []

    def train(self, updates: int = 6, replayed: bool = True, **given: Any) -> None:
        """Some of the updates must be replayed ones, unless said otherwise."""
        before = self.graphs.replays
        for model in (self.eager, self.captured):
            train(model, updates, **given)
        assert differences(everything_learned(self.eager), everything_learned(self.captured)) == []
        logged = [dict(model.logger.name_to_value) for model in (self.eager, self.captured)]
        assert logged[0] == logged[1]
        assert (self.graphs.replays > before) == replayed

    def change(self, change: Callable[[DIPO], object]) -> None:
        for model in (self.eager, self.captured):
            change(model)


on_device_or_host = pytest.mark.parametrize("on_device", [True, False], ids=["device storage", "host storage"])


def storage(on_device: bool) -> dict[str, Any]:
    return {"replay_buffer_class": DIPODeviceReplayBuffer} if on_device else {}


def more_data(model: DIPO) -> None:
    ones = np.ones((20, 1, OBS_DIM), np.float32)
    rewards = np.ones((20, 1), np.float32)
    fill(model, ones, 0.5 * ones[:, :, :2], rewards, ones, 0 * rewards)


# ------------------------------------------------------------------------------------------------- updates


@on_device_or_host
@pytest.mark.parametrize("persist", [True, False])
def test_replayed_updates_are_eager_ones_to_the_bit(on_device: bool, persist: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across changes of the learning rate, of the data, of the batch size, and of what is in the key."""
    both = Both(
        monkeypatch,
        learning_rate=lambda progress: 1e-3 * progress,
        actor_target_update_interval=2,
        persist_improved_actions=persist,
        **storage(on_device),
    )
    both.train(12)
    captures = both.graphs.captures
    both.train(6, seed=1, progress=0.2)
    both.change(more_data)
    both.train(6, seed=2)
    assert both.graphs.captures == captures == 2  # with and without the actor's target: none of this needs another graph
    both.train(10, seed=3, batch_size=16)
    assert both.graphs.captures == captures + 2


CHANGES: dict[str, Callable[[DIPO], object]] = {
    "betas": lambda model: model.actor.optimizer.param_groups[0].update(betas=(0.5, 0.6)),
    "betas of the critic": lambda model: model.critic.optimizer.param_groups[0].update(betas=(0.5, 0.6)),
    "weight decay": lambda model: model.critic.optimizer.param_groups[0].update(weight_decay=0.1),
    "eps": lambda model: model.actor.optimizer.param_groups[0].update(eps=0.1),
    "maximize": lambda model: model.actor.optimizer.param_groups[0].update(maximize=True),
    "frozen layer of the actor": lambda model: next(model.actor.parameters()).requires_grad_(False),
    "frozen layer of the critic": lambda model: next(model.critic.parameters()).requires_grad_(False),
    "sampler of targets": lambda model: model.policy.set_sampler("target", num_inference_steps=2),
    "all samplers": lambda model: model.policy.set_sampler(solver="ddim", eta=0.3),
    "gamma": lambda model: setattr(model, "gamma", 0.5),
    "tau": lambda model: setattr(model, "tau", 0.5),
    "action_lr": lambda model: setattr(model, "action_lr", 0.3),
    "action_gradient_steps": lambda model: setattr(model, "action_gradient_steps", 2),
    "action_grad_norm_ratio": lambda model: setattr(model, "action_grad_norm_ratio", 1e-4),
    "max_grad_norm": lambda model: setattr(model, "max_grad_norm", 1e-3),
    "persist_improved_actions": lambda model: setattr(model, "persist_improved_actions", False),
    "actor_target_update_interval": lambda model: setattr(model, "actor_target_update_interval", 3),
    "learning rate": lambda model: setattr(model, "lr_schedule", lambda _: 1e-2),
    "weights": lambda model: model.policy.load_state_dict(
        {name: 0.5 * value for name, value in model.policy.state_dict().items()}
    ),
    "weights elsewhere": lambda model: move(model.policy),
    "parameters": lambda model: model.set_parameters(
        copy.deepcopy({**model.get_parameters(), "policy": {k: 0.5 * v for k, v in model.policy.state_dict().items()}})
    ),
    "data": more_data,
    "improved actions": lambda model: model.replay_buffer.reset_improved(),  # type: ignore[union-attr]
    "a hook": lambda model: model.critic.get_submodule("qf0").register_forward_hook(lambda module, inputs, output: 2 * output),
    "another layer": lambda model: setattr(model.critic.get_submodule("qf0"), "3", th.nn.Tanh()),
    "another optimizer": lambda model: renew_optimizer(model),
    "the rate of a group, and another schedule": lambda model: set_rates(model),
    "a loaded optimizer, and another schedule": lambda model: load_optimizer(model),
    "moments": lambda model: model.critic.optimizer.state.clear(),
    "a hook at a gradient": lambda model: next(model.critic.parameters()).register_hook(lambda gradient: 0 * gradient),
    "a hook behind a module": lambda model: model.critic.get_submodule("qf0.2").register_full_backward_hook(halve),
    "a hook before steps": lambda model: model.actor.optimizer.register_step_pre_hook(halve_gradients),
    "clip_sample": lambda model: vars(model.actor_target).update(clip_sample=False),
}


def set_rates(model: DIPO) -> None:
    model.actor.optimizer.param_groups[0]["lr"] = 1e-3
    model.lr_schedule = lambda _: 1e-2


def load_optimizer(model: DIPO) -> None:
    model.critic.optimizer.load_state_dict(copy.deepcopy(model.critic.optimizer.state_dict()))
    model.lr_schedule = lambda _: 1e-2


def halve(module: th.nn.Module, of_inputs: Any, of_outputs: Any) -> Any:
    return tuple(0.5 * each for each in of_inputs)


def halve_gradients(optimizer: th.optim.Optimizer, *_: Any) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.mul_(0.5)


def move(policy: th.nn.Module) -> None:
    """To other places in memory, as `policy.to(device)` may do."""
    for parameter in policy.parameters():
        parameter.data = 0.5 * parameter.data


def renew_optimizer(model: DIPO) -> None:
    """As a user does who wants to forget its moments."""
    old: Any = model.actor.optimizer
    model.actor.optimizer = type(old)(old.param_groups[0]["params"], lr=3e-4, eps=1e-5)


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_a_capture_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five updates are enough for a capture, and then five more of the changed agent."""
    both = Both(monkeypatch, replay_buffer_class=DIPODeviceReplayBuffer)
    both.train(5)
    before = copy.deepcopy(both.eager)
    both.change(CHANGES[name])
    both.train(5, seed=1)
    train(before, 5, seed=1)  # a change that changes nothing would prove nothing
    assert differences(everything_learned(before), everything_learned(both.eager)) != []


@pytest.mark.parametrize("kwargs", [{}, {"norm_reward": False}, {"norm_obs": False}], ids=str)
@on_device_or_host
def test_statistics_of_vec_normalize(on_device: bool, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They change at every step, and a graph reads those of the moment."""
    learned = []
    for graphs in (RecordedGraphs(CPU), EagerGraphs(CPU)):
        env = VecNormalize(DummyVecEnv([TinyEnv]), **kwargs)
        model = small_dipo(env, accelerate="cudagraphs", **storage(on_device))
        model._graphs = model.policy._graphs = graphs
        model.learn(40)
        assert graphs.replays > 10 or isinstance(graphs, EagerGraphs)
        learned.append(everything_learned(model))
    assert differences(*learned) == []


PLAIN_POLICIES: dict[str, dict[str, Any]] = {
    "another activation": {"activation_fn": th.nn.ReLU},
    "vae": {"actor": "vae"},
    "mlp": {"actor": "mlp"},
    "shared extractor": {"features_extractor_class": LinearExtractor, "share_features_extractor": True},
    "batch normalisation": {"features_extractor_class": BatchNormExtractor},
    "no hidden layers": {"net_arch": []},
    "five critics": {"n_critics": 5},
    "AdamW": {"optimizer_class": th.optim.AdamW},
    "plain SGD": {"optimizer_class": th.optim.SGD},
}


@pytest.mark.parametrize("name", PLAIN_POLICIES)
def test_other_policies_are_captured_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch, policy_kwargs=PLAIN_POLICIES[name])
    both.train(8)
    for seed in range(6):
        acts_alike(both.captured, both.eager, seed=seed)


def test_a_policy_with_layers_of_ones_own_is_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    for each in (both.eager, both.captured):
        for actor in (each.actor, each.actor_target):
            actor.noise_network.layers.insert(1, th.nn.LayerNorm(64, elementwise_affine=False))  # type: ignore[union-attr, operator]
    both.train(8)
    for seed in range(6):
        acts_alike(both.captured, both.eager, seed=seed)


def test_fifty_updates_also_across_save_and_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = Both(monkeypatch)
    both.train(25)
    captured = both.captured
    captured.save(tmp_path / "model")
    captured.save_replay_buffer(tmp_path / "buffer")
    loaded = DIPO.load(tmp_path / "model", env=captured.get_env(), device="cpu")
    loaded.set_logger(captured.logger)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert type(loaded.replay_buffer) is type(captured.replay_buffer)
    both.train(25, seed=1)
    train(loaded, 25, seed=1)
    assert graphs_of(loaded).replays > 10
    assert differences(everything_learned(both.eager), everything_learned(loaded)) == []


def test_replayed_updates_equal_the_plain_path() -> None:
    captured, plain = recorded(), filled(accelerate="off")
    for model in (captured, plain):
        train(model, 20)
    assert graphs_of(captured).replays > 10
    assert largest_difference(captured, plain) < 2e-3
    for name in ("train/critic_loss", "train/actor_loss", "train/q_value", "train/improved_q_gain"):
        assert captured.logger.name_to_value[name] == pytest.approx(plain.logger.name_to_value[name], rel=1e-3)


# ------------------------------------------------------------------------------------------------- losses that are not finite


@on_device_or_host
@pytest.mark.parametrize("captured_before", [True, False], ids=["replayed", "first"])
def test_a_critic_loss_that_is_not_finite(on_device: bool, captured_before: bool) -> None:
    """Nothing is applied from then on, not even what would be finite, and nothing is written back."""
    model = recorded(**storage(on_device))
    train(model, 8 if captured_before else 1)
    assert (graphs_of(model).replays > 0) == captured_before
    before, buffer = everything_learned(model), model.replay_buffer
    assert buffer is not None
    rewards = copy.deepcopy(buffer.rewards)
    buffer.rewards[:] = np.nan
    with pytest.raises(NonFiniteLossError, match="`critic_loss`"):
        train(model, 5, seed=1)
    assert differences(before, everything_learned(model)) == []
    buffer.rewards[:] = rewards
    train(model, 3, seed=2)
    assert len(differences(before, everything_learned(model))) > 10


@on_device_or_host
def test_an_actor_loss_that_is_not_finite(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic has taken its step before, which stays; targets and replay data are left alone."""
    model = recorded(**storage(on_device))
    train(model, 8)
    with th.no_grad():
        next(model.actor.parameters()).fill_(th.nan)
    before = everything_learned(model)
    with pytest.raises(NonFiniteLossError, match="`actor_loss`"):
        train(model, 4, seed=1)
    changed = differences(before, everything_learned(model))
    assert changed and all(name.startswith(("critic.", "critic optimizer")) for name in changed)
    steps = [float(state["step"]) for state in model.critic.optimizer.state.values()]
    assert set(steps) == {9.0}  # one of the four


@pytest.mark.parametrize("update", [0, 2])
def test_updates_before_the_one_that_is_not_finite_stay(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those, and no others, to the bit."""
    poisoned, expected = recorded(), recorded()
    for model in (poisoned, expected):
        train(model, 8)
    original, calls = poisoned.replay_buffer.sample, [0]  # type: ignore[union-attr]

    def sample(batch_size: int, env: Any = None) -> Any:
        batch = original(batch_size, env)
        calls[0] += 1
        return batch._replace(rewards=th.full_like(batch.rewards, th.inf)) if calls[0] == update + 1 else batch

    monkeypatch.setattr(poisoned.replay_buffer, "sample", sample)
    with pytest.raises(NonFiniteLossError, match="`critic_loss`"):
        train(poisoned, 5, seed=1)
    if update:
        train(expected, update, seed=1)
    assert differences(everything_learned(poisoned), everything_learned(expected)) == []


@pytest.mark.parametrize("optimizer_class", [th.optim.RMSprop, th.optim.Adagrad, th.optim.SGD])
def test_other_optimizers_take_no_step_either(optimizer_class: type[th.optim.Optimizer]) -> None:
    """Those that cannot be told on the device are asked on the host, and so cannot be captured."""
    model = recorded(policy_kwargs={"optimizer_class": optimizer_class})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA graphs cannot be used here")
        train(model, 6)
        before = everything_learned(model)
        model.replay_buffer.rewards[:] = np.inf  # type: ignore[union-attr]
        with pytest.raises(NonFiniteLossError, match="`critic_loss`"):
            train(model, 3, seed=1)
    assert differences(before, everything_learned(model)) == []


# ------------------------------------------------------------------------------------------------- acting


def acts_alike(first: DIPO, second: DIPO, rows: int = 3, seed: int = 0) -> None:
    """Not to the bit: products round by where in memory their numbers lie."""
    observations = np.random.default_rng(seed).normal(size=(rows, OBS_DIM)).astype(np.float32)
    for deterministic in (True, False):
        results = []
        for model in (first, second):
            th.manual_seed(seed)
            results.append(model.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)


def test_acting_is_captured_for_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    for seed in range(WARM_UP + 4):
        for rows in (1, 16):
            acts_alike(both.captured, both.eager, rows, seed)
    assert both.graphs.replays == 4 * 4 and both.graphs.captures == 4
    # what acts next has learned, and samples otherwise
    both.train(6, replayed=True)
    both.change(lambda model: model.policy.set_sampler("behaviour", noise_scale=0.5, num_inference_steps=3))
    for seed in range(6):
        acts_alike(both.captured, both.eager, seed=seed)


def test_acting_after_parameters_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    for seed in range(6):
        acts_alike(both.captured, both.eager, seed=seed)
    assert both.graphs.replays > 0
    for name in ("weights elsewhere", "weights", "parameters"):
        both.change(CHANGES[name])
        acts_alike(both.captured, both.eager, seed=7)


@pytest.mark.parametrize("first", [th.inference_mode, th.no_grad, th.enable_grad])
@pytest.mark.parametrize("then", [th.inference_mode, th.no_grad, th.enable_grad])
def test_acting_in_and_outside_of_inference_mode(first: Any, then: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    for surroundings, calls in ((first, 6), (then, 2), (first, 2)):
        with surroundings():
            for seed in range(calls):
                acts_alike(both.captured, both.eager, seed=seed)
    assert both.graphs.replays > 0
    both.train(6)


def test_gradients_through_a_policy_that_has_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    for seed in range(6):
        acts_alike(both.captured, both.eager, seed=seed)
    given = Inputs(3)
    slopes = []
    for model in (both.captured, both.eager):
        observations = given.observations.clone().requires_grad_()
        model.policy(observations, deterministic=True).sum().backward()
        slopes.append(observations.grad)
    assert slopes[0] is not None and slopes[0].abs().max() > 0
    th.testing.assert_close(slopes[0], slopes[1])
    assert_same(computed(both.captured, given), computed(both.eager, given))


def test_annealing_a_sampler_keeps_few_graphs_and_captures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value has a key of its own; when annealing has ended, acting is captured as before, and so were the updates."""
    both = Both(monkeypatch, policy_kwargs={"solver": "ddim"})
    both.train(6)
    for step, eta in enumerate(np.linspace(0, 1, 40)):
        for model in (both.eager, both.captured):
            model.policy.set_sampler("behaviour", eta=float(eta))
        acts_alike(both.captured, both.eager, seed=step)
        both.train(1, seed=step)
        assert len(both.graphs._known) <= MAX_GRAPHS
    assert both.graphs.captures == 2  # of updates, and of deterministic actions
    before = both.graphs.replays
    for seed in range(6):
        acts_alike(both.captured, both.eager, seed=seed)
    assert both.graphs.replays > before and len(both.graphs._known) <= MAX_GRAPHS


def test_memory_of_graphs_is_bounded() -> None:
    """Those that were called last are kept, and one that was forgotten is captured again."""
    graphs = RecordedGraphs(CPU)
    for size in range(1, 3 * MAX_GRAPHS):
        for _ in range(WARM_UP + 2):
            assert th.equal(graphs(lambda x: 2 * x, "double", th.ones(size)), 2 * th.ones(size))
            assert th.equal(graphs(lambda x: 3 * x, "triple", th.ones(2)), 3 * th.ones(2))
    assert len(graphs._known) == MAX_GRAPHS
    assert graphs.captures == 3 * MAX_GRAPHS  # one for each size, and one for what was always in use
    for _ in range(WARM_UP + 2):
        assert th.equal(graphs(lambda x: 2 * x, "double", th.ones(1)), 2 * th.ones(1))
    assert graphs.captures == 3 * MAX_GRAPHS + 1


def test_results_and_inputs_of_graphs_belong_to_the_caller() -> None:
    """A later replay does not overwrite what an earlier one has returned, and leaves what it is given alone."""
    graphs = RecordedGraphs(CPU)
    inputs = [th.full((2,), float(i)) for i in range(8)]
    results = [graphs(lambda x: (x + 1, {"twice": 2 * x + 2}), "key", each.clone()) for each in inputs]
    for i, (first, second) in enumerate(results):
        assert th.equal(first, th.full((2,), i + 1.0)) and th.equal(second["twice"], th.full((2,), 2 * i + 2.0))


# ------------------------------------------------------------------------------------------------- failures


def test_a_capture_that_fails_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of an optimizer whose step must be decided on the host."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}}
    model = recorded(**kwargs)
    with pytest.warns(
        UserWarning, match="CUDA graphs cannot be used here, everything runs eagerly.*waits for the device"
    ) as w:
        train(model, 10)
    assert len(w) == 1
    plain = filled(accelerate="off", **kwargs)
    plain.policy.load_state_dict(model.policy.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            acts_alike(model, plain, seed=seed)
        train(model, 5, batch_size=16)
    assert model._n_updates == 15 and graphs_of(model).replays == 0 and len(graphs_of(model)._known) == 0


def test_a_capture_that_fails_in_acting(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)

    def hook(module: Any, inputs: Any, output: th.Tensor) -> th.Tensor:
        return output + float(output.sum()) * 0

    both.change(lambda model: model.actor.register_forward_hook(hook))
    with pytest.warns(UserWarning, match="CUDA graphs cannot be used here") as caught:
        for seed in range(8):
            acts_alike(both.captured, both.eager, seed=seed)
        both.train(8, replayed=False)
    assert len(caught) == 1


def test_an_error_of_the_users_own_is_raised() -> None:
    """A capture that fails because the function does so says so by the function's own error."""
    graphs = RecordedGraphs(CPU)

    def function(x: th.Tensor) -> th.Tensor:
        if fail:
            raise KeyError("mine")
        return x

    fail = False
    for _ in range(WARM_UP):
        graphs(function, "key", th.ones(1))
    fail = True
    with pytest.warns(UserWarning, match="KeyError: 'mine'"), pytest.raises(KeyError, match="mine"):
        graphs(function, "key", th.ones(1))


# ------------------------------------------------------------------------------------------------- copies


def test_an_agent_with_graphs_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = small_dipo(TinyEnv(), accelerate="cudagraphs")
    model.learn(60)
    graphs = graphs_of(model)
    assert graphs.replays > 0
    for copied in (pickle.loads(pickle.dumps(graphs)), copy.deepcopy(graphs)):
        assert len(copied._known) == 0 and copied.device == graphs.device
    policy = copy.deepcopy(model.policy)
    assert policy._graphs is not graphs
    observations = np.zeros((3, 3), np.float32)
    np.testing.assert_allclose(
        policy.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0], atol=1e-6
    )
    model.save(tmp_path / "model")
    loaded = DIPO.load(tmp_path / "model", env=TinyEnv(), device="cpu")
    assert graphs_of(loaded) is not graphs and graphs_of(loaded).replays == 0
    loaded.learn(20, reset_num_timesteps=False)
    copied_model = copy.deepcopy(model)
    copied_model.learn(20, reset_num_timesteps=False)
    assert graphs_of(loaded).replays > 0 and graphs_of(copied_model).replays > 0


def test_map_tensors() -> None:
    tree = ({"a": th.ones(2), "b": None}, (th.zeros(1), 3))
    doubled = map_tensors(lambda x, y: x + y, tree, tree)
    assert th.equal(doubled[0]["a"], 2 * th.ones(2)) and doubled[0]["b"] is None and doubled[1][1] == 3


# ------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    "device, accelerate, plain, graphs",
    [
        ("cuda", "auto", False, True),
        ("cuda", "off", True, False),
        ("cuda", "compile", False, True),
        ("cuda", "cudagraphs", False, True),
        ("cpu", "auto", False, False),
        ("cpu", "cudagraphs", False, False),
        ("cpu", "off", True, False),
        ("mps", "auto", True, False),
        ("mps", "cudagraphs", True, False),
        ("mps", "compile", True, False),
        ("xpu", "auto", True, False),
    ],
)
def test_how_a_request_is_resolved(
    device: str, accelerate: str, plain: bool, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA everything but "off" captures, since the tests marked ``gpu`` have passed on one; other devices are no CUDA."""
    monkeypatch.setattr(sb3_dipo.fast, "make_ops", MAKE_OPS)
    monkeypatch.setattr(th, "tensor", lambda *args, device=None, **kwargs: TENSOR(*args, **kwargs))  # no such device is here
    policy = filled(accelerate="off").policy
    monkeypatch.setattr(type(policy), "device", property(lambda self: th.device(device)))
    if accelerate != "off":
        guard, found = SET_UP(policy, accelerate)
        assert (found is not None) == graphs
        assert type(guard) is (CapturableGuard if graphs else FusedGuard if device == "cpu" else Guard)
    else:
        policy.set_accelerate("off")
    assert (policy.actor.ops is PLAIN) == plain
    assert policy.critic.ops is policy.actor.ops is policy.actor_target.ops


def test_replay_lies_on_the_device_where_it_fits_but_for_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_dipo.fast, "fits_on_device", lambda *sizes: True)
    for accelerate, on_device in (("auto", True), ("off", False), ("compile", True), ("cudagraphs", True)):
        model = filled(accelerate=accelerate)
        assert isinstance(model.replay_buffer, DIPODeviceReplayBuffer) == on_device
        train(model, 1)
    # the user's own choice, and what has no place on the device, stay
    for kwargs in (
        {"n_steps": 3},
        {"replay_buffer_class": sb3_dipo.DIPOReplayBuffer},
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ):
        model = filled(accelerate="cudagraphs", **kwargs)
        assert not isinstance(model.replay_buffer, DIPODeviceReplayBuffer)
        train(model, 5)


# ------------------------------------------------------------------------------------------------- devices without float64


@pytest.mark.parametrize("accelerate", ["off", "auto", "cudagraphs"])
@on_device_or_host
@pytest.mark.parametrize("actor", ["diffusion", "vae", "mlp"])
def test_training_and_acting_without_float64(accelerate: str, on_device: bool, actor: str) -> None:
    model = filled(accelerate=accelerate, policy_kwargs={"actor": actor}, **storage(on_device))
    observations = np.random.default_rng(0).normal(size=(20, OBS_DIM)).astype(np.float32)
    with WithoutFloat64():
        for batch_size in (8, 32):
            train(model, 2, batch_size=batch_size)
        for rows in (1, 20):
            for deterministic in (True, False):
                model.predict(observations[:rows], deterministic=deterministic)
    if actor == "diffusion":  # whose tables are made on the CPU
        model.policy.set_sampler(solver="dpmpp_2m", num_inference_steps=3)
    with WithoutFloat64():
        model.predict(observations)
        train(model, 1)
    assert model._n_updates == 5


def test_float64_would_be_seen() -> None:
    with pytest.raises(TypeError, match="no float64"), WithoutFloat64():
        th.ones(2).double()


@on_device_or_host
@pytest.mark.parametrize("accelerate", ["off", "cudagraphs"])
def test_learning_without_float64(accelerate: str, on_device: bool) -> None:
    """With normalised observations, a schedule, and noise: all that is made on the way, too."""
    env = VecNormalize(DummyVecEnv([TinyEnv]))
    model = small_dipo(env, accelerate=accelerate, learning_rate=lambda progress: 1e-3 * progress, **storage(on_device))
    with WithoutFloat64():
        model.learn(30)
        model.predict(np.zeros((2, 3), np.float32))
    assert model._n_updates == 20


# ------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@on_device_or_host
@pytest.mark.parametrize("net_arch", [[64, 64], [256, 256]], ids=str)
def test_captured_updates_equal_eager_ones_on_a_gpu(
    on_device: bool, net_arch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs: dict[str, Any] = {"device": "cuda", "learning_rate": lambda progress: 1e-3 * progress}
    kwargs["replay_buffer_class"] = DIPODeviceReplayBuffer if on_device else sb3_dipo.DIPOReplayBuffer
    kwargs["policy_kwargs"] = {"net_arch": net_arch}
    plain, captured = filled(accelerate="off", **kwargs), filled(accelerate="cudagraphs", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, progress in enumerate([1.0, 0.3]):
            for model in (plain, captured):
                train(model, 25, seed=seed, progress=progress)
    assert captured._graphs is not None and len(captured._graphs._known) > 0 and not captured._graphs._failed
    for name in ("train/critic_loss", "train/actor_loss", "train/q_value", "train/improved_q_gain"):
        tolerance = 0.2 if on_device else 1e-2  # captured draws differ from eager ones
        assert captured.logger.name_to_value[name] == pytest.approx(plain.logger.name_to_value[name], rel=tolerance, abs=0.05)
    observations = np.zeros((4, OBS_DIM), np.float32)
    for _ in range(6):
        actions = captured.predict(observations, deterministic=True)[0]
    with th.no_grad():
        expected = captured.actor(th.from_numpy(observations).cuda(), deterministic=True, sampler=None).cpu().numpy()
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("accelerate", ["auto", "cudagraphs"])
def test_results_on_a_gpu_equal_the_plain_path(accelerate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = filled(accelerate="off", device="cuda"), filled(accelerate=accelerate, device="cuda")
    for rows in (1, 16, 40, 500):
        given = Inputs(rows)
        for name, value in vars(given).items():
            setattr(given, name, value.cuda())
        assert_same(computed(model, given), computed(plain, given), atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLAIN_POLICIES)
def test_other_policies_are_captured_on_a_gpu(name: str) -> None:
    model = filled(accelerate="cudagraphs", device="cuda", policy_kwargs=PLAIN_POLICIES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            train(model, 2)
            model.predict(np.zeros((4, OBS_DIM), np.float32))


@pytest.mark.gpu
@on_device_or_host
def test_a_loss_that_is_not_finite_on_a_gpu(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(accelerate="cudagraphs", device="cuda", **storage(on_device))
    train(model, 8)
    before, buffer = everything_learned(model), model.replay_buffer
    assert buffer is not None
    buffer.rewards[:] = np.nan
    with pytest.raises(NonFiniteLossError, match="`critic_loss`"):
        train(model, 5, seed=1)
    after = everything_learned(model)
    assert all(th.equal(value.cpu(), after[name].cpu()) for name, value in before.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("another layer", "a hook")])
def test_what_changes_after_a_capture_counts_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws differ, so only what follows from none is compared: acting, and that training goes on."""
    model = filled(accelerate="cudagraphs", device="cuda")
    observations = np.random.default_rng(0).normal(size=(4, OBS_DIM)).astype(np.float32)
    for _ in range(6):
        train(model, 1)
        model.predict(observations, deterministic=True)
    CHANGES[name](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            train(model, 1, seed=seed)
            actions = model.predict(observations, deterministic=True)[0]
    with th.no_grad():
        expected = model.policy.actor(
            th.from_numpy(observations).cuda(), deterministic=True, sampler=model.policy.samplers["evaluation"]
        )
    np.testing.assert_allclose(actions, expected.cpu().numpy(), rtol=0, atol=1e-4)
    assert STEPS == 4
