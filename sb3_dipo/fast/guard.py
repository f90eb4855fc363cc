"""Steps of optimizers and targets in few calls."""

from collections.abc import Iterable

import torch as th

from sb3_dipo.guard import Guard

FUSED = (th.optim.Adam, th.optim.AdamW, th.optim.SGD)


class FusedGuard(Guard):
    """A :class:`~sb3_dipo.guard.Guard` that updates all parameters of a network at once."""

    def prepare(self, optimizer: th.optim.Optimizer) -> None:
        """Let PyTorch's own optimizers step in one kernel, unless the user chose otherwise."""
        for group in optimizer.param_groups if type(optimizer) in FUSED else ():
            if group["fused"] is None and not group["foreach"] and not group["differentiable"]:
                group["fused"] = True
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    if isinstance(state.get("step"), th.Tensor):  # of a file, perhaps from another device
                        state["step"] = state["step"].to(parameter.device, th.float32)

    def polyak_update(self, params: Iterable[th.Tensor], target_params: Iterable[th.Tensor], tau: float) -> None:
        """As SB3's ``polyak_update``."""
        targets = list(target_params)
        if targets:
            with th.no_grad():
                th._foreach_mul_(targets, 1 - tau)
                th._foreach_add_(targets, list(params), alpha=tau)
