"""The laws of what iteration (9) and the other samplers give, and the bound of Theorem 4.3.

The bound's quantities, where the paper leaves a choice:
- nu is 1 / max v, the Gaussian's log-Sobolev constant. Whatever is nu-LSI is nu'-LSI for every nu' < nu, so the theorem can
  also be used with min(nu, 1), which is as far as its proof reaches: nu / (nu + (1 - nu) e^{-2t}) >= nu takes nu <= 1.
- L_s is the largest Lipschitz constant of the scores on [0, T], 1 / min v_t with v_t = 1 + (v - 1) e^{-2t}; L_p is 1 / min v.
- The third term's S is frozen at the step's start and the score is not: an exact S leaves O(h^2). Its supremum is taken over
  both ends of at most 1,001 steps. A wrong S is the exact one less the same number in every coordinate: for m >= 0 both
  parts then point the same way, and the far end of a step is the worse one.
- Small enough, for h: 1 / (12 L_s), 1 / nu, and tau with tau e^tau = sqrt(5 nu) / (96 L_s L_p), restored from the proof. Its
  last one, T_0 with 1 - e^{-2 T_0} = e^{T_0} / L_p, is weaker than the third wherever sqrt(nu) < 21 L_s, as here.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from scipy.special import lambertw  # type: ignore[import-untyped]
from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]

from sb3_dipo.diffusion import SOLVERS, SolverTable, make_schedule, sample, time_grid

MODES = th.tensor([[0.0, 0.7], [0.0, -0.7], [0.7, 0.0], [-0.7, 0.0]])
MODE_STD = 0.05
SAMPLERS = [f"ou {name}" for name in ("exponential_integrator", "ddpm", "ddim", "dpmpp_2m")]
SAMPLERS += [f"cosine {name}" for name in ("ddpm", "ddim", "dpmpp_2m")]
Row = dict[str, Any]


# Gaussian policies: everything is per coordinate, arrays (p,), for the coordinates do not see each other.


@functools.lru_cache(maxsize=1)
def iteration(h: float, num_steps: int) -> np.ndarray:
    """The package's table for iteration (9): alpha_t, sigma_t, a, b, c, s of each step, (num_steps, 6)."""
    schedule = make_schedule("ou", num_steps, num_steps * h)
    return np.array(SOLVERS["exponential_integrator"](schedule, range(num_steps)[::-1], 1.0).steps)


def noised(mean: np.ndarray, variance: np.ndarray, t: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the policy after noise time t."""
    return np.exp(-t) * mean, 1 + (variance - 1) * np.exp(-2 * t)


def sampled_law(table: np.ndarray, mean: np.ndarray, variance: np.ndarray, lengths: Any, score_error: float = 0.0) -> Any:
    """
    Mean and variance of what the last n steps of a table make of N(0, I), each (number of lengths, p).

    With the exact D the step x' = a x + b D + s z is x' = f x + g + s z, so the output is (prod f) x_0 + sum over steps of
    (product of the later f) (g + s z): running products and sums from the end give every length at once.
    """
    alpha, sigma, a, b, _, s = table[::-1].T
    ends = np.asarray(lengths) - 1
    means, variances = [], []
    for m, v in zip(mean, variance, strict=True):  # one by one, for the memory's sake
        total = alpha**2 * v + sigma**2
        all_f = np.cumprod(a + b * alpha * v / total)
        later_f = np.concatenate([[1.0], all_f[:-1]])
        shift = b * sigma**2 * (m / total - score_error / alpha)
        means.append(np.cumsum(later_f * shift)[ends])
        variances.append(all_f[ends] ** 2 + np.cumsum((later_f * s) ** 2)[ends])
    return np.transpose(means), np.transpose(variances)


def reverse_law(mean: np.ndarray, variance: np.ndarray, horizon: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of what the exact reverse process (4) makes of N(0, I): what iteration (9) tends to as h -> 0."""
    end_mean, end_variance = noised(mean, variance, horizon)
    slope = np.exp(-horizon) * variance / end_variance
    return mean - slope * end_mean, variance + slope**2 * (1 - end_variance)


def kl(mean: Any, variance: Any, other_mean: Any, other_variance: Any) -> float:
    """KL(N(mean, variance) || N(other)), summed over the coordinates; log1p, as it may be as small as 1e-12."""
    excess = (variance - other_variance) / other_variance
    return float(0.5 * np.sum(excess - np.log1p(excess) + (mean - other_mean) ** 2 / other_variance))


def log_exp_score_error(mean: np.ndarray, variance: np.ndarray, horizon: float, h: float, score_error: float) -> float:
    """
    sup log E exp || S(a, T - hk) - grad log p_{T-t}(a) ||^2, a ~ p_{T-t}. The difference is r z + d with z ~ N(0, 1), and
    E exp (r z + d)^2 = exp(d^2 / (1 - 2 r^2)) / sqrt(1 - 2 r^2), infinite from r^2 = 1/2 on.
    """
    steps = round(horizon / h) if h else 1_001
    frozen = (horizon - np.unique(np.linspace(0, steps - 1, 1_001).round()) * horizon / steps)[:, None]
    frozen_mean, frozen_variance = noised(mean, variance, frozen)
    worst = 0.0
    for t in (frozen, frozen - h):
        t_mean, t_variance = noised(mean, variance, t)
        r = (frozen_variance - t_variance) / (frozen_variance * np.sqrt(t_variance))
        d = (frozen_mean - t_mean) / frozen_variance - score_error
        if np.any(2 * r**2 >= 1):
            return np.inf
        worst = max(worst, float(np.max(np.sum(d**2 / (1 - 2 * r**2) - 0.5 * np.log1p(-2 * r**2), axis=1))))
    return worst


def bound_terms(
    mean: np.ndarray, variance: np.ndarray, horizon: float, h: float, score_error: float, nu: float
) -> tuple[float, float, float]:
    """The three terms of Theorem 4.3: horizon, step and score."""
    score = 20 / 3 * log_exp_score_error(mean, variance, horizon, h, score_error)
    step = 64 * len(mean) * lipschitz(variance, horizon) * np.sqrt(5 / nu) * h
    return np.exp(-9 / 4 * nu * horizon) * kl(0.0, 1.0, mean, variance), step, score


def lipschitz(variance: np.ndarray, horizon: float) -> float:
    """L_s: v_t moves from v to 1, so that it is smallest at one end."""
    return float(1 / min(variance.min(), noised(variance, variance, horizon)[1].min()))


def largest_step(variance: np.ndarray, horizon: float) -> float:
    """The largest h that the theorem's proof allows."""
    nu, steepest = 1 / variance.max(), lipschitz(variance, horizon)
    tau = lambertw(np.sqrt(5 * nu) / (96 * steepest / variance.min())).real
    return float(min(1 / (12 * steepest), 1 / nu, tau))


def measure_gaussian(
    mean: list[float], variance: list[float], h: float, horizons: list[float], score_error: float = 0.0, moved: str = ""
) -> list[Row]:
    """For each horizon: iteration (9)'s distance to the policy and to the exact reverse process, and the bound."""
    m, v = np.array(mean), np.array(variance)
    laws = [reverse_law(m, v, horizon) for horizon in horizons]
    if h:
        lengths = [round(horizon / h) for horizon in horizons]
        laws = list(zip(*sampled_law(iteration(h, max(lengths)), m, v, lengths, score_error), strict=True))
    rows = []
    for horizon, law in zip(horizons, laws, strict=True):
        limit, nu = reverse_law(m, v, horizon), 1 / v.max()
        terms = bound_terms(m, v, horizon, h, score_error, nu)
        row = dict(policy=f"p = {len(m)}, v = {', '.join(f'{each:g}' for each in dict.fromkeys(variance))}", v=v.max(), h=h)
        row |= dict(horizon=horizon, score_error=score_error, moved=moved, kl=kl(*law, m, v), bound=sum(terms))
        row |= dict(zip(("horizon_term", "step_term", "score_term"), terms, strict=True))
        row |= dict(bound_min_nu_1=sum(bound_terms(m, v, horizon, h, score_error, min(nu, 1.0))))
        row |= dict(mean_error=np.linalg.norm(law[0] - limit[0]), largest_h=largest_step(v, horizon))
        row |= dict(std_error=np.linalg.norm(np.sqrt(law[1]) - np.sqrt(limit[1])), kl_to_limit=kl(*law, *limit))
        rows.append(row)
    return rows


# The mixture of four modes: samples, from the package's own loop.


def exact_noise_prediction(table: SolverTable, means: th.Tensor, variance: float) -> Callable[[th.Tensor, int], th.Tensor]:
    """-sigma_t times the score of the noised mixture, in equal parts, of N(means, variance I); means (modes, p)."""

    def predict_noise(x: th.Tensor, i: int) -> th.Tensor:
        alpha, sigma = table.steps[i].alpha_t, table.steps[i].sigma_t
        total = alpha**2 * variance + sigma**2
        weights = th.softmax((x[:, None] - alpha * means).square().sum(dim=2) / (-2 * total), dim=1)
        return sigma / total * (x - alpha * weights @ means)

    return predict_noise


def draw(sampler: str, num_steps: int, num_samples: int, seed: int) -> np.ndarray:
    """Samples of the mixture, (num_samples, 2): "exact" ones, or by a schedule and a solver in so many steps."""
    generator = th.Generator().manual_seed(seed)
    initial_noise = th.randn(num_samples, 2, generator=generator)
    if sampler == "exact":
        modes = th.randint(len(MODES), (num_samples,), generator=generator)
        return (MODES[modes] + MODE_STD * initial_noise).numpy()
    name, _, solver = sampler.partition(" ")
    schedule = make_schedule(name, num_steps if name == "ou" else 100)
    table = SOLVERS[solver](schedule, time_grid(len(schedule), num_steps), 0.0)
    noise = th.randn(num_steps, num_samples, 2, generator=generator) if table.stochastic else None
    predict_noise = exact_noise_prediction(table, MODES, MODE_STD**2)
    return sample(table, predict_noise, initial_noise, noise, clip_sample=name != "ou").numpy()


def measure_mixture(sampler: str, num_steps: int, num_samples: int, seed: int) -> list[Row]:
    """Sliced Wasserstein distance (16 directions) to exact samples, and the spread about the nearest mode."""
    x, exact = draw(sampler, num_steps, num_samples, seed), draw("exact", 0, num_samples, 1_000 + seed)
    angles = np.pi * np.arange(16) / 16
    directions = np.stack([np.cos(angles), np.sin(angles)]).astype(x.dtype)
    distance = np.mean([wasserstein_distance(*pair) for pair in zip((x @ directions).T, (exact @ directions).T, strict=True)])
    offsets = x[:, None] - MODES.numpy()
    spread = np.sqrt(np.square(offsets).sum(axis=2).min(axis=1).mean() / 2)
    return [dict(sampler=sampler, num_steps=num_steps, seed=seed, distance=distance, spread=spread)]
