"""
How Mish and the matrix products are computed in the two loops of DIPO, the reverse process and the action gradient, where
weights stay as they are and take no gradient. Each :class:`Arithmetic` computes the same function; they differ in speed.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dipo.kernels import Kernels, load_kernels

Function = Callable[[th.Tensor], th.Tensor]

FEW_ROWS = 16  # of a batch: below, an operator costs its call, and PyTorch's single ones are the fastest
FEW_ELEMENTS = 256 * FEW_ROWS
KERNEL_ROWS = 24  # up to which one compiled call beats oneDNN's products
MANY_WEIGHTS = 2**14  # of a layer: below, oneDNN is not faster


def on_host(tensor: th.Tensor) -> bool:
    """Whether values can be read, and sizes depend on them, without waiting for a device or breaking a CUDA graph."""
    return tensor.device.type == "cpu"


def is_traced() -> bool:
    """Whether the computation is being recorded, for export: it must then use what every runtime knows, and fit all sizes."""
    return th.compiler.is_compiling() or th.jit.is_tracing()


def _is_slow_in_aten(x: th.Tensor) -> bool:
    return not is_traced() and x.device.type == "cpu" and x.dtype == th.float32 and x.numel() >= FEW_ELEMENTS


def mish(x: th.Tensor) -> th.Tensor:
    """
    Mish, x tanh(log(1 + e^x)) (Misra 2019), equal to ``torch.nn.functional.mish`` to float32 rounding and several times
    faster on the CPU. On other devices, for other types than float32, for tracing and for few elements it is
    ``torch.nn.functional.mish``.

    :param x: any shape
    :return: the same shape
    """
    if not _is_slow_in_aten(x):
        return F.mish(x)
    return _Mish.apply(x, FAST) if th.is_grad_enabled() and x.requires_grad else _mish(x)


def _mish(x: th.Tensor) -> th.Tensor:
    # tanh(log(1 + e^x)) = n / (2 - n), n = s (2 - s), s the sigmoid: nothing overflows, nothing cancels
    s = x.sigmoid()
    n = (2 - s).mul_(s)
    return n.div_(2 - n).mul_(x)


def mish_backward(grad_output: th.Tensor, x: th.Tensor) -> th.Tensor:
    """
    The gradient at Mish's input.

    :param grad_output: the gradient at its output, any shape
    :param x: its input, the same shape
    :return: the same shape
    """
    if not _is_slow_in_aten(x):
        return th.ops.aten.mish_backward(grad_output, x)
    # y = x t with t = n / (2 - n):  y' = t + x s (2 (1 - s) / (2 - n))^2
    s = x.sigmoid()
    n = (2 - s).mul_(s)
    d = 2 - n
    slope = n.div_(d).addcmul_(s * x, (1 - s).div_(d).square_(), value=4)
    return slope.mul_(grad_output)


class Arithmetic(NamedTuple):
    """
    Mish, its gradient, and matrix products; none of them is differentiable, :meth:`run` is.

    ``mish``: as :func:`mish`; ``mish_backward``: as :func:`mish_backward`; ``linear``: from a weight (out, in) and a bias
    (out,) or None to the function (batch_size, in) -> (batch_size, out); ``kernels``: those that run a whole reverse
    process in one call, or None.
    """

    mish: Function
    mish_backward: Callable[[th.Tensor, th.Tensor], th.Tensor]
    linear: Callable[[th.Tensor, th.Tensor | None], Function]
    kernels: Kernels | None = None

    def run(self, layers: Iterable[nn.Module], x: th.Tensor) -> th.Tensor:
        """
        Run layers one after the other, with gradients.

        :param layers: such as an ``nn.Sequential``
        :param x: the first one's input, (batch_size, ...)
        :return: the last one's output
        """
        for layer in layers:
            if self is PLAIN:
                x = layer(x)
            elif isinstance(layer, nn.Linear) and layer.weight.numel() >= MANY_WEIGHTS:
                x = _Linear.apply(x, layer.weight, layer.bias, self)
            elif isinstance(layer, (Mish, nn.Mish)):
                x = _Mish.apply(x, self)
            else:
                x = layer(x)
        return x


class Mish(nn.Module):
    """:func:`mish` as a module, the default ``activation_fn``."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Any shape in, the same shape out."""
        return mish(x)


class _Mish(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, arithmetic: Arithmetic) -> th.Tensor:
        ctx.save_for_backward(x)
        ctx.arithmetic = arithmetic
        return arithmetic.mish(x)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor, None]:
        return ctx.arithmetic.mish_backward(grad_output, *ctx.saved_tensors), None


class _Linear(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, arithmetic: Arithmetic) -> th.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = arithmetic.linear
        return arithmetic.linear(weight, bias)(x)

    @staticmethod
    @th.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor | None, th.Tensor, th.Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = ctx.linear(weight.t(), None)(grad_output) if ctx.needs_input_grad[0] else None
        return grad_x, ctx.linear(x.t(), None)(grad_output.t()), grad_output.sum(dim=0), None


def _linear(weight: th.Tensor, bias: th.Tensor | None) -> Function:
    return functools.partial(F.linear, weight=weight, bias=bias)


def _onednn_linear(weight: th.Tensor, bias: th.Tensor | None) -> Function:
    """oneDNN's float32 product, which PyTorch's compiler uses; eager PyTorch takes MKL's, at half the speed on AMD's CPUs."""
    product = th.ops.mkldnn._linear_pointwise
    return lambda x: product(x, weight, bias, "none", [], "")


def _bfloat16(linear: Callable[[th.Tensor, th.Tensor | None], Function]) -> Callable[..., Function]:
    def rounded(weight: th.Tensor, bias: th.Tensor | None) -> Function:
        product = linear(weight.bfloat16(), None if bias is None else bias.bfloat16())
        return lambda x: product(x.bfloat16()).float()

    return rounded


@functools.cache
def _has_onednn() -> bool:
    if not th.backends.mkldnn.is_available():
        return False
    try:  # no public operator: it may go, or change
        return bool((_onednn_linear(th.ones(3, 2), th.ones(3))(th.ones(4, 2)) == 3).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


FAST = Arithmetic(mish, mish_backward, _linear)

PLAIN = Arithmetic(F.mish, th.ops.aten.mish_backward, _linear)
"""PyTorch's own operators, one by one."""

ACCELERATIONS = ("auto", "cudagraphs", "compile", "off")
INFERENCE_DTYPES = ("float32", "bfloat16")


def choose_arithmetic(features: th.Tensor, accelerate: str = "auto", inference_dtype: str = "float32") -> Arithmetic:
    """
    How to compute with a batch.

    :param features: the batch, (batch_size, features_dim)
    :param accelerate: ``"off"`` for :data:`PLAIN`; ``"compile"``, on the CPU, for compiled kernels; for all others the
        fastest operators that PyTorch has
    :param inference_dtype: ``"bfloat16"`` rounds both sides of the products between hidden layers to 8 bits, where the
        batch is large enough that it pays
    :raises sb3_dipo.kernels.KernelError: for ``"compile"`` where the kernels cannot be compiled
    """
    rows, arithmetic = features.shape[0], PLAIN
    if is_traced():
        return arithmetic
    if features.device.type == "cpu" and features.dtype == th.float32 and accelerate != "off":
        if rows >= FEW_ROWS:
            arithmetic = FAST._replace(linear=_onednn_linear) if _has_onednn() else FAST
        if accelerate == "compile":
            kernels = load_kernels()
            if rows >= FEW_ROWS:
                arithmetic = arithmetic._replace(mish=kernels.mish, mish_backward=kernels.mish_backward)
            if rows <= KERNEL_ROWS:
                arithmetic = arithmetic._replace(kernels=kernels)
    if inference_dtype == "bfloat16" and rows > KERNEL_ROWS:
        arithmetic = arithmetic._replace(linear=_bfloat16(arithmetic.linear))
    return arithmetic
