"""Theorem 4.3: its orders, where its bound holds and where it does not, and that the script's closed forms are right."""

import importlib
import itertools
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from processes import PAPER, Scripts, until
from scipy.integrate import quad  # type: ignore[import-untyped]
from tqdm import tqdm

from sb3_dipo.diffusion import SOLVERS, make_schedule, sample

SCRIPT = PAPER / "convergence.py"
convergence, laws = map(importlib.import_module, ("convergence", "convergence_laws"))


def measure(mean: list[float], variance: list[float], h: float, horizon: float, score_error: float = 0.0) -> dict[str, Any]:
    row: dict[str, Any] = laws.measure_gaussian(mean, variance, h, [horizon], score_error)[0]
    return row


# The theorem


@pytest.mark.parametrize("horizon", [0.5, 2.0])
@pytest.mark.parametrize(
    ("mean", "variance"),
    [([0.5], [0.2]), ([0.5, -0.2, 0.1], [0.1, 0.3, 1.0]), ([0.5] * 6, [0.5] * 6), ([0.3] * 2, [2.0, 4.0])],
)
def test_mean_and_std_have_order_1_and_the_kl_has_order_2(mean: list[float], variance: list[float], horizon: float) -> None:
    """Against the exact reverse process from the same N(0, I), which is what iteration (9) tends to."""
    steps = [horizon / num_steps for num_steps in (1_000, 2_000, 4_000, 8_000)]
    rows = [measure(mean, variance, h, horizon) for h in steps]
    for error, order in {"mean_error": 1, "std_error": 1, "kl_to_limit": 2}.items():
        observed = np.polyfit(np.log(steps), np.log([row[error] for row in rows]), 1)[0]
        assert observed == pytest.approx(order, abs=0.03), error


@pytest.mark.parametrize("score_error", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("horizon", [0.25, 1.0, 3.0])
@pytest.mark.parametrize(("mean", "variance"), [([0.0], [1.0]), ([0.5] * 3, [1.0, 1.5, 2.0]), ([1.0] * 2, [4.0] * 2)])
def test_the_bound_holds_in_the_region_of_the_proof(
    mean: list[float], variance: list[float], horizon: float, score_error: float
) -> None:
    """min v >= 1, so that nu <= 1, at the largest h that the proof allows and below."""
    largest = laws.largest_step(np.array(variance), horizon)
    for num_steps in (math.ceil(horizon / largest), 1_000, 10_000):
        row = measure(mean, variance, horizon / num_steps, horizon, score_error)
        assert -1e-15 < row["kl"] <= row["bound"] < math.inf, num_steps


@pytest.mark.parametrize("variance", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_the_bound_holds_below_v_1_with_a_log_sobolev_constant_of_1(mean: float, variance: float) -> None:
    for horizon, h in itertools.product((0.25, 1.0, 2.0), (1e-3, 1e-4, 0.0)):
        row = measure([mean] * 2, [variance] * 2, h, horizon)
        assert row["kl"] <= row["bound_min_nu_1"]


def test_the_bound_fails_for_a_small_variance_and_short_steps() -> None:
    row = measure([0.5], [0.05], 1e-5, 0.25)
    assert row["h"] < row["largest_h"] and row["kl"] > 1.5 * row["bound"]
    assert row["kl"] <= row["bound_min_nu_1"]


@pytest.mark.slow
def test_the_counterexample_of_the_paper_page() -> None:
    row = measure([0.5], [0.2], 5e-7, 1.0)  # K = 2e6
    assert row["kl"] == pytest.approx(5.8e-4, abs=0.05e-4)
    assert row["horizon_term"] + row["step_term"] == pytest.approx(1.84e-4, abs=0.005e-4)
    assert row["score_term"] < 1e-8


@pytest.mark.parametrize(("variance", "fails"), [(0.5, True), (0.6, False)])
def test_in_the_limit_of_short_steps_the_bound_fails_below_9_16(variance: float, fails: bool) -> None:
    """The KL falls as e^{-4T}, the bound as e^{-(9/4) T / v}."""
    rows = laws.measure_gaussian([0.5], [variance], 0.0, [4.0, 6.0, 8.0])
    ratios = [row["kl"] / row["bound"] for row in rows]
    assert [later > earlier for earlier, later in itertools.pairwise(ratios)] == [fails] * 2
    assert (ratios[0] > 1) == fails


# What it is checked with


@pytest.mark.parametrize("score_error", [0.0, 0.3])
def test_sampled_law_is_iteration_9(score_error: float) -> None:
    """One coordinate at a time: a' = a + (e^h - 1) (a + 2 S(a, T - t_k)) + sqrt(e^{2h} - 1) z, with S(a) = S(0) + S' a."""
    num_steps, h, policies = 40, 0.02, ((0.5, 0.2), (-0.1, 1.7))
    table = laws.iteration(h, num_steps)
    means, variances = laws.sampled_law(table, *np.transpose(policies), [25, num_steps], score_error)
    for (i, length), (j, (m, v)) in itertools.product(enumerate((25, num_steps)), enumerate(policies)):
        mean, variance = 0.0, 1.0
        for k in range(length):
            t = (length - k) * h
            noised_variance = math.exp(-2 * t) * v + 1 - math.exp(-2 * t)
            at_0, slope = math.exp(-t) * m / noised_variance - score_error, -1 / noised_variance
            factor = 1 + (math.exp(h) - 1) * (1 + 2 * slope)
            mean = factor * mean + (math.exp(h) - 1) * 2 * at_0
            variance = factor**2 * variance + math.exp(2 * h) - 1
        assert (means[i, j], variances[i, j]) == pytest.approx((mean, variance), rel=1e-11)


def test_sampled_law_is_that_of_the_packages_samples() -> None:
    """With the noise prediction that the mixture uses, of one mode; a policy that the loop's last clipping does not touch."""
    num_steps, h, mean, variance, num_samples = 60, 0.025, [0.1, -0.2], 0.015, 100_000
    schedule = make_schedule("ou", num_steps, num_steps * h)
    table = SOLVERS["exponential_integrator"](schedule, range(num_steps)[::-1], 1.0)
    generator = th.Generator().manual_seed(0)
    initial_noise, *noise = th.randn(num_steps + 1, num_samples, 2, generator=generator, dtype=th.float64)
    predict_noise = laws.exact_noise_prediction(table, th.tensor([mean], dtype=th.float64), variance)
    x = sample(table, predict_noise, initial_noise, th.stack(noise), clip_sample=False)
    assert float((x.abs() == 1).double().mean()) < 1e-3
    law = laws.sampled_law(laws.iteration(h, num_steps), np.array(mean), np.full(2, variance), [num_steps])
    stds = np.sqrt(law[1][0])
    np.testing.assert_allclose(x.mean(dim=0), law[0][0], atol=4 * stds.max() / math.sqrt(num_samples))
    np.testing.assert_allclose(x.std(dim=0), stds, rtol=4 / math.sqrt(2 * num_samples))


def test_reverse_law_is_the_limit_and_kl_its_definition() -> None:
    mean, variance = np.array([0.5, 0.1]), np.array([0.3, 3.0])
    limit = laws.reverse_law(mean, variance, 0.8)
    law = laws.sampled_law(laws.iteration(1e-5, 80_000), mean, variance, [80_000])
    np.testing.assert_allclose(np.ravel(law), np.ravel(limit), rtol=1e-4)

    ours, other = th.distributions.Normal(th.tensor([0.0, 1.0]), 2.0), th.distributions.Normal(th.tensor([0.5, 1.0]), 0.7)
    expected = float(th.distributions.kl_divergence(ours, other).sum())
    assert laws.kl(np.array([0, 1]), 4.0, np.array([0.5, 1]), 0.49) == pytest.approx(expected, rel=1e-6)
    assert laws.kl(0.0, 0.3 + 0.3e-7, 0.0, 0.3) == pytest.approx(0.25e-14, rel=1e-4, abs=0)  # d^2 / 4 for a small d


def test_terms_of_the_bound() -> None:
    h, horizon = 0.01, 0.5
    horizon_term, step_term, score_term = laws.bound_terms(np.array([0.5]), np.array([0.2]), horizon, h, 0.1, 5.0)
    assert horizon_term == pytest.approx(math.exp(-9 / 4 * 5 * 0.5) * 0.5 * (1 / 0.2 - 1 + math.log(0.2) + 0.25 / 0.2))
    assert step_term == pytest.approx(64 * 1 * 5 * math.sqrt(5 / 5) * 0.01)

    def log_expectation(k: int, t: float) -> float:
        """By quadrature, over z with a = e^{-tau} m + sqrt(v_tau) z ~ p_tau, tau = T - t, of the scores as they are."""

        def score(a: float, tau: float) -> float:
            return -(a - math.exp(-tau) * 0.5) / (1 - 0.8 * math.exp(-2 * tau))

        def integrand(z: float) -> float:
            tau = horizon - t
            a = math.exp(-tau) * 0.5 + math.sqrt(1 - 0.8 * math.exp(-2 * tau)) * z
            difference = score(a, horizon - k * h) - 0.1 - score(a, tau)
            return math.exp(difference**2 - z**2 / 2) / math.sqrt(2 * math.pi)

        return math.log(quad(integrand, -20, 20)[0])

    worst = max(log_expectation(k, (k + part) * h) for k in range(50) for part in (0, 0.5, 1))
    assert score_term == pytest.approx(20 / 3 * worst, rel=1e-6)

    assert laws.log_exp_score_error(np.array([0.0]), np.array([0.1]), 1.0, 0.1, 0.0) == math.inf
    tau = laws.largest_step(np.array([0.2]), 1.0)
    assert tau * math.exp(tau) == pytest.approx(5 / (96 * 5 * 5))
    assert laws.largest_step(np.array([200.0]), 10.0) == pytest.approx(1 / 12, rel=1e-5)  # L_s = 1


def test_the_mixtures_noise_prediction_is_its_score() -> None:
    schedule = make_schedule("ou", 30, 3.0)
    table = SOLVERS["ddim"](schedule, range(30)[::-1], 0.0)
    x = th.randn(64, 2, generator=th.Generator().manual_seed(0), dtype=th.float64, requires_grad=True)
    modes, variance = laws.MODES.double(), 0.04
    predict_noise = laws.exact_noise_prediction(table, modes, variance)
    for i in (0, 20, 29):
        alpha, sigma = table.steps[i].alpha_t, table.steps[i].sigma_t
        normal = th.distributions.Normal(alpha * modes, math.sqrt(alpha**2 * variance + sigma**2))
        parts = th.distributions.Categorical(th.ones(4, dtype=th.float64))
        density = th.distributions.MixtureSameFamily(parts, th.distributions.Independent(normal, 1))
        (score,) = th.autograd.grad(density.log_prob(x).sum(), x)
        th.testing.assert_close(predict_noise(x, i), -sigma * score)


def test_more_steps_sample_the_mixture_better() -> None:
    def distance(sampler: str, num_steps: int) -> float:
        return float(laws.measure_mixture(sampler, num_steps, 4_000, seed=0)[0]["distance"])

    floor = distance("exact", 0)
    assert floor < 0.02
    for sampler in laws.SAMPLERS:
        assert distance(sampler, 5) / 1.3 > distance(sampler, 50) > floor / 2, sampler
    assert distance("ou exponential_integrator", 100) > 1.5 * distance("ou ddpm", 100)


# How the script keeps what it has


def test_keep_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure_cell(x: int, cut_off_at: int = 3) -> list[dict[str, float]]:
        if x == cut_off_at:
            raise KeyboardInterrupt
        measured.append(x)
        return [dict(x=x, third=x / 3), dict(x=x, third=-x / 3)]

    cells, path, bar = [dict(x=x) for x in range(5)], tmp_path / "part.csv", tqdm(disable=True)
    with pytest.raises(KeyboardInterrupt):
        convergence.keep(path, cells, measure_cell, bar)
    rows = convergence.keep(path, cells, lambda x: measure_cell(x, -1), bar)
    assert measured == [0, 1, 2, 3, 4] and list(rows.x) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    kept = path.read_bytes()
    convergence.keep(path, cells, measure_cell, bar)
    assert len(measured) == 5 and path.read_bytes() == kept
    convergence.keep(tmp_path / "at_once.csv", cells, lambda x: measure_cell(x, -1), bar)
    assert (tmp_path / "at_once.csv").read_bytes() == kept

    assert list(convergence.keep(path, [dict(x=7)], measure_cell, bar).x) == [7, 7]  # other settings: from the start
    assert {path.name for path in tmp_path.iterdir()} == {"part.csv", "at_once.csv"}


@pytest.mark.slow
def test_quick_killed_and_started_again(scripts: Scripts, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = scripts.start(SCRIPT, "--quick", "--out", "killed", cwd=tmp_path)
    until(lambda: (killed / "terms.csv").exists(), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "mixture.csv").exists()

    scripts.run(SCRIPT, "--quick", "--parts", "orders", "terms", "--out", "killed", cwd=tmp_path)
    scripts.run(SCRIPT, "--quick", "--out", "whole", cwd=tmp_path)
    parts = [f"{part}.{suffix}" for part in ("orders", "terms", "map", "mixture") for suffix in ("csv", "png")]
    for name in parts[:4]:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in whole.iterdir()} == {"convergence.md", *parts}
    assert all(path.stat().st_size <= 200 * 1024 for path in whole.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "whole"}
