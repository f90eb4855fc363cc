"""
The diffusion process against closed forms, naive formulas and diffusers' schedulers.

Closed forms: for clean actions ~ N(m, v) the exact noise prediction is linear, every solver here is then an affine map, and
the moments of its samples are plain numbers, free of sampling noise. What is compared with them runs in float64, so that
only the solver's own error is left.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from gymnasium import spaces
from helpers import noise_predictions
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_dipo.actors import DiffusionActor
from sb3_dipo.diffusion import (
    SCHEDULES,
    SOLVERS,
    NoiseSchedule,
    SolverTable,
    add_noise,
    denoising_loss,
    make_schedule,
    sample,
    time_grid,
)

PredictNoise = Callable[[th.Tensor, int], th.Tensor]


def make_table(solver: str, schedule: NoiseSchedule, timesteps: list[int] | None = None, eta: float = 0.0) -> SolverTable:
    """The solver's table on the given timesteps, or on all of them."""
    return SOLVERS[solver](schedule, list(reversed(range(len(schedule)))) if timesteps is None else timesteps, eta)


def without_last_step(table: SolverTable) -> SolverTable:
    """The same solver, stopped at the last of its timesteps in place of the clean action."""
    return SolverTable(table.timesteps[:-1], table.steps[:-1])


def draw_noise(seed: int, *shape: int, dtype: th.dtype = th.float64) -> th.Tensor:
    """Standard normal, without touching the global generator."""
    return th.randn(shape, generator=th.Generator().manual_seed(seed), dtype=dtype)


def order_of_convergence(num_steps: list[int], errors: list[float]) -> float:
    """p in error = C (1 / number of steps)^p, by least squares in the logarithms."""
    return -float(np.polyfit(np.log(num_steps), np.log(errors), 1)[0])


def exact_noise_prediction(
    schedule: NoiseSchedule, timesteps: tuple[int, ...], mean: th.Tensor, variance: th.Tensor
) -> PredictNoise:
    """eps(x, t) = sigma (x - alpha m) / (alpha^2 v + sigma^2) for clean actions ~ N(m, v)."""

    def predict_noise(x: th.Tensor, i: int) -> th.Tensor:
        abar = float(schedule.alphas_cumprod[timesteps[i]])
        return math.sqrt(1 - abar) * (x - math.sqrt(abar) * mean) / (abar * variance + 1 - abar)

    return predict_noise


def sampled_moments(
    table: SolverTable, schedule: NoiseSchedule, start: tuple[float, float], mean: float, variance: float
) -> tuple[float, float]:
    """
    Mean and variance of the samples for clean actions ~ N(m, v) and x_K ~ N(start), for solvers without memory.

    D = k x + g with k = alpha v / (alpha^2 v + sigma^2) and g = m sigma^2 / (alpha^2 v + sigma^2), so that
    x' = (a + b k) x + b g + s z.
    """
    x_mean, x_variance = start
    for timestep, step in zip(table.timesteps, table.steps, strict=True):
        assert step.c == 0
        abar = float(schedule.alphas_cumprod[timestep])
        total = abar * variance + 1 - abar
        factor = step.a + step.b * math.sqrt(abar) * variance / total
        x_mean = factor * x_mean + step.b * mean * (1 - abar) / total
        x_variance = factor**2 * x_variance + step.s**2
    return x_mean, x_variance


# Schedules


def naive_betas(beta_schedule: str, num_train_timesteps: int) -> list[float]:
    """The authors' schedules, as the paper's page writes them."""
    K = num_train_timesteps
    if beta_schedule == "linear":
        return [float(beta) for beta in np.linspace(1e-4, 2e-2, K)]
    if beta_schedule == "vp":
        return [1 - math.exp(-0.1 / K - 0.5 * (10 - 0.1) * (2 * i - 1) / K**2) for i in range(1, K + 1)]
    x = np.linspace(0, K + 1, K + 1)
    f = [math.cos((x[i] / (K + 1) + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(K + 1)]
    return [min(max(1 - f[i] / f[i - 1], 0.0), 0.999) for i in range(1, K + 1)]


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 3, 5, 20, 100, 1000])
@pytest.mark.parametrize("beta_schedule", ["cosine", "vp", "linear"])
def test_betas_of_the_authors_schedules(beta_schedule: str, num_train_timesteps: int) -> None:
    schedule = make_schedule(beta_schedule, num_train_timesteps)
    expected = naive_betas(beta_schedule, num_train_timesteps)
    assert len(schedule) == num_train_timesteps
    np.testing.assert_allclose(schedule.betas.numpy(), expected, rtol=1.2e-7, atol=0)
    np.testing.assert_allclose(
        schedule.alphas_cumprod.numpy(),
        [math.prod(1 - beta for beta in expected[: k + 1]) for k in range(len(expected))],
        rtol=1e-4,
    )


@pytest.mark.parametrize("num_train_timesteps", [1, 2, 7, 100])
@pytest.mark.parametrize("horizon", [None, 0.5, 3.0])
def test_ou_schedule_is_the_ou_process_at_times_hk(horizon: float | None, num_train_timesteps: int) -> None:
    h = (4.0 if horizon is None else horizon) / num_train_timesteps
    schedule = make_schedule("ou", num_train_timesteps, horizon)
    expected = [math.exp(-2 * h * k) for k in range(1, num_train_timesteps + 1)]
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(schedule.betas.numpy(), [1 - math.exp(-2 * h)] * num_train_timesteps, rtol=1e-12)


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_quantities_of_a_schedule_agree_with_each_other(beta_schedule: str) -> None:
    schedule = make_schedule(beta_schedule, 30)
    abar = schedule.alphas_cumprod
    for quantity in (schedule.betas, schedule.alphas, abar, schedule.lambda_t):
        assert quantity.shape == (30,)
        assert quantity.dtype == th.float64
    th.testing.assert_close(schedule.alphas, 1 - schedule.betas, rtol=1e-6, atol=1e-7)
    th.testing.assert_close(abar, th.cumprod(schedule.alphas, 0), rtol=1e-5, atol=0)
    assert bool((abar[1:] < abar[:-1]).all())
    th.testing.assert_close(schedule.lambda_t, th.log(abar.sqrt() / (1 - abar).sqrt()), rtol=1e-9, atol=1e-9)
    assert schedule.alpha_t.dtype == schedule.sigma_t.dtype == th.float32
    th.testing.assert_close(schedule.alpha_t.double(), abar.sqrt(), rtol=1e-7, atol=0)
    th.testing.assert_close(schedule.sigma_t.double(), (1 - abar).sqrt(), rtol=1e-7, atol=0)


def test_cumulative_product_has_the_precision_of_the_betas() -> None:
    """The authors' float32 schedule is reproduced with its rounding; a float64 one has none."""
    betas = th.full((50,), 0.1)
    th.testing.assert_close(NoiseSchedule(betas).alphas_cumprod, th.cumprod(1 - betas, 0).double(), rtol=0, atol=0)
    th.testing.assert_close(NoiseSchedule(betas.double()).alphas_cumprod, th.cumprod(1 - betas.double(), 0), rtol=0, atol=0)


def test_buffers_move_and_are_not_saved_while_the_solvers_numbers_stay() -> None:
    schedule = make_schedule("cosine", 10)
    abar = schedule.alphas_cumprod.clone()
    assert schedule.state_dict() == {}
    assert not list(schedule.parameters())
    before = make_table("ddpm", schedule)
    schedule.to(th.float16)
    assert schedule.alpha_t.dtype == schedule.sigma_t.dtype == th.float16
    schedule.to("meta")
    assert schedule.alpha_t.device.type == schedule.sigma_t.device.type == "meta"
    for quantity in (schedule.betas, schedule.alphas, schedule.alphas_cumprod, schedule.lambda_t):
        assert quantity.device.type == "cpu"
        assert quantity.dtype == th.float64
    assert th.equal(schedule.alphas_cumprod, abar)
    assert make_table("ddpm", schedule) == before


@pytest.mark.parametrize(
    "betas",
    [
        th.tensor([]),
        th.tensor([[0.1, 0.2]]),
        th.tensor(0.1),
        th.tensor([0.1, 0.0]),
        th.tensor([1.0, 0.1]),
        th.tensor([0.1, -0.1]),
        th.tensor([0.1, math.nan]),
    ],
)
def test_noise_schedule_refuses_bad_betas(betas: th.Tensor) -> None:
    with pytest.raises(ValueError, match="`betas` must be"):
        NoiseSchedule(betas)


@pytest.mark.parametrize(
    ("name", "num_train_timesteps", "horizon", "message"),
    [
        ("sigmoid", 10, None, "`beta_schedule` must be one of 'cosine', 'vp', 'linear', 'ou', not 'sigmoid'"),
        ("cosine", 0, None, "`num_train_timesteps` must be at least 1, not 0"),
        ("ou", -1, None, "`num_train_timesteps` must be at least 1, not -1"),
        ("cosine", 10, 4.0, "`horizon` belongs to `beta_schedule='ou'`"),
        ("ou", 10, 0.0, "`horizon` must be"),
        ("ou", 10, -1.0, "`horizon` must be"),
        ("ou", 10, math.inf, "`horizon` must be"),
        ("ou", 10, math.nan, "`horizon` must be"),
    ],
)
def test_make_schedule_refuses_bad_input(name: str, num_train_timesteps: int, horizon: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(name, num_train_timesteps, horizon)


# Time grids


@given(st.integers(1, 300), st.data())
@settings(deadline=None, derandomize=True)
def test_time_grid_descends_evenly_from_end_to_end(num_train_timesteps: int, data: st.DataObject) -> None:
    num_inference_steps = data.draw(st.integers(1, num_train_timesteps))
    grid = time_grid(num_train_timesteps, num_inference_steps)
    assert len(grid) == num_inference_steps
    assert grid[0] == num_train_timesteps - 1
    if num_inference_steps > 1:
        assert grid[-1] == 0
        spacing = (num_train_timesteps - 1) / (num_inference_steps - 1)
        gaps = [before - after for before, after in itertools.pairwise(grid)]
        assert all(gap >= 1 and abs(gap - spacing) <= 1 for gap in gaps)


def test_time_grid_of_all_steps_is_every_timestep() -> None:
    assert time_grid(5, 5) == (4, 3, 2, 1, 0)
    assert time_grid(1, 1) == (0,)
    assert time_grid(9, 3) == (8, 4, 0)


@pytest.mark.parametrize("num_inference_steps", [0, -1, 11])
def test_time_grid_refuses_bad_input(num_inference_steps: int) -> None:
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be between 1 and .* = 10, not {num_inference_steps}"):
        time_grid(10, num_inference_steps)


@pytest.mark.parametrize("timesteps", [[], [0, 1], [3, 3, 0], [10, 0], [3, -1]])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_refuse_bad_timesteps(solver: str, timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="`timesteps` must be descending indices between 0 and 9"):
        make_table(solver, make_schedule("ou", 10), timesteps)


# Solvers against closed forms


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("dpmpp_2m", 2.0)])
def test_order_of_the_deterministic_solvers_on_a_gaussian(solver: str, order: float) -> None:
    """
    The probability-flow ODE of N(m, v) from noise level 0 to e ends at
    ``x_e = alpha_e m + (x_0 - alpha_0 m) sqrt((alpha_e^2 v + sigma_e^2) / (alpha_0^2 v + sigma_0^2))``.
    Grids of equal steps in noise time, all from 2 to 4/17: the last step, to sigma = 0, is left out, as it is first order.
    """
    mean, variance = th.tensor([-0.3, 0.2], dtype=th.float64), th.tensor([0.1, 0.3], dtype=th.float64)
    schedule = make_schedule("ou", 1088, horizon=2.0)
    first, last = 1087, 127
    x = th.linspace(-0.9, 0.9, 7, dtype=th.float64).unsqueeze(1).expand(7, 2)
    start, end = math.exp(-4.0), math.exp(-8 / 17)  # alphas_cumprod there
    spread = ((end * variance + 1 - end) / (start * variance + 1 - start)).sqrt()
    exact = math.sqrt(end) * mean + (x - math.sqrt(start) * mean) * spread

    num_steps, errors = [15, 30, 60, 120, 240], []
    for n in num_steps:
        table = without_last_step(make_table(solver, schedule, list(range(first, last - 1, -(first - last) // n))))
        assert len(table.steps) == n
        predict_noise = exact_noise_prediction(schedule, table.timesteps, mean, variance)
        result = sample(table, predict_noise, x, None, clip_sample=False)
        assert result.dtype == th.float64
        assert float(result.abs().max()) < 1  # or the final clip would be measured, too
        errors.append(float((result - exact).abs().max()))
    assert errors[-1] < (1e-3 if order == 1 else 1e-5)
    assert order_of_convergence(num_steps, errors) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("solver_eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.4), ("ddim", 1.0)], ids=str)
@pytest.mark.parametrize("timesteps", [list(range(29, -1, -1)), [29, 20, 19, 7, 3]], ids=["all", "strided"])
def test_a_point_target_is_noised_exactly_at_every_step(timesteps: list[int], solver_eta: tuple[str, float]) -> None:
    """
    Where all clean actions are m, x_t ~ N(alpha_t m, sigma_t^2) is kept exactly by the posterior q(x_next | x_t, D) that
    DDPM samples from, and by all of DDIM's family: no discretisation error, whatever the grid and the schedule.
    """
    schedule = make_schedule("ou", 30, horizon=2.0)
    table = make_table(solver_eta[0], schedule, timesteps, solver_eta[1])
    mean = 0.7
    noised = [(math.sqrt(abar) * mean, 1 - abar) for abar in schedule.alphas_cumprod[list(table.timesteps)].tolist()]
    for end, expected in enumerate([*noised, (mean, 0.0)]):
        part = SolverTable(table.timesteps[:end], table.steps[:end])
        assert sampled_moments(part, schedule, noised[0], mean, 0.0) == pytest.approx(expected, abs=1e-12)


def test_ddpm_moments_converge_to_the_target_with_order_one() -> None:
    """
    Started from the exact law of x_T, the error is the discretisation's alone: none in the mean (D is linear in x and right
    on average), of order 1 in the variance if stopped at a fixed sigma > 0, here at noise time 1/4.
    """
    mean, variance, horizon = 0.4, 0.1, 2.0
    start = math.exp(-horizon) * mean, math.exp(-2 * horizon) * variance + 1 - math.exp(-2 * horizon)
    end = math.exp(-0.25) * mean, math.exp(-0.5) * variance + 1 - math.exp(-0.5)
    num_steps, errors = [64, 128, 256, 512], []
    for n in num_steps:
        schedule = make_schedule("ou", n, horizon)
        table = without_last_step(make_table("ddpm", schedule, list(range(n - 1, n // 8 - 2, -1))))
        x_mean, x_variance = sampled_moments(table, schedule, start, mean, variance)
        assert x_mean == pytest.approx(end[0], abs=1e-12)
        errors.append(abs(x_variance - end[1]))
    assert errors[-1] < 5e-3
    assert order_of_convergence(num_steps, errors) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("beta_schedule", "missing_variance"), [("cosine", 0.02), ("vp", 0.025), ("linear", 0.03), ("ou", 0.1)]
)
def test_ddpm_from_standard_normal_noise_has_the_targets_moments(beta_schedule: str, missing_variance: float) -> None:
    """In 1000 steps; the variance is short of O(h log 1/h), h the noise time of a step, largest near the data on ``ou``."""
    mean, variance = 0.3, 0.3
    schedule = make_schedule(beta_schedule, 1000)
    x_mean, x_variance = sampled_moments(make_table("ddpm", schedule), schedule, (0.0, 1.0), mean, variance)
    assert x_mean == pytest.approx(mean, abs=1e-3)
    assert (1 - missing_variance) * variance < x_variance < variance


@pytest.mark.parametrize("beta_schedule", ["cosine", "vp", "linear"])
def test_ddpm_on_all_timesteps_is_the_authors_sampler_with_its_rounding(beta_schedule: str) -> None:
    """
    The page's posterior mean and variance, on float32 betas, alphas = 1 - betas and their products. The float32 rounding
    shows: beta_1 / (1 - abar_1) is not quite 1, by 2e-4 on linear.
    """
    K = 20
    betas = np.array(naive_betas(beta_schedule, K)).astype(np.float32)
    alphas = np.float32(1) - betas
    products = np.concatenate([[np.float32(1)], np.cumprod(alphas, dtype=np.float32)]).astype(np.float64)
    expected = []
    for k in range(K, 0, -1):
        beta, alpha, abar, previous = float(betas[k - 1]), float(alphas[k - 1]), products[k], products[k - 1]
        on_sample = (1 - previous) * math.sqrt(alpha) / (1 - abar)
        on_denoised = beta * math.sqrt(previous) / (1 - abar)
        deviation = math.sqrt(beta * (1 - previous) / (1 - abar))
        expected.append((math.sqrt(abar), math.sqrt(1 - abar), on_sample, on_denoised, 0, deviation))
    table = make_table("ddpm", make_schedule(beta_schedule, K))
    np.testing.assert_allclose(np.array(table.steps), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_inference_steps", [40, 9])
@pytest.mark.parametrize("solver_eta", [("ddpm", 0.0), ("ddim", 0.5), ("exponential_integrator", 0.0)], ids=str)
def test_many_samples_have_the_predicted_moments(solver_eta: tuple[str, float], num_inference_steps: int) -> None:
    """The empirical mean and variance of samples of N(m, v) are those of the affine recursion, within 5 standard errors."""
    mean, variance, n = 0.1, 0.02, 20_000
    schedule = make_schedule("ou", 40, horizon=3.0)
    table = make_table(solver_eta[0], schedule, list(time_grid(40, num_inference_steps)), solver_eta[1])
    predict_noise = exact_noise_prediction(
        schedule, table.timesteps, th.tensor(mean, dtype=th.float64), th.tensor(variance, dtype=th.float64)
    )
    noise = draw_noise(1, len(table.steps), n, 1)
    samples = sample(table, predict_noise, draw_noise(0, n, 1), noise, clip_sample=False)
    expected_mean, expected_variance = sampled_moments(table, schedule, (0.0, 1.0), mean, variance)
    assert float(samples.mean()) == pytest.approx(expected_mean, abs=5 * math.sqrt(expected_variance / n))
    assert float(samples.var()) == pytest.approx(expected_variance, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("timesteps", [None, [39, 30, 12, 11, 4]], ids=["all", "strided"])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_ddim_with_eta_one_is_ddpm(beta_schedule: str, timesteps: list[int] | None) -> None:
    """At eta = 1 to the last bit; just below it, where DDIM's own formula is used, up to the float32 rounding of betas."""
    schedule = make_schedule(beta_schedule, 40)
    ancestral = make_table("ddpm", schedule, timesteps)
    assert make_table("ddim", schedule, timesteps, eta=1.0) == ancestral
    nearly = make_table("ddim", schedule, timesteps, eta=1 - 1e-9)
    assert nearly.timesteps == ancestral.timesteps
    tolerance = 1e-8 if beta_schedule == "ou" else 1e-3
    np.testing.assert_allclose(np.array(nearly.steps), np.array(ancestral.steps), rtol=0, atol=tolerance)


def test_ddim_tends_to_ddpm_as_eta_tends_to_one() -> None:
    schedule = make_schedule("ou", 40)
    ancestral = np.array(make_table("ddpm", schedule).steps)
    gaps = [
        float(np.abs(np.array(make_table("ddim", schedule, None, 1 - gap).steps) - ancestral).max())
        for gap in (0.1, 0.01, 0.001)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.02 * gaps[0]


def test_only_solvers_that_add_noise_are_stochastic() -> None:
    schedule = make_schedule("ou", 10)
    assert make_table("ddpm", schedule).stochastic
    assert make_table("ddim", schedule, None, 0.5).stochastic
    assert make_table("exponential_integrator", schedule).stochastic
    assert not make_table("ddim", schedule).stochastic
    assert not make_table("dpmpp_2m", schedule).stochastic
    assert not make_table("ddpm", schedule, [9]).stochastic


# The paper's Algorithm 1


def test_exponential_integrator_is_iteration_9_of_the_paper() -> None:
    """a' = a + (e^h - 1)(a + 2 S(a, T - t_k)) + sqrt(e^{2h} - 1) z, the last step's noise included."""
    num_steps, horizon, mean, variance = 25, 1.5, 0.1, 0.05
    h = horizon / num_steps
    initial_noise, noise = 0.5 * draw_noise(0, 6, 3), 0.2 * draw_noise(1, num_steps, 6, 3)

    a = initial_noise
    for k in range(num_steps):
        t = horizon - k * h
        noised_variance = math.exp(-2 * t) * variance + 1 - math.exp(-2 * t)
        eps = math.sqrt(1 - math.exp(-2 * t)) * (a - math.exp(-t) * mean) / noised_variance
        score = -eps / math.sqrt(1 - math.exp(-2 * t))
        a = a + (math.exp(h) - 1) * (a + 2 * score) + math.sqrt(math.exp(2 * h) - 1) * noise[k]
    assert float(a.abs().max()) < 1

    schedule = make_schedule("ou", num_steps, horizon)
    table = make_table("exponential_integrator", schedule)
    predict_noise = exact_noise_prediction(
        schedule, table.timesteps, th.tensor(mean, dtype=th.float64), th.tensor(variance, dtype=th.float64)
    )
    th.testing.assert_close(sample(table, predict_noise, initial_noise, noise, clip_sample=False), a, rtol=0, atol=1e-12)
    noise[-1] = 0
    assert not th.allclose(sample(table, predict_noise, initial_noise, noise, clip_sample=False), a, atol=1e-3)


def test_exponential_integrator_converges_to_a_gaussian_target() -> None:
    """
    Started from the exact law of a_T the mean is exact, the standard deviation converges with order 1 in h and the KL
    divergence with order 2 (the paper's bound: 1).
    """
    mean, variance, horizon = 0.5, 0.3, 1.0
    start = math.exp(-horizon) * mean, math.exp(-2 * horizon) * variance + 1 - math.exp(-2 * horizon)
    num_steps, std_errors, divergences = [100, 200, 400, 800], [], []
    for n in num_steps:
        schedule = make_schedule("ou", n, horizon)
        x_mean, x_variance = sampled_moments(make_table("exponential_integrator", schedule), schedule, start, mean, variance)
        assert x_mean == pytest.approx(mean, abs=1e-12)
        std_errors.append(abs(math.sqrt(x_variance) - math.sqrt(variance)))
        ratio = x_variance / variance
        divergences.append(0.5 * (ratio - 1 - math.log(ratio) + (x_mean - mean) ** 2 / variance))
    assert std_errors[-1] < 1e-2
    assert order_of_convergence(num_steps, std_errors) == pytest.approx(1.0, abs=0.05)
    assert order_of_convergence(num_steps, divergences) == pytest.approx(2.0, abs=0.1)


def test_exponential_integrator_from_standard_normal_noise_converges_to_the_reverse_process() -> None:
    """
    Mean and standard deviation converge with order 1 in h to those of the exact reverse process from N(0, 1), which is
    a_0 | a_T ~ N(m + k (a_T - e^{-T} m), v - k^2 v_T), with k = e^{-T} v / v_T and v_T the variance of a_T's true law.
    """
    mean, variance, horizon = 0.5, 0.3, 1.0
    noised_variance = math.exp(-2 * horizon) * variance + 1 - math.exp(-2 * horizon)
    slope = math.exp(-horizon) * variance / noised_variance
    exact_mean = mean - slope * math.exp(-horizon) * mean
    exact_std = math.sqrt(variance + slope**2 * (1 - noised_variance))
    num_steps, mean_errors, std_errors = [100, 200, 400, 800], [], []
    for n in num_steps:
        schedule = make_schedule("ou", n, horizon)
        table = make_table("exponential_integrator", schedule)
        x_mean, x_variance = sampled_moments(table, schedule, (0.0, 1.0), mean, variance)
        mean_errors.append(abs(x_mean - exact_mean))
        std_errors.append(abs(math.sqrt(x_variance) - exact_std))
    assert max(mean_errors[-1], std_errors[-1]) < 1e-2
    assert order_of_convergence(num_steps, mean_errors) == pytest.approx(1.0, abs=0.05)
    assert order_of_convergence(num_steps, std_errors) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("beta_schedule", "num_train_timesteps", "num_inference_steps"),
    [("cosine", 1, 1), ("cosine", 100, 100), ("cosine", 1000, 1000), ("ou", 100, 2), ("vp", 100, 1)],
)
def test_exponential_integrator_is_refused_where_it_diverges(
    beta_schedule: str, num_train_timesteps: int, num_inference_steps: int
) -> None:
    grid = list(time_grid(num_train_timesteps, num_inference_steps))
    with pytest.raises(ValueError, match="`solver='exponential_integrator'` diverges on this `beta_schedule`"):
        make_table("exponential_integrator", make_schedule(beta_schedule, num_train_timesteps), grid)


@pytest.mark.parametrize("beta_schedule", ["vp", "linear", "ou"])
def test_exponential_integrator_is_accepted_where_it_is_stable(beta_schedule: str) -> None:
    table = make_table("exponential_integrator", make_schedule(beta_schedule, 100))
    assert all(abs(step.a) <= 1 for step in table.steps)


# diffusers as an oracle

GRIDS = {"all": list(range(19, -1, -1)), "strided": [19, 15, 11, 7, 3], "uneven": [19, 16, 10, 9, 2, 0]}


def oracle_schedule(beta_schedule: str) -> NoiseSchedule:
    """
    Betas that float32 holds exactly, as diffusers keeps them in it, but without the float32 rounding of 1 - beta and of its
    products, which the authors' schedules have and diffusers rounds elsewhere.
    """
    return NoiseSchedule(SCHEDULES[beta_schedule](20, 4.0).float().double())


def oracle_options(schedule: NoiseSchedule) -> dict[str, object]:
    """Of all three of diffusers' schedulers."""
    return {"num_train_timesteps": len(schedule), "trained_betas": schedule.betas.tolist()}


def made_up_noise_prediction(schedule: NoiseSchedule) -> Callable[[th.Tensor, int], th.Tensor]:
    """
    eps(x, timestep): that of N(0, 0.3) with a bump, so that it is not linear, D leaves [-1, 1] on the way, and, without
    clipping, about half of the samples end inside.
    """
    weights = draw_noise(7, 3, 3)

    def predict_noise(x: th.Tensor, timestep: int) -> th.Tensor:
        abar = float(schedule.alphas_cumprod[timestep])
        bump = 1.1 * math.sqrt(abar) * th.sin(2 * x @ weights.to(x.dtype) + 0.5 * timestep)
        return math.sqrt(1 - abar) * x / (0.3 * abar + 1 - abar) + bump

    return predict_noise


def assert_same_samples(
    table: SolverTable,
    schedule: NoiseSchedule,
    initial_noise: th.Tensor,
    noise: th.Tensor | None,
    clip: bool,
    theirs: th.Tensor,
    tolerance: float,
) -> None:
    """Ours equal theirs up to our final clip, which does not hide too much (see above); clipping on the way matters."""
    assert float((theirs.abs() < 0.999).double().mean()) > 0.4
    predict_noise = made_up_noise_prediction(schedule)
    ours, otherwise = (
        sample(table, lambda x, i: predict_noise(x, table.timesteps[i]), initial_noise, noise, clip_sample)
        for clip_sample in (clip, not clip)
    )
    assert ours.dtype == theirs.dtype
    assert not th.allclose(ours, otherwise, rtol=0, atol=1e-3)
    th.testing.assert_close(ours, theirs.clamp(-1, 1), rtol=0, atol=tolerance)


def ddpm_of_diffusers(
    schedule: NoiseSchedule, timesteps: list[int], initial_noise: th.Tensor, clip: bool, exact: bool
) -> tuple[th.Tensor, th.Tensor]:
    """Their samples and their noise: step by step they draw it from a generator, whose twin draws the same for us."""
    oracle = DDPMScheduler(**oracle_options(schedule), variance_type="fixed_small", clip_sample=clip)
    if exact:
        oracle.alphas_cumprod, oracle.one = schedule.alphas_cumprod, th.tensor(1.0, dtype=th.float64)
    oracle.set_timesteps(timesteps=timesteps)
    predict_noise = made_up_noise_prediction(schedule)
    x, generator, twin = initial_noise, th.Generator().manual_seed(1), th.Generator().manual_seed(1)
    for timestep in timesteps:
        x = oracle.step(predict_noise(x, timestep), timestep, x, generator=generator).prev_sample
    return x, th.stack([th.randn(x.shape, generator=twin, dtype=x.dtype) for _ in timesteps])


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_ddpm_agrees_with_diffusers(beta_schedule: str, grid: str, clip: bool) -> None:
    schedule, timesteps, initial_noise = oracle_schedule(beta_schedule), GRIDS[grid], draw_noise(0, 64, 3)
    theirs, noise = ddpm_of_diffusers(schedule, timesteps, initial_noise, clip, exact=True)
    # where the last timestep is not 0, they add noise of variance 1e-20 in the last step
    assert_same_samples(make_table("ddpm", schedule, timesteps), schedule, initial_noise, noise, clip, theirs, tolerance=1e-9)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("beta_schedule", ["cosine", "vp", "linear"])
def test_ddpm_agrees_with_diffusers_in_float32(beta_schedule: str, clip: bool) -> None:
    """
    The authors' float32 schedules, and all of diffusers in float32. We round beta as the authors do, diffusers takes it from
    the rounded 1 - abar: their last steps differ by a factor 1 + 2^-24 / beta_1, 3e-4 on linear, where beta_1 is 1e-4.
    """
    schedule, timesteps, initial_noise = make_schedule(beta_schedule, 20), GRIDS["all"], draw_noise(0, 64, 3).float()
    theirs, noise = ddpm_of_diffusers(schedule, timesteps, initial_noise, clip, exact=False)
    table = make_table("ddpm", schedule, timesteps)
    tolerance = 1e-5 + 2**-24 / float(schedule.betas[0])
    assert_same_samples(table, schedule, initial_noise, noise, clip, theirs, tolerance)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("grid", ["all", "strided"])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_ddim_agrees_with_diffusers(beta_schedule: str, grid: str, eta: float, clip: bool) -> None:
    """Their scheduler knows grids of even strides only, and takes the noise prediction from the clipped D if asked to."""
    schedule, timesteps = oracle_schedule(beta_schedule), GRIDS[grid]
    oracle = DDIMScheduler(**oracle_options(schedule), clip_sample=clip, timestep_spacing="trailing")
    oracle.alphas_cumprod, oracle.final_alpha_cumprod = schedule.alphas_cumprod, th.tensor(1.0, dtype=th.float64)
    oracle.set_timesteps(len(timesteps))
    assert oracle.timesteps.tolist() == timesteps
    predict_noise = made_up_noise_prediction(schedule)
    initial_noise, noise = draw_noise(0, 64, 3), draw_noise(1, len(timesteps), 64, 3)

    x = initial_noise
    for z, timestep in zip(noise, timesteps, strict=True):
        eps = predict_noise(x, timestep)
        x = oracle.step(eps, timestep, x, eta=eta, use_clipped_model_output=True, variance_noise=z).prev_sample

    assert_same_samples(make_table("ddim", schedule, timesteps, eta), schedule, initial_noise, noise, clip, x, tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # theirs
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_dpmpp_2m_agrees_with_diffusers(beta_schedule: str, grid: str, clip: bool) -> None:
    """Their scheduler cannot clip D to a fixed box, so it is given D in place of the noise. Its steps are in float32."""
    schedule, timesteps = oracle_schedule(beta_schedule), GRIDS[grid]
    options = {**oracle_options(schedule), "prediction_type": "sample"}
    oracle = DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint")
    oracle.set_timesteps(timesteps=timesteps)
    abar = schedule.alphas_cumprod[timesteps]
    oracle.sigmas = th.cat([((1 - abar) / abar).sqrt(), th.zeros(1)])
    predict_noise = made_up_noise_prediction(schedule)
    initial_noise = draw_noise(0, 64, 3)

    x = initial_noise
    for timestep, now in zip(timesteps, abar, strict=True):
        denoised = (x - (1 - now).sqrt() * predict_noise(x, timestep)) / now.sqrt()
        x = oracle.step(denoised.clamp(-1, 1) if clip else denoised, timestep, x).prev_sample

    assert_same_samples(
        make_table("dpmpp_2m", schedule, timesteps), schedule, initial_noise, None, clip, x, tolerance=1e-5 if clip else 3e-5
    )


# Noising, loss and the sampling loop


def test_add_noise_is_the_forward_process_in_one_go() -> None:
    schedule = make_schedule("cosine", 10)
    actions, noise = draw_noise(0, 6, 2, dtype=th.float32), draw_noise(1, 6, 2, dtype=th.float32)
    timesteps = th.tensor([0, 9, 3, 3, 5, 0])
    noisy = add_noise(schedule, actions, noise, timesteps)
    assert noisy.shape == (6, 2)
    for row, k in enumerate(timesteps.tolist()):
        abar = math.prod(1 - beta for beta in naive_betas("cosine", 10)[: k + 1])
        for i in range(2):
            expected = math.sqrt(abar) * float(actions[row, i]) + math.sqrt(1 - abar) * float(noise[row, i])
            assert float(noisy[row, i]) == pytest.approx(expected, abs=1e-6)


def test_denoising_loss_is_the_mean_squared_error_of_the_noise() -> None:
    schedule = make_schedule("vp", 10)
    actions, noise = draw_noise(0, 5, 3, dtype=th.float32), draw_noise(1, 5, 3, dtype=th.float32)
    timesteps = th.tensor([9, 0, 4, 4, 7])

    def predict_noise(noisy_actions: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
        return th.sin(noisy_actions) + 0.1 * timesteps.unsqueeze(1)

    total = 0.0
    for row, k in enumerate(timesteps.tolist()):
        abar = math.prod(1 - beta for beta in naive_betas("vp", 10)[: k + 1])
        for i in range(3):
            z = float(noise[row, i])
            total += (z - math.sin(math.sqrt(abar) * float(actions[row, i]) + math.sqrt(1 - abar) * z) - 0.1 * k) ** 2
    loss = denoising_loss(schedule, predict_noise, actions, timesteps, noise)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(total / 15, rel=1e-5)
    assert float(denoising_loss(schedule, lambda noisy, k: noise, actions, timesteps, noise)) == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_noise_is_noise_of_zeros(solver: str) -> None:
    table = make_table(solver, make_schedule("ou", 10))
    without, zeros, drawn = (
        sample(table, lambda x, i: x.sin(), draw_noise(0, 8, 2), noise)
        for noise in (None, th.zeros(10, 8, 2), draw_noise(1, 10, 8, 2))
    )
    assert th.equal(without, zeros)
    assert th.equal(without, drawn) is not table.stochastic


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_lie_in_the_box_with_and_without_clipping_on_the_way(solver: str) -> None:
    table = make_table(solver, make_schedule("ou", 10))
    initial_noise, noise = 3 * draw_noise(0, 50, 2), 3 * draw_noise(1, 10, 50, 2)
    samples = {clip: sample(table, lambda x, i: x.sin(), initial_noise, noise, clip) for clip in (True, False)}
    for result in samples.values():
        assert float(result.abs().max()) == 1  # some would have left it
    assert not th.allclose(samples[True], samples[False], atol=0.1)


def test_sample_leaves_its_arguments_alone_and_counts_steps_from_zero() -> None:
    table = make_table("ddpm", make_schedule("cosine", 6), [5, 3, 0])
    initial_noise, noise = draw_noise(0, 4, 2), draw_noise(1, 3, 4, 2)
    copies = initial_noise.clone(), noise.clone()
    steps: list[int] = []

    def predict_noise(x: th.Tensor, step: int) -> th.Tensor:
        steps.append(step)
        return x.sin()

    sample(table, predict_noise, initial_noise, noise)
    assert steps == [0, 1, 2]
    assert th.equal(initial_noise, copies[0])
    assert th.equal(noise, copies[1])


# The diffusion actor's use of all this


def make_actor(**options: Any) -> DiffusionActor:
    observation_space = spaces.Box(-1, 1, (3,))
    extractor = FlattenExtractor(observation_space)
    actor = DiffusionActor(observation_space, spaces.Box(-1, 1, (2,)), [16], nn.Mish, extractor, 3, **options)
    generator = th.Generator().manual_seed(0)
    for parameter in actor.parameters():  # biases, too
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return actor


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("num_inference_steps", [None, 1, 4, 20])
def test_actor_calls_its_network_once_an_inference_step(solver: str, num_inference_steps: int | None) -> None:
    actor = make_actor(num_train_timesteps=20, solver=solver, num_inference_steps=num_inference_steps)
    expected = 20 if num_inference_steps is None else num_inference_steps
    with noise_predictions(actor.noise_network) as calls:
        actor.sample(th.zeros(2, 3))
        assert len(calls) == expected
        actor.deterministic_action(th.zeros(2, 3))
        assert len(calls) == 2 * expected
        actor.sample(th.zeros(2, 3), sampler=replace(actor.sampler, num_inference_steps=3))
        assert len(calls) == 2 * expected + 3
        actor.deterministic_action(th.zeros(2, 3), replace(actor.sampler, num_inference_steps=2))
        assert len(calls) == 2 * expected + 3 + 2


@pytest.mark.parametrize("noise_scale", [None, 0.0, 0.5])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_actor_samples_with_its_network_at_the_grids_timesteps(clip_sample: bool, noise_scale: float | None) -> None:
    """An actor's sample is the loop run on the network as it is trained, on the timesteps of the grid."""
    actor = make_actor(
        num_train_timesteps=20, beta_schedule="linear", num_inference_steps=6, clip_sample=clip_sample, noise_scale=0.8
    )
    grid = time_grid(20, 6)
    features, initial_noise = draw_noise(0, 5, 3).float(), draw_noise(1, 5, 2).float()
    noise = draw_noise(2, 6, 5, 2).float()
    table = make_table("ddpm", make_schedule("linear", 20), list(grid))

    def predict_noise(x: th.Tensor, i: int) -> th.Tensor:
        return actor.noise_network(x, th.full((5,), grid[i]), features)

    expected = sample(table, predict_noise, initial_noise, (0.8 if noise_scale is None else noise_scale) * noise, clip_sample)
    sampler = None if noise_scale is None else replace(actor.sampler, noise_scale=noise_scale)
    result = actor.sample(features, initial_noise, noise, sampler)
    assert float((result.abs() < 0.999).float().mean()) > 0.2
    th.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_actors_loss_is_the_denoising_loss_of_its_network() -> None:
    actor = make_actor(num_train_timesteps=20)
    features, actions, noise = draw_noise(0, 5, 3).float(), draw_noise(1, 5, 2).float(), draw_noise(2, 5, 2).float()
    timesteps = th.tensor([0, 19, 7, 7, 3])
    noisy = add_noise(make_schedule("cosine", 20), actions, noise, timesteps)
    expected = ((actor.noise_network(noisy, timesteps, features) - noise) ** 2).mean()
    th.testing.assert_close(actor.loss(features, actions, timesteps, noise), expected)


# Any schedule, length, grid and solver


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, NoiseSchedule, tuple[int, ...], float]:
    """A solver's name, a schedule, a time grid (evenly spread or not) and eta."""
    beta_schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    num_train_timesteps = draw(st.integers(1, 60))
    horizon = draw(st.floats(0.1, 8.0)) if beta_schedule == "ou" else None
    schedule = make_schedule(beta_schedule, num_train_timesteps, horizon)
    even = st.integers(1, num_train_timesteps).map(lambda n: time_grid(num_train_timesteps, n))
    uneven = st.sets(st.integers(0, num_train_timesteps - 1), min_size=1).map(lambda rows: tuple(sorted(rows, reverse=True)))
    solver = draw(st.sampled_from(sorted(SOLVERS)))
    eta = draw(st.sampled_from([0.0, 0.3, 1.0]) | st.floats(0, 1)) if solver == "ddim" else 0.0
    return solver, schedule, draw(even | uneven), eta


@given(tables(), st.floats(-1, 1))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_every_table_is_sound(arguments: tuple[str, NoiseSchedule, tuple[int, ...], float], clean: float) -> None:
    """
    A table is finite, with one row a step; but for Algorithm 1, whose last step adds noise, it ends at D itself; so that a
    network that always points at the same clean action is followed there, whatever the noise.
    """
    solver, schedule, timesteps, eta = arguments
    try:
        table = make_table(solver, schedule, list(timesteps), eta)
    except ValueError as error:
        assert solver == "exponential_integrator"
        assert "`solver='exponential_integrator'` diverges" in str(error)
        return
    assert table.timesteps == timesteps
    assert all(before > after for before, after in itertools.pairwise(table.timesteps))
    rows = np.array(table.steps)
    assert rows.shape == (len(timesteps), 6)
    assert np.isfinite(rows).all()
    abar = schedule.alphas_cumprod[list(timesteps)].numpy()
    np.testing.assert_allclose(rows[:, 0], np.sqrt(abar), rtol=1e-12)
    np.testing.assert_allclose(rows[:, 1], np.sqrt(1 - abar), rtol=1e-12)
    if solver == "exponential_integrator":
        return

    # 1 - beta is rounded to float32 in the authors' schedules, so that beta / (1 - abar) is 1 up to 2^-24 / beta
    rounding = 1e-9 if schedule.betas[0] != schedule.betas[0].float() else 2**-24 / float(schedule.betas[0])
    np.testing.assert_allclose(rows[-1, 2:], [0, 1, 0, 0], rtol=0, atol=rounding)

    def predict_noise(x: th.Tensor, i: int) -> th.Tensor:
        return (x - table.steps[i].alpha_t * clean) / table.steps[i].sigma_t

    result = sample(table, predict_noise, draw_noise(0, 4, 2), draw_noise(1, len(timesteps), 4, 2))
    np.testing.assert_allclose(result.numpy(), clean, rtol=0, atol=2 * rounding)
