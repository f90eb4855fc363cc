"""
Kernels for the CPU that the user's C++ compiler makes from ``kernels.cpp``: Mish in one pass over memory, and the whole
reverse process for a few states in one call.
"""

import ctypes
import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import torch as th

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
    The compiled functions, for float32 tensors on the CPU; a ``TypeError`` refuses others.

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
        """As :func:`sb3_dipo.fast.ops.mish`, in one pass."""
        x = x.resolve_neg().contiguous()
        y = th.empty_like(x)
        self._mish(_pointer(x), _pointer(y), x.numel())
        return y

    def mish_backward(self, grad_output: th.Tensor, x: th.Tensor) -> th.Tensor:
        """As :func:`sb3_dipo.fast.ops.mish_backward`, in one pass."""
        grad_output, x = grad_output.expand_as(x).resolve_neg().contiguous(), x.resolve_neg().contiguous()
        result = th.empty_like(x)
        self._mish_backward(_pointer(grad_output), _pointer(x), _pointer(result), x.numel())
        return result

    def sample(
        self,
        coefficients: th.Tensor,
        constants: th.Tensor,
        on_action: th.Tensor,
        layers: Sequence[tuple[th.Tensor, th.Tensor]],
        initial_noise: th.Tensor,
        added: th.Tensor | None,
        clip_sample: bool = True,
    ) -> th.Tensor:
        """
        As :func:`sb3_dipo.diffusion.process.sample` with an MLP of Mish, in one call: for few states.

        :param coefficients: of a solver's table, see :func:`coefficients`
        :param constants: what state, timestep and bias add to the first layer, (number of steps, batch_size, its width)
        :param on_action: the action's columns of the first layer's weight, transposed, (action_dim, its width)
        :param layers: weight (out, in) and bias (out,) of the others
        :param initial_noise: a_K, (batch_size, action_dim)
        :param added: s z, the noise added along the way, (number of steps, batch_size, action_dim); None adds none
        :param clip_sample: clip the predicted clean actions to [-1, 1] at every step
        :return: actions clipped to [-1, 1], (batch_size, action_dim)
        """
        if constants.dim() != 3 or initial_noise.dim() != 2:
            raise TypeError(f"The kernel was given {constants.dim()} and {initial_noise.dim()} dimensions, not 3 and 2.")
        actions = initial_noise.resolve_neg().clone(memory_format=th.contiguous_format)
        steps, widths = len(constants), [constants.shape[2], *(len(weight) for weight, _ in layers)]
        expected = [(steps, 5), (steps, len(actions), widths[0]), (actions.shape[1], widths[0])]
        expected += [(out, width) for width, out in itertools.pairwise(widths)] + [(out,) for out in widths[1:]]
        expected += [] if added is None else [(steps, *actions.shape)]
        weights, biases = zip(*layers, strict=True)
        given = [coefficients, constants, on_action, *weights, *biases, *([] if added is None else [added])]
        given = [tensor.resolve_neg().contiguous() for tensor in given]
        if [tensor.shape for tensor in given] != expected or widths[-1] != actions.shape[1]:
            raise TypeError(f"The kernel was given shapes {[tuple(tensor.shape) for tensor in given]}, not {expected}.")
        pointers, array = [_pointer(tensor) for tensor in given], ctypes.c_void_p * len(layers)
        self._reverse(
            steps,
            *actions.shape,
            len(layers),
            (ctypes.c_int64 * len(widths))(*widths),
            *pointers[:3],
            array(*pointers[3 : 3 + len(layers)]),
            array(*pointers[3 + len(layers) : 3 + 2 * len(layers)]),
            None if added is None else pointers[-1],
            clip_sample,
            _pointer(actions),
        )
        return actions


def _pointer(tensor: th.Tensor) -> int:
    """Where a tensor's numbers are, if they are what the kernels read."""
    if tensor.dtype != th.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise TypeError(f"The kernels take dense float32 tensors on the CPU, not {tensor.dtype} on {tensor.device}.")
    return tensor.data_ptr()


def coefficients(table: SolverTable) -> th.Tensor:
    """What :meth:`Kernels.sample` reads of a solver's table: 1 / alpha_t, sigma_t / alpha_t, a, b, c; (number of steps, 5)."""
    rows = [[1 / step.alpha_t, step.sigma_t / step.alpha_t, step.a, step.b, step.c] for step in table.steps]
    return th.tensor(rows, dtype=th.float32, device="cpu")
