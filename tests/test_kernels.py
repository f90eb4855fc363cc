"""
The compiled kernel: that it computes what PyTorch does for networks of any size and numbers of any kind, what it refuses,
how it is compiled and kept, and what happens without it.
"""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from fast_and_plain import OBS_DIM, Inputs, KernelMish, assert_same, computed, filled, largest_difference, train
from helpers import make_net, normal_numbers
from sb3_contrib.common.utils import quantile_huber_loss
from torch import nn
from torch.nn import functional as F

from sb3_dipo import DIPO, NonFiniteLossError, improve_actions
from sb3_dipo.diffusion import SOLVERS, make_schedule, time_grid
from sb3_dipo.fast import kernels as kernels_module
from sb3_dipo.fast.guard import FusedGuard
from sb3_dipo.fast.kernels import KernelError, Kernels, coefficients, kernels_at_hand, load_kernels, rounding_kernels
from sb3_dipo.fast.layers import Layer, known_layers
from sb3_dipo.fast.ops import FastOps
from sb3_dipo.guard import Guard
from sb3_dipo.networks import PLAIN, NoisePredictionNetwork, average, smallest


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load_kernels()


@pytest.fixture(scope="module")
def ops(kernels: Kernels) -> Iterator[FastOps]:
    """Which use the kernel for few rows, too, where modules would do for a single MLP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_dipo.fast.ops.FEW_ROWS", 1)
        yield FastOps(kernels=kernels)


SIZES = [
    (inputs, widths, outputs, norm)
    for inputs, widths, outputs in [
        (1, [1], 1),
        (3, [7], 2),
        (23, [256, 256], 6),
        (24, [256, 255, 256], 17),
        (5, [33, 16, 15], 1),
        (40, [31, 64, 32, 100], 33),
        (17, [129, 3], 25),
        (100, [400, 300], 8),
    ]
    for norm in (False, True)
]
ROWS = (1, 2, 3, 4, 7, 8, 31, 32, 33, 65, 256, 1000)


def assert_near(actual: Any, expected: Any, scale: float = 1.0) -> None:
    """Equal but for rounding: that of float32 in sums as long as these, relative to the largest of the numbers."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    th.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-4, atol=3e-6 * scale * max(largest, 0.1))


# ------------------------------------------------------------------------------------------------- equal to PyTorch


@pytest.mark.parametrize("inputs, widths, outputs, norm", SIZES)
def test_an_mlp_and_its_gradients(ops: FastOps, inputs: int, widths: list[int], outputs: int, norm: bool) -> None:
    """Against float64, for every number of rows."""
    normal = normal_numbers(0)
    net = make_net(normal, inputs, widths, outputs, norm)
    exact = copy.deepcopy(net).double()
    for rows in ROWS:
        x, weights = normal(rows, inputs), normal(rows, outputs)
        with th.no_grad():
            assert_near(ops.mlp(net, x), exact(x.double()))
        climber, exact_climber = x.clone().requires_grad_(), x.double().requires_grad_()
        y = ops.mlp(net, climber)
        assert y.grad_fn is not None and type(y.grad_fn.next_functions[0][0]).__name__ == "_KernelMLPsBackward"
        assert_near(y.detach(), exact(exact_climber).detach())
        found = th.autograd.grad((y * weights).sum(), [climber, *net.parameters()])
        expected = th.autograd.grad((exact(exact_climber) * weights).sum(), [exact_climber, *exact.parameters()])
        for actual, value in zip(found, expected, strict=True):
            assert_near(actual, value, 10.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_reverse_process(ops: FastOps, solver: str, clip_sample: bool, norm: bool) -> None:
    normal = normal_numbers(1)
    # a process that starts with some signal left: one that starts with noise alone makes much of rounding
    schedule = make_schedule("ou" if solver == "exponential_integrator" else "linear", 10)
    table = SOLVERS[solver](schedule, time_grid(10, 10), 0.0)
    for action_dim, features_dim, widths in (
        (1, 3, [16]),
        (6, 17, [256, 256]),
        (17, 376, [65, 33, 20]),
        (38, 2, [30, 7, 8, 9]),
    ):
        network = NoisePredictionNetwork(action_dim, features_dim, widths, nn.Mish, 6)
        network.layers = make_net(normal, action_dim + 6 + features_dim, widths, action_dim, norm)
        for rows in (1, 5, 32, 100):
            features, start = normal(rows, features_dim), normal(rows, action_dim)
            noise = normal(10, rows, action_dim)
            for given in (noise, None):
                with th.no_grad():
                    expected = PLAIN.reverse_process(network, table, features, start, given, clip_sample)
                    actual = ops.reverse_process(network, table, features, start, given, clip_sample)
                # which starts from little signal, and makes the most of rounding
                assert_near(actual, expected, 30.0 if solver == "exponential_integrator" else 10.0)


@pytest.mark.parametrize("n_critics", [1, 2, 5])
@pytest.mark.parametrize("reduce, outputs", [(smallest, 1), (average, 1), (average, 25)])
@pytest.mark.parametrize("norm", [True, False])
def test_the_action_gradient(ops: FastOps, n_critics: int, reduce: Any, outputs: int, norm: bool) -> None:
    normal = normal_numbers(2)
    moved = 0.0
    for action_dim, features_dim, widths in ((6, 17, [256, 256]), (1, 1, [5]), (17, 30, [33, 20, 8, 40])):
        nets = [make_net(normal, features_dim + action_dim, widths, outputs, norm) for _ in range(n_critics)]
        for rows in (1, 9, 32, 70):
            features, actions = normal(rows, features_dim), (normal(rows, action_dim) / 2).clamp(-1, 1)
            plain, fast = (each.objective(nets, features, reduce) for each in (PLAIN, ops))
            assert hasattr(fast, "improve")
            with th.no_grad():
                assert_near(fast(actions), plain(actions))
            taken = (actions + normal(rows, action_dim) / 10).clamp(-1, 1)
            for settings in ({}, {"max_action_shift": 0.1, "actions_taken": taken}, {"action_grad_norm_ratio": 1e9}):
                given: dict[str, Any] = {"action_gradient_steps": 3, "action_lr": 0.1, **settings}
                expected = improve_actions(plain, actions, **given)
                improved = improve_actions(fast, actions, **given)
                with th.no_grad():
                    assert_near(fast(actions), plain(actions))
                    assert_near(fast(improved), plain(improved))
                moved += float((expected - actions).abs().mean())
                # Adam makes steps of one size of gradients of all sizes, so that rounding counts where they are nearly 0
                difference = (improved - expected).abs()
                assert float(difference.mean()) < 2e-6 and float(difference.max()) < 1e-3
    assert moved > 0.5


@pytest.mark.parametrize("number", [1, 2, 5])
def test_mlps_on_the_same_input(ops: FastOps, number: int) -> None:
    """As each by itself; their hidden layers may differ."""
    normal = normal_numbers(10)
    nets = [make_net(normal, 7, [33, 8 + i], 3, bool(i % 2)) for i in range(number)]
    for rows in (1, 30, 257):
        x, weights = normal(rows, 7), normal(rows, number, 3)
        results = []
        for each in (PLAIN, ops):
            climber = x.clone().requires_grad_()
            y = each.mlps(nets, climber)
            with th.no_grad():
                assert_near(each.mlps(nets, x), y.detach())
            parameters = [parameter for net in nets for parameter in net.parameters()]
            results.append([y.detach(), *th.autograd.grad((y * weights).sum(), [climber, *parameters])])
        assert y.grad_fn is not None and type(y.grad_fn).__name__ == "_KernelMLPsBackward"
        for expected, actual in zip(*results, strict=True):
            assert_near(actual, expected, 10.0)


def test_mlps_that_share_a_layer(ops: FastOps) -> None:
    """Its gradient is the sum of both, where it can be differentiated, too."""
    normal = normal_numbers(14)
    nets = [make_net(normal, 7, [16, 16], 3, True) for _ in range(2)]
    nets[1][3] = nets[0][3]
    x, shared = normal(20, 7), nets[0][3].get_parameter("weight")
    for create_graph in (False, True):
        of_both = [
            th.autograd.grad(each.mlps(nets, x).square().mean(), shared, create_graph=create_graph)[0] for each in (PLAIN, ops)
        ]
        th.testing.assert_close(*of_both, rtol=1e-4, atol=1e-6)


def test_values_after_a_climb_are_those_of_the_actions_given(ops: FastOps) -> None:
    """Also where the climb began: in another order, or changed in place."""
    normal = normal_numbers(8)
    nets = [make_net(normal, 5, [16, 16], 1, False) for _ in range(2)]
    features, actions = normal(20, 3), normal(20, 2).clamp(-1, 1)
    plain, fast = (each.objective(nets, features, smallest) for each in (PLAIN, ops))
    improve_actions(fast, actions, action_gradient_steps=2)
    with th.no_grad():
        for change in (lambda: None, lambda: actions.mul_(0.5), lambda: setattr(actions, "data", actions.flip(0))):
            change()
            for given in (actions, actions.flip(1), actions.view(2, 20).t(), actions.detach()):
                th.testing.assert_close(fast(given), plain(given), rtol=1e-4, atol=1e-5)
        values = fast(actions)
        values.zero_()
        th.testing.assert_close(fast(actions), plain(actions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [th.nan, th.inf, -th.inf])
def test_sorted_rows(ops: FastOps, bad: float) -> None:
    """A NaN is the largest."""
    x = normal_numbers(11)(70, 50)
    x[3, 7], x[69, 0] = bad, bad
    for each in (x, x.t(), x[:1], x[:, :1], x.double(), th._neg_view(x), x.clone().requires_grad_()):
        th.testing.assert_close(ops.sort(each), PLAIN.sort(each), rtol=0, atol=0, equal_nan=True)
    climber = x.clone().requires_grad_()
    ops.sort(climber)[:, :4].nansum().backward()
    assert climber.grad is not None and 0 < int(climber.grad.sum()) <= 280


@pytest.mark.parametrize("tau", [0.0, 0.005, 1.0])
def test_targets_follow(kernels: Kernels, tau: float) -> None:
    """Of any shape; what lies in memory in another order is moved, too, and autograd sees it."""
    normal = normal_numbers(12)
    of = [normal(256, 256), normal(17), normal(1), normal(3, 5, 7), normal(40_000), normal(6, 4).t()]
    for parameters in (of, of[:-1]):
        targets, expected = ([2 * each.clone() for each in parameters] for _ in range(2))
        versions = [each._version for each in targets]
        FusedGuard(kernels).polyak_update(parameters, targets, tau)
        Guard().polyak_update(parameters, expected, tau)
        th.testing.assert_close(targets, expected, rtol=1e-6, atol=1e-7)
        assert all(each._version > version for each, version in zip(targets, versions, strict=True))
    shared, expected_shared = th.ones(40), th.ones(40)
    FusedGuard(kernels).polyak_update([shared.detach()], [shared], tau)
    Guard().polyak_update([expected_shared.detach()], [expected_shared], tau)
    th.testing.assert_close(shared, expected_shared)


@pytest.mark.parametrize("rows, n_critics, count, targets", [(256, 2, 25, 46), (1, 1, 1, 1), (3, 5, 16, 32), (70, 2, 7, 17)])
def test_the_quantile_huber_loss(ops: FastOps, rows: int, n_critics: int, count: int, targets: int) -> None:
    normal = normal_numbers(3)
    quantiles, target = 2 * normal(rows, n_critics, count), 2 * normal(rows, targets)
    target[0, 0] = quantiles[0, 0, 0]  # where the loss has no slope of its own
    exact = quantiles.double().requires_grad_()
    # sb3-contrib's takes its probabilities in float32
    expected = quantile_huber_loss(exact, target.double().unsqueeze(1), sum_over_quantiles=False)
    climber = quantiles.clone().requires_grad_()
    loss = ops.quantile_huber_loss(climber, target)
    assert type(loss.grad_fn).__name__ == "_QuantileHuberLossBackward"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_near(th.autograd.grad(3 * loss, climber)[0], 3 * th.autograd.grad(expected, exact)[0])


def test_the_quantile_huber_loss_is_plain_where_more_is_asked_for(ops: FastOps) -> None:
    """Gradients of targets, those of gradients, other types and shapes, and what has been changed."""
    normal = normal_numbers(4)
    quantiles, targets = normal(5, 2, 3), normal(5, 4)
    results = []
    for each in (ops, PLAIN):
        climber, other = quantiles.clone().requires_grad_(), targets.clone().requires_grad_()
        of_both = th.autograd.grad(each.quantile_huber_loss(climber, other), [climber, other])
        (slope,) = th.autograd.grad(each.quantile_huber_loss(climber, targets), climber, create_graph=True)
        (second,) = th.autograd.grad(slope.square().sum(), climber)
        results.append([*of_both, slope.detach(), second, each.quantile_huber_loss(quantiles.double(), targets.double())])
        for bad in (targets[:4], targets.double()[:4]):
            with pytest.raises(ValueError, match="batch size"):
                each.quantile_huber_loss(climber, bad)
        loss = each.quantile_huber_loss(climber * 1, other.detach())
        assert loss.requires_grad and not each.quantile_huber_loss(quantiles, targets).requires_grad
        shifted = climber * 1
        loss = each.quantile_huber_loss(shifted, targets)
        with th.no_grad():
            shifted.add_(1)
        results[-1] += th.autograd.grad(loss, climber)
    th.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_results_do_not_depend_on_the_other_rows_nor_on_threads(ops: FastOps) -> None:
    normal = normal_numbers(5)
    steps = 12  # of fewer, a single state is computed with weights that are not packed, and rounded otherwise
    table = SOLVERS["ddpm"](make_schedule("cosine", steps), time_grid(steps, steps), 0.0)
    network = NoisePredictionNetwork(3, 5, [64, 33], nn.Mish, 8)
    critics = [make_net(normal, 8, [64, 33], 1, False) for _ in range(2)]
    features, start, noise, weights = normal(200, 5), normal(200, 3), normal(steps, 200, 3), normal(200, 1)

    def results(rows: slice = slice(None)) -> list[th.Tensor]:
        with th.no_grad():
            actions = ops.reverse_process(network, table, features[rows], start[rows], noise[:, rows], True)
            objective = ops.objective(critics, features[rows], smallest)
            return [actions, objective(actions)]

    def of_whole_batches() -> list[th.Tensor]:
        climbed = improve_actions(ops.objective(critics, features, smallest), start.clamp(-1, 1), action_gradient_steps=3)
        loss = (ops.mlp(critics[0], th.cat([features, climbed], dim=1)) * weights).sum()
        return [climbed, *th.autograd.grad(loss, list(critics[0].parameters()))]

    threads = th.get_num_threads()
    expected, expected_whole = results(), of_whole_batches()
    try:
        th.set_num_threads(3)
        for actual, value in zip([*results(), *of_whole_batches()], [*expected, *expected_whole], strict=True):
            assert th.equal(actual, value)
    finally:
        th.set_num_threads(threads)
    for rows in (slice(0, 1), slice(3, 8), slice(50, 83), slice(199, 200)):
        for actual, value in zip(results(rows), expected, strict=True):
            assert th.equal(actual, value[rows])


@pytest.mark.parametrize("bad", [th.nan, th.inf, -th.inf])
def test_what_is_not_finite_is_not_hidden(ops: FastOps, bad: float) -> None:
    """In any argument: the kernel's results are finite where the plain path's are, and nowhere else."""
    normal = normal_numbers(6)
    table = SOLVERS["ddpm"](make_schedule("cosine", 3), time_grid(3, 3), 0.0)
    network: Any = NoisePredictionNetwork(2, 5, [20, 33], nn.Mish, 8)
    critics = [make_net(normal, 7, [20, 33], 1, False) for _ in range(2)]

    def results(each: Any, given: list[th.Tensor]) -> list[th.Tensor]:
        features, actions, start, noise, quantiles, targets = given
        with th.no_grad():
            sampled = [each.reverse_process(network, table, features, start, noise, clip) for clip in (True, False)]
            objective = each.objective(critics, features, smallest)
            value = objective(actions)
        climbed = improve_actions(objective, actions, action_gradient_steps=2)
        x = th.cat([features, actions], dim=1)
        loss = each.mlp(critics[0], x).square().mean()
        climber = quantiles.clone().requires_grad_()
        huber = each.quantile_huber_loss(climber, targets)
        slopes = th.autograd.grad(huber, climber)[0]
        return [
            *sampled,
            value,
            climbed,
            loss.detach(),
            *th.autograd.grad(loss, list(critics[0].parameters())),
            huber.detach(),
            slopes,
        ]

    shapes = ((40, 5), (40, 2), (40, 2), (3, 40, 2), (40, 2, 3), (40, 4))
    good = [normal(*shape) for shape in shapes]
    changed = 0
    for which, place in itertools.product(range(len(good)), (0, -1)):
        given = [each.clone() for each in good]
        given[which].view(-1)[place] = bad
        for actual, expected in zip(results(ops, given), results(PLAIN, given), strict=True):
            assert th.equal(actual.isfinite(), expected.isfinite())
            changed += not bool(expected.isfinite().all())
            finite = expected.isfinite()
            th.testing.assert_close(actual[finite], expected[finite], rtol=1e-3, atol=1e-4)
    for net, name in itertools.product((critics[0], network.layers), ("0.weight", "2.bias")):
        parameter = net.get_parameter(name)
        before = parameter.detach().clone()
        parameter.data.view(-1)[3] = bad
        pairs = list(zip(results(ops, good), results(PLAIN, good), strict=True))
        if net is critics[0]:
            del pairs[3]  # the plain gradient of the other critic's values is NaN, too: 0 times infinity
        for actual, expected in pairs:
            assert th.equal(actual.isfinite(), expected.isfinite())
            changed += not bool(expected.isfinite().all())
        parameter.data = before
    assert changed > 20


# ------------------------------------------------------------------------------------------------- optimizers


def adam_and_loss(seed: int, **options: Any) -> tuple[th.optim.Optimizer, Callable[[int], th.Tensor]]:
    """An optimizer of drawn parameters, and a loss for each step, of which one has no gradient in the second step."""
    normal = normal_numbers(seed)
    parameters = [nn.Parameter(normal(*shape)) for shape in ((256, 300), (17,), (1, 1), (70, 3))]
    wanted = [normal(*each.shape) for each in parameters]

    def loss(step: int) -> th.Tensor:
        some = zip(parameters, wanted, strict=True) if step != 2 else zip(parameters[1:], wanted[1:], strict=True)
        return th.stack([(each - other).pow(2).sum() * step for each, other in some]).sum()

    return th.optim.Adam(parameters, **{"lr": 0.01, "eps": 1e-5, **options}), loss


def stepped(guard: Guard, max_grad_norm: float, **options: Any) -> list[Any]:
    """What parameters, gradients and states are after each of some steps."""
    optimizer, loss = adam_and_loss(0, **options)
    guard.prepare(optimizer)
    states = []
    for step in range(1, 6):
        guard.set_learning_rate(optimizer, 0.01 * step)
        guard.step("loss", optimizer, loss(step), max_grad_norm)
        parameters = optimizer.param_groups[0]["params"]
        found = [
            each for parameter in parameters for each in (parameter, parameter.grad, *optimizer.state[parameter].values())
        ]
        states.append([None if each is None else each.detach().clone() for each in found])
    return states


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e9, th.inf])
@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"amsgrad": True}, {"foreach": True}])
def test_clipped_steps_of_adam(kernels: Kernels, max_grad_norm: float, options: dict[str, Any]) -> None:
    for actual, expected in zip(
        stepped(FusedGuard(kernels), max_grad_norm, **options), stepped(Guard(), max_grad_norm, **options), strict=True
    ):
        th.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_steps_of_adam_are_seen_by_autograd_and_by_hooks(kernels: Kernels) -> None:
    optimizer, loss = adam_and_loss(0)
    guard = FusedGuard(kernels)
    guard.prepare(optimizer)  # whose first step, and every step with a hook, is PyTorch's
    parameter = optimizer.param_groups[0]["params"][0]
    calls: list[str] = []
    for _ in range(2):
        version, square = parameter._version, parameter.square().sum()
        guard.step("loss", optimizer, loss(1), 1.0)
        assert parameter._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    guard.step("loss", optimizer, loss(1), 1.0)
    assert calls == ["after"]


@pytest.mark.parametrize("layout", [th.contiguous_format, th.channels_last])
def test_steps_of_adam_on_memory_in_another_order(kernels: Kernels, layout: th.memory_format) -> None:
    """Of what a file has brought, say: as PyTorch's plain steps. What does not fit is an error, as there."""
    results = []
    for guard in (FusedGuard(kernels), Guard()):
        (parameter,) = parameters = [nn.Parameter(normal_numbers(13)(4, 3, 5, 5).contiguous(memory_format=layout))]
        optimizer = th.optim.Adam(parameters, lr=0.1)
        guard.prepare(optimizer)
        for _ in range(3):
            guard.step("loss", optimizer, parameter.square().sum(), 1.0)
            state = optimizer.state[parameter]
            state.update({name: state[name].contiguous(memory_format=th.channels_last) for name in ("exp_avg", "exp_avg_sq")})
        results.append(parameter.detach().clone())
        state["exp_avg"] = state["exp_avg"].reshape(3, 4, 5, 5)
        with pytest.raises(RuntimeError, match="size of tensor"):
            guard.step("loss", optimizer, parameter.square().sum(), 1.0)
    th.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [th.nan, th.inf])
def test_no_step_of_adam_that_is_not_finite(kernels: Kernels, bad: float) -> None:
    optimizer, loss = adam_and_loss(0)
    guard = FusedGuard(kernels)
    guard.prepare(optimizer)
    guard.step("loss", optimizer, loss(1), 1.0)
    parameters = optimizer.param_groups[0]["params"]
    before = [each.detach().clone() for each in parameters]
    for wrong in (loss(1) + bad, loss(1) * bad):
        with pytest.raises(NonFiniteLossError, match="`loss` or its gradient is not finite"):
            guard.step("loss", optimizer, wrong, 1.0)
        assert all(each.grad is None for each in parameters)
        assert all(th.equal(each, other) for each, other in zip(parameters, before, strict=True))
        assert optimizer.state[parameters[0]]["step"] == 1
    guard.step("loss", optimizer, loss(1), 1.0)


FAR = [-3e38, -1e36, -1e10, -200.0, -100.0, -88.0, -87.0, -20.0, -1e-30, 0.0, 1e-30, 19.9, 20.1, 88.0, 1e10, 3e38]


def test_mish_is_pytorchs_everywhere() -> None:
    """Also where exponentials under- or overflow; what is infinite is as for PyTorch, so that nothing is hidden."""
    x = th.tensor([*FAR, th.inf, -th.inf, th.nan])
    th.testing.assert_close(KernelMish().mish(x), F.mish(x), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_the_slope_of_mish_is_pytorchs_everywhere() -> None:
    x = th.tensor(FAR)
    slope = th.ops.aten.mish_backward(th.ones_like(x), x)
    th.testing.assert_close(KernelMish().mish_backward(th.ones_like(x), x), slope, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------- what is refused


def layers_of(net: nn.Sequential) -> list[Layer]:
    layers = known_layers(net, th.device("cpu"))
    assert layers is not None
    return [layer.with_parameters(each.detach() for each in layer.parameters()) for layer in layers]


def calls_of(kernels: Kernels) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each function, with arguments that it takes."""
    normal = normal_numbers(7)
    table = SOLVERS["ddpm"](make_schedule("cosine", 3), time_grid(3, 3), 0.0)
    actor = layers_of(make_net(normal, 2 + 6 + 4, [8, 5], 2, False))
    critics = [layers_of(make_net(normal, 4 + 2, [8, 5], 1, True)) for _ in range(2)]
    features, actions = normal(9, 4), normal(9, 2)
    adam = {"steps": 2, "rate": 0.1, "max_norm": 0.2, "betas": (0.9, 0.999), "epsilon": 1e-5}
    x = normal(9, 6)
    kept = kernels.forward(critics, x, keep=True)[1]
    return {
        "reverse_process": (
            kernels.reverse_process,
            {
                "layers": actor,
                "coefficients": coefficients(table),
                "embedding": normal(3, 6),
                "features": features,
                "initial_noise": actions,
                "noise": normal(3, 9, 2),
                "clip_sample": True,
            },
        ),
        "values": (kernels.values, {"critics": critics, "features": features, "actions": actions, "mean": False}),
        "improve": (
            kernels.improve,
            {
                "critics": critics,
                "features": features,
                "actions": actions,
                "mean": True,
                "bounds": (actions - 1, actions + 1),
                **adam,
            },
        ),
        "forward": (kernels.forward, {"mlps": critics, "x": x}),
        "backward": (
            kernels.backward,
            {"mlps": critics, "x": x, "kept": kept, "of_y": normal(9, 2, 1), "of_x": True, "needed": [True] * 20},
        ),
        "quantile_huber_loss": (kernels.quantile_huber_loss, {"quantiles": normal(9, 2, 3), "targets": normal(9, 4)}),
    }


CALLS = ("reverse_process", "values", "improve", "forward", "backward", "quantile_huber_loss")
BAD_TENSORS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "int32": lambda x: x.int(),
    "meta": lambda x: x.to("meta"),
    "fewer": lambda x: x[1:],
    "none": lambda x: x[:0],
    "flat": lambda x: x.flatten()[1:],
}


def tensors_changed(arguments: Any, change: Callable[[th.Tensor], th.Tensor]) -> Iterator[Any]:
    """The arguments, each time with another one of their tensors changed."""
    leaves, spec = th.utils._pytree.tree_flatten(arguments)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, th.Tensor):
            yield th.utils._pytree.tree_unflatten([*leaves[:i], change(leaf), *leaves[i + 1 :]], spec)


@pytest.mark.parametrize("what", BAD_TENSORS)
@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_refuses_what_it_would_read_wrongly(kernels: Kernels, name: str, what: str) -> None:
    call, good = calls_of(kernels)[name]
    call(**good)
    tried = 0
    for bad in tensors_changed(good, BAD_TENSORS[what]):
        if (name, what) == ("forward", "fewer") and len(bad["x"]) < 9:
            continue  # as good as 9 rows
        tried += 1
        with pytest.raises((TypeError, RuntimeError), match=r"kernel|meta"):
            call(**bad)
    assert tried >= 2


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_takes_any_strides(kernels: Kernels, name: str) -> None:
    call, good = calls_of(kernels)[name]
    expected = call(**good)
    # a lazily negated view reads its numbers with the other sign
    for change in (lambda x: th.stack([x, -x], dim=-1)[..., 0], lambda x: th.complex(x, -x).conj().imag):
        strided: Any = th.utils._pytree.tree_map(lambda x, change=change: change(x) if isinstance(x, th.Tensor) else x, good)
        # parameters and what the kernel itself has made are taken as they are
        strided.update({name: good[name] for name in ("layers", "critics", "mlps", "kept") if name in good})
        found = call(**strided)
        th.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_kernel_refuses_strided_parameters(kernels: Kernels) -> None:
    layers = [Layer(th.ones(2, 3), th.ones(2)), Layer(th.ones(2, 2), th.ones(4)[::2])]
    with pytest.raises(TypeError, match="dense: False"):
        kernels.forward([layers], th.ones(4, 3))


def test_the_kernel_refuses_mlps_of_one_layer(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match="two or more layers"):
        kernels.forward([[Layer(th.ones(2, 3), th.ones(2))]], th.ones(4, 3))


# ------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Changes of the environment count at once, in an empty cache, and are forgotten at the end."""

    def forget() -> None:
        load_kernels.cache_clear()
        kernels_at_hand.cache_clear()
        rounding_kernels.cache_clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
        patch.setattr("sb3_dipo.fast.kernels_at_hand", kernels_at_hand)  # which conftest.py has replaced
        yield patch
    forget()


def loaded_elsewhere(cache: Path, processes: int = 1) -> None:
    """Load the kernel in processes of their own, all at once."""
    command = [sys.executable, "-c", "from sb3_dipo.fast.kernels import load_kernels; load_kernels()"]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache)}
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(processes)]
    for process in started:
        assert process.communicate(timeout=300)[1] == ""
        assert process.returncode == 0


def compiled_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "command, message",
    [
        ("no-such-compiler", "no-such-compiler"),
        ("false", "false failed"),
        ("true", "true failed|could not be loaded|cannot open"),
    ],
)
def test_a_broken_compiler(compiler: pytest.MonkeyPatch, command: str, message: str) -> None:
    """It fails, it is not there, or it writes nothing: one warning, and everything runs as with "auto"."""
    compiler.setenv("CXX", command)
    with pytest.raises(KernelError, match=message):
        load_kernels()
    with pytest.warns(UserWarning, match=r"`accelerate='compile'`.*\"auto\"") as caught:
        model = filled(accelerate="compile")
        train(model, 1)
        model.predict(np.zeros((40, OBS_DIM), np.float32))
    assert len(caught) == 1 and caught[0].filename == __file__.replace("test_kernels", "helpers")
    assert model.accelerate == "compile"  # it is a request: another machine may grant it
    auto = filled(accelerate="auto")
    train(auto, 1)
    assert largest_difference(model, auto) == 0
    given = Inputs(30)
    assert_same(computed(model, given), computed(auto, given), atol=0, rtol=0)


def test_no_compiler_at_all(compiler: pytest.MonkeyPatch) -> None:
    compiler.setenv("CXX", "")
    compiler.setenv("PATH", "")
    with pytest.raises(KernelError, match=r"no C\+\+ compiler was found: set CXX"):
        load_kernels()


def test_by_default_the_kernel_is_used_where_there_is_a_compiler(compiler: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And operators, without a word, where there is none."""
    given = Inputs(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = filled()
        assert compiled_files(tmp_path / "cache") != []
        assert_same(computed(model, given), computed(filled(accelerate="compile"), given), atol=0, rtol=0)
        compiler.setenv("CXX", "false")
        load_kernels.cache_clear()
        kernels_at_hand.cache_clear()
        model = filled()
        train(model, 1)
    other = filled(accelerate="off")
    train(other, 1)
    assert 0 < largest_difference(model, other) < 1e-4


def test_the_kernel_of_bfloat16(kernels: Kernels) -> None:
    """Sums of products of rounded numbers: near what float32 gives, and where widths are odd the same."""
    try:
        rounding = load_kernels(bfloat16=True)
    except KernelError as error:
        assert "bfloat16" in str(error)
        pytest.skip(str(error))
    arguments = calls_of(kernels)
    for name in ("reverse_process", "values"):
        given = {**arguments[name][1]}
        normal = normal_numbers(9)
        if name == "values":
            given["critics"] = [layers_of(make_net(normal, 6, [64, 48], 1, norm)) for norm in (True, False)]
            given["critics"] = given["critics"][:1] * 2
        else:
            given["layers"] = layers_of(make_net(normal, 12, [64, 48], 2, False))
        exact, rounded = (getattr(each, name)(**given) for each in (kernels, rounding))
        assert 1e-6 < float((exact - rounded).abs().max()) < 0.1
    given = {**arguments["improve"][1], "critics": [layers_of(make_net(normal, 6, [64, 48], 1, False))] * 2}
    exact, rounded = (each.improve(**given)[0] for each in (kernels, rounding))
    assert 1e-7 < float((exact - rounded).abs().mean()) < 0.01


def test_a_compiled_agent_reaches_a_machine_without_a_compiler(compiler: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pickled, as a worker process gets it, or saved."""
    model = filled(accelerate="compile")
    observations = np.random.default_rng(0).normal(size=(8, OBS_DIM)).astype(np.float32)
    expected = model.predict(observations, deterministic=True)[0]
    pickled = pickle.dumps(model.policy)
    model.save(tmp_path / "model")
    compiler.setenv("CXX", "false")
    load_kernels.cache_clear()
    kernels_at_hand.cache_clear()
    with pytest.warns(UserWarning, match="`accelerate='compile'`"):
        loaded = DIPO.load(tmp_path / "model", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpickled = pickle.loads(pickled)
    for policy in (loaded.policy, unpickled):
        np.testing.assert_allclose(policy.predict(observations, deterministic=True)[0], expected, rtol=0, atol=1e-5)


def test_what_was_compiled_is_kept(compiler: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And found again, without compiling: the file is the same one. Another source would be another file."""
    load_kernels()
    (name,) = compiled_files(tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob(name)
    before = path.stat().st_mtime_ns
    load_kernels.cache_clear()
    load_kernels()
    assert compiled_files(tmp_path / "cache") == [name] and path.stat().st_mtime_ns == before
    load_kernels.cache_clear()
    compiler.setattr(kernels_module, "FLAGS", (*kernels_module.FLAGS, "-DANOTHER"))
    load_kernels()
    assert len(compiled_files(tmp_path / "cache")) == 2


def test_a_kept_file_that_is_broken_is_made_again(tmp_path: Path) -> None:
    """As a full disk would leave it."""
    loaded_elsewhere(tmp_path)
    (name,) = compiled_files(tmp_path)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[:50])
    loaded_elsewhere(tmp_path)
    assert compiled_files(tmp_path) == [name] and path.stat().st_size > 10_000


@pytest.mark.parametrize("folder", ["file/in/the/way", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written(compiler: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    """Compiled into a temporary folder, which is removed, and without a warning."""
    (tmp_path / "file").write_text("")
    compiler.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / folder))
    compiler.setenv("TMPDIR", str(tmp_path))
    compiler.setattr("tempfile.tempdir", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_kernels()
    assert compiled_files(tmp_path) == ["file"]


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    """All get it, and one file is left."""
    loaded_elsewhere(tmp_path, 3)
    assert len(compiled_files(tmp_path)) == 1
