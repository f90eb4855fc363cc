"""Networks: Mish, timestep embedding, noise prediction, critic ensemble, initialisation."""

import math
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F


def _mish(x: th.Tensor) -> th.Tensor:
    # tanh(log(1 + e^x)) = n / (n + 2) with n = e^2 + 2 e, e = e^x; beyond x = 20 it is 1 in float32
    e = x.clamp(max=20.0).exp_()
    n = (e + 2.0).mul_(e)
    return n.div_(n + 2.0).mul_(x)


class _FastMish(th.autograd.Function):
    """Mish with a hand-written backward: ATen's is not vectorised on the CPU (5 times slower)."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(x)
        return _mish(x)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> th.Tensor:
        # y = x - x / w with w = 1 + e + e^2 / 2:  y' = 1 - 1 / w + x (e + e^2) / w^2
        (x,) = ctx.saved_tensors
        clamped = x.clamp(max=20.0)
        e = clamped.exp()
        w = (e * 0.5).add_(1.0).mul_(e).add_(1.0).reciprocal_()
        slope = e.addcmul_(e, e).mul_(clamped).mul_(w).sub_(1.0).mul_(w).add_(1.0)
        return slope.mul_(grad_output)


def mish(x: th.Tensor) -> th.Tensor:
    """
    Mish, x tanh(log(1 + e^x)) (Misra 2019), equal to ``torch.nn.functional.mish`` to float32 rounding and several times
    faster on the CPU. On other devices, for other types than float32, and for tracing it is ``torch.nn.functional.mish``.

    :param x: any shape
    :return: the same shape
    """
    if x.device.type != "cpu" or x.dtype != th.float32 or th.jit.is_tracing():
        return F.mish(x)
    return _FastMish.apply(x) if th.is_grad_enabled() and x.requires_grad else _mish(x)


class Mish(nn.Module):
    """:func:`mish` as a module, the default ``activation_fn``."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Any shape in, the same shape out."""
        return mish(x)


def init_weights(module: nn.Module) -> None:
    """
    Initialise a linear layer as the paper does: weights normal with std 1 / (2 sqrt(fan_in)), truncated at two std;
    biases zero. For ``module.apply``; other layers are left alone.
    """
    if isinstance(module, nn.Linear):
        std = 1 / (2 * math.sqrt(module.in_features))
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_mlp(input_dim: int, output_dim: int, net_arch: list[int], activation_fn: type[nn.Module]) -> nn.Sequential:
    """SB3's ``create_mlp`` with the paper's initialisation: (batch_size, input_dim) -> (batch_size, output_dim), or, if
    ``output_dim`` is -1, no output layer."""
    return nn.Sequential(*create_mlp(input_dim, output_dim, net_arch, activation_fn)).apply(init_weights)


def timestep_embedding(timesteps: th.Tensor, dim: int) -> th.Tensor:
    """
    Sinusoidal embedding (Vaswani et al. 2017): sines, then cosines, of ``timesteps * exp(-log(10000) i / (dim/2 - 1))``.

    :param timesteps: counted from 0, (batch_size,)
    :param dim: even, at least 4
    :return: (batch_size, dim)
    """
    half = dim // 2
    frequencies = th.exp(th.arange(half, device=timesteps.device) * (-math.log(10000) / (half - 1)))
    angles = timesteps.float().unsqueeze(1) * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=1)


class NoisePredictionNetwork(nn.Module):
    """
    eps(a_k, s, k): an MLP on [noisy action, timestep embedding, features], after the authors' code.

    :param action_dim: p
    :param features_dim: size of the state's features
    :param net_arch: widths of the hidden layers
    :param activation_fn: activation after each of them
    :param time_embed_dim: size of the timestep embedding, which passes Linear - activation - Linear first
    """

    def __init__(
        self, action_dim: int, features_dim: int, net_arch: list[int], activation_fn: type[nn.Module], time_embed_dim: int
    ):
        super().__init__()
        self.splits = [action_dim, time_embed_dim, features_dim]
        time_width = net_arch[0] if net_arch else time_embed_dim
        self.time_embed_dim = time_embed_dim
        self.time_mlp = make_mlp(time_embed_dim, time_embed_dim, [time_width], activation_fn)
        self.layers = make_mlp(sum(self.splits), action_dim, net_arch, activation_fn)

    def embed(self, timesteps: th.Tensor) -> th.Tensor:
        """Timesteps (batch_size,) to their learned embedding (batch_size, time_embed_dim)."""
        return self.time_mlp(timestep_embedding(timesteps, self.time_embed_dim))

    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, features: th.Tensor) -> th.Tensor:
        """
        Predict the noise in noisy actions.

        :param noisy_actions: (batch_size, action_dim)
        :param timesteps: counted from 0, int64, (batch_size,)
        :param features: of the states, (batch_size, features_dim)
        :return: (batch_size, action_dim)
        """
        return self.layers(th.cat([noisy_actions, self.embed(timesteps), features], dim=1))

    def bind(self, features: th.Tensor, timesteps: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        The same function for one reverse process: states and time grid are fixed, so their part of the first layer,
        which is linear, is computed here once; only the action's columns remain in the loop.

        :param features: of the states, (batch_size, features_dim)
        :param timesteps: the grid, int64, (number of steps,)
        :return: from noisy actions (batch_size, action_dim) and the number of the step to the noise in them
        """
        first, rest = self.layers[0], self.layers[1:]
        assert isinstance(first, nn.Linear)
        on_action, on_time, on_state = first.weight.split(self.splits, dim=1)
        of_state = F.linear(features, on_state, first.bias)
        of_time = F.linear(self.embed(timesteps), on_time)
        on_action = on_action.t()

        def predict_noise(noisy_actions: th.Tensor, step: int) -> th.Tensor:
            return rest(th.addmm(of_state + of_time[step], noisy_actions, on_action))

        return predict_noise


class CriticEnsemble(ContinuousCritic):
    """
    SB3's ensemble of critics ``qf0``, ``qf1``, ... with the paper's activation and initialisation, and the objective of
    the action gradient. Its features extractor, shared with the actor or not, is always trained by the critic's loss.

    :param args: as ``ContinuousCritic``
    :param kwargs: as ``ContinuousCritic``
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # SB3's flag would stop the critic's gradient at a shared extractor; here it is the actor's that is stopped
        super().__init__(*args, **{**kwargs, "share_features_extractor": False})
        for q_network in self.q_networks:
            q_network.apply(init_weights)

    def min_q(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """min_i Q_i(s, a): observations and actions (batch_size, action_dim) to (batch_size, 1)."""
        return th.cat(self(observations, actions), dim=1).min(dim=1, keepdim=True)[0]

    def bind(self, observations: PyTorchObs) -> Callable[[th.Tensor], th.Tensor]:
        """
        min_i Q_i(s, .) at fixed states, as a function of actions that :func:`sb3_dipo.action_gradient.improve_actions`
        climbs. Features, and their part of the first layers, are computed here once and take no gradient.

        :param observations: a batch of observations
        :return: from actions (batch_size, action_dim) to (batch_size, 1)
        """
        with th.no_grad():
            features = self.extract_features(observations, self.features_extractor)
            bound = []
            for q_network in self.q_networks:
                assert isinstance(q_network, nn.Sequential)
                first = q_network[0]
                assert isinstance(first, nn.Linear)
                on_state, on_action = first.weight.split([features.shape[1], first.in_features - features.shape[1]], dim=1)
                bound.append((F.linear(features, on_state, first.bias), on_action.t(), q_network[1:]))

        def q_fn(actions: th.Tensor) -> th.Tensor:
            q_values = [rest(th.addmm(of_state, actions, on_action)) for of_state, on_action, rest in bound]
            return th.cat(q_values, dim=1).min(dim=1, keepdim=True)[0]

        return q_fn
