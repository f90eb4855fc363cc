"""
Kernels for the CPU that the user's C++ compiler makes from ``kernels.cpp``: Mish in one pass over memory, and the whole
reverse process for a few states in one call.
"""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import torch as th

from sb3_dipo.diffusion.process import noise_scales
from sb3_dipo.diffusion.solvers import SolverTable

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC")
WIDE = "-mprefer-vector-width=512"  # not every compiler and processor knows it


class KernelError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why."""


@functools.cache
def load_kernels() -> "Kernels":
    """
    Compile the kernels, once in a process, which takes about a second. The environment variable ``CXX`` names the compiler;
    what it writes goes to a temporary folder that is removed at once.

    :raises KernelError: if there is no C++ compiler, or it fails
    """
    named = os.environ.get("CXX", "").split()
    compiler = named or [found for found in map(shutil.which, COMPILERS) if found][:1]
    if not compiler:
        raise KernelError(f"no C++ compiler was found: set CXX, or install one of {', '.join(COMPILERS)}")
    source = pathlib.Path(__file__).with_name("kernels.cpp")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = os.path.join(folder, "kernels.so")
        for flags in ((*FLAGS, WIDE), FLAGS):
            try:
                subprocess.run([*compiler, *flags, "-o", library, str(source)], check=True, capture_output=True, text=True)
                return Kernels(ctypes.CDLL(library))
            except subprocess.CalledProcessError as error:
                message = error.stderr.strip()[-500:]
            except OSError as error:
                message = str(error)
        raise KernelError(f"{' '.join(compiler)} failed: {message}")


class Kernels:
    """
    The compiled functions, for dense float32 tensors on the CPU.

    :param library: with the functions of ``kernels.cpp``
    """

    def __init__(self, library: ctypes.CDLL):
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._mish, self._mish_backward, self._reverse = library.mish, library.mish_backward, library.reverse_process
        self._mish.argtypes = [pointer, pointer, number]
        self._mish_backward.argtypes = [pointer, pointer, pointer, number]
        self._reverse.argtypes = [*[number] * 4, *[pointer] * 7, ctypes.c_int32, pointer]
        for function in (self._mish, self._mish_backward, self._reverse):
            function.restype = None

    def mish(self, x: th.Tensor) -> th.Tensor:
        """As :func:`sb3_dipo.arithmetic.mish`, in one pass."""
        x = x.contiguous()
        y = th.empty_like(x)
        self._mish(x.data_ptr(), y.data_ptr(), x.numel())
        return y

    def mish_backward(self, grad_output: th.Tensor, x: th.Tensor) -> th.Tensor:
        """As :func:`sb3_dipo.arithmetic.mish_backward`, in one pass."""
        grad_output, x = grad_output.contiguous(), x.contiguous()
        result = th.empty_like(x)
        self._mish_backward(grad_output.data_ptr(), x.data_ptr(), result.data_ptr(), x.numel())
        return result

    def sample(
        self,
        table: SolverTable,
        constants: th.Tensor,
        on_action: th.Tensor,
        layers: Sequence[tuple[th.Tensor, th.Tensor]],
        initial_noise: th.Tensor,
        noise: th.Tensor | None,
        clip_sample: bool = True,
    ) -> th.Tensor:
        """
        As :func:`sb3_dipo.diffusion.process.sample` with an MLP of Mish, in one call: for few states.

        :param table: a solver's coefficients
        :param constants: what state, timestep and bias add to the first layer, (number of steps, batch_size, its width)
        :param on_action: the action's columns of the first layer's weight, transposed, (action_dim, its width)
        :param layers: weight (out, in) and bias (out,) of the others
        :param initial_noise: a_K, (batch_size, action_dim)
        :param noise: the noise added along the way, (number of steps, batch_size, action_dim); None adds none
        :param clip_sample: clip the predicted clean actions to [-1, 1] at every step
        :return: actions clipped to [-1, 1], (batch_size, action_dim)
        """
        added = None if noise is None else (noise * noise_scales(table, noise.device, noise.dtype)).contiguous()
        coefficients, constants, on_action = _coefficients(table), constants.contiguous(), on_action.contiguous()
        weights, biases = ([tensor.contiguous() for tensor in tensors] for tensors in zip(*layers, strict=True))
        actions = initial_noise.clone(memory_format=th.contiguous_format)
        widths = [constants.shape[2], *(len(weight) for weight in weights)]
        pointers = ctypes.c_void_p * len(layers)
        self._reverse(
            len(table.steps),
            *actions.shape,
            len(layers),
            (ctypes.c_int64 * len(widths))(*widths),
            coefficients.data_ptr(),
            constants.data_ptr(),
            on_action.data_ptr(),
            pointers(*(weight.data_ptr() for weight in weights)),
            pointers(*(bias.data_ptr() for bias in biases)),
            None if added is None else added.data_ptr(),
            clip_sample,
            actions.data_ptr(),
        )
        return actions


@functools.cache
def _coefficients(table: SolverTable) -> th.Tensor:
    return th.tensor([[1 / step.alpha_t, step.sigma_t / step.alpha_t, step.a, step.b, step.c] for step in table.steps])
