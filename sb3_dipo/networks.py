"""Networks: timestep embedding, noise prediction, critic ensemble, initialisation, and MLPs at fixed weights."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_dipo.arithmetic import PLAIN, Arithmetic, Mish, choose_arithmetic, is_traced, on_host

MANY_ELEMENTS = 2**20  # of a table that is worth making in advance
ROWS_AT_ONCE = 32  # products of few different sizes: oneDNN compiles a kernel for each


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


def _is_mish_only(layers: Iterable[nn.Module]) -> bool:
    activations = list(layers)[1::2]
    return len(activations) > 0 and all(isinstance(activation, (Mish, nn.Mish)) for activation in activations)


class BoundMLP:
    """
    An MLP at fixed weights and with a fixed part of its input, for loops in which only x varies: the first layer, which is
    linear, is ``constant + W x`` with W the columns of its weight that belong to x.

    :param layers: of :func:`make_mlp`: linear ones and activations in turn; their parameters take no gradient
    :param on_x: W, (width of the first layer, size of x)
    :param arithmetic: how to compute
    """

    def __init__(self, layers: nn.Sequential, on_x: th.Tensor, arithmetic: Arithmetic):
        self.arithmetic = arithmetic
        self.on_x = on_x.detach().t().contiguous()
        activations = list(layers.children())[1::2]
        self.layers = [
            (layer.weight.detach(), layer.bias.detach()) for layer in list(layers)[2:] if isinstance(layer, nn.Linear)
        ]
        products = [arithmetic.linear(*layer) for layer in self.layers]
        if products:  # the last one is small and keeps full precision
            products[-1] = PLAIN.linear(*self.layers[-1])
        self.is_mish = _is_mish_only(layers.children())
        functions = [arithmetic.mish if isinstance(layer, (Mish, nn.Mish)) else layer for layer in activations]
        self.stages = list(zip(functions, products, strict=True))
        self.products_back = [arithmetic.linear(weight.t(), None) for weight, _ in reversed(self.layers[:-1])]

    def __call__(self, constant: th.Tensor, x: th.Tensor, pre_activations: list[th.Tensor] | None = None) -> th.Tensor:
        """
        The output (batch_size, output_dim).

        :param constant: what the rest of the input, and the bias, add to the first layer, (batch_size, its width)
        :param x: (batch_size, size of x)
        :param pre_activations: what comes before each activation is appended to it, for :meth:`backward`
        """
        x = th.addmm(constant, x, self.on_x)
        for activation, product in self.stages:
            if pre_activations is not None:
                pre_activations.append(x)
            x = product(activation(x))
        return x

    def backward(self, grad_output: th.Tensor, pre_activations: list[th.Tensor]) -> th.Tensor:
        """
        The gradient at x, for Mish and one output.

        :param grad_output: at the output, (batch_size, 1)
        :param pre_activations: as left by the call, (batch_size, width) each
        :return: (batch_size, size of x)
        """
        gradient = grad_output * self.layers[-1][0]  # output_dim is 1
        for product, pre_activation in zip([None, *self.products_back], reversed(pre_activations), strict=True):
            gradient = self.arithmetic.mish_backward(gradient if product is None else product(gradient), pre_activation)
        return F.linear(gradient, self.on_x)


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

    accelerate = "auto"
    """How to compute, see :func:`sb3_dipo.arithmetic.choose_arithmetic`."""

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
        arithmetic = choose_arithmetic(features, self.accelerate)
        return arithmetic.run(self.layers, th.cat([noisy_actions, self.embed(timesteps), features], dim=1))

    def bind(self, features: th.Tensor, timesteps: th.Tensor, arithmetic: Arithmetic = PLAIN) -> "BoundNoisePrediction":
        """
        The same function for one reverse process, whose states and time grid are fixed. The parameters take no gradient.

        :param features: of the states, (batch_size, features_dim)
        :param timesteps: the grid, int64, (number of steps,)
        :param arithmetic: how to compute
        """
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        on_action, on_time, on_state = first.weight.split(self.splits, dim=1)
        of_state = F.linear(features, on_state, first.bias)
        of_time = F.linear(self.embed(timesteps), on_time)
        return BoundNoisePrediction(BoundMLP(self.layers, on_action, arithmetic), of_state, of_time)


class BoundNoisePrediction:
    """
    eps(a_k, s, k) at fixed states and time grid: their part of the first layer is computed once for the whole loop; only the
    action's columns remain in it.

    :param mlp: the layers
    :param of_state: what the states and the bias add to the first one, (batch_size, its width)
    :param of_time: what the timesteps add, (number of steps, its width)
    """

    def __init__(self, mlp: BoundMLP, of_state: th.Tensor, of_time: th.Tensor):
        self.mlp = mlp
        self.of_state = of_state
        self.of_time = of_time.unbind()
        self.constants: th.Tensor | None = None
        # (number of steps, batch_size, width), where that saves more time than it takes memory
        if not is_traced() and len(of_time) * of_state.numel() <= MANY_ELEMENTS:
            self.constants = of_state + of_time.unsqueeze(1)
            self._each = self.constants.unbind()

    def __call__(self, noisy_actions: th.Tensor, step: int) -> th.Tensor:
        """
        Predict the noise.

        :param noisy_actions: (batch_size, action_dim)
        :param step: the number of the step, counted from 0 in order of use
        :return: (batch_size, action_dim)
        """
        constant = self.of_state + self.of_time[step] if self.constants is None else self._each[step]
        return self.mlp(constant, noisy_actions)


class CriticEnsemble(ContinuousCritic):
    """
    SB3's ensemble of critics ``qf0``, ``qf1``, ... with the paper's activation and initialisation, and the objective of
    the action gradient. Its features extractor, shared with the actor or not, is always trained by the critic's loss.

    :param args: as ``ContinuousCritic``
    :param inference_dtype: of the products in the action gradient, see :func:`sb3_dipo.arithmetic.choose_arithmetic`
    :param kwargs: as ``ContinuousCritic``
    """

    accelerate = "auto"
    """How to compute, see :func:`sb3_dipo.arithmetic.choose_arithmetic`."""

    def __init__(self, *args: Any, inference_dtype: str = "float32", **kwargs: Any):
        # SB3's flag would stop the critic's gradient at a shared extractor; here it is the actor's that is stopped
        super().__init__(*args, **{**kwargs, "share_features_extractor": False})
        self.inference_dtype = inference_dtype
        for q_network in self.q_networks:
            q_network.apply(init_weights)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """All Q_i(s, a): observations and actions (batch_size, action_dim) to (batch_size, 1) each."""
        x = th.cat([self.extract_features(obs, self.features_extractor), actions], dim=1)
        arithmetic = choose_arithmetic(x, self.accelerate)
        return tuple(arithmetic.run(q_network.children(), x) for q_network in self.q_networks)

    def min_q(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """min_i Q_i(s, a): observations and actions (batch_size, action_dim) to (batch_size, 1)."""
        if not th.is_grad_enabled():
            return self.bind(observations)(actions)
        return th.cat(self(observations, actions), dim=1).min(dim=1, keepdim=True)[0]

    def bind(self, observations: PyTorchObs) -> Callable[[th.Tensor], th.Tensor]:
        """
        min_i Q_i(s, .) at fixed states, as a function of actions that :func:`sb3_dipo.action_gradient.improve_actions`
        climbs. Features, and their part of the first layers, are computed here once; they and the parameters take no
        gradient.

        :param observations: a batch of observations
        :return: from actions (batch_size, action_dim) to (batch_size, 1)
        """
        critics = []
        with th.no_grad():
            features = self.extract_features(observations, self.features_extractor)
            by_hand = self.accelerate != "off" and all(_is_mish_only(q_network.children()) for q_network in self.q_networks)
            # the operators of the others are not differentiable
            arithmetic = choose_arithmetic(features, self.accelerate, self.inference_dtype) if by_hand else PLAIN
            for q_network in self.q_networks:
                assert isinstance(q_network, nn.Sequential)
                first = q_network[0]
                assert isinstance(first, nn.Linear)
                on_state, on_action = first.weight.split([features.shape[1], first.in_features - features.shape[1]], dim=1)
                mlp = BoundMLP(q_network, on_action, arithmetic)
                critics.append((mlp, F.linear(features, on_state, first.bias)))

        def q_fn(actions: th.Tensor) -> th.Tensor:
            if by_hand and actions.requires_grad and th.is_grad_enabled():
                return _MinQ.apply(actions, critics)
            return th.cat([mlp(of_state, actions) for mlp, of_state in critics], dim=1).min(dim=1, keepdim=True)[0]

        return q_fn


class _MinQ(th.autograd.Function):
    """min_i Q_i(s, a), differentiable in a: the gradient of each row passes through its smallest critic alone."""

    @staticmethod
    def forward(ctx: Any, actions: th.Tensor, critics: list[tuple[BoundMLP, th.Tensor]]) -> th.Tensor:
        ctx.passes = [(mlp, []) for mlp, _ in critics]
        q_values = [mlp(of_state, actions, kept) for (mlp, of_state), (_, kept) in zip(critics, ctx.passes, strict=True)]
        min_q_values, ctx.smallest = th.cat(q_values, dim=1).min(dim=1, keepdim=True)
        return min_q_values

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor, None]:
        gradients = []
        for i, (mlp, kept) in enumerate(ctx.passes):
            mine = ctx.smallest == i
            if not on_host(grad_output):
                gradients.append(mlp.backward(grad_output * mine, kept))
                continue
            rows = mine.flatten().nonzero().flatten()
            some = F.pad(rows, (0, -len(rows) % ROWS_AT_ONCE))
            gradient = mlp.backward(grad_output.index_select(0, some), [each.index_select(0, some) for each in kept])
            whole = gradient.new_zeros(len(grad_output), gradient.shape[1])
            gradients.append(whole.index_copy_(0, rows, gradient[: len(rows)]))
        return th.stack(gradients).sum(dim=0), None
