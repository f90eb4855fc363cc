"""
What is computed fast is what the modules compute, whatever they are and however they are called: where a fast path does not
know a module, a number's type, or who is listening, it steps aside. Expected is each time what ``accelerate="off"`` does,
its errors included.
"""

import copy
import gc
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from both import error_of
from fast_and_plain import (
    ACTION_DIM,
    FLOAT32_ROUNDING,
    OBS_DIM,
    STEPS,
    Inputs,
    assert_same,
    computed,
    filled,
    furthest_apart,
    gradients_of,
    train,
)
from helpers import MODES
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_dipo import DIPO, DiffusionActor, Sampler, improve_actions
from sb3_dipo.networks import NoisePredictionNetwork

FAST = [mode for mode in MODES if mode != "off"]
fast = pytest.mark.parametrize("accelerate", FAST)
modes = pytest.mark.parametrize("accelerate", MODES)


def pair(accelerate: str, **kwargs: Any) -> tuple[DIPO, DIPO]:
    """A plain agent, and one with the same weights that computes otherwise."""
    return filled(accelerate="off", **kwargs), filled(accelerate=accelerate, **kwargs)


def diffusion_actor(model: DIPO) -> DiffusionActor:
    assert isinstance(model.actor, DiffusionActor)
    return model.actor


# ------------------------------------------------------------------------------------------------- A1: layers


class LowRank(nn.Linear):
    """An adapter: the layer, and something beside it."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) + 0.5 * x.mean(dim=1, keepdim=True)


class ShiftedMish(nn.Mish):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) + 0.3


class Residual(nn.Sequential):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) + x.sum(dim=1, keepdim=True)


class Doubled(nn.Module):
    def forward(self, weight: th.Tensor) -> th.Tensor:
        return 2 * weight


class ShiftedNetwork(NoisePredictionNetwork):
    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, features: th.Tensor) -> th.Tensor:
        return super().forward(noisy_actions, timesteps, features) + 0.2


class ShiftedEmbedding(NoisePredictionNetwork):
    def embed(self, timesteps: th.Tensor, dtype: th.dtype = th.float32) -> th.Tensor:
        return super().embed(timesteps, dtype) + 0.2


class Weight(th.Tensor):
    """Computes as a tensor does, and adds to the result of every product."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        return result + 0.1 if func is nn.functional.linear else result


def retype(index: int, kind: type[nn.Module]) -> Callable[[nn.Sequential], None]:
    def alter(mlp: nn.Sequential) -> None:
        mlp[index].__class__ = kind

    return alter


def replace(index: int, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Sequential], None]:
    def alter(mlp: nn.Sequential) -> None:
        mlp[index] = make(mlp[index])

    return alter


def without_bias(layer: Any) -> nn.Module:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(1.5 * layer.weight.detach())
    return plain


def own_forward(mlp: nn.Sequential) -> None:
    layer: Any = mlp[2]
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight, layer.bias)


def plain_weight(mlp: nn.Sequential) -> None:
    """As hypernetworks do it: the weight is a tensor that something else has computed."""
    layer: Any = mlp[2]
    weight = 1.5 * layer.weight.detach()
    del layer.weight
    layer.weight = weight


def sparse_weight(mlp: nn.Sequential) -> None:
    layer: Any = mlp[2]
    weight = layer.weight.detach()
    layer.weight = nn.Parameter((weight * (weight > 0)).to_sparse_csr(), requires_grad=False)


def subclassed_weight(mlp: nn.Sequential) -> None:
    layer: Any = mlp[2]
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight), requires_grad=False)


def strided_weight(mlp: nn.Sequential) -> None:
    layer: Any = mlp[2]
    layer.weight = nn.Parameter((1.5 * layer.weight.detach()).t().contiguous().t())


def transposed_in_place(mlp: nn.Sequential) -> None:
    layer: Any = mlp[2]  # square
    layer.weight.data = layer.weight.data.t()


def weight_norm(mlp: nn.Sequential) -> None:
    layer: Any = parametrizations.weight_norm(mlp[2])
    with th.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)


def spectral_norm(mlp: nn.Sequential) -> None:
    th.manual_seed(0)  # its vectors are drawn
    parametrizations.spectral_norm(mlp[2], n_power_iterations=5)
    mlp.eval()


def old_weight_norm(mlp: nn.Sequential) -> None:
    layer: Any = nn.utils.weight_norm(mlp[2])  # by a hook before the layer
    with th.no_grad():
        layer.weight_g.mul_(1.5)


def old_spectral_norm(mlp: nn.Sequential) -> None:
    th.manual_seed(0)
    nn.utils.spectral_norm(mlp[2])
    mlp.eval()


def hooked(where: int, name: str, hook: Callable[..., Any]) -> Callable[[nn.Sequential], None]:
    """With a hook on one of the layers, or, at -1, on the whole."""

    def alter(mlp: nn.Sequential) -> None:
        getattr(mlp if where < 0 else mlp[where], f"register_{name}")(hook)

    return alter


def smaller_gradient(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if each is None else 0.5 * each for each in grad_input)


def tensor_hook(mlp: nn.Sequential) -> None:
    layer: Any = mlp[2]
    layer.weight.register_hook(lambda gradient: 3 * gradient)


ALTERATIONS: dict[str, Callable[[nn.Sequential], Any]] = {
    "subclass of Linear, first": retype(0, LowRank),
    "subclass of Linear, middle": retype(2, LowRank),
    "subclass of Linear, last": retype(4, LowRank),
    "subclass of Mish": retype(1, ShiftedMish),
    "another activation": replace(3, lambda _: nn.Tanh()),
    "Mish in place": replace(1, lambda _: nn.Mish(inplace=True)),
    "LayerNorm for an activation": replace(3, lambda _: nn.LayerNorm(64)),
    "LayerNorm between the layers": lambda mlp: mlp.insert(1, nn.LayerNorm(64)),
    "Dropout of everything": lambda mlp: mlp.insert(2, nn.Dropout(1.0)),
    "nested": replace(2, lambda layer: nn.Sequential(layer, nn.LayerNorm(64))),
    "no bias": replace(2, without_bias),
    "subclass of Sequential": lambda mlp: setattr(mlp, "__class__", Residual),
    "forward of its own": own_forward,
    "weight that is no parameter": plain_weight,
    "sparse weight": sparse_weight,
    "weight of a subclass": subclassed_weight,
    "strided weight": strided_weight,
    "weight transposed in place": transposed_in_place,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "parametrisation": lambda mlp: parametrize.register_parametrization(mlp[2], "weight", Doubled()),
    "parametrised bias": lambda mlp: parametrize.register_parametrization(mlp[0], "bias", Doubled()),
    "pruned": lambda mlp: prune.l1_unstructured(mlp[2], "weight", 0.5),
    "forward hook": hooked(2, "forward_hook", lambda module, inputs, output: output + 0.5),
    "forward hook with keywords": lambda mlp: mlp[0].register_forward_hook(
        lambda module, inputs, keywords, output: 1.5 * output, with_kwargs=True
    ),
    "forward pre-hook": hooked(3, "forward_pre_hook", lambda module, inputs: (1.5 * inputs[0],)),
    "hook on the whole": hooked(-1, "forward_hook", lambda module, inputs, output: output + 0.5),
    "pre-hook on the whole": hooked(-1, "forward_pre_hook", lambda module, inputs: (1.5 * inputs[0],)),
    "backward hook": hooked(2, "full_backward_hook", smaller_gradient),
    "backward pre-hook": hooked(
        3, "full_backward_pre_hook", lambda module, grad_output: tuple(0.5 * each for each in grad_output)
    ),
    "backward hook on the whole": hooked(-1, "full_backward_hook", smaller_gradient),
    "tensor hook": tensor_hook,
}


def mlps(model: DIPO) -> list[Any]:
    """All MLPs of actor and critic, and of their targets."""
    found: list[Any] = [critic.get_submodule("qf0") for critic in (model.critic, model.critic_target)]
    return found + [network.noise_network.layers for network in (diffusion_actor(model), model.actor_target)]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("name", ALTERATIONS)
def test_layers_that_are_not_the_ones_expected(name: str) -> None:
    models = {accelerate: filled(accelerate=accelerate) for accelerate in MODES}
    for model in models.values():
        for mlp in mlps(model):
            ALTERATIONS[name](mlp)
    original = filled(accelerate="off")
    for rows in (8, 40):
        given = Inputs(rows)
        expected = computed(models["off"], given)
        assert name == "Mish in place" or furthest_apart(expected, computed(original, given)) > 1e-3
        # a TD target has no gradient, and is the same function
        with th.enable_grad():
            with_gradient = models["off"].critic(given.observations, given.actions)
        th.testing.assert_close(expected["next_value"], th.cat(with_gradient, dim=1).min(dim=1, keepdim=True)[0].detach())
        for accelerate in FAST:
            assert_same(computed(models[accelerate], given), expected)


class ShiftedNorm(nn.LayerNorm):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) + 0.5


def norm_of_its_own(mlp: nn.Sequential) -> None:
    layer: Any = mlp[1]
    layer.forward = lambda x: 2 * x


NORMS: dict[str, Callable[[nn.Sequential], Any]] = {
    "subclass": retype(1, ShiftedNorm),
    "hook": hooked(1, "forward_hook", lambda module, inputs, output: output + 0.5),
    "pre-hook": hooked(4, "forward_pre_hook", lambda module, inputs: (inputs[0] ** 2,)),
    "backward hook": hooked(4, "full_backward_hook", smaller_gradient),
    "forward of its own": norm_of_its_own,
    "no weights": replace(1, lambda _: nn.LayerNorm(64, elementwise_affine=False, eps=0.1)),
    "no bias": replace(1, lambda _: nn.LayerNorm(64, bias=False, eps=0.1)),
    "another eps": replace(1, lambda _: nn.LayerNorm(64, eps=10.0)),
    "RMSNorm": replace(1, lambda _: nn.RMSNorm(64)),
    "BatchNorm": replace(1, lambda _: nn.BatchNorm1d(64, track_running_stats=False)),
    "after the activation": lambda mlp: mlp.insert(3, nn.LayerNorm(64, eps=0.1)),
    "twice": lambda mlp: mlp.insert(2, nn.LayerNorm(64, eps=0.1)),
    "at the end": lambda mlp: mlp.append(nn.LayerNorm(1, eps=0.1)),
    "at the beginning": lambda mlp: mlp.insert(0, nn.LayerNorm(7, eps=0.1)),
    "parametrised": lambda mlp: parametrize.register_parametrization(mlp[1], "weight", Doubled()),
    "frozen": lambda mlp: mlp[1].requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", NORMS)
def test_norms_that_are_not_the_ones_expected(name: str) -> None:
    """In critics whose hidden layers have a LayerNorm before each activation."""
    models = {accelerate: filled(accelerate=accelerate, policy_kwargs={"layer_norm": True}) for accelerate in MODES}
    for model in models.values():
        for critic in (model.critic, model.critic_target):
            qf0: Any = critic.get_submodule("qf0")
            NORMS[name](qf0)
    original = filled(accelerate="off", policy_kwargs={"layer_norm": True})
    for rows in (8, 40):
        given = Inputs(rows)
        expected = computed(models["off"], given)
        before = computed(original, given)
        assert expected.keys() != before.keys() or furthest_apart(expected, before) > 1e-3
        for accelerate in FAST:
            assert_same(computed(models[accelerate], given), expected)


@fast
def test_a_norm_of_another_size_is_the_same_error(accelerate: str) -> None:
    for size in ((63,), (65,), (40, 64)):
        errors = []
        for model in pair(accelerate, policy_kwargs={"layer_norm": True}):
            qf0: Any = model.critic.get_submodule("qf0")
            qf0[1] = nn.LayerNorm(size)
            for rows in (8, 39):
                given = Inputs(rows)
                errors.append(error_of(partial(model.critic.next_value, given.observations, given.actions)))
                errors.append(error_of(partial(improved, model, given)))
        assert errors[:4] == errors[4:] and all(errors)


@pytest.mark.parametrize("name", ["subclass of Linear, middle", "forward hook", "LayerNorm between the layers"])
def test_altered_layers_in_whole_updates(name: str) -> None:
    models = [filled(accelerate=accelerate) for accelerate in MODES]
    for model in models:
        for mlp in mlps(model):
            ALTERATIONS[name](mlp)
        train(model, 3)
    for model in models[1:]:
        th.testing.assert_close(model.policy.state_dict(), models[0].policy.state_dict(), rtol=1e-4, atol=1e-5)


@fast
@pytest.mark.parametrize("kind", [ShiftedNetwork, ShiftedEmbedding])
def test_subclasses_of_the_noise_network(accelerate: str, kind: type[nn.Module]) -> None:
    plain, model = pair(accelerate)
    for each in (plain, model):
        diffusion_actor(each).noise_network.__class__ = kind  # type: ignore[assignment]
    for rows in (8, 40):
        given = Inputs(rows)
        expected = computed(plain, given)
        assert furthest_apart(expected, computed(filled(accelerate="off"), given)) > 1e-2
        assert_same(computed(model, given), expected)


@fast
@pytest.mark.parametrize(
    "alter",
    [
        lambda network: retype(2, LowRank)(network.time_mlp),
        lambda network: network.register_forward_hook(lambda module, inputs, output: output + 0.5),
        lambda network: network.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:])),
        lambda network: setattr(network, "embed", lambda *inputs: 0.5 * NoisePredictionNetwork.embed(network, *inputs)),
        lambda network: setattr(network, "forward", lambda *inputs: 0.5 * NoisePredictionNetwork.forward(network, *inputs)),
        lambda network: setattr(network, "layers", nn.Sequential(*network.layers, nn.Linear(ACTION_DIM, ACTION_DIM))),
    ],
    ids=["time MLP", "hook", "pre-hook", "own embedding", "own forward", "two linear layers at the end"],
)
def test_altered_noise_networks(accelerate: str, alter: Callable[[Any], Any]) -> None:
    plain, model = pair(accelerate)
    for each in (plain, model):
        th.manual_seed(0)
        alter(diffusion_actor(each).noise_network)
    for rows in (8, 40):
        given = Inputs(rows)
        expected = computed(plain, given)
        assert furthest_apart(expected, computed(filled(accelerate="off"), given)) > 1e-3
        assert_same(computed(model, given), expected)


@fast
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules(accelerate: str, name: str) -> None:
    plain, model = pair(accelerate)
    given = Inputs(40)
    before = computed(plain, given)
    hooks: dict[str, Callable[..., Any]] = {
        "forward_hook": lambda module, inputs, output: output + 0.1 if type(module) is nn.Mish else None,
        "forward_pre_hook": lambda module, inputs: 1.5 * inputs[0] if type(module) is nn.Mish else None,
        "full_backward_hook": lambda module, grad_input, grad_output: (
            smaller_gradient(module, grad_input, grad_output) if type(module) is nn.Mish else None
        ),
        "full_backward_pre_hook": lambda module, grad_output: (0.5 * grad_output[0],) if type(module) is nn.Mish else None,
    }
    hook = getattr(nn.modules.module, f"register_module_{name}")(hooks[name])
    try:
        expected = computed(plain, given)
        assert furthest_apart(expected, before) > 1e-3
        assert_same(computed(model, given), expected)
    finally:
        hook.remove()
    assert_same(computed(model, given), before)


def parts_of(model: DIPO, kind: type[Any]) -> list[Any]:
    return [module for module in model.policy.modules() if type(module) is kind]


@fast
def test_a_hook_sees_every_call(accelerate: str) -> None:
    """That it changes nothing does not mean that it may be left out: it may count, or keep activations."""
    counts = []
    for model in pair(accelerate):
        calls: list[th.Size] = []
        for module in (*parts_of(model, nn.Linear), *parts_of(model, nn.Mish)):
            module.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(output.shape))
        train(model, 1)
        model.predict(np.zeros((40, OBS_DIM), np.float32))
        counts.append(calls)
    assert counts[0] == counts[1] and len(counts[0]) > 100


def grow(model: DIPO) -> None:
    """In place, as an optimizer or ``load_state_dict`` does."""
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.mul_(1.5)


def move(model: DIPO) -> None:
    for parameter in model.critic.parameters():
        parameter.data = 1.5 * parameter.data


def hook_in(model: DIPO) -> None:
    model.critic.get_submodule("qf0").register_forward_hook(lambda module, inputs, output: output - 3)


def adapt(model: DIPO) -> None:
    qf0: Any = model.critic.get_submodule("qf0")
    retype(2, LowRank)(qf0)


@fast
@pytest.mark.parametrize("change", [grow, move, hook_in, adapt], ids=lambda change: change.__name__)
def test_what_changes_after_an_objective_was_made(accelerate: str, change: Callable[[DIPO], None]) -> None:
    """It is a function of the actions at fixed states; of weights and layers it has no copy."""
    results: list[list[th.Tensor]] = []
    for model in pair(accelerate):
        given = Inputs(40)
        objective = model.critic.objective(given.observations)
        with th.no_grad():
            before = objective(given.actions)
            change(model)
            after = objective(given.actions)
        assert furthest_apart({"": before}, {"": after}) > 1e-2
        results.append([after, improve_actions(objective, given.actions, action_gradient_steps=2)])
    for actual, expected in zip(results[1], results[0], strict=True):
        th.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@fast
def test_frozen_layers(accelerate: str) -> None:
    """Have no gradient, and the others have theirs."""
    for frozen in ([0], [2, 3], [0, 1, 2, 3, 4, 5], []):
        gradients = []
        for model in pair(accelerate, policy_kwargs={"net_arch": [128, 128]}):
            for module in (model.actor, model.critic):
                for i, parameter in enumerate(module.parameters()):
                    parameter.requires_grad_(i not in frozen)
            given = Inputs(40)
            model.critic.loss(given.observations, given.actions, given.targets).backward()
            model.actor.loss(given.observations, given.actions, given.timesteps, given.actions).backward()
            gradients.append([parameter.grad for parameter in (*model.actor.parameters(), *model.critic.parameters())])
        for actual, expected in zip(gradients[1], gradients[0], strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None and expected is not None:
                th.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@fast
def test_a_frozen_critic_gives_the_gradient_of_the_actions(accelerate: str) -> None:
    slopes = []
    for model in pair(accelerate, policy_kwargs={"net_arch": [128, 128]}):
        model.critic.requires_grad_(False)
        given = Inputs(40)
        climber = given.actions.clone().requires_grad_()
        th.cat(model.critic(given.observations, climber)).sum().backward()
        slopes.append(climber.grad)
    assert slopes[0] is not None and slopes[1] is not None
    th.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- A2, A3: types and devices


class LouderMish(TorchFunctionMode):
    """Changes what functions of PyTorch compute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 1.5 * result if func is nn.functional.mish else result


class LouderProducts(TorchDispatchMode):
    """Changes what operators compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 1.5 * result if func is th.ops.aten.mish.default else result


@contextmanager
def default_dtype(dtype: th.dtype) -> Iterator[None]:
    before = th.get_default_dtype()
    th.set_default_dtype(dtype)
    try:
        yield
    finally:
        th.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    th.set_default_device(device)
    try:
        yield
    finally:
        th.set_default_device(None)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast to bfloat16": lambda: th.autocast("cpu", dtype=th.bfloat16),
    "autocast to float16": lambda: th.autocast("cpu", dtype=th.float16),
    "autocast without a cache": lambda: th.autocast("cpu", dtype=th.bfloat16, cache_enabled=False),
    "autocast of another device": lambda: th.autocast("cuda", dtype=th.bfloat16, enabled=False),
    "default float64": lambda: default_dtype(th.float64),
    "default bfloat16": lambda: default_dtype(th.bfloat16),
    "default device": lambda: default_device("meta"),
    "device": lambda: th.device("meta"),
    "function mode": LouderMish,
    "dispatch mode": LouderProducts,
    "forward-mode level": th.autograd.forward_ad.dual_level,
    "saved tensors": lambda: th.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "saved elsewhere": lambda: th.autograd.graph.save_on_cpu(),
    "anomalies": lambda: th.autograd.detect_anomaly(check_nan=True),
}
ROUNDED = {"autocast to bfloat16", "autocast to float16", "autocast without a cache"}
CHANGED = {*ROUNDED, "function mode", "dispatch mode"}


@fast
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", CONTEXTS)
def test_whoever_intercepts_or_casts_is_obeyed(accelerate: str, name: str) -> None:
    """And what is computed afterwards is as if nothing had been."""
    plain, model = pair(accelerate)
    for rows in (8, 16, 40):
        given = Inputs(rows)
        usual = computed(plain, given)
        if rows == 16:
            assert_same(computed(model, given), usual)  # with all that a cache may hold, and without
        with CONTEXTS[name]():
            expected, actual = computed(plain, given), computed(model, given)
        if name in CHANGED:
            assert furthest_apart(expected, usual) > 1e-4
        assert_same(actual, expected)
        assert_same(computed(model, given), usual)


@modes
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_predict_and_train_in_any_surroundings(accelerate: str, name: str) -> None:
    """A default that changes after the agent was made does not change the agent."""
    plain, model = pair(accelerate)
    for rows in (1, 16, 40):
        observations = np.random.default_rng(rows).normal(size=(rows, OBS_DIM)).astype(np.float32)
        for deterministic in (True, False):
            results: list[np.ndarray] = []
            for each in (plain, model) if name in CHANGED else (plain, plain, model):
                surroundings = nullcontext() if name not in CHANGED and not results else CONTEXTS[name]()
                th.manual_seed(0)
                with surroundings:
                    actions = each.predict(observations, deterministic=deterministic)[0]
                results.append(actions)
            for actions in results[1:]:
                assert actions.dtype == np.float32
                np.testing.assert_allclose(actions, results[0], rtol=0, atol=1e-5)
    # Two updates of each agent. Rounding to 8 bits lets gradients go either way: the losses tell then.
    losses = []
    for each in (plain, model):
        with CONTEXTS[name]():
            train(each, 2)
        losses.append(dict(each.logger.name_to_value))
    if name not in ROUNDED:
        th.testing.assert_close(model.policy.state_dict(), plain.policy.state_dict(), rtol=1e-4, atol=1e-5)
    for key in ("train/critic_loss", "train/actor_loss", "train/q_value"):
        assert losses[1][key] == pytest.approx(losses[0][key], rel=1e-4 if name not in ROUNDED else 0.02)


@modes
def test_what_is_made_under_another_default_is_right_for_good(accelerate: str) -> None:
    """Samplers and tables, too: nothing that was made in the meantime stays."""
    expected = filled(accelerate="off", policy_kwargs={"num_train_timesteps": 20})
    expected.policy.set_sampler(num_inference_steps=5, solver="dpmpp_2m", timestep_spacing="lambda")
    observations = np.random.default_rng(0).normal(size=(20, OBS_DIM)).astype(np.float32)
    for name in ("default float64", "default bfloat16", "default device", "autocast to bfloat16"):
        model = filled(accelerate=accelerate, policy_kwargs={"num_train_timesteps": 20})
        with CONTEXTS[name]():
            model.policy.set_sampler(num_inference_steps=5, solver="dpmpp_2m", timestep_spacing="lambda")
            model.predict(observations, deterministic=True)
        assert model.policy.samplers == expected.policy.samplers
        actions = [each.predict(observations, deterministic=True)[0] for each in (model, expected)]
        np.testing.assert_allclose(actions[0], actions[1], rtol=0, atol=1e-5)


@modes
@pytest.mark.parametrize("beta_schedule", ["cosine", "vp", "linear", "ou"])
def test_samplers_can_be_set_under_another_default(accelerate: str, beta_schedule: str) -> None:
    model, same = (
        filled(accelerate=accelerate, policy_kwargs={"num_train_timesteps": 12, "beta_schedule": beta_schedule})
        for _ in range(2)
    )
    changes: list[dict[str, Any]] = [{"timestep_spacing": "lambda", "num_inference_steps": 4}, {"solver": "ddim", "eta": 0.5}]
    for change in changes:
        same.policy.set_sampler(**change)
        for context in (default_device("meta"), default_dtype(th.float64)):
            with context:
                model.policy.set_sampler(**change)
        th.manual_seed(0)
        actions = model.predict(np.ones((3, OBS_DIM), np.float32))[0]
        th.manual_seed(0)
        np.testing.assert_array_equal(actions, same.predict(np.ones((3, OBS_DIM), np.float32))[0])


@pytest.mark.parametrize("name", ["default device", "default float64", "default bfloat16"])
def test_the_device_buffer_under_another_default(name: str) -> None:
    from sb3_dipo.fast import DIPODeviceReplayBuffer

    expected = filled(replay_buffer_class=DIPODeviceReplayBuffer)
    given = expected.replay_buffer
    assert isinstance(given, DIPODeviceReplayBuffer)
    with CONTEXTS[name]():
        buffer = DIPODeviceReplayBuffer(64, given.observation_space, given.action_space, device="cpu")
        for i in range(64):
            row: list[Any] = [
                getattr(given, column)[i].numpy() for column in ("observations", "next_observations", "actions", "rewards")
            ]
            buffer.add(row[0], row[1], row[2], row[3], given.dones[i].numpy(), [{}])
        pickled = pickle.loads(pickle.dumps(buffer))
        results = []
        for each in (given, buffer, pickled):
            th.manual_seed(0)
            results.append((each.sample(16), each.sample_improved(16)))
            each.update_improved(results[-1][1].rows, results[-1][1].envs, 0.5 * results[-1][1].actions)
    for result in results[1:]:
        th.testing.assert_close(result, results[0], rtol=0, atol=0)
    for each in (buffer, pickled):
        assert th.equal(each.improved_actions, given.improved_actions)


Arguments = Callable[[Inputs], dict[str, Any]]


def changed(usual: Arguments, name: str, change: Callable[[th.Tensor], th.Tensor]) -> Arguments:
    def arguments(given: Inputs) -> dict[str, Any]:
        found = usual(given)
        return {**found, name: change(found[name])}

    return arguments


def strange_samples() -> dict[str, Callable[[Inputs], dict[str, Any]]]:
    """Arguments of ``sample`` that are not what is usually given."""
    usual: Callable[[Inputs], dict[str, Any]] = lambda g: {  # noqa: E731
        "features": g.observations,
        "initial_noise": g.initial_noise,
        "noise": g.noise,
    }
    found: dict[str, Callable[[Inputs], dict[str, Any]]] = {}
    for name in ("features", "initial_noise", "noise"):
        for what, change in {
            "float64": lambda x: x.double(),
            "bfloat16": lambda x: x.bfloat16(),
            "float16": lambda x: x.half(),
            "int64": lambda x: x.long(),
            "complex": lambda x: x.to(th.complex64),
            "on meta": lambda x: x.to("meta"),
            "transposed": lambda x: x.mT.contiguous().mT,
            "strided": lambda x: th.stack([x, x], dim=-1).flatten(-2)[..., ::2],
            "negative view": lambda x: th.complex(x, -x).conj().imag,
            "subclass": lambda x: x.as_subclass(Weight),
            "parameter": nn.Parameter,
            "wider": lambda x: th.cat([x, x], dim=-1),
            "narrower": lambda x: x[..., 1:],
            "no columns": lambda x: x[..., :0],
            "one row": lambda x: x[..., :1, :],
            "fewer rows": lambda x: x[..., 1:, :],
            "no rows": lambda x: x[..., :0, :],
            "one dimension": lambda x: x.flatten(),
            "a dimension more": lambda x: x.unsqueeze(0),
            "sparse": lambda x: x.to_sparse(),
            "expanded": lambda x: x[..., :1, :].expand_as(x),
        }.items():
            found[f"{name}: {what}"] = changed(usual, name, change)
    found["noise: one step"] = lambda g: {**usual(g), "noise": g.noise[:1]}
    found["noise: too few steps"] = lambda g: {**usual(g), "noise": g.noise[1:]}
    found["noise: too many steps"] = lambda g: {**usual(g), "noise": th.cat([g.noise, g.noise])}
    found["noise: one for all"] = lambda g: {**usual(g), "noise": g.noise[0, 0, 0]}
    found["all float64"] = lambda g: {name: value.double() for name, value in usual(g).items()}
    found["no rows at all"] = lambda g: {name: value[..., :0, :] for name, value in usual(g).items()}
    found["no rows, drawn"] = lambda g: {"features": g.observations[:0]}
    found["noise of other rows"] = lambda g: {"features": g.observations, "initial_noise": g.initial_noise[:1].flatten()}
    return found


STRANGE_SAMPLES = strange_samples()


def outcome(function: Callable[[], Any]) -> Any:
    """What a function returns, as plain tensors; or the error that it raises."""
    results: list[Any] = []
    error = error_of(lambda: results.append(function()))
    return error or th.utils._pytree.tree_map(lambda x: x.detach().as_subclass(th.Tensor), results[0])


def assert_same_outcome(actual: Any, expected: Any, what: str) -> None:
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected, what
    else:
        th.testing.assert_close(actual, expected, rtol=1e-4, atol=FLOAT32_ROUNDING, msg=lambda text: f"{what}: {text}")


@fast
def test_strange_arguments_of_sample(accelerate: str) -> None:
    plain, model = pair(accelerate)
    different, errors = [], 0
    for name, change in STRANGE_SAMPLES.items():
        for rows in (1, 8, 40):
            for surroundings in (th.no_grad, th.enable_grad):
                outcomes = []
                for each in (plain, model):
                    arguments = change(Inputs(rows))
                    with surroundings():
                        th.manual_seed(0)
                        outcomes.append(outcome(partial(each.actor.sample, **arguments)))
                errors += isinstance(outcomes[0], str)
                try:
                    assert_same_outcome(outcomes[1], outcomes[0], f"{name}, {rows} rows")
                except AssertionError as error:
                    different.append(str(error))
    assert not different, "\n".join(different)
    assert 20 < errors < 2 * 3 * len(STRANGE_SAMPLES) - 100  # some are errors, and some are not


STRANGE_ACTIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "on meta": lambda x: x.to("meta"),
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: th.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "negative view": lambda x: th.complex(x, -x).conj().imag,
    "wider": lambda x: th.cat([x, x], dim=-1),
    "narrower": lambda x: x[..., 1:],
    "no columns": lambda x: x[..., :0],
    "one row": lambda x: x[:1],
    "no rows": lambda x: x[:0],
    "one dimension": lambda x: x.flatten(),
    "a dimension more": lambda x: x.unsqueeze(0),
    "subclass": lambda x: x.as_subclass(Weight),
    "parameter": nn.Parameter,
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x[:1].expand_as(x),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "computed": lambda x: x.clone().requires_grad_() * 1,
}


def with_strange_actions(model: DIPO, given: Inputs, change: Callable[[th.Tensor], th.Tensor]) -> dict[str, Any]:
    """What comes of all that takes actions, or states, if they are strange."""
    critic, states = model.critic, given.observations
    objective, of_no_state = critic.objective(states), critic.objective(states[:0])

    def slope() -> th.Tensor:
        climber = change(given.actions).detach().requires_grad_()
        return th.autograd.grad(objective(climber).sum(), climber)[0]

    calls: dict[str, Callable[[], Any]] = {
        "critic": lambda: critic(states, change(given.actions)),
        "next_value": lambda: critic.next_value(states, change(given.actions)),
        "objective": lambda: objective(change(given.actions)),
        "objective without gradients": lambda: th.no_grad()(objective)(change(given.actions)),
        "objective of no state": lambda: of_no_state(change(given.actions)),
        "slope": slope,
        "improved": lambda: improve_actions(objective, change(given.actions), action_gradient_steps=2),
        "improved in no state": lambda: improve_actions(of_no_state, change(given.actions), action_gradient_steps=2),
        "loss": lambda: critic.loss(states, change(given.actions), given.targets),
        "actor's loss": lambda: model.actor.loss(states, change(given.actions), given.timesteps, given.actions),
        "strange states": lambda: critic.objective(change(states))(given.actions),
    }
    return {what: outcome(call) for what, call in calls.items()}


@fast
@pytest.mark.parametrize("name", STRANGE_ACTIONS)
def test_strange_actions_of_the_critic(accelerate: str, name: str) -> None:
    for rows in (1, 8, 40):
        plain, model = (with_strange_actions(each, Inputs(rows), STRANGE_ACTIONS[name]) for each in pair(accelerate))
        for what, expected in plain.items():
            assert_same_outcome(model[what], expected, f"{what}, {rows} rows")


# ------------------------------------------------------------------------------------------------- A4: gradients


@fast
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("settings", [{}, {"actor": "vae"}, {"actor": "mlp"}], ids=["diffusion", "vae", "mlp"])
def test_a_policy_has_gradients(accelerate: str, deterministic: bool, settings: dict[str, Any]) -> None:
    """Those of its observations, and those of all its parameters."""
    if not settings:  # without noise and clipping nearly all deterministic actions lie in corners, where nothing moves
        settings = {"clip_sample": False}
    plain, model = pair(accelerate, policy_kwargs=settings)
    for rows in (1, 15, 16, 24, 25, 100):
        results = []
        for each in (plain, model):
            observations = (0.1 * Inputs(rows).observations).requires_grad_()
            th.manual_seed(0)
            actions = each.policy(observations, deterministic=deterministic)
            assert actions.requires_grad
            parameters = {"observations": observations, **dict(each.actor.named_parameters())}
            found: Any = th.autograd.grad(actions.square().sum(), list(parameters.values()), allow_unused=True)
            results.append(dict(zip(parameters, found, strict=True)))
        slope = results[0]["observations"]
        assert rows == 1 or slope.abs().max() > 1e-4
        for name, expected in results[0].items():
            actual = results[1][name]
            assert (actual is None) == (expected is None), name
            if actual is not None and expected is not None:
                th.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@modes
def test_samples_have_the_gradients_of_all_parameters(accelerate: str) -> None:
    """Equal to differences of samples: no reference to what another path computes."""
    model = filled(accelerate=accelerate, policy_kwargs={"clip_sample": False})
    given, actor = Inputs(40), diffusion_actor(model)

    def total() -> th.Tensor:
        return actor.sample(0.1 * given.observations, 0.1 * given.initial_noise, 0.1 * given.noise).sum()

    parameters = dict(actor.named_parameters())
    slopes = dict(zip(parameters, th.autograd.grad(total(), list(parameters.values())), strict=True))
    for name, parameter in parameters.items():
        direction = slopes[name] / slopes[name].norm()
        with th.no_grad():
            step, difference = 0.02 / direction.abs().max(), 0.0
            for sign in (1, -1):
                parameter.add_(direction, alpha=float(sign * step))
                difference += sign * float(total())
                parameter.sub_(direction, alpha=float(sign * step))
        assert difference / (2 * float(step)) == pytest.approx(float(slopes[name].norm()), rel=0.05), name


@fast
@pytest.mark.parametrize("rows", [1, 16, 40, 200])
def test_second_derivatives_of_the_critic(accelerate: str, rows: int) -> None:
    """A gradient penalty, from fewer than 4,096 numbers of a hidden layer to many more."""
    results = []
    for model in pair(accelerate, policy_kwargs={"net_arch": [128, 128]}):
        given, critic = Inputs(rows), model.critic
        climber = given.actions.clone().requires_grad_()
        for function in (
            lambda actions, critic=critic, given=given: th.cat(critic(given.observations, actions), dim=1),
            critic.objective(given.observations),
        ):
            (slope,) = th.autograd.grad(function(climber).sum(), climber, create_graph=True)
            (second,) = th.autograd.grad(slope.square().sum(), climber, create_graph=True)
            (third,) = th.autograd.grad(second.square().sum(), climber, retain_graph=True)
            of_weights = gradients_of(slope.square().sum(), critic)
            results.append({"slope": slope.detach(), "second": second.detach(), "third": third, **of_weights})
    assert results[0]["second"].abs().max() > 1e-4
    for actual, expected in zip(results[2:], results[:2], strict=True):
        assert_same(actual, expected, rtol=1e-3)


@fast
def test_second_derivatives_of_an_actors_loss(accelerate: str) -> None:
    """As meta-learning asks for them: the gradient after a step along the gradient."""
    results = []
    for model in pair(accelerate):
        given, actor = Inputs(40), diffusion_actor(model)
        loss = actor.loss(given.observations, given.actions, given.timesteps, given.actions)
        parameters = list(actor.parameters())
        slopes = th.autograd.grad(loss, parameters, create_graph=True)
        results.append(th.autograd.grad(sum((slope.square().sum() for slope in slopes), th.zeros(())), parameters))
    th.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


JIT = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
"""PyTorch's own forward mode compiles its decompositions so."""


@fast
@JIT
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_in_batches(accelerate: str) -> None:
    """PyTorch's Jacobians and Hessians, one vector at a time and all at once."""
    from torch.autograd.functional import hessian, jacobian

    for rows in (2, 40):
        results = []
        for model in pair(accelerate):
            given, critic = Inputs(rows), model.critic

            def values(actions: th.Tensor, critic: Any = critic, given: Any = given) -> th.Tensor:
                return critic(given.observations, actions)[0].flatten()

            climber = given.actions.clone().requires_grad_()
            ones = th.eye(rows)
            results.append(
                {
                    "jacobian": jacobian(values, given.actions),
                    "vectorised": jacobian(values, given.actions, vectorize=True),
                    "forward": jacobian(values, given.actions, vectorize=True, strategy="forward-mode"),
                    "batched": th.autograd.grad(values(climber), climber, ones, is_grads_batched=True)[0],
                    "hessian": hessian(lambda actions: values(actions).sum(), given.actions),
                    "hessian at once": hessian(lambda actions: values(actions).sum(), given.actions, vectorize=True),
                }
            )
        assert_same(results[1], results[0])


@fast
def test_backward_under_autocast(accelerate: str) -> None:
    """Advised against, and yet it works on the plain path."""
    results = []
    for model in pair(accelerate, policy_kwargs={"net_arch": [128, 128]}):
        given = Inputs(40)
        loss = model.critic.loss(given.observations, given.actions, given.targets)
        with th.autocast("cpu", dtype=th.bfloat16):
            results.append(gradients_of(loss, model.critic))
    assert_same(results[1], results[0], atol=0.02, rtol=0.05)


@fast
def test_backward_twice_and_from_a_checkpoint(accelerate: str) -> None:
    from torch.utils.checkpoint import checkpoint

    results = []
    for model in pair(accelerate):
        given, critic = Inputs(40), model.critic
        parameters = list(critic.parameters())
        loss = critic.loss(given.observations, given.actions, given.targets)
        once = th.autograd.grad(loss, parameters, retain_graph=True)
        twice = th.autograd.grad(loss, parameters)
        with pytest.raises(RuntimeError, match="second time"):
            th.autograd.grad(loss, parameters)
        loss = checkpoint(critic.loss, given.observations, given.actions, given.targets, use_reentrant=False)
        again = th.autograd.grad(loss, parameters)
        th.testing.assert_close(twice, once)
        th.testing.assert_close(again, once)
        results.append(once)
    th.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@fast
def test_what_changed_before_the_backward_pass_is_an_error(accelerate: str) -> None:
    """Weights that were stepped, or inputs that were overwritten: their gradients would be those of other numbers."""
    for what in ("weight", "actions"):
        errors = []
        for model in pair(accelerate):
            given = Inputs(40)
            actions = given.actions.clone()
            x = th.cat([given.observations, actions], dim=1).requires_grad_()
            (value,) = (model.critic.ops.mlp(model.critic.get_submodule("qf0"), x * 1),)
            with th.no_grad():
                if what == "weight":
                    list(model.critic.parameters())[2].mul_(2)
                else:
                    x.mul_(1)
            errors.append(error_of(value.sum().backward))
        assert bool(errors[0]) == bool(errors[1])


@fast
@JIT
def test_transforms_of_functions(accelerate: str) -> None:
    from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

    results = []
    for model in pair(accelerate, policy_kwargs={"net_arch": [32, 32], "beta_schedule": "vp"}):
        given, actor, critic = Inputs(40), diffusion_actor(model), model.critic

        def act(features: th.Tensor, initial_noise: th.Tensor, actor: Any = actor) -> th.Tensor:
            return actor.sample(features, initial_noise, sampler=Sampler(noise_scale=0.0))

        def value(actions: th.Tensor, critic: Any = critic, given: Any = given) -> th.Tensor:
            return th.cat(critic(given.observations, actions), dim=1)

        def with_weights(weights: Any, critic: Any = critic, given: Any = given) -> th.Tensor:
            return functional_call(critic, weights, (given.observations, given.actions))[0].sum()

        weights = {name: 1.5 * each.detach() for name, each in critic.named_parameters()}
        batches = given.observations.view(2, 20, OBS_DIM), given.initial_noise.view(2, 20, ACTION_DIM)
        with th.no_grad():
            found: dict[str, Any] = {"vmap without gradients": vmap(act)(*batches)}
        objective = critic.objective(given.observations)
        found |= {
            "vmap": vmap(act)(*batches).detach(),
            "vmap over the critic": vmap(value)(given.actions.expand(3, -1, -1)).detach(),
            "jvp": jvp(act, (given.observations, given.initial_noise), (given.observations, given.initial_noise)),
            "jvp of the objective": jvp(objective, (given.actions,), (given.actions,)),
            "grad": grad(lambda actions: value(actions).sum())(given.actions).detach(),
            "grad of the objective": grad(lambda actions, objective=objective: objective(actions).sum())(
                given.actions
            ).detach(),
            "grad of weights": grad(with_weights)(weights),
            "call": with_weights(weights).detach(),
            "hessian": hessian(lambda actions: value(actions).sum())(given.actions).detach(),
            "jacfwd": jacfwd(value)(given.actions).detach(),
            "jacrev": jacrev(value)(given.actions).detach(),
        }
        results.append(th.utils._pytree.tree_map(lambda x: x.detach(), found))
    th.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@fast
@JIT
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_derivatives(accelerate: str, gradients: bool) -> None:
    from torch.autograd import forward_ad

    results = []
    for model in pair(accelerate, policy_kwargs={"beta_schedule": "vp"}):
        given = Inputs(40)
        with forward_ad.dual_level(), th.set_grad_enabled(gradients):
            features = forward_ad.make_dual(given.observations, th.ones_like(given.observations))
            actions = forward_ad.make_dual(given.actions, th.ones_like(given.actions))
            sampled = forward_ad.unpack_dual(model.actor.sample(features, given.initial_noise, given.noise))
            value = forward_ad.unpack_dual(th.cat(model.critic(given.observations, actions), dim=1))
            climbed = forward_ad.unpack_dual(model.critic.objective(given.observations)(actions))
        results.append([each.detach() for pair_ in (sampled, value, climbed) for each in pair_ if each is not None])
    assert len(results[0]) == 6 and all(each.abs().max() > 0 for each in results[0])
    th.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@fast
def test_parts_in_float64(accelerate: str) -> None:
    """An actor or critic that the user has moved to another type."""
    for rows in (1, 40):
        results = []
        for model in pair(accelerate):
            given, actor, critic = Inputs(rows, dtype=th.float64), model.actor.double(), model.critic.double()
            noise = given.initial_noise, given.noise
            with th.no_grad():
                objective = critic.objective(given.observations)
                found = {
                    "sample": actor.sample(given.observations, *noise),
                    "deterministic": actor.deterministic_action(given.observations),
                    "value": critic.next_value(given.observations, given.actions),
                    "objective": objective(given.actions),
                }
            found["improved"] = improve_actions(objective, given.actions, action_gradient_steps=3)
            found |= gradients_of(critic.loss(given.observations, given.actions, given.targets), critic)
            loss = actor.loss(given.observations, given.actions, given.timesteps, given.actions)
            found |= gradients_of(loss, diffusion_actor(model).noise_network)
            assert all(value.dtype == th.float64 for value in found.values())
            results.append(found)
        assert_same(results[1], results[0], atol=1e-9, rtol=1e-9)


def improved(model: DIPO, given: Inputs) -> th.Tensor:
    return improve_actions(model.critic.objective(given.observations), given.actions)


@fast
def test_a_part_of_another_type(accelerate: str) -> None:
    """One layer in float64, or on another device, is an error, the same one."""
    for change in (lambda layer: layer.double(), lambda layer: layer.to("meta"), lambda layer: layer.bfloat16()):
        for rows in (8, 40):
            outcomes: list[Any] = []
            for model in pair(accelerate):
                for mlp in mlps(model):
                    change(mlp[2])
                given = Inputs(rows)
                with th.no_grad():
                    outcomes.append(outcome(partial(model.actor.sample, given.observations)))
                    outcomes.append(outcome(partial(model.critic.next_value, given.observations, given.actions)))
                outcomes.append(outcome(partial(improved, model, given)))
            assert isinstance(outcomes[0], str)
            assert outcomes[:3] == outcomes[3:]


# ------------------------------------------------------------------------------------------------- A5: tracing, caches


@pytest.fixture(scope="module")
def observations() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, OBS_DIM)).astype(np.float32)


def acts_as(model: DIPO, other: DIPO, observations: np.ndarray) -> None:
    """Both act alike, and can be trained."""
    for deterministic in (True, False):
        actions = []
        for each in (model, other):
            th.manual_seed(0)
            actions.append(each.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_allclose(actions[0], actions[1], rtol=0, atol=1e-5)
    for each in (model, other):
        train(each, 1)
    th.testing.assert_close(model.policy.state_dict(), other.policy.state_dict(), rtol=1e-3, atol=1e-5)


LENGTHS = itertools.count(6)


def new_schedule() -> dict[str, Any]:
    """Of a length that no other agent of this process has had: nothing that belongs to it was made before."""
    return {"policy_kwargs": {"num_train_timesteps": next(LENGTHS)}}


class Acting(nn.Module):
    def __init__(self, policy: nn.Module, deterministic: bool):
        super().__init__()
        self.policy, self.deterministic = policy, deterministic

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.policy(observations, deterministic=self.deterministic)


@modes
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["at once", "later"])
def test_exporting_leaves_nothing_behind(accelerate: str, deterministic: bool, first: bool, observations: np.ndarray) -> None:
    """This agent goes on, and so does another one with the same schedule."""
    schedule = new_schedule()
    model = filled(accelerate=accelerate, **schedule)
    if not first:
        model.predict(observations)
    given = th.from_numpy(observations)
    with th.no_grad():
        exported = th.export.export(Acting(model.policy, deterministic), (given,))
        results = []
        for function in (exported.module(), Acting(model.policy, deterministic)):
            th.manual_seed(0)
            results.append(function(given))
    th.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    acts_as(model, filled(accelerate="off", **schedule), observations)
    acts_as(filled(accelerate=accelerate, **schedule), filled(accelerate="off", **schedule), observations)


@modes
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_tracing_and_compiling_leave_nothing_behind(accelerate: str, observations: np.ndarray) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    schedule = new_schedule()
    model, plain = filled(accelerate=accelerate, **schedule), filled(accelerate="off", **schedule)
    given = th.from_numpy(observations)
    acting = Acting(model.policy, deterministic=True)
    with th.no_grad():
        expected = Acting(plain.policy, deterministic=True)(given)
        for trace in (
            lambda: th.jit.trace(acting, (given,)),
            lambda: make_fx(acting)(given),
            lambda: make_fx(acting, tracing_mode="fake", _allow_non_fake_inputs=True)(given),
            lambda: th.compile(acting, backend="eager"),
        ):
            th.testing.assert_close(trace()(given), expected, rtol=1e-4, atol=1e-5)
            th.testing.assert_close(acting(given), expected, rtol=1e-4, atol=1e-5)
    acts_as(model, plain, observations)


@modes
def test_fake_tensors_leave_nothing_behind(accelerate: str, observations: np.ndarray) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    schedule = new_schedule()
    model = filled(accelerate=accelerate, **schedule)
    given = Inputs(40)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, th.no_grad():
        features, actions = mode.from_tensor(given.observations), mode.from_tensor(given.actions)
        for result in (
            model.actor.sample(features),
            model.critic.next_value(features, actions),
            model.critic.objective(features)(actions),
        ):
            assert isinstance(result, FakeTensor) and len(result) == 40
    acts_as(model, filled(accelerate="off", **schedule), observations)
    acts_as(filled(accelerate=accelerate, **schedule), filled(accelerate="off", **schedule), observations)


@fast
def test_operations_are_counted(accelerate: str) -> None:
    """By PyTorch's counter, which knows PyTorch's operators."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair(accelerate):
        given = Inputs(40)
        with FlopCounterMode(display=False) as counter:
            with th.no_grad():
                model.actor.sample(given.observations, given.initial_noise, given.noise)
            improve_actions(model.critic.objective(given.observations), given.actions, action_gradient_steps=2)
            model.critic.loss(given.observations, given.actions, given.targets).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 1e6


@modes
def test_inference_mode_leaves_nothing_behind(accelerate: str, observations: np.ndarray) -> None:
    """Tensors that were made in it can have no gradient, and are not written to outside of it."""
    model, plain = filled(accelerate=accelerate), filled(accelerate="off")
    given = Inputs(40)
    with th.inference_mode():
        for _ in range(3):
            model.predict(observations)
            model.actor.sample(given.observations, given.initial_noise, given.noise)
            model.critic.objective(given.observations)(given.actions)
        model.policy.set_sampler(num_inference_steps=3)
        model.policy.set_sampler(num_inference_steps=None)
    assert_same(computed(model, given), computed(plain, given))
    acts_as(model, plain, observations)


@modes
def test_a_copy_and_its_original_are_independent(accelerate: str, observations: np.ndarray) -> None:
    model, plain = filled(accelerate=accelerate), filled(accelerate="off")
    model.predict(observations)
    copied = copy.deepcopy(model.policy)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.zero_()
    expected = plain.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(copied.predict(observations, deterministic=True)[0], expected, rtol=0, atol=1e-5)


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), th.Tensor) for each in gc.get_objects())


@modes
def test_caches_are_bounded(accelerate: str, observations: np.ndarray) -> None:
    """Annealing goes on for ever; memory does not."""
    model = filled(accelerate=accelerate, policy_kwargs={"solver": "ddim"})
    alive = []
    for etas in (np.linspace(0, 0.2, 20), np.linspace(0.3, 0.9, 60)):
        for eta in etas:
            model.policy.set_sampler(eta=float(eta))
            model.predict(observations)
            model.predict(observations[:2])
        alive.append(tensors_alive())
    assert alive[0] == alive[1]
    assert len(pickle.dumps(model.policy)) < 1.02 * len(pickle.dumps(filled(accelerate=accelerate).policy)) + 20_000


@modes
def test_nothing_outlives_an_agent(accelerate: str, observations: np.ndarray) -> None:
    filled(accelerate=accelerate).predict(observations)  # what is made once for the whole process
    before = tensors_alive()
    model = filled(accelerate=accelerate, policy_kwargs={"num_train_timesteps": 17, "beta_schedule": "vp"})
    train(model, 2)
    model.predict(observations)
    assert tensors_alive() > before
    del model
    assert tensors_alive() == before


def test_no_module_holds_tensors(observations: np.ndarray) -> None:
    """Of this package, after all of it was used: neither as a global nor in a cache."""
    import sys

    for accelerate in MODES:
        train(filled(accelerate=accelerate), 1)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "sb3_dipo":
            for key, value in vars(module).items():
                if inspect.isclass(value) or inspect.ismodule(value) or inspect.isfunction(value):
                    continue
                held = [each for each in (value, *gc.get_referents(value)) if isinstance(each, th.Tensor)]
                assert not held, f"{name}.{key}"


def test_steps_of_the_samples_are_those_of_the_table() -> None:
    """That what these tests compare is not trivial: all steps count, and so does the noise of each."""
    model = filled(accelerate="off")
    given = Inputs(8)
    with th.no_grad():
        before = model.actor.sample(given.observations, given.initial_noise, given.noise)
        for step in range(STEPS - 1):  # the authors' sampler multiplies the last by 0
            noise = given.noise.clone()
            noise[step] += 1
            after = model.actor.sample(given.observations, given.initial_noise, noise)
            assert (after - before).abs().max() > 1e-4
