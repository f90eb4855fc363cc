"""Steps of optimizers and targets, none of which is taken after a number that is not finite."""

from collections.abc import Iterable

import torch as th
from stable_baselines3.common.utils import polyak_update, update_learning_rate


class NonFiniteLossError(ValueError):
    """A loss, or the norm of its gradient, was infinite or not a number. A ValueError, so that tuning prunes the trial."""


def clipped_gradient(optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float) -> th.Tensor:
    """
    Give the optimizer's parameters the gradient of a loss, clipped by its joint L2 norm.

    :param optimizer: of the parameters
    :param loss: a scalar
    :param max_grad_norm: the largest norm, above 0
    :return: the norm before it was clipped, a scalar
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)


class Guard:
    """Takes steps, and raises an error in place of one that is not finite. Nothing that was done before is undone."""

    def begin(self) -> None:
        """Called before the updates of a ``train()``."""

    def end(self) -> None:
        """Called after them."""

    def prepare(self, optimizer: th.optim.Optimizer) -> None:
        """Called of each optimizer before it is used, and after its state was loaded."""

    def set_learning_rate(self, optimizer: th.optim.Optimizer, learning_rate: float) -> None:
        """As SB3's ``update_learning_rate``."""
        update_learning_rate(optimizer, learning_rate)

    def step(self, name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float) -> None:
        """
        Take one step down a loss's clipped gradient, or none where all parameters are frozen.

        :param name: of the loss, for the error
        :param optimizer: of the parameters to change
        :param loss: a scalar
        :param max_grad_norm: largest L2 norm of the gradient, above 0
        :raises NonFiniteLossError: if the loss or its gradient is not finite; nothing is changed then
        :raises RuntimeError: if the loss has no gradient, as PyTorch: under ``th.no_grad()``, or where it was detached
        """
        if any(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"]):
            self._step(name, optimizer, loss, max_grad_norm)

    def _step(self, name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float) -> None:
        grad_norm = clipped_gradient(optimizer, loss, max_grad_norm)
        if not th.isfinite(loss.detach() + grad_norm):
            optimizer.zero_grad()
            raise non_finite(name, f" (loss {loss.item()}, gradient norm {grad_norm.item()})")
        optimizer.step()

    def polyak_update(self, params: Iterable[th.Tensor], target_params: Iterable[th.Tensor], tau: float) -> None:
        """As SB3's ``polyak_update``."""
        polyak_update(params, target_params, tau)


def non_finite(name: str, numbers: str = "") -> NonFiniteLossError:
    """The error for a loss of a name."""
    return NonFiniteLossError(
        f"`{name}` or its gradient is not finite{numbers}. Neither this step nor any after it was taken; those before it "
        "stay. Look for observations or rewards that are not finite, or lower the learning rates."
    )
