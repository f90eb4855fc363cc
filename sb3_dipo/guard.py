"""What happens when a loss is not finite: the update that met it leaves no trace."""

from collections.abc import Callable, Sequence

import torch as th
from torch import nn


class NonFiniteLossError(ValueError):
    """A loss, or the norm of its gradient, was infinite or not a number. A ValueError, so that tuning prunes the trial."""


def remember(modules: Sequence[nn.Module], optimizers: Sequence[th.optim.Optimizer]) -> Callable[[], None]:
    """
    Remember the tensors of modules, running statistics included, and the state of optimizers.

    :param modules: the modules
    :param optimizers: the optimizers
    :return: a function that puts all of it back
    """
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    values = [tensor.clone() for tensor in tensors]
    states = [
        (optimizer, parameter, {name: _copy(value) for name, value in state.items()})
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    ]

    def put_back() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        for optimizer in optimizers:
            optimizer.state.clear()
        for optimizer, parameter, state in states:
            optimizer.state[parameter] = state

    return put_back


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, th.Tensor) else value
