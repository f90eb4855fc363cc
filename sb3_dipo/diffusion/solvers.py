"""
Solvers of the reverse process, each a table of coefficients.

Every solver here is one update whose coefficients depend on the step alone,

    x' = a x + b D + c D_prev + s z,        D = (x - sigma_t eps) / alpha_t,

with x the noisy actions, eps the predicted noise, D the predicted clean actions (of the step before: D_prev) and
z ~ N(0, I). A solver maps (schedule, timesteps) to the rows (alpha_t, sigma_t, a, b, c, s), one per step;
:func:`sb3_dipo.diffusion.process.sample` runs them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th

from sb3_dipo.diffusion.schedules import NoiseSchedule


class Step(NamedTuple):
    """One row of a solver's table: x' = a x + b D + c D_prev + s z, D = (x - sigma_t eps) / alpha_t."""

    alpha_t: float
    sigma_t: float
    a: float
    b: float
    c: float
    s: float


@dataclass(frozen=True)
class SolverTable:
    """
    A solver on a time grid.

    :param timesteps: what the network is told of the time at each step: descending indices into the schedule, of which 0 is
        the paper's k = 1; of a flow, ``FLOW_TIME`` t
    :param steps: the rows, in order of use; the last one ends at the clean action
    """

    timesteps: tuple[Any, ...]
    steps: tuple[Step, ...]

    def timesteps_on(self, device: th.device, dtype: th.dtype) -> th.Tensor:
        """The timesteps as a tensor, (number of steps,): int64, or, of a flow, of the given type."""
        whole = isinstance(self.timesteps[0], int)
        return th.tensor(self.timesteps, dtype=th.int64 if whole else dtype, device=device)

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return any(step.s > 0 for step in self.steps)


class _Point(NamedTuple):
    """A point of the time grid: the noised action there is alpha a_0 + sigma z, lambda = log(alpha / sigma)."""

    timestep: int
    alphas_cumprod: float
    alpha: float
    sigma: float
    lambda_: float


_CLEAN = _Point(-1, 1.0, 1.0, 0.0, math.inf)

LAMBDA_LIMIT = 3.0  # alpha or sigma = 0.05: of the limits 2.5, 3 and 3.3 the best compromise at 5, 10 and 20 steps


def _check_steps(num_train_timesteps: int, num_inference_steps: int) -> None:
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must be between 1 and `num_train_timesteps` = {num_train_timesteps}, "
            f"not {num_inference_steps!r}."
        )


def time_grid(num_train_timesteps: int, num_inference_steps: int) -> tuple[int, ...]:
    """
    ``num_inference_steps`` descending indices, evenly spread over 0..K-1 with both ends included (one step: K-1 alone).

    :raises ValueError: unless 1 <= num_inference_steps <= num_train_timesteps
    """
    _check_steps(num_train_timesteps, num_inference_steps)
    if num_inference_steps == 1:
        return (num_train_timesteps - 1,)
    spacing = (num_train_timesteps - 1) / (num_inference_steps - 1)
    return tuple(math.floor(i * spacing + 0.5) for i in reversed(range(num_inference_steps)))


def lambda_grid(schedule: NoiseSchedule, num_inference_steps: int) -> tuple[int, ...]:
    """
    ``num_inference_steps`` descending indices, evenly spread in lambda = log(alpha / sigma), of which DPM-Solver++ is a
    function, over that part of -3..3 that the schedule covers: beyond it there is hardly any signal (the clipped cosine
    schedule's last steps), or hardly any noise. Each is the nearest index not yet taken; all K of them are every index.

    :raises ValueError: unless 1 <= num_inference_steps <= len(schedule)
    """
    _check_steps(len(schedule), num_inference_steps)
    first, last = (float(schedule.lambda_t[end].clamp(-LAMBDA_LIMIT, LAMBDA_LIMIT)) for end in (-1, 0))
    grid: list[int] = []
    highest = len(schedule) - 1
    for i, target in enumerate(th.linspace(first, last, num_inference_steps, dtype=th.float64, device="cpu")):
        nearest = int((schedule.lambda_t - target).abs().argmin())
        lowest = num_inference_steps - 1 - i  # leaves an index for each step to come
        grid.append(max(lowest, min(nearest, highest)))
        highest = grid[-1] - 1
    return tuple(grid)


Spacing = Callable[[NoiseSchedule, int], tuple[int, ...]]

SPACINGS: dict[str, Spacing] = {
    "linspace": lambda schedule, num_inference_steps: time_grid(len(schedule), num_inference_steps),
    "lambda": lambda_grid,
}


def _grid(schedule: NoiseSchedule, timesteps: Sequence[int]) -> list[_Point]:
    """The points of the grid, from most to least noise, with the clean action (sigma = 0) as the last."""
    descending = all(later < earlier for earlier, later in itertools.pairwise(timesteps))
    if len(timesteps) == 0 or not descending or not 0 <= timesteps[-1] <= timesteps[0] < len(schedule):
        raise ValueError(f"`timesteps` must be descending indices between 0 and {len(schedule) - 1}, not {timesteps!r}.")
    points = [
        _Point(timestep, abar, math.sqrt(abar), math.sqrt(1 - abar), lambda_)
        for timestep, abar, lambda_ in (
            (int(t), float(schedule.alphas_cumprod[t]), float(schedule.lambda_t[t])) for t in timesteps
        )
    ]
    return [*points, _CLEAN]


def _table(
    timesteps: Sequence[int], points: list[_Point], coefficients: list[tuple[float, float, float, float]]
) -> SolverTable:
    steps = (Step(now.alpha, now.sigma, *row) for now, row in zip(points[:-1], coefficients, strict=True))
    return SolverTable(tuple(timesteps), tuple(steps))


def ddpm(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float = 1.0) -> SolverTable:
    """
    Ancestral sampling from the posterior q(a_next | a_now, D); on all timesteps it is the authors' sampler.

    For a step from abar to abar' with alpha = abar / abar', beta = 1 - alpha:
    ``b = beta sqrt(abar') / (1 - abar)``, ``a = (1 - abar') sqrt(alpha) / (1 - abar)``,
    ``s = sqrt(beta (1 - abar') / (1 - abar))`` (Ho et al. 2020, equation 7; strided: Nichol and Dhariwal 2021, section 4).

    :param schedule: the noise schedule
    :param timesteps: descending indices into it
    :param eta: not used: ancestral sampling is DDIM with eta = 1
    """
    points = _grid(schedule, timesteps)
    rows = []
    for now, then in itertools.pairwise(points):
        beta, alpha = 1 - now.alphas_cumprod / then.alphas_cumprod, now.alphas_cumprod / then.alphas_cumprod
        if then.timestep == now.timestep - 1:  # as the authors' code rounds them
            beta, alpha = float(schedule.betas[now.timestep]), float(schedule.alphas[now.timestep])
        variance = 1 - now.alphas_cumprod
        a = (1 - then.alphas_cumprod) * math.sqrt(alpha) / variance
        b = beta * then.alpha / variance
        s = math.sqrt(beta * (1 - then.alphas_cumprod) / variance)
        rows.append((a, b, 0.0, s))
    return _table(timesteps, points, rows)


def ddim(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float = 0.0) -> SolverTable:
    """
    DDIM (Song et al. 2021, equations 12 and 16): ``x' = alpha' D + sqrt(sigma'^2 - s^2) eps + s z`` with
    eps = (x - alpha D) / sigma taken from the clipped D, and ``s = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar'))``.

    :param schedule: the noise schedule
    :param timesteps: descending indices into it
    :param eta: between 0, a deterministic first-order solver of the probability-flow ODE, and 1, which is :func:`ddpm`
    """
    if eta == 1:  # the same function; its table has the authors' rounding
        return ddpm(schedule, timesteps)
    points = _grid(schedule, timesteps)
    rows = []
    for now, then in itertools.pairwise(points):
        ratio = now.alphas_cumprod / then.alphas_cumprod
        s = eta * math.sqrt((1 - then.alphas_cumprod) / (1 - now.alphas_cumprod) * (1 - ratio))
        a = math.sqrt(max(then.sigma**2 - s**2, 0.0)) / now.sigma
        rows.append((a, then.alpha - a * now.alpha, 0.0, s))
    return _table(timesteps, points, rows)


def dpmpp_2m(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float = 0.0) -> SolverTable:
    """
    DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic, second order in the log signal-to-noise ratio:
    ``x' = sigma'/sigma x + alpha' (1 - exp(-h)) ((1 + 1/(2r)) D - 1/(2r) D_prev)``, h = lambda' - lambda, r = h_prev / h.
    The first step has no D_prev and the last one (to sigma = 0, h infinite) no use for it: both are first order.

    :param schedule: the noise schedule
    :param timesteps: descending indices into it
    :param eta: not used: the solver adds no noise
    """
    points = _grid(schedule, timesteps)
    rows = []
    for i, (now, then) in enumerate(itertools.pairwise(points)):
        h = then.lambda_ - now.lambda_
        gain = then.alpha * -math.expm1(-h)
        extrapolation = 0.0
        if i > 0 and math.isfinite(h):
            extrapolation = 0.5 * h / (now.lambda_ - points[i - 1].lambda_)
        rows.append((then.sigma / now.sigma, gain * (1 + extrapolation), -gain * extrapolation, 0.0))
    return _table(timesteps, points, rows)


def exponential_integrator(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float = 1.0) -> SolverTable:
    """
    The paper's Algorithm 1, iteration (9): ``x' = x + (e^h - 1) (x + 2 S) + sqrt(e^{2h} - 1) z`` with the score
    S = -eps / sigma = (alpha D - x) / sigma^2 at the step's start, and h the noise time that the step removes
    (abar / abar' = e^{-2h}; on the ``ou`` schedule h = T / K). As in the paper the last step adds noise, too.

    :param schedule: the noise schedule
    :param timesteps: descending indices into it
    :param eta: not used
    :raises ValueError: if a step is so long that x is multiplied by less than -1, where the iteration diverges
        (h > log 3 far from the data; the cosine schedule's first step always is)
    """
    points = _grid(schedule, timesteps)
    rows = []
    for now, then in itertools.pairwise(points):
        h = 0.5 * math.log(then.alphas_cumprod / now.alphas_cumprod)
        growth = math.expm1(h)
        pull = 2 * growth / now.sigma**2
        a = 1 + growth - pull
        if a < -1:
            raise ValueError(
                f"`solver='exponential_integrator'` diverges on this `beta_schedule`: one of its steps removes a noise time "
                f"of {h:.2f}, at which it multiplies the noisy action by {a:.1f}. Use `beta_schedule='ou'`, 'vp' or 'linear' "
                "with more steps, or another `solver`."
            )
        rows.append((a, pull * now.alpha, 0.0, math.sqrt(math.expm1(2 * h))))
    return _table(timesteps, points, rows)


Solver = Callable[[NoiseSchedule, Sequence[int], float], SolverTable]

SOLVERS: dict[str, Solver] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "exponential_integrator": exponential_integrator,
}


# ------------------------------------------------------------------------------------------------- flow

FLOW_TIME = 100.0
"""Factor of the time t in [0, 1] of a flow before it is embedded, as if it were a timestep of 100."""


def euler(num_inference_steps: int) -> SolverTable:
    """
    Euler's method for the rectified flow dx/dt = v(x, t), from noise at t = 0 to the action at t = 1, first order.

    With x_t = (1 - t) z + t a and v the network's prediction of a - z, the predicted clean action is D = x + (1 - t) v, and
    ``x' = x + dt v = (1 - dt / (1 - t)) x + dt / (1 - t) D`` (Liu et al. 2023; Lipman et al. 2023).

    :param num_inference_steps: number of steps, of length dt = 1 / num_inference_steps; at least 1
    """
    dt = 1 / num_inference_steps
    times = [i * dt for i in range(num_inference_steps)]
    rates = [1 / (num_inference_steps - i) for i in range(num_inference_steps)]  # dt / (1 - t)
    rows = (Step(1.0, t - 1, 1 - rate, rate, 0.0, 0.0) for t, rate in zip(times, rates, strict=True))
    return SolverTable(tuple(FLOW_TIME * t for t in times), tuple(rows))


def midpoint(num_inference_steps: int) -> SolverTable:
    """
    The midpoint method for the flow of :func:`euler`, second order, two evaluations of the network for each step:
    ``m = x + dt/2 v(x, t)``, then ``x' = x + dt v(m, t + dt/2)``.

    As x is not kept, the second row takes it back from m and D_prev: with r = dt / (2 (1 - t)) and
    q = dt / (1 - t - dt/2), ``m = (1 - r) x + r D_prev`` and ``x' = (m - r D_prev) / (1 - r) + q (D - m)``.

    :param num_inference_steps: number of steps, of length dt = 1 / num_inference_steps; at least 1
    """
    timesteps, rows = [], []
    for i in range(num_inference_steps):
        left = num_inference_steps - i  # (1 - t) / dt
        r, q = 0.5 / left, 1 / (left - 0.5)
        t, middle = i / num_inference_steps, (i + 0.5) / num_inference_steps
        timesteps += [FLOW_TIME * t, FLOW_TIME * middle]
        rows.append(Step(1.0, t - 1, 1 - r, r, 0.0, 0.0))
        rows.append(Step(1.0, middle - 1, 1 / (1 - r) - q, q, -r / (1 - r), 0.0))
    return SolverTable(tuple(timesteps), tuple(rows))


FLOW_SOLVERS: dict[str, Callable[[int], SolverTable]] = {"euler": euler, "midpoint": midpoint}
