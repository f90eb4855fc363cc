"""
How actors and critics compute in less time: the products and Mish of MLPs whose every module is known.

The first layer's part that does not change along a reverse process or an action gradient is computed once; products go to
the fastest library that PyTorch has; Mish is computed from one exponential; gradients are computed by hand. What is not
known, or is asked for in a way that is not, is computed by :class:`~sb3_dipo.networks.Ops`, which calls the modules.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dipo.diffusion.process import noise_scales, sample
from sb3_dipo.diffusion.solvers import SolverTable
from sb3_dipo.fast.kernels import KernelError, Kernels, coefficients, load_kernels
from sb3_dipo.fast.trees import map_tensors
from sb3_dipo.networks import NoisePredictionNetwork, Ops, average, smallest

Function = Callable[[th.Tensor], th.Tensor]


class Layer(NamedTuple):
    """A linear layer, weight (out, in) and bias (out,), and the LayerNorm after it, if there is one."""

    weight: th.Tensor
    bias: th.Tensor
    norm: nn.LayerNorm | None = None

    def normalise(self, x: th.Tensor) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
        """The output of the LayerNorm, and what its backward pass needs beside it."""
        if self.norm is None:
            return x, ()
        y, mean, deviation = th.native_layer_norm(
            x, self.norm.normalized_shape, self.norm.weight.detach(), self.norm.bias.detach(), self.norm.eps
        )
        return y, (x, mean, deviation)

    def normalise_backward(
        self, gradient: th.Tensor, kept: tuple[th.Tensor, ...], needed: Sequence[bool] = (True, False, False)
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Gradients at the input, the weight and the bias of the LayerNorm, as far as they are needed."""
        if self.norm is None:
            return gradient, None, None
        x, mean, deviation = kept
        shape, weight, bias = self.norm.normalized_shape, self.norm.weight.detach(), self.norm.bias.detach()
        found: Any = th.ops.aten.native_layer_norm_backward(gradient, x, shape, mean, deviation, weight, bias, list(needed))
        return found


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
        and th._C._len_torch_function_stack() == 0
        and th.autograd.forward_ad._current_level < 0
        and all(
            type(tensor) in (th.Tensor, nn.Parameter)
            and tensor.dtype == th.float32
            and tensor.layout == th.strided
            and tensor.device == device
            and tensor.numel() > 0
            and th._C._has_storage(tensor)  # a batch of PyTorch's vmap has none
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
    The layers of an MLP of Linear, perhaps LayerNorm, Mish, Linear, ..., Linear; None if it is, or does, anything else.

    :param mlp: such as an ``nn.Sequential``
    :param device: where its parameters must be
    """
    if not is_known(mlp, nn.Sequential) or nn.modules.module._has_any_global_hook():
        return None
    layers: list[Layer] = []
    previous: type | None = nn.Mish
    for module in mlp._modules.values():
        if module is None or not is_known(module, kind := type(module)):
            return None
        if kind is nn.Mish and previous in (nn.Linear, nn.LayerNorm):
            previous = kind
            continue
        own: Any = [module._parameters.get("weight"), module._parameters.get("bias")]
        if not all(_is_dense(parameter, device) for parameter in own):
            return None
        if kind is nn.Linear and previous is nn.Mish:
            layers.append(Layer(*own))
        elif isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm and previous is nn.Linear and own[0].dim() == 1:
            layers[-1] = layers[-1]._replace(norm=module)
        else:
            return None
        previous = kind
    return layers if previous is nn.Linear else None


def _is_dense(parameter: nn.Parameter | None, device: th.device) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype == th.float32
        and parameter.device == device
        and parameter.layout == th.strided
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
        self.layers = [(weight.detach(), bias.detach()) for weight, bias, _ in layers[1:]]
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
        ctx.arithmetic, ctx.layers, ctx.kept = arithmetic, layers, []
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
        needed = iter(ctx.needs_input_grad[2:])
        of_x = next(needed)
        of_layers = [[next(needed) for _ in _parameters(layer)] for layer in ctx.layers]
        gradient, gradients = grad_output.contiguous(), list[th.Tensor | None]()
        for i in reversed(range(len(ctx.layers))):
            layer, (x, pre_activation, of_norm), wanted = ctx.layers[i], ctx.kept[i], of_layers[i]
            found: list[th.Tensor | None] = []
            if pre_activation is not None:
                gradient = ctx.arithmetic.mish_backward(gradient, pre_activation)
                gradient, *found = layer.normalise_backward(gradient, of_norm, (True, *(wanted[2:] or (False, False))))
            of_weight = _product(ctx.arithmetic, x.t(), None)(gradient.t()) if wanted[0] else None
            gradients = [of_weight, gradient.sum(dim=0) if wanted[1] else None, *found[: len(wanted) - 2], *gradients]
            if i > 0 or of_x:
                gradient = _product(ctx.arithmetic, layer.weight.t(), None)(gradient)
        return None, None, gradient if of_x else None, *gradients


def _parameters(layer: Layer) -> list[th.Tensor]:
    return [layer.weight, layer.bias, *([layer.norm.weight, layer.norm.bias] if layer.norm else [])]


def _product(arithmetic: Arithmetic, weight: th.Tensor, bias: th.Tensor | None) -> Function:
    return (arithmetic.linear if weight.numel() >= MANY_WEIGHTS else linear)(weight, bias)


def _differentiable_gradients(ctx: Any, inputs: Sequence[th.Tensor], grad_output: th.Tensor) -> list[th.Tensor | None]:
    again = th.is_grad_enabled()
    with th.enable_grad(), th.autocast(inputs[0].device.type, enabled=False):
        x, *_ = inputs
        parameters = iter(inputs[1:])
        for i, layer in enumerate(ctx.layers):
            x = F.linear(x, next(parameters), next(parameters))
            if layer.norm is not None:
                x = F.layer_norm(x, layer.norm.normalized_shape, next(parameters), next(parameters), layer.norm.eps)
            x = F.mish(x) if i < len(ctx.layers) - 1 else x
        wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        found = iter(th.autograd.grad(x, wanted, grad_output.to(x.dtype), create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[2:]]


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
        return _remake, (type(self), self.inference_dtype, self.kernels is not None)

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
        if known is None or x.dim() != 2 or x.shape[1] != known[0].weight.shape[1]:
            return super().mlp(layers, x)
        parameters = [parameter for layer in known for parameter in _parameters(layer)]
        result: th.Tensor = _MLP.apply(self.arithmetic(x), known, x, *parameters)
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
        on_action, on_time, on_state = layers[0].weight.split(network.splits, dim=1)
        of_state = F.linear(features, on_state, layers[0].bias)
        of_time = F.linear(network.embed(timesteps), on_time)
        mlp = BoundMLP(layers, on_action, self.arithmetic(features, rounded=True))
        few = len(of_time) * of_state.numel() <= MANY_ELEMENTS  # a table then saves more time than it takes memory
        constants = of_state + of_time.unsqueeze(1) if few else None
        is_mish_only = len(layers) > 1 and not any(layer.norm for layer in layers)
        if self.kernels and constants is not None and is_mish_only and len(features) <= KERNEL_ROWS:
            added = None if noise is None else noise * scales
            return self.kernels.sample(of_kernel, constants, mlp.on_x, mlp.layers, initial_noise, added, clip_sample)
        each = (of_state + row for row in of_time) if constants is None else iter(constants.unbind())
        return sample(table, lambda x, step: mlp(next(each), x), initial_noise, noise, clip_sample, scales)

    def _constants_of(self, table: SolverTable, device: th.device) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Timesteps, noise scales and the kernel's coefficients: a copy from the host has no place in a CUDA graph."""
        found = self._constants.get(table)
        if found is None or found[0].device != device:
            with th.inference_mode(False):
                timesteps = table.timesteps_on(device, th.float32)
                found = timesteps, noise_scales(table, device, th.float32), coefficients(table)
            self._constants[table] = found
            if len(self._constants) > MAX_TABLES:
                del self._constants[next(iter(self._constants))]
        return found

    def objective(self, q_networks: Sequence[nn.Module], features: th.Tensor, reduce: Callable[[th.Tensor], th.Tensor]) -> Any:
        """See :meth:`sb3_dipo.networks.Ops.objective`."""
        plain = super().objective(q_networks, features, reduce)
        if not is_ordinary(features) or reduce not in (smallest, average) or features.requires_grad or features.dim() != 2:
            return plain
        layers = [known_layers(q_network, features.device) for q_network in q_networks]
        if not all(known and known[0].weight.shape[1] > features.shape[1] for known in layers):
            return plain
        return Objective(plain, q_networks, features, self.arithmetic(features), self.arithmetic(features, True), reduce)


def _remake(cls: type[FastOps], inference_dtype: str, compiled: bool) -> FastOps:
    kernels = None
    if compiled:
        with contextlib.suppress(KernelError):  # another machine may have no compiler
            kernels = load_kernels()
    return cls(inference_dtype, kernels)


class Objective:
    """
    The smallest or the mean of the critics' outputs at fixed states, with a gradient computed by hand. That of the smallest
    passes through each row's smallest critic alone; for the mean of many outputs, the last layers' weights are averaged.

    What is not known, or has changed since, is computed by the modules.

    :param plain: the same function by the modules
    :param q_networks: the critics' MLPs, of :func:`known_layers`, on [features, actions]
    :param features: of the states, (batch_size, features_dim)
    :param arithmetic: how to compute values
    :param of_gradient: how to compute gradients
    :param reduce: :func:`~sb3_dipo.networks.smallest` or :func:`~sb3_dipo.networks.average`
    """

    def __init__(
        self,
        plain: Function,
        q_networks: Sequence[nn.Module],
        features: th.Tensor,
        arithmetic: Arithmetic,
        of_gradient: Arithmetic,
        reduce: Function,
    ):
        self.plain, self.q_networks, self.device, self.reduce = plain, q_networks, features.device, reduce
        self.mean = reduce is average
        self.made_of = self._parameters()
        self.critics: list[tuple[BoundMLP, th.Tensor]] = []
        self.climbed: list[tuple[BoundMLP, th.Tensor]] = []
        with th.no_grad():
            for q_network in q_networks:
                layers = known_layers(q_network, features.device)
                assert layers is not None
                if self.mean:
                    *hidden, last = layers
                    layers = [*hidden, Layer(last.weight.mean(dim=0, keepdim=True), last.bias.mean(dim=0, keepdim=True))]
                weight, bias, _ = layers[0]
                on_state, on_action = weight.split([features.shape[1], weight.shape[1] - features.shape[1]], dim=1)
                of_state = F.linear(features, on_state, bias)
                self.climbed.append((BoundMLP(layers, on_action, of_gradient, True), of_state))
                same = of_gradient == arithmetic
                self.critics.append(self.climbed[-1] if same else (BoundMLP(layers, on_action, arithmetic), of_state))
        self.shape = (features.shape[0], on_action.shape[1])

    def _parameters(self) -> Any:
        """What the critics are made of, or None if it is not known (any more)."""
        found = [known_layers(q_network, self.device) for q_network in self.q_networks]
        if not all(found):
            return None
        parameters = [each for layers in found for layer in layers or () for each in _parameters(layer)]
        return [(id(each), each.data_ptr(), each._version) for each in parameters]

    def knows(self, actions: th.Tensor) -> bool:
        """Whether the actions are as many as the states, and dense float32, and the critics are what they were."""
        fits = is_ordinary(actions) and actions.shape == self.shape and actions.device == self.device
        return fits and self.made_of == self._parameters()

    def __call__(self, actions: th.Tensor) -> th.Tensor:
        """Actions (batch_size, action_dim) to values (batch_size, 1), differentiable as often as one likes."""
        if th.is_grad_enabled() or not self.knows(actions):
            return self.plain(actions)
        return self.reduce(th.cat([mlp(of_state, actions) for mlp, of_state in self.critics], dim=1))

    def gradient(self, actions: th.Tensor) -> th.Tensor:
        """The gradient of the values' sum at actions, (batch_size, action_dim), without one of its own."""
        if not self.knows(actions):
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
