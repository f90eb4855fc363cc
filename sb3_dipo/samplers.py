"""How a policy samples: which solver, how many steps, how much noise."""

from dataclasses import dataclass

SAMPLER_USES = ("behaviour", "target", "evaluation")
"""What a policy samples for: acting, TD targets, and ``deterministic=True``."""


@dataclass(frozen=True)
class Sampler:
    """
    How an actor samples. A policy owns one for each use (``"behaviour"``, ``"target"`` and ``"evaluation"``) and hands it to
    the actor; see :meth:`sb3_dipo.DIPOPolicy.set_sampler`. Which fields an actor uses is in its ``sampler_options``; the
    actor checks them.

    :param num_candidates: actions that are sampled for each state, of which the one that the critic values most is taken; at
        least 1. The policy does so, see :meth:`sb3_dipo.DIPOPolicy.act`
    :param noise_scale: factor of the noise that is added on the way, at least 0
    :param solver: of the reverse process: see :mod:`sb3_dipo.diffusion.solvers`
    :param num_inference_steps: steps that are really taken; of the diffusion between 1 and K, and None is all K
    :param timestep_spacing: which of the K steps those are: ``"linspace"`` or ``"lambda"``
    :param eta: for ``solver="ddim"``: between 0, deterministic, and 1, which is ``"ddpm"``
    """

    num_candidates: int = 1
    noise_scale: float = 1.0
    solver: str = "ddpm"
    num_inference_steps: int | None = None
    timestep_spacing: str = "linspace"
    eta: float = 0.0
