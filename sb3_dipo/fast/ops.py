"""
How actors and critics compute in less time: the products and Mish of MLPs whose every module is known.

The first layer's part that does not change along a reverse process or an action gradient is computed once; products go to
the fastest library that PyTorch has; Mish is computed from one exponential; gradients are computed by hand. What is not
known, or is asked for in a way that is not, is computed by :class:`~sb3_dipo.networks.Ops`, which calls the modules.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dipo.diffusion.process import noise_scales, sample
from sb3_dipo.diffusion.solvers import SolverTable
from sb3_dipo.fast.kernels import Kernels, coefficients, load_kernels
from sb3_dipo.networks import NoisePredictionNetwork, Ops, smallest

Function = Callable[[th.Tensor], th.Tensor]
Layer = tuple[th.Tensor, th.Tensor]
"""Weight (out, in) and bias (out,)."""

FEW_ROWS = 16  # of a batch: below, an operator costs its call, and PyTorch's single ones are the fastest
KERNEL_ROWS = 24  # up to which one compiled call beats oneDNN's products
MANY_WEIGHTS = 2**14  # of a layer: below, oneDNN is not faster
MANY_ELEMENTS = 2**20  # of a table that is worth making in advance
ROWS_AT_ONCE = 32  # products of few different sizes: oneDNN compiles a kernel for each
MAX_TABLES = 8  # whose constants are kept


# ------------------------------------------------------------------------------------------------- what is known


def is_ordinary(*tensors: th.Tensor) -> bool:
    """
    Whether operators mean what they say: tensors are dense float32 matrices of one device and at least one row, and nobody
    traces, transforms, intercepts or casts what is computed.
    """
    if th.compiler.is_compiling() or th.jit.is_tracing():  # before any size is read, which would be fixed in the trace
        return False
    device = tensors[0].device
    return (
        device.type in ("cpu", "cuda")
        and not th.is_autocast_enabled(device.type)
        and not th._C._are_functorch_transforms_active()
        and not th.utils._python_dispatch._get_current_dispatch_mode()
        and th.autograd.forward_ad._current_level < 0
        and all(
            type(tensor) in (th.Tensor, nn.Parameter)
            and tensor.dtype == th.float32
            and tensor.layout == th.strided
            and tensor.device == device
            and tensor.numel() > 0
            for tensor in tensors
        )
    )


def is_known(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is calling its class's ``forward`` and nothing else."""
    own = module.__dict__  # __getattr__ of modules is slow
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return type(module) is kind and not hooks and "forward" not in own


def known_layers(mlp: nn.Module, device: th.device) -> list[Layer] | None:
    """
    The layers of an MLP of Linear, Mish, Linear, ..., Linear; None if it is, or does, anything else.

    :param mlp: such as an ``nn.Sequential``
    :param device: where its parameters must be
    """
    if not is_known(mlp, nn.Sequential) or len(mlp._modules) % 2 == 0 or nn.modules.module._has_any_global_hook():
        return None
    layers = []
    for i, module in enumerate(mlp._modules.values()):
        if module is None or not is_known(module, nn.Mish if i % 2 else nn.Linear):
            return None
        if i % 2 == 0:
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            if not (_is_dense(weight, device) and _is_dense(bias, device)):
                return None
            layers.append((weight, bias))
    return layers  # type: ignore[return-value]


def _is_dense(parameter: nn.Parameter | None, device: th.device) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype == th.float32
        and parameter.device == device
        and parameter.is_contiguous()
    )


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
    slope = n.div_(d).addcmul_(s * x, (1 - s).div_(d).square_(), value=4)
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
        self.layers = [(weight.detach(), bias.detach()) for weight, bias in layers[1:]]
        self.products = [arithmetic.linear(*layer) for layer in self.layers]
        if self.products:
            self.products[-1] = linear(*self.layers[-1])
        backward = self.layers[-2::-1] if differentiable else []
        self.products_back = [arithmetic.linear(weight.t(), None) for weight, _ in backward]

    def __call__(self, constant: th.Tensor, x: th.Tensor, pre_activations: list[th.Tensor] | None = None) -> th.Tensor:
        """
        The output, (batch_size, output_dim).

        :param constant: what the rest of the input, and the bias, add to the first layer, (batch_size, its width)
        :param x: (batch_size, size of x)
        :param pre_activations: what comes before each activation is appended to it, for :meth:`backward`
        """
        x = th.addmm(constant, x, self.on_x)
        for product in self.products:
            if pre_activations is not None:
                pre_activations.append(x)
            x = product(self.arithmetic.mish(x))
        return x

    def backward(self, grad_output: th.Tensor, pre_activations: list[th.Tensor]) -> th.Tensor:
        """
        The gradient at x.

        :param grad_output: at the output, (batch_size, output_dim)
        :param pre_activations: as left by the call, (batch_size, width) each
        :return: (batch_size, size of x)
        """
        gradient = grad_output
        if self.layers:
            gradient = grad_output @ self.layers[-1][0]
        for product, pre_activation in zip([None, *self.products_back], reversed(pre_activations), strict=False):
            gradient = self.arithmetic.mish_backward(gradient if product is None else product(gradient), pre_activation)
        return F.linear(gradient, self.on_x)


# ------------------------------------------------------------------------------------------------- training steps


class _MLP(th.autograd.Function):
    """An MLP whose backward pass is computed by hand, or, where it must be differentiable itself, by PyTorch."""

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, x: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        ctx.arithmetic, ctx.inputs, ctx.pre_activations = arithmetic, [], []
        ctx.save_for_backward(x, *parameters)
        for weight, bias in _pairs(parameters):
            if ctx.inputs:
                ctx.pre_activations.append(x)
                x = arithmetic.mish(x)
            ctx.inputs.append(x)
            x = _product(arithmetic, weight, bias)(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[Any, ...]:
        if th.is_grad_enabled():
            return None, *_differentiable_gradients(ctx, grad_output)
        pairs, needed = _pairs(ctx.saved_tensors[1:]), ctx.needs_input_grad[1:]
        gradient, gradients = grad_output.contiguous(), list[th.Tensor | None]()
        for i in reversed(range(len(pairs))):
            if i < len(pairs) - 1:
                gradient = ctx.arithmetic.mish_backward(gradient, ctx.pre_activations[i])
            of_weight = _product(ctx.arithmetic, ctx.inputs[i].t(), None)(gradient.t()) if needed[2 * i + 1] else None
            gradients = [of_weight, gradient.sum(dim=0) if needed[2 * i + 2] else None, *gradients]
            if i > 0 or needed[0]:
                gradient = _product(ctx.arithmetic, pairs[i][0].t(), None)(gradient)
        return None, gradient if needed[0] else None, *gradients


def _pairs(parameters: Sequence[th.Tensor]) -> list[Layer]:
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def _product(arithmetic: Arithmetic, weight: th.Tensor, bias: th.Tensor | None) -> Function:
    return (arithmetic.linear if weight.numel() >= MANY_WEIGHTS else linear)(weight, bias)


def _differentiable_gradients(ctx: Any, grad_output: th.Tensor) -> list[th.Tensor | None]:
    x, *parameters = inputs = ctx.saved_tensors
    for i, (weight, bias) in enumerate(_pairs(parameters)):
        x = F.linear(F.mish(x) if i else x, weight, bias)
    wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
    found = iter(th.autograd.grad(x, wanted, grad_output, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[1:]]


# ------------------------------------------------------------------------------------------------- the interface


class FastOps(Ops):
    """
    Computes what :class:`~sb3_dipo.networks.Ops` computes, in less time where it knows every module.

    :param inference_dtype: ``"bfloat16"`` rounds both sides of the products between hidden layers, in
        :meth:`reverse_process` and the gradients of :meth:`objective`, where the batch is large enough that it pays
    :param kernels: compiled ones, for the CPU, or None
    """

    def __init__(self, inference_dtype: str = "float32", kernels: Kernels | None = None):
        self.inference_dtype = inference_dtype
        self.kernels = kernels
        self._constants: dict[SolverTable, tuple[th.Tensor, th.Tensor, th.Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.inference_dtype, self.kernels is not None)

    def arithmetic(self, x: th.Tensor, rounded: bool = False) -> Arithmetic:
        """
        How to compute with a batch.

        :param x: the batch
        :param rounded: whether ``inference_dtype`` counts
        """
        rows, found = len(x), SINGLE
        if x.device.type == "cpu" and rows >= FEW_ROWS:
            found = Arithmetic(mish, mish_backward, onednn_linear if has_onednn() else linear)
            if self.kernels is not None:
                found = found._replace(mish=self.kernels.mish, mish_backward=self.kernels.mish_backward)
        if rounded and self.inference_dtype == "bfloat16" and rows > KERNEL_ROWS:
            found = found._replace(linear=functools.partial(bfloat16_linear, found.linear))
        return found

    def mlp(self, layers: nn.Module, x: th.Tensor) -> th.Tensor:
        """See :meth:`sb3_dipo.networks.Ops.mlp`."""
        many = is_ordinary(x) and x.device.type == "cpu" and len(x) > KERNEL_ROWS
        known = known_layers(layers, x.device) if many else None
        if known is None or x.dim() != 2 or x.shape[1] != known[0][0].shape[1]:
            return super().mlp(layers, x)
        parameters = [parameter for layer in known for parameter in layer]
        result: th.Tensor = _MLP.apply(self.arithmetic(x), x, *parameters)
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
        if not th.is_grad_enabled() and is_ordinary(*given) and is_known(network, NoisePredictionNetwork):
            shape = (features.shape[0], network.splits[0])
            fits = features.shape == (shape[0], network.splits[2]) and initial_noise.shape == shape
            if fits and (noise is None or noise.shape == (len(table.steps), *shape)):
                layers = known_layers(network.layers, features.device)
        if layers is None:
            return super().reverse_process(network, table, features, initial_noise, noise, clip_sample)

        timesteps, scales, of_kernel = self._constants_of(table, features.device)
        on_action, on_time, on_state = layers[0][0].split(network.splits, dim=1)
        of_state = F.linear(features, on_state, layers[0][1])
        of_time = F.linear(network.embed(timesteps), on_time)
        mlp = BoundMLP(layers, on_action, self.arithmetic(features, rounded=True))
        few = len(of_time) * of_state.numel() <= MANY_ELEMENTS  # a table then saves more time than it takes memory
        constants = of_state + of_time.unsqueeze(1) if few else None
        if self.kernels and constants is not None and len(features) <= KERNEL_ROWS and len(layers) > 1:
            added = None if noise is None else noise * scales
            return self.kernels.sample(of_kernel, constants, mlp.on_x, mlp.layers, initial_noise, added, clip_sample)
        each = (of_state + row for row in of_time) if constants is None else iter(constants.unbind())
        return sample(table, lambda x, step: mlp(next(each), x), initial_noise, noise, clip_sample, scales)

    def _constants_of(self, table: SolverTable, device: th.device) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Timesteps, noise scales and the kernel's coefficients: a copy from the host has no place in a CUDA graph."""
        found = self._constants.get(table)
        if found is None or found[0].device != device:
            with th.inference_mode(False):
                timesteps = th.tensor(table.timesteps, dtype=th.int64, device=device)
                found = timesteps, noise_scales(table, device, th.float32), coefficients(table)
            self._constants[table] = found
            if len(self._constants) > MAX_TABLES:
                del self._constants[next(iter(self._constants))]
        return found

    def objective(self, q_networks: Sequence[nn.Module], features: th.Tensor, reduce: Callable[[th.Tensor], th.Tensor]) -> Any:
        """See :meth:`sb3_dipo.networks.Ops.objective`."""
        plain = super().objective(q_networks, features, reduce)
        layers = [known_layers(q_network, features.device) for q_network in q_networks] if is_ordinary(features) else [None]
        if None in layers or reduce is not smallest or features.requires_grad or features.dim() != 2:
            return plain
        return Objective(plain, [each for each in layers if each], features, self.arithmetic(features, rounded=True))


def _remake(inference_dtype: str, compiled: bool) -> FastOps:
    return FastOps(inference_dtype, load_kernels() if compiled else None)


class Objective:
    """
    min_i Q_i(s, a) at fixed states, with a gradient computed by hand, which passes through each row's smallest critic alone.

    :param plain: the same function, for what is not known
    :param critics: the layers of each Q_i, on [features, actions]
    :param features: of the states, (batch_size, features_dim)
    :param arithmetic: how to compute
    """

    def __init__(self, plain: Function, critics: Iterable[list[Layer]], features: th.Tensor, arithmetic: Arithmetic):
        self.plain = plain
        self.critics = []
        with th.no_grad():
            for layers in critics:
                weight, bias = layers[0]
                on_state, on_action = weight.split([features.shape[1], weight.shape[1] - features.shape[1]], dim=1)
                self.critics.append((BoundMLP(layers, on_action, arithmetic, True), F.linear(features, on_state, bias)))
        self.shape = (features.shape[0], on_action.shape[1])

    def knows(self, actions: th.Tensor) -> bool:
        """Whether the actions are as many as the states, and dense float32."""
        return actions.shape == self.shape and actions.device == self.critics[0][1].device and is_ordinary(actions)

    def __call__(self, actions: th.Tensor) -> th.Tensor:
        """Actions (batch_size, action_dim) to values (batch_size, 1), differentiable as often as one likes."""
        if th.is_grad_enabled() or not self.knows(actions):
            return self.plain(actions)
        return smallest(th.cat([mlp(of_state, actions) for mlp, of_state in self.critics], dim=1))

    def gradient(self, actions: th.Tensor) -> th.Tensor:
        """The gradient of the values' sum at actions, (batch_size, action_dim), without one of its own."""
        if not self.knows(actions):
            with th.enable_grad():
                climber = actions.detach().requires_grad_()
                return th.autograd.grad(self.plain(climber).sum(), climber)[0]
        with th.no_grad():
            passes: list[list[th.Tensor]] = [[] for _ in self.critics]
            pairs = zip(self.critics, passes, strict=True)
            q_values = th.cat([mlp(of_state, actions, kept) for (mlp, of_state), kept in pairs], dim=1)
            smallest_one = q_values.argmin(dim=1, keepdim=True)
            gradients = []
            for i, ((mlp, _), kept) in enumerate(zip(self.critics, passes, strict=True)):
                mine = smallest_one == i
                if actions.device.type != "cpu" or not kept:  # sizes that depend on values would wait for the device
                    gradients.append(mlp.backward(mine.to(actions.dtype), kept))
                    continue
                rows = mine.flatten().nonzero().flatten()
                if len(rows) == 0:
                    continue
                some = F.pad(rows, (0, -len(rows) % ROWS_AT_ONCE))
                ones = actions.new_ones(len(some), 1)
                gradient = mlp.backward(ones, [each.index_select(0, some) for each in kept])
                whole = gradient.new_zeros(len(actions), gradient.shape[1])
                gradients.append(whole.index_copy_(0, rows, gradient[: len(rows)]))
            return th.stack(gradients).sum(dim=0) if len(gradients) > 1 else gradients[0]
