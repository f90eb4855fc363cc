"""The recommended setting of DIPO: today's critics and sampler, which learned soonest of what was compared."""

from typing import Any

RECOMMENDED: dict[str, Any] = dict(
    policy_kwargs=dict(actor="flow", critic="quantile", layer_norm=True, samplers=dict(behaviour=dict(num_candidates=4))),
    action_lr=0.12,
    action_gradient_steps=5,
)
"""
Arguments of :class:`~sb3_dipo.DIPO`, to be used as ``DIPO("MlpPolicy", env, **RECOMMENDED)``. What is not named here keeps its
default, which is the paper's.

``actor="flow"``: :class:`~sb3_dipo.FlowActor`, which samples in five evaluations of its network where the paper's diffusion
needs K = 100.

``critic="quantile", layer_norm=True``: :class:`~sb3_dipo.QuantileCritic`, TQC's quantiles of the return, with a LayerNorm
before each activation.

``samplers=dict(behaviour=dict(num_candidates=4))``: in training, the action that is played is the best of four by the critic.

``action_lr=0.12, action_gradient_steps=5``: long ascent steps, a quarter of the paper's 20, each four times as long. Adam
moves an action by about ``action_lr`` in a step, whatever the size of the gradient, so that both lead about as far. On
HalfCheetah, for which the paper takes 40 steps, we recommend 10.

The hyper-parameters that ``--algo dipo`` takes in the RL Zoo, ``hyperparams/dipo.yml``, have the same values.
"""
