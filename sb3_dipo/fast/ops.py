"""
How actors and critics compute in less time: MLPs whose every module is known.

On a CPU with a C++ compiler the kernel computes them, see :mod:`sb3_dipo.fast.kernels`, and on NVIDIA's GPUs those of
:mod:`sb3_dipo.fast.triton_kernels` do. Elsewhere operators of PyTorch do: the
first layer's part that does not change along a reverse process or an action gradient is computed once; products go to
the fastest library that PyTorch has; Mish is computed from one exponential; gradients are computed by hand. What is not
known, or is asked for in a way that is not, is computed by :class:`~sb3_dipo.networks.Ops`, which calls the modules.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dipo.action_gradient import ADAM_BETAS, ADAM_EPS
from sb3_dipo.diffusion.process import noise_scales, sample
from sb3_dipo.diffusion.solvers import SolverTable
from sb3_dipo.fast.kernels import Kernels, coefficients
from sb3_dipo.fast.layers import Layer, is_known, is_ordinary, known_layers, known_mlps
from sb3_dipo.fast.trees import map_tensors
from sb3_dipo.networks import PLAIN, NoisePredictionNetwork, Ops, average, smallest, timestep_embedding

if TYPE_CHECKING:
    from sb3_dipo.fast.triton_kernels import TritonKernels

Function = Callable[[th.Tensor], th.Tensor]

FEW_ROWS = 16  # of a batch: below, an operator costs its call, and PyTorch's single ones are the fastest
MANY_WEIGHTS = 2**14  # of a layer: below, oneDNN is not faster
MANY_ELEMENTS = 2**20  # of a table that is worth making in advance
ROWS_AT_ONCE = 32  # products of few different sizes: oneDNN compiles a kernel for each
MAX_TABLES = 8  # whose constants are kept


# ------------------------------------------------------------------------------------------------- Mish and products


def mish(x: th.Tensor) -> th.Tensor:
    """Mish, x tanh(log(1 + e^x)) (Misra 2019), several times as fast as ``F.mish`` on the CPU for many elements."""
    # tanh(log(1 + e^x)) = n / (2 - n), n = s (2 - s), s the sigmoid: nothing overflows, nothing cancels
    s = x.sigmoid()
    n = (2 - s).mul_(s)
    return n.div_(2 - n).mul_(x)


def mish_backward(grad_output: th.Tensor, x: th.Tensor) -> th.Tensor:
    """
    The gradient at Mish's input.

    :param grad_output: the gradient at its output, any shape
    :param x: its input, the same shape
    """
    # y = x t with t = n / (2 - n):  y' = t + x s (2 (1 - s) / (2 - n))^2
    s = x.sigmoid()
    n = (2 - s).mul_(s)
    d = 2 - n
    slope = n.div_(d).addcmul_(s * x, th.rsub(s, 2, alpha=2).div_(d).square_())
    return slope.mul_(grad_output)


def linear(weight: th.Tensor, bias: th.Tensor | None) -> Function:
    """The product of a layer, (batch_size, in) -> (batch_size, out), as PyTorch computes it."""
    return functools.partial(F.linear, weight=weight, bias=bias)


def onednn_linear(weight: th.Tensor, bias: th.Tensor | None) -> Function:
    """oneDNN's float32 product, which PyTorch's compiler uses."""
    product = th.ops.mkldnn._linear_pointwise
    return lambda x: product(x, weight, bias, "none", [], "")


@functools.cache
def has_onednn() -> bool:
    """Whether PyTorch has oneDNN's product; its operator is not public: it may go, or change."""
    if not th.backends.mkldnn.is_available():
        return False
    ones = functools.partial(th.ones, dtype=th.float32, device="cpu")
    try:
        return bool((onednn_linear(ones(3, 2), ones(3))(ones(4, 2)) == 3).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def bfloat16_linear(product: Callable[..., Function], weight: th.Tensor, bias: th.Tensor | None) -> Function:
    """A product both of whose sides are rounded to bfloat16."""
    rounded = product(weight.bfloat16(), None if bias is None else bias.bfloat16())
    return lambda x: rounded(x.bfloat16()).float()


class Arithmetic(NamedTuple):
    """Mish, its gradient and products: three ways to compute one thing, for a batch of some size."""

    mish: Function
    mish_backward: Callable[[th.Tensor, th.Tensor], th.Tensor]
    linear: Callable[[th.Tensor, th.Tensor | None], Function]


SINGLE = Arithmetic(F.mish, th.ops.aten.mish_backward, linear)
"""PyTorch's own operators, one by one."""


class BoundMLP:
    """
    An MLP at fixed weights and with a fixed part of its input, for loops in which only x varies: the first layer, which is
    linear, is ``constant + W x`` with W the columns of its weight that belong to x.

    :param layers: of :func:`known_layers`
    :param on_x: W, (width of the first layer, size of x)
    :param arithmetic: how to compute; the last layer, which is small, keeps full precision
    :param differentiable: whether :meth:`backward` will be called
    """

    def __init__(self, layers: Sequence[Layer], on_x: th.Tensor, arithmetic: Arithmetic, differentiable: bool = False):
        self.arithmetic = arithmetic
        self.on_x = on_x.detach().t().contiguous()
        self.hidden = layers[:-1]
        self.layers = [(weight.detach(), bias.detach()) for weight, bias, *_ in layers[1:]]
        self.products = [arithmetic.linear(*layer) for layer in self.layers]
        if self.products:
            self.products[-1] = linear(*self.layers[-1])
        backward = self.layers[-2::-1] if differentiable else []
        self.products_back = [arithmetic.linear(weight.t(), None) for weight, _ in backward]

    def __call__(self, constant: th.Tensor, x: th.Tensor, kept: list[Any] | None = None) -> th.Tensor:
        """
        The output, (batch_size, output_dim).

        :param constant: what the rest of the input, and the bias, add to the first layer, (batch_size, its width)
        :param x: (batch_size, size of x)
        :param kept: what :meth:`backward` needs is appended to it: for each hidden layer what comes before its activation,
            (batch_size, width), and what its LayerNorm has kept
        """
        x = th.addmm(constant, x, self.on_x)
        for layer, product in zip(self.hidden, self.products, strict=True):
            x, of_norm = layer.normalise(x)
            if kept is not None:
                kept.append((x, of_norm))
            x = product(self.arithmetic.mish(x))
        return x

    def backward(self, grad_output: th.Tensor, kept: list[Any]) -> th.Tensor:
        """
        The gradient at x.

        :param grad_output: at the output, (batch_size, output_dim)
        :param kept: as left by the call
        :return: (batch_size, size of x)
        """
        gradient = grad_output @ self.layers[-1][0] if self.layers else grad_output
        products = [None, *self.products_back]
        for layer, product, (x, of_norm) in zip(reversed(self.hidden), products, reversed(kept), strict=False):
            gradient = self.arithmetic.mish_backward(gradient if product is None else product(gradient), x)
            gradient = layer.normalise_backward(gradient, of_norm)[0]
        return F.linear(gradient, self.on_x)


# ------------------------------------------------------------------------------------------------- training steps


class _MLP(th.autograd.Function):
    """An MLP whose backward pass is computed by hand, or, where it must be differentiable itself, by PyTorch."""

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, layers: list[Layer], x: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        ctx.arithmetic, ctx.mlps, ctx.kept = arithmetic, [layers], []
        ctx.save_for_backward(x, *parameters)
        for i, layer in enumerate(layers):
            product = _product(arithmetic, layer.weight, layer.bias)(x)
            if i == len(layers) - 1:
                ctx.kept.append((x, None, ()))
                return product
            pre_activation, of_norm = layer.normalise(product)
            ctx.kept.append((x, pre_activation, of_norm))
            x = arithmetic.mish(pre_activation)
        raise AssertionError("an MLP has a layer")

    @staticmethod
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors  # reading them raises an error if they were changed in the meantime
        if th.is_grad_enabled() or not is_ordinary(grad_output):
            return None, None, *_differentiable_gradients(ctx, inputs, grad_output)
        needed, (layers,) = iter(ctx.needs_input_grad[2:]), ctx.mlps
        of_x = next(needed)
        of_layers = [[next(needed) for _ in layer.parameters()] for layer in layers]
        gradient, gradients = grad_output.contiguous(), list[th.Tensor | None]()
        for i in reversed(range(len(layers))):
            layer, (x, pre_activation, of_norm), wanted = layers[i], ctx.kept[i], of_layers[i]
            found: list[th.Tensor | None] = []
            if pre_activation is not None:
                gradient = ctx.arithmetic.mish_backward(gradient, pre_activation)
                gradient, *found = layer.normalise_backward(gradient, of_norm, (True, *(wanted[2:] or (False, False))))
            of_weight = _product(ctx.arithmetic, x.t(), None)(gradient.t()) if wanted[0] else None
            gradients = [of_weight, gradient.sum(dim=0) if wanted[1] else None, *found[: len(wanted) - 2], *gradients]
            if i > 0 or of_x:
                gradient = _product(ctx.arithmetic, layer.weight.t(), None)(gradient)
        return None, None, gradient if of_x else None, *gradients


class _KernelMLPs(th.autograd.Function):
    """Several MLPs on the same input, as :class:`_MLP`, by the kernel: (batch_size, number of MLPs, out)."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, mlps: list[list[Layer]], x: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        ctx.kernels, ctx.mlps = kernels, mlps
        y, ctx.kept = kernels.forward(mlps, x, keep=True)
        ctx.save_for_backward(x, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors  # reading them raises an error if they were changed in the meantime
        if th.is_grad_enabled() or not is_ordinary(grad_output, *inputs):
            return None, None, *_differentiable_gradients(ctx, inputs, grad_output)
        x, *parameters = inputs
        own = iter(parameters)
        mlps = [[layer.with_parameters(own) for layer in layers] for layers in ctx.mlps]
        _, _, of_x, *of_parameters = ctx.needs_input_grad
        return None, None, *ctx.kernels.backward(mlps, x, ctx.kept, grad_output, of_x, of_parameters)


class _QuantileHuberLoss(th.autograd.Function):
    """The kernel's, which computes the gradient together with the loss."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, quantiles: th.Tensor, targets: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(quantiles, targets)
        loss, ctx.slopes = kernels.quantile_huber_loss(quantiles, targets)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[Any, ...]:
        again = th.is_grad_enabled()
        if not again and is_ordinary(grad_output):
            return None, ctx.slopes * grad_output, None
        quantiles, targets = ctx.saved_tensors
        with th.enable_grad(), th.autocast(quantiles.device.type, enabled=False):
            loss = PLAIN.quantile_huber_loss(quantiles, targets)
            return None, *th.autograd.grad(loss, quantiles, grad_output.to(loss.dtype), create_graph=again), None


def _product(arithmetic: Arithmetic, weight: th.Tensor, bias: th.Tensor | None) -> Function:
    return (arithmetic.linear if weight.numel() >= MANY_WEIGHTS else linear)(weight, bias)


def _differentiable_gradients(ctx: Any, inputs: Sequence[th.Tensor], grad_output: th.Tensor) -> list[th.Tensor | None]:
    again = th.is_grad_enabled()
    with th.enable_grad(), th.autocast(inputs[0].device.type, enabled=False):
        # each by itself: a parameter of two layers gets the gradient of each, and autograd adds them
        inputs = [each.view_as(each) for each in inputs]
        parameters = iter(inputs[1:])
        y = th.stack([_by_modules(layers, inputs[0], parameters) for layers in ctx.mlps], dim=1).view_as(grad_output)
        wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        found = iter(th.autograd.grad(y, wanted, grad_output.to(y.dtype), create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[2:]]


def _by_modules(layers: Sequence[Layer], x: th.Tensor, parameters: Iterator[th.Tensor]) -> th.Tensor:
    """What the modules of an MLP do, with the next ones of some parameters."""
    for i, each in enumerate(layers):
        layer = each.with_parameters(parameters)
        x = F.linear(x, layer.weight, layer.bias)
        if layer.scale is not None:
            x = F.layer_norm(x, layer.scale.shape, layer.scale, layer.shift, layer.eps)
        x = F.mish(x) if i < len(layers) - 1 else x
    return x


# ------------------------------------------------------------------------------------------------- the interface


class FastOps(Ops):
    """
    Computes what :class:`~sb3_dipo.networks.Ops` computes, in less time where it knows every module.

    :param inference_dtype: ``"bfloat16"`` rounds both sides of the products between hidden layers, in
        :meth:`reverse_process` and the gradients of :meth:`objective`, where the batch is large enough that it pays, and, by
        the kernel, where the processor is faster then
    :param kernels: the device's, or None
    """

    def __init__(self, inference_dtype: str = "float32", kernels: "Kernels | TritonKernels | None" = None):
        self.inference_dtype = inference_dtype
        self.kernels = kernels
        self._constants: dict[tuple[SolverTable, int], tuple[th.Tensor, th.Tensor, th.Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.inference_dtype, self.kernels)

    def arithmetic(self, x: th.Tensor, rounded: bool = False) -> Arithmetic:
        """
        How to compute with a batch by operators.

        :param x: the batch
        :param rounded: whether ``inference_dtype`` counts
        """
        found = SINGLE
        if x.device.type == "cpu" and len(x) >= FEW_ROWS:
            found = Arithmetic(mish, mish_backward, onednn_linear if has_onednn() else linear)
        if rounded and self.inference_dtype == "bfloat16" and len(x) >= FEW_ROWS:
            found = found._replace(linear=functools.partial(bfloat16_linear, found.linear))
        return found

    def kernels_for(self, x: th.Tensor, *mlps: Sequence[Layer], rounded: bool = False) -> Any:
        """
        The kernel, if it can compute these MLPs, or None.

        :param x: a batch that they are called with
        :param mlps: the layers of each
        :param rounded: whether ``inference_dtype`` counts
        """
        here = self.kernels is not None and x.device.type == self.kernels.device_type
        if self.kernels is None or not here or len(x) < self.kernels.fewest_rows or not self.kernels.take(*mlps):
            return None
        round_them = rounded and self.inference_dtype == "bfloat16" and len(x) >= FEW_ROWS
        return self.kernels.rounded(*mlps) if round_them else self.kernels

    def mlp(self, layers: nn.Module, x: th.Tensor) -> th.Tensor:
        """See :meth:`sb3_dipo.networks.Ops.mlp`."""
        y = self._known_mlps([layers], x)
        return super().mlp(layers, x) if y is None else y.flatten(1)

    def mlps(self, networks: Sequence[nn.Module], x: th.Tensor) -> th.Tensor:
        """See :meth:`sb3_dipo.networks.Ops.mlps`."""
        y = self._known_mlps(networks, x)
        return super().mlps(networks, x) if y is None else y

    def _known_mlps(self, networks: Sequence[nn.Module], x: th.Tensor) -> th.Tensor | None:
        """As :meth:`mlps`, or None where they are not known, or are no faster this way."""
        if not is_ordinary(x) or x.device.type != "cpu" or len(x) < FEW_ROWS or x.dim() != 2:
            return None
        mlps = known_mlps(networks, x.device)
        if mlps is None or mlps[0][0].weight.shape[1] != x.shape[1]:
            return None
        kernels = self.kernels_for(x, *mlps)
        if kernels is not None and not th.is_grad_enabled():
            result: th.Tensor = kernels.forward(mlps, x)[0]
            return result
        parameters = [[each for layer in layers for each in layer.parameters()] for layers in mlps]
        if kernels is None:
            arithmetic = self.arithmetic(x)
            return th.stack([_MLP.apply(arithmetic, mlps[i], x, *own) for i, own in enumerate(parameters)], dim=1)
        result = _KernelMLPs.apply(kernels, mlps, x, *(each for own in parameters for each in own))
        return result

    def reverse_process(
        self,
        network: NoisePredictionNetwork,
        table: SolverTable,
        features: th.Tensor,
        initial_noise: th.Tensor,
        noise: th.Tensor | None,
        clip_sample: bool,
    ) -> th.Tensor:
        """See :meth:`sb3_dipo.networks.Ops.reverse_process`."""
        given = (features, initial_noise) if noise is None else (features, initial_noise, noise)
        layers = None
        known = is_known(network, NoisePredictionNetwork) and "embed" not in network.__dict__
        if known and not th.is_grad_enabled() and is_ordinary(*given):
            shape = (features.shape[0], network.splits[0])
            fits = features.shape == (shape[0], network.splits[2]) and initial_noise.shape == shape
            if fits and (noise is None or noise.shape == (len(table.steps), *shape)):
                layers = known_layers(network.layers, features.device)
        if layers is None or (layers[0].weight.shape[1], len(layers[-1].weight)) != (sum(network.splits), network.splits[0]):
            return super().reverse_process(network, table, features, initial_noise, noise, clip_sample)

        times, scales, of_kernel = self._constants_of(table, network.time_embed_dim, features.device)
        embedding = self.mlp(network.time_mlp, times)
        kernels = self.kernels_for(features, layers, rounded=True)
        if kernels is not None:
            return kernels.reverse_process(layers, of_kernel, embedding, features, initial_noise, noise, clip_sample)
        on_action, on_time, on_state = layers[0].weight.split(network.splits, dim=1)
        of_state = F.linear(features, on_state, layers[0].bias)
        of_time = F.linear(embedding, on_time)
        mlp = BoundMLP(layers, on_action, self.arithmetic(features, rounded=True))
        few = len(of_time) * of_state.numel() <= MANY_ELEMENTS  # a table then saves more time than it takes memory
        each = iter((of_state + of_time.unsqueeze(1)).unbind()) if few else (of_state + row for row in of_time)
        return sample(table, lambda x, step: mlp(next(each), x), initial_noise, noise, clip_sample, scales)

    def _constants_of(self, table: SolverTable, dim: int, device: th.device) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Embedded timesteps (without what is learned), noise scales and the kernel's coefficients: a copy from the host has no
        place in a CUDA graph.
        """
        found = self._constants.get((table, dim))
        if found is None or found[0].device != device:
            with th.inference_mode(False):
                times = timestep_embedding(table.timesteps_on(device, th.float32), dim)
                found = times, noise_scales(table, device, th.float32), coefficients(table).to(device)
            self._constants[table, dim] = found
            if len(self._constants) > MAX_TABLES:
                del self._constants[next(iter(self._constants))]
        return found

    def objective(self, q_networks: Sequence[nn.Module], features: th.Tensor, reduce: Callable[[th.Tensor], th.Tensor]) -> Any:
        """See :meth:`sb3_dipo.networks.Ops.objective`."""
        plain = super().objective(q_networks, features, reduce)
        given = (plain, q_networks, features, reduce)
        if reduce not in (smallest, average) or features.requires_grad or features.dim() != 2:
            return plain
        if isinstance(self.kernels, Kernels):
            return KernelObjective(self, *given)
        critics = known_critics(q_networks, features, reduce) if is_ordinary(features) else None
        if critics is None:
            return plain
        if self.kernels_for(features, *critics) is not None:
            return KernelObjective(self, *given)
        return OperatorObjective(critics, self.arithmetic(features), self.arithmetic(features, rounded=True), *given)

    def sort(self, x: th.Tensor) -> th.Tensor:
        """See :meth:`sb3_dipo.networks.Ops.sort`. NumPy sorts short rows many times as fast as PyTorch."""
        if not is_ordinary(x) or not x.is_cpu or x.requires_grad:
            return super().sort(x)
        return th.from_numpy(np.sort(x.resolve_neg().numpy(), axis=1))

    def quantile_huber_loss(self, quantiles: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """See :meth:`sb3_dipo.networks.Ops.quantile_huber_loss`."""
        known = isinstance(self.kernels, Kernels) and is_ordinary(quantiles, targets) and quantiles.device.type == "cpu"
        fits = known and quantiles.dim() == 3 and targets.dim() == 2 and len(quantiles) == len(targets)
        if not fits or targets.requires_grad:
            return super().quantile_huber_loss(quantiles, targets)
        result: th.Tensor = _QuantileHuberLoss.apply(self.kernels, quantiles, targets)
        return result


# ------------------------------------------------------------------------------------------------- the action gradient


def known_critics(q_networks: Sequence[nn.Module], features: th.Tensor, reduce: Function) -> list[list[Layer]] | None:
    """
    The layers of critics that are all known; else None.

    :param q_networks: the critics' MLPs, each on [features, actions]
    :param features: of the states, (batch_size, features_dim)
    :param reduce: what is made of their outputs side by side; the smallest is known of one for each critic
    """
    found = known_mlps(q_networks, features.device)
    if found is None or found[0][0].weight.shape[1] <= features.shape[1]:
        return None
    return found if reduce is average or len(found[0][-1].weight) == 1 else None


class Objective(ABC):
    """
    The smallest or the mean of the critics' outputs at fixed states, with a gradient computed by hand. What is not known is
    computed by the modules.

    :param plain: the same function by the modules
    :param q_networks: the critics' MLPs, of :func:`known_critics`, on [features, actions]
    :param features: of the states, (batch_size, features_dim)
    :param reduce: :func:`~sb3_dipo.networks.smallest` or :func:`~sb3_dipo.networks.average`
    """

    def __init__(self, plain: Function, q_networks: Sequence[nn.Module], features: th.Tensor, reduce: Function):
        self.plain, self.q_networks, self.features, self.reduce = plain, q_networks, features, reduce
        self.mean = reduce is average

    def known(self, *actions: th.Tensor) -> list[list[Layer]] | None:
        """The critics' layers, if all actions are as many as the states, and dense float32; else None."""
        if not is_ordinary(self.features, *actions):
            return None
        critics = known_critics(self.q_networks, self.features, self.reduce)
        if critics is None:
            return None
        shape = self.features.shape[0], critics[0][0].weight.shape[1] - self.features.shape[1]
        return critics if all(each.shape == shape for each in actions) else None

    def __call__(self, actions: th.Tensor) -> th.Tensor:
        """Actions (batch_size, action_dim) to values (batch_size, 1), differentiable as often as one likes."""
        critics = None if th.is_grad_enabled() else self.known(actions)
        return self.plain(actions) if critics is None else self.values(critics, actions)

    @abstractmethod
    def values(self, critics: list[list[Layer]], actions: th.Tensor) -> th.Tensor:
        """The values at actions, of critics that are known, without gradient."""


class KernelObjective(Objective):
    """
    By the kernel, which also climbs.

    :param ops: whose kernels these are
    :param given: as :class:`Objective`
    """

    def __init__(self, ops: "FastOps", *given: Any):
        super().__init__(*given)
        self.ops = ops

    def known(self, *actions: th.Tensor) -> list[list[Layer]] | None:
        """See :class:`Objective`; and the kernel takes them."""
        critics = super().known(*actions)
        return None if critics is None or self.ops.kernels_for(self.features, *critics) is None else critics

    def values(self, critics: list[list[Layer]], actions: th.Tensor) -> th.Tensor:
        """See :class:`Objective`."""
        values: th.Tensor = self.ops.kernels_for(self.features, *critics).values(critics, self.features, actions, self.mean)
        return values

    def improve(
        self,
        actions: th.Tensor,
        bounds: tuple[th.Tensor, th.Tensor] | None,
        action_lr: float,
        action_gradient_steps: int,
        max_norm: float,
    ) -> th.Tensor | None:
        """
        All steps of :func:`sb3_dipo.improve_actions` in one call.

        :param actions: (batch_size, action_dim)
        :param bounds: the lowest and the highest improved action, (batch_size, action_dim); None is -1 and 1
        :param action_lr: Adam's step size
        :param action_gradient_steps: number of steps
        :param max_norm: largest norm of the batch's gradient
        :return: improved actions, (batch_size, action_dim), or None for actions that are not known
        """
        critics = self.known(actions, *(bounds or ()))
        if critics is None:
            return None
        kernels = self.ops.kernels_for(self.features, *critics, rounded=True)
        adam = (action_gradient_steps, action_lr, max_norm, ADAM_BETAS, ADAM_EPS)
        improved: th.Tensor = kernels.improve(critics, self.features, actions, self.mean, bounds, *adam)[0]
        return improved


class OperatorObjective(Objective):
    """
    By PyTorch's operators, with what does not change from step to step made in advance. The gradient of the smallest passes
    through each row's smallest critic alone; for the mean of many outputs, the last layers' weights are averaged.

    :param critics: what :func:`known_critics` has found
    :param arithmetic: how to compute values
    :param of_gradient: how to compute gradients
    :param given: as :class:`Objective`
    """

    def __init__(self, critics: list[list[Layer]], arithmetic: Arithmetic, of_gradient: Arithmetic, *given: Any):
        super().__init__(*given)
        self.made_of = self._state_of(critics)
        self.evaluated: list[tuple[BoundMLP, th.Tensor]] = []
        self.climbed: list[tuple[BoundMLP, th.Tensor]] = []
        with th.no_grad():
            for layers in critics:
                if self.mean:
                    *hidden, last = layers
                    layers = [*hidden, Layer(last.weight.mean(dim=0, keepdim=True), last.bias.mean(dim=0, keepdim=True))]
                features_dim = self.features.shape[1]
                on_state, on_action = layers[0].weight.tensor_split([features_dim], dim=1)
                of_state = F.linear(self.features, on_state, layers[0].bias)
                self.climbed.append((BoundMLP(layers, on_action, of_gradient, True), of_state))
                same = of_gradient == arithmetic
                self.evaluated.append(self.climbed[-1] if same else (BoundMLP(layers, on_action, arithmetic), of_state))

    def _state_of(self, critics: list[list[Layer]]) -> Any:
        """What the function is made of."""
        parameters = [each for layers in critics for layer in layers for each in layer.parameters()]
        eps = [layer.eps for layers in critics for layer in layers]
        # tensors that were made in inference mode have no version
        versions = [0 if each.is_inference() else each._version for each in (*parameters, self.features)]
        return eps, versions, [(id(each), each.data_ptr()) for each in (*parameters, self.features)]

    def known(self, *actions: th.Tensor) -> list[list[Layer]] | None:
        """See :class:`Objective`; and critics and states are what they were."""
        critics = super().known(*actions)
        return critics if critics is not None and self._state_of(critics) == self.made_of else None

    def values(self, critics: list[list[Layer]], actions: th.Tensor) -> th.Tensor:
        """See :class:`Objective`."""
        return self.reduce(th.cat([mlp(of_state, actions) for mlp, of_state in self.evaluated], dim=1))

    def gradient(self, actions: th.Tensor) -> th.Tensor:
        """The gradient of the values' sum at actions, (batch_size, action_dim), without one of its own."""
        if self.known(actions) is None:
            with th.enable_grad():
                climber = actions.detach().requires_grad_()
                return th.autograd.grad(self.plain(climber).sum(), climber)[0]
        with th.no_grad():
            passes: list[list[Any]] = [[] for _ in self.climbed]
            pairs = zip(self.climbed, passes, strict=True)
            q_values = th.cat([mlp(of_state, actions, kept) for (mlp, of_state), kept in pairs], dim=1)
            smallest_one = q_values.argmin(dim=1, keepdim=True)
            gradients = []
            for i, ((mlp, _), kept) in enumerate(zip(self.climbed, passes, strict=True)):
                if self.mean:
                    gradients.append(mlp.backward(th.full_like(q_values[:, :1], 1 / len(passes)), kept))
                elif actions.device.type != "cpu" or not kept:  # sizes that depend on values would wait for the device
                    gradients.append(mlp.backward((smallest_one == i).to(actions.dtype), kept))
                else:
                    rows = (smallest_one == i).flatten().nonzero().flatten()
                    if len(rows) == 0:
                        continue
                    some = F.pad(rows, (0, -len(rows) % ROWS_AT_ONCE))
                    chosen = map_tensors(lambda each, some=some: each.index_select(0, some), tuple(kept))
                    gradient = mlp.backward(actions.new_ones(len(some), 1), chosen)
                    whole = gradient.new_zeros(len(actions), gradient.shape[1])
                    gradients.append(whole.index_copy_(0, rows, gradient[: len(rows)]))
            return th.stack(gradients).sum(dim=0) if len(gradients) > 1 else gradients[0]
