"""The action gradient, equation (15): actions climb Q."""

from collections.abc import Callable
from typing import Any

import torch as th

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-5


def improve_actions(
    q_fn: Callable[[th.Tensor], th.Tensor],
    actions: th.Tensor,
    action_lr: float = 0.03,
    action_gradient_steps: int = 20,
    action_grad_norm_ratio: float = 0.1,
    max_action_shift: float | None = None,
    actions_taken: th.Tensor | None = None,
) -> th.Tensor:
    """
    Move a batch of actions uphill on Q: ``a <- clip(a + eta grad_a Q(s, a), -1, 1)``, equation (15), several times.

    As in the authors' code each step is one of Adam (Kingma and Ba 2015; moments start at zero in every call, eps 1e-5)
    on the batch's sum of Q, whose gradient is first clipped to ``action_grad_norm_ratio * action_dim`` by its L2 norm
    over the whole batch. No gradient reaches the parameters of ``q_fn``.

    :param q_fn: Q at fixed states, from actions (batch_size, action_dim) to values (batch_size, 1). Where it has a method
        ``gradient(actions)``, which returns the gradient of its sum, (batch_size, action_dim), that is used; else autograd.
        Where it has a method ``improve(actions, bounds, action_lr, action_gradient_steps, max_norm)``, which takes all steps
        and returns the improved actions, or None if it cannot, that is used first; ``bounds`` are the lowest and the highest
        improved action, both (batch_size, action_dim), or None
    :param actions: in [-1, 1], (batch_size, action_dim); left as they are
    :param action_lr: eta, Adam's step size: about what an action moves in one step, in units of the box's half-width
    :param action_gradient_steps: number of steps
    :param action_grad_norm_ratio: largest norm of the batch's gradient, divided by action_dim
    :param max_action_shift: how far an action may get from ``actions_taken`` in each dimension, above 0; None is no bound
    :param actions_taken: the middle of that bound, in [-1, 1], (batch_size, action_dim); ``actions`` where None
    :return: improved actions in [-1, 1], (batch_size, action_dim)
    """

    def autograd(actions: th.Tensor) -> th.Tensor:
        with th.enable_grad():
            climber = actions.requires_grad_()
            return th.autograd.grad(q_fn(climber).sum(), climber)[0]

    gradient_of: Callable[[th.Tensor], th.Tensor] = getattr(q_fn, "gradient", autograd)
    max_norm = action_grad_norm_ratio * actions.shape[1]
    beta1, beta2 = ADAM_BETAS
    actions, bounds = actions.detach(), None
    if max_action_shift is not None:
        middle = (actions if actions_taken is None else actions_taken).detach()
        bounds = (middle - max_action_shift).clamp(min=-1), (middle + max_action_shift).clamp(max=1)
    if hasattr(q_fn, "improve"):
        improved: th.Tensor | None = q_fn.improve(actions, bounds, action_lr, action_gradient_steps, max_norm)
        if improved is not None:
            return improved
    limits: Any = bounds or (-1.0, 1.0)
    first_moment, second_moment = th.zeros_like(actions), th.zeros_like(actions)
    for step in range(1, action_gradient_steps + 1):
        gradient = gradient_of(actions)
        with th.no_grad():
            gradient = gradient * (max_norm / (gradient.norm() + 1e-6)).clamp_(max=1.0)
            first_moment.lerp_(gradient, 1 - beta1)
            second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (second_moment / (1 - beta2**step)).sqrt_().add_(ADAM_EPS)
            actions = th.addcdiv(actions, first_moment, denominator, value=action_lr / (1 - beta1**step)).clamp_(*limits)
    return actions.detach()
