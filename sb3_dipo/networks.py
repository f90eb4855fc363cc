"""Building blocks: initialisation, MLPs, the timestep embedding, noise prediction, and how all of them are computed."""

import math
from collections.abc import Callable, Sequence

import torch as th
from sb3_contrib.common.utils import quantile_huber_loss
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn

from sb3_dipo.diffusion.process import sample
from sb3_dipo.diffusion.solvers import SolverTable


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


def timestep_embedding(timesteps: th.Tensor, dim: int, dtype: th.dtype = th.float32) -> th.Tensor:
    """
    Sinusoidal embedding (Vaswani et al. 2017): sines, then cosines, of ``timesteps * exp(-log(10000) i / (dim/2 - 1))``.

    :param timesteps: counted from 0, (batch_size,)
    :param dim: even, at least 4
    :param dtype: of the embedding
    :return: (batch_size, dim)
    """
    half = dim // 2
    frequencies = th.exp(th.arange(half, device=timesteps.device, dtype=dtype) * (-math.log(10000) / (half - 1)))
    angles = timesteps.to(dtype).unsqueeze(1) * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=1)


class Ops:
    """
    How actors and critics compute. This is the plain path, the reference: it calls their modules. ``sb3_dipo.fast`` has a
    subclass that computes the same in less time where it knows every module, and calls these methods where it does not.
    """

    def mlp(self, layers: nn.Module, x: th.Tensor) -> th.Tensor:
        """
        The output of an MLP, with gradients.

        :param layers: the MLP
        :param x: its input, (batch_size, ...)
        """
        return layers(x)

    def mlps(self, networks: Sequence[nn.Module], x: th.Tensor) -> th.Tensor:
        """
        The outputs of some MLPs on the same input, with gradients.

        :param networks: the MLPs
        :param x: their input, (batch_size, in)
        :return: (batch_size, number of MLPs, out)
        """
        return th.stack([network(x) for network in networks], dim=1)

    def reverse_process(
        self,
        network: "NoisePredictionNetwork",
        table: SolverTable,
        features: th.Tensor,
        initial_noise: th.Tensor,
        noise: th.Tensor | None,
        clip_sample: bool,
    ) -> th.Tensor:
        """
        Sample actions, with gradients: :func:`sb3_dipo.diffusion.process.sample` with a network at fixed states.

        :param network: eps(a_k, s, k)
        :param table: a solver's coefficients on a time grid
        :param features: of the states, (batch_size, features_dim)
        :param initial_noise: a_K, (batch_size, action_dim)
        :param noise: z in order of use, (number of steps, batch_size, action_dim), or None
        :param clip_sample: whether to clip the predicted clean actions to [-1, 1] at every step
        :return: actions in [-1, 1], (batch_size, action_dim)
        """

        def predict_noise(noisy_actions: th.Tensor, step: int) -> th.Tensor:
            timestep = table.timesteps[step]
            dtype = th.int64 if isinstance(timestep, int) else features.dtype
            timesteps = features.new_full((features.shape[0],), timestep, dtype=dtype)
            return network(noisy_actions, timesteps, features)

        return sample(table, predict_noise, initial_noise, noise, clip_sample)

    def objective(
        self, q_networks: Sequence[nn.Module], features: th.Tensor, reduce: Callable[[th.Tensor], th.Tensor]
    ) -> Callable[[th.Tensor], th.Tensor]:
        """
        What the action gradient climbs, as a function of the actions at fixed states.

        :param q_networks: the critics' MLPs, each on [features, actions]
        :param features: of the states, (batch_size, features_dim)
        :param reduce: from the networks' outputs side by side, (batch_size, n), to one value per row, (batch_size, 1):
            :func:`smallest`, :func:`average`, or another
        :return: from actions (batch_size, action_dim) to (batch_size, 1), differentiable
        """

        def q_fn(actions: th.Tensor) -> th.Tensor:
            x = th.cat([features, actions], dim=1)
            return reduce(th.cat([q_network(x) for q_network in q_networks], dim=1))

        return q_fn

    def sort(self, x: th.Tensor) -> th.Tensor:
        """The numbers of each row from the smallest to the largest, (batch_size, n)."""
        return x.sort(dim=1)[0]

    def quantile_huber_loss(self, quantiles: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """
        The mean quantile Huber loss of all pairs, as in TQC.

        :param quantiles: (batch_size, n_critics, n_quantiles)
        :param targets: (batch_size, number of target quantiles)
        :return: a scalar
        """
        return quantile_huber_loss(quantiles, targets.unsqueeze(1), sum_over_quantiles=False)


PLAIN = Ops()


def smallest(q_values: th.Tensor) -> th.Tensor:
    """min_i Q_i: (batch_size, n_critics) to (batch_size, 1)."""
    return q_values.min(dim=1, keepdim=True)[0]


def average(q_values: th.Tensor) -> th.Tensor:
    """The mean of each row: (batch_size, n) to (batch_size, 1)."""
    return q_values.mean(dim=1, keepdim=True)


class UsesOps:
    """A module that computes by ``ops``, which :meth:`sb3_dipo.DIPOPolicy.set_accelerate` sets."""

    ops: Ops = PLAIN


class NoisePredictionNetwork(UsesOps, nn.Module):
    """
    eps(a_k, s, k): an MLP on [noisy action, timestep embedding, features], after the authors' code. For the flow it is the
    velocity v(x_t, s, t).

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

    def embed(self, timesteps: th.Tensor, dtype: th.dtype = th.float32) -> th.Tensor:
        """Timesteps (batch_size,) to their learned embedding (batch_size, time_embed_dim)."""
        return self.ops.mlp(self.time_mlp, timestep_embedding(timesteps, self.time_embed_dim, dtype))

    def forward(self, noisy_actions: th.Tensor, timesteps: th.Tensor, features: th.Tensor) -> th.Tensor:
        """
        Predict the noise in noisy actions.

        :param noisy_actions: (batch_size, action_dim)
        :param timesteps: counted from 0, int64, (batch_size,); of the flow 100 t, floats
        :param features: of the states, (batch_size, features_dim)
        :return: (batch_size, action_dim)
        """
        x = th.cat([noisy_actions, self.embed(timesteps, features.dtype), features], dim=1)
        return self.ops.mlp(self.layers, x)
