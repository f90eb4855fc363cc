"""
Critics: what says how good an action is.

All share one contract, :class:`Critic`: ``critic(obs, actions)``, ``next_value(obs, actions)`` for TD targets,
``loss(obs, actions, targets)``, and ``objective(obs)``, which the action gradient climbs. :class:`EnsembleCritic` is the
paper's; :class:`QuantileCritic` is TQC's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_dipo.checks import check_bool, check_int
from sb3_dipo.networks import UsesOps, average, init_weights, smallest


class Critic(UsesOps, BaseModel, ABC):
    """
    Values of actions in states. A class of your own can be given as ``policy_kwargs=dict(critic=MyCritic)``.

    :param observation_space: observation space
    :param action_space: action space, a Box
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation after each of them
    :param features_extractor: network that makes features of observations; the critic's loss trains it
    :param features_dim: number of features
    :param normalize_images: whether to divide images by 255
    """

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer
    options: ClassVar[tuple[str, ...]] = ()
    """The critic's own arguments: what ``policy_kwargs`` may set."""

    q_value: th.Tensor
    """The mean of the values that the last :meth:`loss` was made from, a scalar without gradient: ``train/q_value``."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        normalize_images: bool = True,
    ):
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.features_dim = features_dim
        self.action_dim = get_action_dim(action_space)

    @abstractmethod
    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> Any:
        """
        What the critic knows of the value of actions, with gradients.

        :param obs: observations, batch_size first
        :param actions: (batch_size, action_dim)
        """

    @abstractmethod
    def next_value(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        What a TD target bootstraps from, without gradient. Called of the target critic.

        :param obs: observations, batch_size first
        :param actions: (batch_size, action_dim)
        :return: (batch_size, number of values); the targets that :meth:`loss` is given have the same shape
        """

    @abstractmethod
    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        How far the critic is from TD targets.

        :param obs: observations, batch_size first
        :param actions: the actions taken, (batch_size, action_dim)
        :param targets: rewards and discounted next values, (batch_size, number of values)
        :return: the loss, a scalar
        """

    @abstractmethod
    def objective(self, obs: PyTorchObs) -> Callable[[th.Tensor], th.Tensor]:
        """
        What :func:`sb3_dipo.improve_actions` climbs, and by which the best of several actions is chosen, at fixed states,
        whose features are computed once and take no gradient.

        :param obs: observations, batch_size first
        :return: from actions (batch_size, action_dim) to values (batch_size, 1), differentiable in the actions
        """

    def _make_q_networks(self, n_critics: int, output_dim: int, layer_norm: bool) -> list[nn.Sequential]:
        """MLPs on [features, action], by SB3's names."""
        norms: list[type[nn.Module]] = [nn.LayerNorm] if layer_norm else []
        sizes = (self.features_dim + self.action_dim, output_dim, self.net_arch, self.activation_fn)
        q_networks = [nn.Sequential(*create_mlp(*sizes, post_linear_modules=norms)) for _ in range(n_critics)]
        for i, q_network in enumerate(q_networks):
            self.add_module(f"qf{i}", q_network.apply(init_weights))
        return q_networks

    def _fixed_features(self, obs: PyTorchObs) -> th.Tensor:
        with th.no_grad():
            return self.extract_features(obs, self.features_extractor)


class EnsembleCritic(Critic):
    """
    The paper's: several Q functions, of which the smallest counts (clipped double Q-learning, Fujimoto et al. 2018).

    :param args: as :class:`Critic`
    :param n_critics: number of Q functions, at least 1; the paper's 2
    :param layer_norm: whether a LayerNorm stands between each hidden layer and its activation; the paper has none
    :param kwargs: as :class:`Critic`
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    options = ("n_critics", "layer_norm")

    def __init__(self, *args: Any, n_critics: int = 2, layer_norm: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n_critics = check_int("n_critics", n_critics, 1)
        self.layer_norm = check_bool("layer_norm", layer_norm)
        self.q_networks = self._make_q_networks(self.n_critics, 1, self.layer_norm)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """All Q_i(s, a): observations and actions (batch_size, action_dim) to (batch_size, 1) each."""
        x = th.cat([self.extract_features(obs, self.features_extractor), actions], dim=1)
        return self.ops.mlps(self.q_networks, x).unbind(dim=1)

    def next_value(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """min_i Q_i(s, a): observations and actions (batch_size, action_dim) to (batch_size, 1), without gradient."""
        with th.no_grad():
            return smallest(th.cat(self(obs, actions), dim=1))

    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        sum_i mean (Q_i(s, a) - y)^2, Algorithm 3.

        :param obs: observations, batch_size first
        :param actions: the actions taken, (batch_size, action_dim)
        :param targets: y, (batch_size, 1)
        :return: the loss, a scalar
        """
        q_values = self(obs, actions)
        self.q_value = th.cat(q_values, dim=1).detach().mean()
        return th.stack([F.mse_loss(each, targets) for each in q_values]).sum()

    def objective(self, obs: PyTorchObs) -> Callable[[th.Tensor], th.Tensor]:
        """min_i Q_i(s, .), equation (15); see :meth:`sb3_dipo.critics.Critic.objective`."""
        return self.ops.objective(self.q_networks, self._fixed_features(obs), smallest)


class QuantileCritic(Critic):
    """
    TQC's: each network predicts quantiles of the return's distribution, and targets leave out the largest of all of them
    together (Kuznetsov et al. 2020, arXiv 2005.04269).

    :param args: as :class:`Critic`
    :param n_critics: number of networks, at least 1; TQC's 2 in sb3-contrib
    :param n_quantiles: quantiles of each, at least 1; TQC's 25
    :param top_quantiles_to_drop_per_net: how many of the largest are left out of targets, for each network, less than
        ``n_quantiles``; TQC's 2
    :param layer_norm: whether a LayerNorm stands between each hidden layer and its activation
    :param kwargs: as :class:`Critic`
    :raises ValueError: for a value outside its range, naming the option and what it may be
    """

    options = ("n_critics", "n_quantiles", "top_quantiles_to_drop_per_net", "layer_norm")

    def __init__(
        self,
        *args: Any,
        n_critics: int = 2,
        n_quantiles: int = 25,
        top_quantiles_to_drop_per_net: int = 2,
        layer_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.n_critics = check_int("n_critics", n_critics, 1)
        self.n_quantiles = check_int("n_quantiles", n_quantiles, 1)
        dropped = check_int("top_quantiles_to_drop_per_net", top_quantiles_to_drop_per_net, 0)
        if dropped >= self.n_quantiles:
            raise ValueError(
                f"`top_quantiles_to_drop_per_net` must be less than `n_quantiles` = {n_quantiles}, not {dropped}."
            )
        self.top_quantiles_to_drop_per_net = dropped
        self.layer_norm = check_bool("layer_norm", layer_norm)
        self.q_networks = self._make_q_networks(self.n_critics, self.n_quantiles, self.layer_norm)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """All quantiles: observations and actions (batch_size, action_dim) to (batch_size, n_critics, n_quantiles)."""
        x = th.cat([self.extract_features(obs, self.features_extractor), actions], dim=1)
        return self.ops.mlps(self.q_networks, x)

    def next_value(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        The sorted mixture of all networks' quantiles without the largest, without gradient.

        :param obs: observations, batch_size first
        :param actions: (batch_size, action_dim)
        :return: (batch_size, n_critics * (n_quantiles - top_quantiles_to_drop_per_net))
        """
        with th.no_grad():
            mixture = self.ops.sort(self(obs, actions).flatten(1))
        return mixture[:, : self.n_critics * (self.n_quantiles - self.top_quantiles_to_drop_per_net)]

    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        The quantile Huber loss between each network's quantiles and all targets, as in TQC.

        :param obs: observations, batch_size first
        :param actions: the actions taken, (batch_size, action_dim)
        :param targets: (batch_size, number of target quantiles)
        :return: the loss, a scalar
        """
        quantiles = self(obs, actions)
        self.q_value = quantiles.detach().mean()
        return self.ops.quantile_huber_loss(quantiles, targets)

    def objective(self, obs: PyTorchObs) -> Callable[[th.Tensor], th.Tensor]:
        """The mean over networks and quantiles; see :meth:`sb3_dipo.critics.Critic.objective`."""
        return self.ops.objective(self.q_networks, self._fixed_features(obs), average)


CRITICS: dict[str, type[Critic]] = {"ensemble": EnsembleCritic, "quantile": QuantileCritic}
