"""What happens when a loss is not finite: the update that met it leaves no trace."""

from collections.abc import Callable

import torch as th
from torch import nn


class NonFiniteLossError(ValueError):
    """A loss, or the norm of its gradient, was infinite or not a number. A ValueError, so that tuning prunes the trial."""


def remember(module: nn.Module, optimizer: th.optim.Optimizer) -> Callable[[], None]:
    """
    Remember a module's tensors and its optimizer's state.

    :param module: the module
    :param optimizer: its optimizer
    :return: a function that puts them back
    """
    with th.no_grad():
        held = [*module.state_dict().values()]
        held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, th.Tensor)]
        values = [tensor.clone() for tensor in held]
    is_fresh = not optimizer.state

    def put_back() -> None:
        for tensor, value in zip(held, values, strict=True):
            tensor.copy_(value)
        if is_fresh:
            optimizer.state.clear()

    return put_back
