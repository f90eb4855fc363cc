"""Steps of optimizers and targets in few calls."""

import math
from collections.abc import Iterable

import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_dipo.fast.kernels import Kernels, RefusedError
from sb3_dipo.fast.layers import is_ordinary
from sb3_dipo.guard import Guard, non_finite


class FusedGuard(Guard):
    """
    A :class:`~sb3_dipo.guard.Guard` that updates all parameters of a network at once.

    :param kernels: the kernel, which clips gradients and steps in two passes, or None
    """

    def __init__(self, kernels: Kernels | None = None):
        self.kernels = kernels

    def _step(self, name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float) -> None:
        if self.kernels is None or not is_plain_adam(optimizer):
            super()._step(name, optimizer, loss, max_grad_norm)
            _tell_autograd(optimizer)
            return
        optimizer.zero_grad()
        loss.backward()

        def check(norm: float) -> None:
            if not math.isfinite(loss.item() + norm):
                optimizer.zero_grad()
                raise non_finite(name, f" (loss {loss.item()}, gradient norm {norm})")

        (group,) = optimizer.param_groups
        adams = _adams(optimizer, group["params"]) if is_ordinary(loss) else []
        beta1, beta2 = group["betas"]
        adam = float(group["lr"]), (float(beta1), float(beta2)), float(group["eps"])
        try:
            if adams:
                return self.kernels.clip_and_step(adams, max_grad_norm, *adam, check)
        except RefusedError:
            pass
        check(float(th.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)))
        optimizer.step()

    def polyak_update(self, params: Iterable[th.Tensor], target_params: Iterable[th.Tensor], tau: float) -> None:
        """As SB3's ``polyak_update``."""
        targets, parameters = list(target_params), list(params)
        if not targets:
            return
        try:
            if self.kernels is not None and is_ordinary(targets[0]):
                return self.kernels.polyak_update(targets, parameters, tau)
        except RefusedError:
            pass
        with th.no_grad():
            th._foreach_mul_(targets, 1 - tau)  # rounded as SB3 does: a step of a target is small beside it
            th._foreach_add_(targets, parameters, alpha=tau)


def _tell_autograd(optimizer: th.optim.Optimizer) -> None:
    """That parameters have changed, as fused steps on the CPU, where the user chose them, do not."""
    th.autograd.graph.increment_version([each for group in optimizer.param_groups for each in group["params"]])


def is_plain_adam(optimizer: th.optim.Optimizer) -> bool:
    """Whether a step of the optimizer is Adam's for the parameters of one group, and nothing else."""
    own = optimizer.__dict__
    if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1 or "step" in own:
        return False
    group = optimizer.param_groups[0]
    others = ("fused", "foreach", "amsgrad", "maximize", "differentiable", "capturable", "weight_decay")
    hooks = own["_optimizer_step_pre_hooks"] or own["_optimizer_step_post_hooks"]
    everywhere = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    scaled = own.get("grad_scale") is not None or own.get("found_inf") is not None
    return group["fused"] is None and not (hooks or everywhere or scaled or any(group[name] for name in others))


def _adams(optimizer: th.optim.Optimizer, parameters: list[th.Tensor]) -> list[tuple[th.Tensor, ...]]:
    """Parameters that have gradients, these, and what Adam keeps of them; nothing if their counts of steps differ."""
    adams: list[tuple[th.Tensor, ...]] = []
    for parameter in parameters:
        if parameter.grad is not None:
            state = optimizer.state.get(parameter)
            if not state:
                return []
            adams.append((parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
    return adams if len({float(step) for *_, step in adams}) == 1 else []
