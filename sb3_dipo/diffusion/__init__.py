"""The diffusion process by itself: it imports torch only and knows nothing of reinforcement learning."""

from sb3_dipo.diffusion.process import add_noise, denoising_loss, sample
from sb3_dipo.diffusion.schedules import SCHEDULES, NoiseSchedule, make_schedule
from sb3_dipo.diffusion.solvers import SOLVERS, SolverTable, time_grid

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "NoiseSchedule",
    "SolverTable",
    "add_noise",
    "denoising_loss",
    "make_schedule",
    "sample",
    "time_grid",
]
