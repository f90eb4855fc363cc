"""
What only makes DIPO faster and computes the same: with ``accelerate="off"`` nothing of it is imported.

``ops`` computes networks whose modules ``layers`` knows, by operators of PyTorch, by the kernel of ``kernels``, which the
user's C++ compiler makes from the folder ``kernel``, or, on a GPU, by those of ``triton_kernels``; ``guard`` takes optimizer
steps in fewer calls; ``cuda_graphs`` captures whole updates; ``device_buffer`` keeps replay data on the device.
"""

from typing import Any

import torch as th

from sb3_dipo.buffers import DIPOReplayBuffer
from sb3_dipo.fast.cuda_graphs import CapturableGuard, CudaGraphs
from sb3_dipo.fast.device_buffer import DIPODeviceReplayBuffer, as_storage, fits_on_device
from sb3_dipo.fast.guard import FusedGuard
from sb3_dipo.fast.kernels import KernelError, Kernels, kernels_at_hand, load_kernels, rounding_kernels, triton_kernels_at_hand
from sb3_dipo.fast.ops import FastOps
from sb3_dipo.guard import Guard
from sb3_dipo.networks import PLAIN, Ops

__all__ = ["DIPODeviceReplayBuffer", "KernelError", "as_storage", "choose_storage", "make_ops", "set_up"]


def make_ops(device: th.device, accelerate: str, inference_dtype: str) -> Ops:
    """
    How networks compute on a device. Other devices than the CPU and CUDA compute plainly.

    :param device: of the networks
    :param accelerate: ``"auto"``, ``"cudagraphs"`` or ``"compile"``
    :param inference_dtype: ``"float32"`` or ``"bfloat16"``
    :raises KernelError: for ``"compile"`` on a CPU, if the kernel cannot be compiled
    """
    if device.type == "cpu":
        kernels: Kernels | None = load_kernels() if accelerate == "compile" else kernels_at_hand()
        if kernels is not None and inference_dtype == "bfloat16":
            rounding_kernels()  # compiled now, and not when it is first used
        return FastOps(inference_dtype, kernels)
    return FastOps(inference_dtype, triton_kernels_at_hand()) if device.type == "cuda" else PLAIN


def set_up(policy: Any, accelerate: str) -> tuple[Guard, CudaGraphs | None]:
    """
    Let a policy compute fast.

    :param policy: a :class:`~sb3_dipo.DIPOPolicy`
    :param accelerate: as for :func:`make_ops`
    :return: what takes the optimizers' steps, and the graphs that updates run in, or None
    :raises KernelError: as :func:`make_ops`; nothing is changed then
    """
    policy.set_accelerate(accelerate)
    if policy.device.type == "cpu":
        keep_freed_memory()
        return FusedGuard(policy.actor.ops.kernels), None
    if policy.device.type == "cuda":
        graphs = CudaGraphs(policy.device)
        return CapturableGuard(policy.device), graphs
    return Guard(), None


def choose_storage(replay_buffer_class: type[Any], model: Any) -> type[Any]:
    """
    Replay on the device where it fits, as drawing and write-back then join the update's graph.

    :param replay_buffer_class: with improved actions
    :param model: a :class:`~sb3_dipo.DIPO`, before its networks are made
    :return: that class, or the device's
    """
    sizes = (model.observation_space, model.action_space, model.buffer_size, model.n_envs)
    plain = replay_buffer_class is DIPOReplayBuffer and not model.optimize_memory_usage
    return DIPODeviceReplayBuffer if plain and fits_on_device(*sizes, model.device) else replay_buffer_class


def keep_freed_memory() -> None:
    """
    Free a block of 16 MB that was never touched. From then on glibc keeps freed memory up to that size for the next
    allocation, instead of giving it back and faulting it in again, page by page: that took a third of the action gradient.
    """
    th.empty(2**24, dtype=th.uint8, device="cpu")
