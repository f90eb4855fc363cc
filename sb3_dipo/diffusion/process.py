"""The diffusion process: noising, the denoising loss, and the one loop that samples."""

from collections.abc import Callable

import torch as th
from torch.nn import functional as F

from sb3_dipo.diffusion.schedules import NoiseSchedule
from sb3_dipo.diffusion.solvers import SolverTable


def add_noise(schedule: NoiseSchedule, actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
    """
    a_k = alpha_t a + sigma_t z, the forward process in one go (paper, Appendix C).

    :param schedule: the noise schedule, on the device of the other arguments
    :param actions: clean actions, (batch_size, action_dim)
    :param noise: standard normal z, (batch_size, action_dim)
    :param timesteps: indices into the schedule, int64, (batch_size,); 0 is the paper's k = 1
    :return: noisy actions, (batch_size, action_dim)
    """
    return schedule.alpha_t[timesteps].unsqueeze(1) * actions + schedule.sigma_t[timesteps].unsqueeze(1) * noise


def denoising_loss(
    schedule: NoiseSchedule,
    predict_noise: Callable[[th.Tensor, th.Tensor], th.Tensor],
    actions: th.Tensor,
    timesteps: th.Tensor,
    noise: th.Tensor,
) -> th.Tensor:
    """
    l_d = || z - eps(a_k, k) ||^2, equation (11), averaged over batch and action dimensions.

    :param schedule: the noise schedule
    :param predict_noise: eps, from noisy actions (batch_size, action_dim) and timesteps (batch_size,) to the noise in them
    :param actions: clean actions, (batch_size, action_dim)
    :param timesteps: indices into the schedule, int64, (batch_size,)
    :param noise: standard normal z, (batch_size, action_dim)
    :return: the loss, a scalar
    """
    return F.mse_loss(predict_noise(add_noise(schedule, actions, noise, timesteps), timesteps), noise)


def flow_matching_loss(
    predict_velocity: Callable[[th.Tensor, th.Tensor], th.Tensor], actions: th.Tensor, times: th.Tensor, noise: th.Tensor
) -> th.Tensor:
    """
    || v((1 - t) z + t a, t) - (a - z) ||^2, averaged over batch and action dimensions (rectified flow, Liu et al. 2023).

    :param predict_velocity: v, from x_t (batch_size, action_dim) and t (batch_size,) to the velocity there
    :param actions: clean actions a, (batch_size, action_dim)
    :param times: t in [0, 1], (batch_size,)
    :param noise: standard normal z, (batch_size, action_dim)
    :return: the loss, a scalar
    """
    t = times.unsqueeze(1)
    return F.mse_loss(predict_velocity((1 - t) * noise + t * actions, times), actions - noise)


def noise_scales(table: SolverTable, device: th.device, dtype: th.dtype) -> th.Tensor:
    """The coefficients s of the noise added on the way, (number of steps, 1, 1)."""
    return th.tensor([step.s for step in table.steps], device=device, dtype=dtype).view(-1, 1, 1)


def sample(
    table: SolverTable,
    predict_noise: Callable[[th.Tensor, int], th.Tensor],
    initial_noise: th.Tensor,
    noise: th.Tensor | None,
    clip_sample: bool = True,
    scales: th.Tensor | None = None,
) -> th.Tensor:
    """
    Run the reverse process: from noise to actions in ``len(table.steps)`` steps (paper, Algorithm 4 with the authors'
    clipping, or Algorithm 1, or whichever solver made the table).

    :param table: a solver's coefficients
    :param predict_noise: eps, from noisy actions (batch_size, action_dim) and the number of the step, counted from 0
        in order of use, to the noise in them
    :param initial_noise: a_K, (batch_size, action_dim)
    :param noise: the noise added along the way, in order of use, (number of steps, batch_size, action_dim); None adds none
    :param clip_sample: clip the predicted clean actions to [-1, 1] at every step
    :param scales: :func:`noise_scales`, where they were made before
    :return: actions clipped to [-1, 1], (batch_size, action_dim)
    """
    x, previous = initial_noise, None
    added: list[th.Tensor] | None = None
    if noise is not None:
        if scales is None:
            added = [each * step.s for each, step in zip(noise.unbind(), table.steps, strict=True)]
        else:
            added = list((noise * scales).unbind())
    for i, step in enumerate(table.steps):
        # D = (x - sigma_t eps) / alpha_t
        denoised = th.sub(x * (1 / step.alpha_t), predict_noise(x, i), alpha=step.sigma_t / step.alpha_t)
        if clip_sample:
            denoised = denoised.clamp(-1, 1)
        # x' = a x + b D + c D_prev + s z
        x = x * step.a if added is None else th.add(added[i], x, alpha=step.a)
        x = th.add(x, denoised, alpha=step.b)
        if previous is not None and step.c != 0:
            x = th.add(x, previous, alpha=step.c)
        previous = denoised
    return x.clamp(-1, 1)
