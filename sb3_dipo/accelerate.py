"""
Device tricks: CUDA graphs, and optimizers that can be captured in them. Same signature in and out: what runs here is what
would run without it.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch as th

WARM_UP = 3  # eager calls before a capture, as PyTorch asks for: libraries allocate and optimizers make their state
FUSED = (th.optim.Adam, th.optim.AdamW, th.optim.SGD)
MAX_GRAPHS = 32  # each holds the memory of its intermediate results


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """
    Apply a function to the tensors of nested tuples and dicts; what is no tensor is taken from the first.

    :param function: of as many tensors as there are trees
    :param trees: of the same form
    :return: such a tree
    """
    first = trees[0]
    if isinstance(first, th.Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: map_tensors(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple):
        values = [map_tensors(function, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else tuple(values)
    return first


def _signature(tree: Any) -> Hashable:
    if isinstance(tree, th.Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return tuple((key, _signature(value)) for key, value in tree.items())
    return tuple(map(_signature, tree)) if isinstance(tree, tuple) else None


def keep_freed_memory() -> None:
    """
    Free a block of 16 MB that was never touched. From then on glibc keeps freed memory up to that size for the next
    allocation, instead of giving it back and faulting it in again, page by page: that took a third of the action gradient.
    """
    th.empty(2**22)


class CudaGraphs:
    """
    Functions captured in CUDA graphs, one for each key and shape of the inputs, and replayed in one launch. The first calls
    run eagerly; one that cannot be captured runs eagerly for ever, with one warning that says why.

    :param device: a CUDA device
    """

    def __init__(self, device: th.device):
        self.device = device
        self._calls: dict[Hashable, int] = {}
        self._captured: dict[Hashable, tuple[Callable[[], None], Any, Any]] = {}
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.device,)  # a copy captures its own

    def clear(self) -> None:
        """Forget all graphs: what they read or write has moved."""
        self._calls.clear()
        self._captured.clear()

    def __call__(self, function: Callable[..., Any], key: Hashable, *inputs: Any) -> Any:
        """
        Call a function.

        :param function: of tensors, or of tuples and dicts of them; it may read and write other tensors that stay where they
            are, and must neither wait for the device nor depend on Python values that are not in the key
        :param key: what else the function depends on
        :param inputs: its arguments
        :return: what it returns
        """
        key = (key, _signature(inputs))
        if key not in self._captured:
            calls = self._calls.get(key, 0)
            self._calls[key] = calls + 1
            if self._failed or len(self._captured) >= MAX_GRAPHS:
                return function(*inputs)
            if calls < WARM_UP:
                return self._aside(function, *inputs)
            static = map_tensors(th.clone, inputs)
            try:
                replay, outputs = self._capture(lambda: function(*static))
            except Exception as error:
                self._failed = True
                warnings.warn(
                    f"`accelerate`: CUDA graphs cannot be used here, everything runs eagerly instead. The capture failed: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=3,
                )
                return function(*inputs)
            self._captured[key] = replay, static, outputs
        replay, static, outputs = self._captured[key]
        map_tensors(lambda kept, given: kept.copy_(given, non_blocking=True), static, inputs)
        replay()
        return map_tensors(th.clone, outputs)

    def _aside(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call on another stream, as captures do."""
        stream, current = th.cuda.Stream(self.device), th.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with th.cuda.stream(stream):
            outputs = function(*inputs)
        current.wait_stream(stream)
        return outputs

    def _capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = th.cuda.CUDAGraph()
        with th.cuda.device(self.device), th.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


def prepare_optimizer(optimizer: th.optim.Optimizer, capturable: bool, fuse: bool = True) -> None:
    """
    Let an optimizer update all parameters in one kernel where it can, and, for capture, keep its learning rate and step
    counts on the device. Options that the user chose stay.

    :param optimizer: an optimizer; its state may come from another device
    :param capturable: whether its steps are to be captured in CUDA graphs
    :param fuse: whether to use the one kernel
    """
    fuse = fuse and type(optimizer) in FUSED
    # the first, eager steps are no mistake: PyTorch would warn of them
    optimizer._warned_capturable_if_run_uncaptured = True
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if fuse and group["fused"] is not False and not group["foreach"] and not group["differentiable"]:
            group["fused"] = True
            optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        if "capturable" in group:
            group["capturable"] = capturable
        rate = group["lr"]
        if capturable:
            group["lr"] = th.as_tensor(rate, dtype=th.float32, device=device).clone()
        elif isinstance(rate, th.Tensor):
            group["lr"] = float(rate)
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, th.Tensor):
                on_device = capturable or group.get("fused")
                optimizer.state[parameter]["step"] = step.to(device if on_device else "cpu", th.float32)


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """
    As SB3's ``update_learning_rate``, also for a rate that is on the device, which a captured step reads.

    :param optimizer: an optimizer
    :param learning_rate: its new learning rate
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def move_towards(targets: Iterable[th.Tensor], tensors: Iterable[th.Tensor], tau: float, ok: th.Tensor) -> None:
    """
    SB3's ``polyak_update``, ``target <- (1 - tau) target + tau tensor``, in a few kernels, or nothing.

    :param targets: changed in place
    :param tensors: finite, of the same shapes
    :param tau: between 0 and 1
    :param ok: whether to, a boolean scalar, which is not read on the host
    """
    moved = list(targets)
    if moved:
        share = tau * ok.double()
        with th.no_grad():
            th._foreach_mul_(moved, (1 - share).float())
            th._foreach_add_(moved, list(th._foreach_mul(list(tensors), share.float())))
