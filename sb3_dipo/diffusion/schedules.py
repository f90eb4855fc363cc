"""Noise schedules: how much noise each step of the forward process adds."""

import math
from collections.abc import Callable

import torch as th
from torch import nn

DEFAULT_HORIZON = 4.0
MIN_HORIZON, MAX_HORIZON = 1e-3, 50.0  # float32 can tell the noisy action from the clean one, and from pure noise


def cosine_betas(num_train_timesteps: int, horizon: float) -> th.Tensor:
    """
    The squared-cosine schedule of the authors' code, on its grid x_i = i (K + 1) / K, i = 0..K:
    ``f_i = cos((x_i / (K + 1) + 0.008) / 1.008 * pi / 2)^2``, ``beta_i = clip(1 - f_i / f_{i-1}, 0, 0.999)``.
    """
    grid = th.linspace(0, 1, num_train_timesteps + 1, dtype=th.float64, device="cpu")
    remaining = th.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - remaining[1:] / remaining[:-1]).clamp(0, 0.999).float()


def vp_betas(num_train_timesteps: int, horizon: float) -> th.Tensor:
    """The variance-preserving schedule: ``beta_i = 1 - exp(-0.1 / K - 0.5 (10 - 0.1) (2 i - 1) / K^2)``, i = 1..K."""
    i = th.arange(1, num_train_timesteps + 1, dtype=th.float64, device="cpu")
    return (1 - th.exp(-0.1 / num_train_timesteps - 0.5 * (10 - 0.1) * (2 * i - 1) / num_train_timesteps**2)).float()


def linear_betas(num_train_timesteps: int, horizon: float) -> th.Tensor:
    """K values evenly spaced from 1e-4 to 2e-2."""
    return th.linspace(1e-4, 2e-2, num_train_timesteps, dtype=th.float64, device="cpu").float()


def ou_betas(num_train_timesteps: int, horizon: float) -> th.Tensor:
    """The paper's Ornstein-Uhlenbeck process (2) on a uniform grid of step h = T / K: constant ``beta = 1 - exp(-2 h)``."""
    return th.full((num_train_timesteps,), -math.expm1(-2 * horizon / num_train_timesteps), dtype=th.float64, device="cpu")


SCHEDULES: dict[str, Callable[[int, float], th.Tensor]] = {
    "cosine": cosine_betas,
    "vp": vp_betas,
    "linear": linear_betas,
    "ou": ou_betas,
}


class NoiseSchedule(nn.Module):
    """
    The forward process a_k = alpha_t a_0 + sigma_t z, for k = 1..K (paper, Appendix C; index 0 here is the paper's k = 1).

    ``betas``, ``alphas``, ``alphas_cumprod`` and ``lambda_t = log(alpha_t / sigma_t)`` are float64 and stay on the CPU:
    solvers make their tables from them. They are first computed in the precision of ``betas``: the authors' schedules are
    float32, cumulative product included, and without that rounding their samples are missed by 2.6e-5.
    ``alpha_t = sqrt(alphas_cumprod)`` and ``sigma_t = sqrt(1 - alphas_cumprod)`` are float32 buffers (not saved) that move
    with the module, for :func:`sb3_dipo.diffusion.process.add_noise`. All have shape (num_train_timesteps,).

    :param betas: variance added at each step, shape (num_train_timesteps,), each in (0, 1)
    :raises ValueError: if ``betas`` is empty or a value lies outside (0, 1)
    """

    alpha_t: th.Tensor
    sigma_t: th.Tensor

    def __init__(self, betas: th.Tensor):
        super().__init__()
        betas = betas.detach().cpu()
        if betas.ndim != 1 or betas.numel() == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"`betas` must be a non-empty vector of values between 0 and 1, not {betas}.")
        self.num_train_timesteps = len(betas)
        self.betas = betas.double()
        self.alphas = (1 - betas).double()
        self.alphas_cumprod = th.cumprod(1 - betas, dim=0).double()
        smallest = th.finfo(th.float32).tiny
        if not bool(((self.alphas_cumprod.sqrt() > smallest) & (self.alphas_cumprod < 1)).all()):
            raise ValueError(f"`betas` must leave some signal and add some noise at every step in float32, not {betas}.")
        self.lambda_t = 0.5 * (th.log(self.alphas_cumprod) - th.log1p(-self.alphas_cumprod))
        self.register_buffer("alpha_t", self.alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma_t", (1 - self.alphas_cumprod).sqrt().float(), persistent=False)

    def __len__(self) -> int:
        return self.num_train_timesteps


def make_schedule(beta_schedule: str, num_train_timesteps: int, horizon: float | None = None) -> NoiseSchedule:
    """
    Build a noise schedule by name.

    :param beta_schedule: ``"cosine"``, ``"vp"``, ``"linear"``, as in the authors' code, or ``"ou"``, the paper's process (2)
    :param num_train_timesteps: K, the length of the process, at least 1
    :param horizon: T, the time that the Ornstein-Uhlenbeck process runs for, 1e-3 to 50; only for ``"ou"``, where None is 4
        (the noised action then keeps a share e^-4 = 0.018 of the clean one)
    :raises ValueError: for an unknown name, ``num_train_timesteps`` < 1, a ``horizon`` outside its range or not ``"ou"``'s
    """
    if beta_schedule not in SCHEDULES:
        raise ValueError(f"`beta_schedule` must be one of {', '.join(map(repr, SCHEDULES))}, not {beta_schedule!r}.")
    if num_train_timesteps < 1:
        raise ValueError(f"`num_train_timesteps` must be at least 1, not {num_train_timesteps!r}.")
    if horizon is not None and beta_schedule != "ou":
        raise ValueError(
            f"`horizon` belongs to `beta_schedule='ou'` and must be None with {beta_schedule!r}, not {horizon!r}."
        )
    if horizon is not None and not MIN_HORIZON <= horizon <= MAX_HORIZON:
        raise ValueError(f"`horizon` must be a number between {MIN_HORIZON:g} and {MAX_HORIZON:g}, not {horizon!r}.")
    betas = SCHEDULES[beta_schedule](num_train_timesteps, DEFAULT_HORIZON if horizon is None else horizon)
    try:
        return NoiseSchedule(betas)
    except ValueError as error:
        raise ValueError(
            f"`num_train_timesteps` = {num_train_timesteps} does not go with `beta_schedule={beta_schedule!r}`: {error}"
        ) from error
