"""
The kernels for GPUs: that they compute what PyTorch does. Where there is no GPU, Triton's interpreter runs them on the CPU,
line by line; where there is no Triton either, nothing does.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch as th
from helpers import make_net, normal_numbers
from torch import nn

from sb3_dipo import improve_actions
from sb3_dipo.diffusion import SOLVERS, make_schedule, time_grid
from sb3_dipo.fast.layers import known_layers
from sb3_dipo.fast.ops import FastOps
from sb3_dipo.networks import PLAIN, NoisePredictionNetwork, Ops, average, smallest

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes by NumPy

DEVICE = "cuda" if th.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
MANY_ROWS = (1, 16, 100, 1000) if ON_GPU else (20,)
WIDE = 256 if ON_GPU else 32  # the interpreter is slow


@pytest.fixture(scope="module")
def ops() -> Iterator[FastOps]:
    pytest.importorskip("triton", reason="PyTorch for CUDA comes with it")
    with pytest.MonkeyPatch.context() as patch:
        from sb3_dipo.fast.triton_kernels import TritonKernels

        patch.setattr(TritonKernels, "device_type", DEVICE)
        patch.setattr(TritonKernels, "fewest_rows", 1)
        if not ON_GPU:
            patch.setattr("sb3_dipo.fast.triton_kernels.shared_memory", lambda: 2**18)
        yield FastOps(kernels=TritonKernels().tried())


def drawn(seed: int) -> Any:
    normal = normal_numbers(seed)
    return lambda *shape: normal(*shape).to(DEVICE)


def assert_near(actual: th.Tensor, expected: th.Tensor, scale: float = 1.0) -> None:
    th.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-5 * scale * max(float(expected.abs().max()), 0.1))


@pytest.mark.parametrize(
    "solver, norm", [*itertools.product(SOLVERS, [True, False])] if ON_GPU else [("dpmpp_2m", True), ("ddpm", False)]
)
def test_the_reverse_process(ops: FastOps, solver: str, norm: bool) -> None:
    normal = drawn(1)
    schedule = make_schedule("ou" if solver == "exponential_integrator" else "linear", 5)
    table = SOLVERS[solver](schedule, time_grid(5, 5), 0.0)
    for action_dim, features_dim, widths in ((1, 3, [16]), (6, 17, [WIDE, WIDE]), (17, 40, [33, 33, 33]), (20, 2, [7, 7])):
        network = NoisePredictionNetwork(action_dim, features_dim, widths, nn.Mish, 6)
        network.layers = make_net(normal_numbers(2), action_dim + 6 + features_dim, widths, action_dim, norm)
        network.to(DEVICE)
        layers = known_layers(network.layers, next(network.parameters()).device)
        assert ops.kernels is not None and layers is not None and ops.kernels.take(layers)
        for rows, noisy in itertools.product(MANY_ROWS, (True, False)):
            features, start = normal(rows, features_dim), normal(rows, action_dim)
            noise = normal(5, rows, action_dim) if noisy else None
            with th.no_grad():
                expected = PLAIN.reverse_process(network, table, features, start, noise, noisy)
                actual = ops.reverse_process(network, table, features, start, noise, noisy)
            # one that starts with noise alone makes much of rounding
            assert_near(actual, expected, 20.0 if solver == "exponential_integrator" else 1.0)


@pytest.mark.parametrize(
    "n_critics, reduce, outputs, norm",
    [
        (n, *ends, norm)
        for n, ends, norm in itertools.product([1, 2, 3], [(smallest, 1), (average, 25)], [True, False])
        if ON_GPU or (n, ends[1], norm) in ((2, 1, False), (3, 25, True))
    ],
)
def test_the_action_gradient(ops: FastOps, n_critics: int, reduce: Any, outputs: int, norm: bool) -> None:
    normal = drawn(2)
    moved = 0.0
    for action_dim, features_dim, widths in ((6, 17, [WIDE, WIDE]), (1, 1, [5]), (17, 30, [33, 33, 33])):
        nets = [
            make_net(normal_numbers(i), features_dim + action_dim, widths, outputs, norm).to(DEVICE) for i in range(n_critics)
        ]
        for rows in MANY_ROWS:
            features, actions = normal(rows, features_dim), (normal(rows, action_dim) / 2).clamp(-1, 1)
            plain, fast = (each.objective(nets, features, reduce) for each in (PLAIN, ops))
            assert hasattr(fast, "improve")
            taken = (actions + normal(rows, action_dim) / 10).clamp(-1, 1)
            for settings in ({}, {"max_action_shift": 0.1, "actions_taken": taken}, {"action_grad_norm_ratio": 1e9}):
                given: dict[str, Any] = {"action_gradient_steps": 3, "action_lr": 0.1, **settings}
                expected, improved = improve_actions(plain, actions, **given), improve_actions(fast, actions, **given)
                with th.no_grad():
                    assert_near(fast(improved), plain(improved))
                moved += float((expected - actions).abs().mean())
                # Adam makes steps of one size of gradients of all sizes, so that rounding counts where they are nearly 0
                difference = (improved - expected).abs()
                assert float(difference.mean()) < 1e-5 and float(difference.max()) < 5e-3
    assert moved > 0.5


@pytest.mark.parametrize("bad", [th.nan, th.inf, -th.inf] if ON_GPU else [th.nan])
def test_what_is_not_finite_is_not_hidden(ops: FastOps, bad: float) -> None:
    """In any argument: results are not finite where the plain path's are not."""
    table = SOLVERS["ddpm"](make_schedule("cosine", 3), time_grid(3, 3), 0.0)
    network = NoisePredictionNetwork(2, 5, [20, 20], nn.Mish, 8).to(DEVICE)
    critics = [make_net(normal_numbers(i), 7, [20, 20], 1, False).to(DEVICE) for i in range(2)]

    def results(each: Ops, given: list[th.Tensor]) -> list[th.Tensor]:
        features, actions, start, noise = given
        objective = each.objective(critics, features, smallest)
        with th.no_grad():
            sampled = [each.reverse_process(network, table, features, start, noise, clip) for clip in (True, False)]
            return [*sampled, objective(actions), improve_actions(objective, actions, action_gradient_steps=2)]

    good = [drawn(3)(*shape) for shape in ((20, 5), (20, 2), (20, 2), (3, 20, 2))]
    changed = 0
    for which, place in itertools.product(range(len(good)), (0, -1)):
        given = [each.clone() for each in good]
        given[which].view(-1)[place] = bad
        for actual, expected in zip(results(ops, given), results(PLAIN, given), strict=True):
            assert not bool((actual.isfinite() & ~expected.isfinite()).any())
            changed += not bool(expected.isfinite().all())
    assert changed > 8


def test_what_is_not_known_to_them_is_left_to_operators(ops: FastOps) -> None:
    assert ops.kernels is not None
    for widths, outputs in (([16, 17], 1), ([257], 1), ([16], 300), ([], 1)):
        layers = known_layers(
            make_net(normal_numbers(0), 3, widths, outputs, False) if widths else nn.Sequential(nn.Linear(3, 1)),
            th.device("cpu"),
        )
        assert layers is not None and not ops.kernels.take(layers)
    alike = [known_layers(make_net(normal_numbers(0), 3, [16], 1, norm), th.device("cpu")) for norm in (True, False)]
    assert all(ops.kernels.take(layers) for layers in alike if layers) and not ops.kernels.take(*alike)  # type: ignore[arg-type]
