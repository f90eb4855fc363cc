"""What of the networks is known: MLPs that can be computed without calling their modules."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn


class Layer(NamedTuple):
    """A linear layer, weight (out, in) and bias (out,), and weight, bias and eps of the LayerNorm after it, if there is."""

    weight: th.Tensor
    bias: th.Tensor
    scale: th.Tensor | None = None
    shift: th.Tensor | None = None
    eps: float = 0.0

    def parameters(self) -> list[th.Tensor]:
        """Weight and bias, and, where there is a LayerNorm, its weight and bias."""
        return [self.weight, self.bias, *([] if self.scale is None or self.shift is None else [self.scale, self.shift])]

    def with_parameters(self, parameters: Iterator[th.Tensor]) -> "Layer":
        """The same layer with the next ones of other parameters, in the order of :meth:`parameters`."""
        weight, bias = next(parameters), next(parameters)
        if self.scale is None:
            return Layer(weight, bias)
        return Layer(weight, bias, next(parameters), next(parameters), self.eps)

    def normalise(self, x: th.Tensor) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
        """The output of the LayerNorm, and what its backward pass needs beside it."""
        if self.scale is None or self.shift is None:
            return x, ()
        y, mean, deviation = th.native_layer_norm(x, self.scale.shape, self.scale.detach(), self.shift.detach(), self.eps)
        return y, (x, mean, deviation)

    def normalise_backward(
        self, gradient: th.Tensor, kept: tuple[th.Tensor, ...], needed: Sequence[bool] = (True, False, False)
    ) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Gradients at the input, the weight and the bias of the LayerNorm, as far as they are needed."""
        if self.scale is None or self.shift is None:
            return gradient, None, None
        x, mean, deviation = kept
        norm = (self.scale.shape, mean, deviation, self.scale.detach(), self.shift.detach(), list(needed))
        found: Any = th.ops.aten.native_layer_norm_backward(gradient, x, *norm)
        return found


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
    The layers of an MLP of Linear, perhaps LayerNorm, Mish, Linear, ..., Linear; None if it is, or does, anything else, an
    error among them.

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
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if not (_is_dense(weight, device) and _is_dense(bias, device)) or weight is None or bias is None:
            return None
        if kind is nn.Linear and previous is nn.Mish:
            fits = weight.dim() == 2 and (not layers or weight.shape[1] == layers[-1].weight.shape[0])
            layers.append(Layer(weight, bias))
        elif isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm and previous is nn.Linear:
            fits = weight.shape == layers[-1].bias.shape == module.normalized_shape
            layers[-1] = Layer(layers[-1].weight, layers[-1].bias, weight, bias, module.eps)
        else:
            return None
        if not fits or bias.shape != weight.shape[:1]:
            return None
        previous = kind
    return layers if previous is nn.Linear else None


def known_mlps(networks: Sequence[nn.Module], device: th.device) -> list[list[Layer]] | None:
    """
    The layers of MLPs that are all known and have as many inputs and outputs as each other; else None.

    :param networks: as for :func:`known_layers`
    :param device: as there
    """
    found: list[list[Layer]] = []
    for network in networks:
        layers = known_layers(network, device)
        if layers is None:
            return None
        found.append(layers)
    ends = {(layers[0].weight.shape[1], layers[-1].weight.shape[0]) for layers in found}
    return found if len(ends) == 1 else None


def _is_dense(parameter: nn.Parameter | None, device: th.device) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dtype == th.float32
        and parameter.device == device
        and parameter.layout == th.strided
        and parameter.is_contiguous()
        and parameter.numel() > 0
        and not parameter.is_neg()
    )
