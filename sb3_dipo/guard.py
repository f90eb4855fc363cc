"""What happens when a loss is not finite: the update that met it leaves no trace, and the device is not waited for."""

from collections.abc import Callable, Iterable

import torch as th

from sb3_dipo.arithmetic import on_host


class NonFiniteLossError(ValueError):
    """A loss, or the norm of its gradient, was infinite or not a number. A ValueError, so that tuning prunes the trial."""


def step_if(ok: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    """
    One step of an optimizer, or none.

    :param ok: whether to, a boolean scalar, which is not read where the optimizer can be told on the device (fused ones)
    :param optimizer: an optimizer, with gradients
    """
    if not on_host(ok) and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]  # as PyTorch's GradScaler tells it
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif ok:
        optimizer.step()


def remember(tensors: Iterable[th.Tensor], optimizer: th.optim.Optimizer) -> Callable[[th.Tensor], None]:
    """
    Remember tensors and the state of an optimizer.

    :param tensors: such as parameters and running statistics
    :param optimizer: the optimizer; the state that its first step makes is then gone, or 0 on a GPU, as Adam's starts
    :return: a function of a flag, a boolean scalar, that puts all of it back unless the flag is True
    """
    known = {id(tensor): (tensor, tensor.clone()) for tensor in (*tensors, *_state(optimizer))}
    numbers = {parameter: {**state} for parameter, state in optimizer.state.items()}  # what is no tensor is on the host

    @th.no_grad()
    def put_back_unless(ok: th.Tensor) -> None:
        # outside of a capture, waiting once for the flag costs less than putting everything back
        capturing = not on_host(ok) and (ok.device.type != "cuda" or th.cuda.is_current_stream_capturing())
        if not capturing and ok:
            return
        for tensor, value in known.values():
            tensor.copy_(th.where(ok.to(tensor.device), tensor, value))
        if on_host(ok):
            optimizer.state.clear()
            optimizer.state.update(numbers)
        else:
            for value in _state(optimizer):
                if id(value) not in known:
                    value.copy_(th.where(ok.to(value.device), value, 0 * value))

    return put_back_unless


def _state(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, th.Tensor)]
