"""
The kernel for the CPU, which the user's C++ compiler makes from the files in ``kernel/``: reverse process, action gradient
and training steps of MLPs, each as one call, a tile of states at a time.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch as th

from sb3_dipo.diffusion.solvers import SolverTable
from sb3_dipo.fast.layers import Layer

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O2", "-march=native", "-fno-math-errno", "-std=c++17")
SOURCE = pathlib.Path(__file__).with_name("kernel")

TENSORS = (th.Tensor, th.nn.Parameter)
Pointer, Number, Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class KernelError(RuntimeError):
    """The kernel could not be compiled or loaded; the message says why."""


class RefusedError(TypeError):
    """The kernel does not take these tensors; the message says why."""


# ------------------------------------------------------------------------------------------------- compilation


@functools.cache
def load_kernels(bfloat16: bool = False) -> "Kernels":
    """
    Load the kernel, which was compiled before on this machine, or compile it, which takes some seconds. The environment
    variable ``CXX`` names the compiler. What it makes stays in the folder ``torch_extensions`` of the user's cache, or where
    the environment variable ``TORCH_EXTENSIONS_DIR`` says, which is also where PyTorch's own extensions are.

    :param bfloat16: whether the products between hidden layers are of bfloat16
    :raises KernelError: if there is no C++ compiler, or it fails, or the processor has no bfloat16
    """
    named = os.environ.get("CXX", "").split()
    compiler = named or [found for found in map(shutil.which, COMPILERS) if found][:1]
    if not compiler:
        raise KernelError(f"no C++ compiler was found: set CXX, or install one of {', '.join(COMPILERS)}")
    command = [*compiler, *FLAGS, *(["-DBFLOAT16"] if bfloat16 else [])]
    # the compiler's version and all that it knows of the processor
    macros = _output_of([*command, "-dM", "-E", "-x", "c++", os.devnull])
    if bfloat16 and "__AVX512BF16__" not in macros:
        raise KernelError("the processor or the compiler has no products of bfloat16")
    texts = [path.read_text() for path in sorted(SOURCE.iterdir())]
    name = f"kernel-{hashlib.sha256(repr((command, macros, texts)).encode()).hexdigest()[:16]}.so"
    try:
        return Kernels(_compiled(command, name), bfloat16)
    except OSError as error:
        raise KernelError(f"the compiled kernel could not be loaded: {error}") from error


def _compiled(command: list[str], name: str) -> ctypes.CDLL:
    folder = _cache_folder()
    with suppress(OSError):  # there is none yet, or it is of no use here
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        made = os.path.join(temporary, name)
        _output_of([*command, "-shared", "-fPIC", "-o", made, str(SOURCE / "kernel.cpp")])
        # Renamed when it is whole: other processes, which may do the same just now, never see a part of it.
        unfinished = folder / f".{name}.{os.getpid()}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(made, "rb") as source, open(unfinished, "wb") as target:
                    shutil.copyfileobj(source, target)
                    target.flush()
                    os.fsync(target.fileno())  # loading a file whose end is missing would end the process
                unfinished.replace(folder / name)
            finally:
                unfinished.unlink(missing_ok=True)
            return ctypes.CDLL(str(folder / name))
        return ctypes.CDLL(made)


def _cache_folder() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(home, "torch_extensions")) / "sb3_dipo"


def _output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
    except subprocess.CalledProcessError as error:
        message = error.stderr.strip()[-500:]
    except OSError as error:
        message = str(error)
    raise KernelError(f"{command[0]} failed: {message}")


@functools.cache
def rounding_kernels() -> "Kernels | None":
    """The kernel of bfloat16, where it is faster: on AMD's processors. Intel's do such products at a fraction of the rate."""
    kernels = kernels_at_hand(bfloat16=True)
    return kernels if kernels is not None and kernels.on_amd else None


@functools.cache
def kernels_at_hand(bfloat16: bool = False) -> "Kernels | None":
    """As :func:`load_kernels`, or None; what failed is not tried again in this process."""
    try:
        return load_kernels(bfloat16)
    except KernelError:
        return None


@functools.cache
def triton_kernels_at_hand(bfloat16: bool = False) -> Any:
    """
    The :class:`~sb3_dipo.fast.triton_kernels.TritonKernels`, or None where there is no Triton, no C compiler, which it needs,
    too, or no GPU with tensor cores for float32.

    :param bfloat16: as for them
    """
    if not th.cuda.is_available() or th.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from sb3_dipo.fast.triton_kernels import TritonKernels

        return TritonKernels(bfloat16).tried()
    except Exception:  # of Triton, which raises all sorts
        return None


# ------------------------------------------------------------------------------------------------- calls


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("weight", "bias", "scale", "shift")),
        *((name, Number) for name in ("inputs", "outputs")),
        ("epsilon", Real),
    ]


class _Climb(ctypes.Structure):
    _fields_ = [("steps", Number), *((name, Real) for name in ("rate", "max_norm", "beta1", "beta2", "epsilon"))]


class _Adam(ctypes.Structure):
    _fields_ = [*((name, Pointer) for name in ("parameter", "gradient", "mean", "square", "step")), ("size", Number)]


class _Average(ctypes.Structure):
    _fields_ = [("target", Pointer), ("parameter", Pointer), ("size", Number)]


class Kernels:
    """
    The compiled functions. A :class:`RefusedError` refuses whatever is not float32 on the CPU, or of another shape than it
    should be, and parameters that do not lie in memory row by row. Pointers are taken anew in each call, so that tensors may
    move.

    :param library: made from ``kernel.cpp``
    :param bfloat16: whether its products between hidden layers are of bfloat16
    """

    device_type = "cpu"
    fewest_rows = 1  # of a batch that it is given

    def __init__(self, library: ctypes.CDLL, bfloat16: bool = False):
        self._library = library
        self.bfloat16 = bfloat16
        self.on_amd = bool(library.is_for_amd())
        flag: Any = ctypes.c_int32
        mlp: list[Any] = [Number, Pointer]
        for name, result, arguments in (
            ("use_threads", None, [Pointer]),
            ("reverse_process", flag, [*mlp, *[Number, Pointer], *[Number] * 4, *[Pointer] * 3, flag, Number, Pointer]),
            (
                "action_gradient",
                flag,
                [Number, *mlp, flag, Pointer, *[Number] * 3, *[Pointer] * 3, Number, *[Pointer] * 2],
            ),
            ("mlp_kept", Number, [Number, *mlp, Number]),
            ("mlp_forward", flag, [Number, *mlp, Number, Number, *[Pointer] * 3]),
            ("mlp_backward", flag, [Number, *mlp, Number, Number, *[Pointer] * 5]),
            ("gradient_norm_of", Real, [*mlp, Number]),
            ("adam_step_of", None, [*mlp, Number, *[Real] * 5]),
            ("polyak_update_of", None, [*mlp, Number, Real]),
            ("quantile_huber_loss", Real, [*[Number] * 4, *[Pointer] * 3]),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        # PyTorch has loaded its OpenMP library for all to see; where it has another one, there is one thread
        everything: Any = ctypes.CDLL(None)
        fork = getattr(everything, "GOMP_parallel", None)
        library.use_threads(None if fork is None else ctypes.cast(fork, Pointer))

    def __reduce__(self) -> tuple[Any, ...]:
        return kernels_at_hand, (self.bfloat16,)  # another machine may have no compiler, and gets None

    def take(self, *mlps: Sequence[Layer]) -> bool:
        """Whether the kernel computes these MLPs together."""
        return all(len(mlps[0]) == len(layers) > 1 for layers in mlps)

    def rounded(self, *mlps: Sequence[Layer]) -> "Kernels":
        """The kernel of bfloat16 for these MLPs, where it is faster, else this one."""
        even = all(layer.weight.shape[0] % 2 == 0 for layers in mlps for layer in layers[:-1])
        return (rounding_kernels() if even else None) or self

    def _call(self, name: str, *arguments: Any) -> None:
        if not getattr(self._library, name)(*arguments):
            raise MemoryError(f"The kernel found no memory for `{name}`.")

    def reverse_process(
        self,
        layers: Sequence[Layer],
        coefficients: th.Tensor,
        embedding: th.Tensor,
        features: th.Tensor,
        initial_noise: th.Tensor,
        noise: th.Tensor | None,
        clip_sample: bool,
    ) -> th.Tensor:
        """
        As :func:`sb3_dipo.diffusion.process.sample` with an MLP.

        :param layers: of the network on [noisy action, embedding of the time, features], two or more
        :param coefficients: of a solver's table, see :func:`coefficients`
        :param embedding: of the time at each step, (number of steps, its size)
        :param features: of the states, (batch_size, features_dim)
        :param initial_noise: a_K, (batch_size, action_dim)
        :param noise: z in order of use, (number of steps, batch_size, action_dim), or None
        :param clip_sample: whether to clip the predicted clean actions to [-1, 1] at every step
        :return: actions in [-1, 1], (batch_size, action_dim)
        """
        actions = _copy(initial_noise)
        (rows, action_dim), steps = _sizes(actions), len(coefficients)
        time_dim, features_dim = _sizes(embedding)[1], _sizes(features)[1]
        coefficients, embedding, features = _dense(coefficients), _dense(embedding), _dense(features)
        noise = None if noise is None else _dense(noise)
        number, array = _layers(layers, inputs=action_dim + time_dim + features_dim, outputs=action_dim)
        self._call(
            "reverse_process",
            number,
            array,
            steps,
            _pointer(coefficients, steps, 6),
            rows,
            action_dim,
            time_dim,
            features_dim,
            _pointer(embedding, steps, time_dim),
            _pointer(features, rows, features_dim),
            None if noise is None else _pointer(noise, steps, rows, action_dim),
            clip_sample,
            th.get_num_threads(),
            _pointer(actions, rows, action_dim),
        )
        return actions

    def values(self, critics: Sequence[Sequence[Layer]], features: th.Tensor, actions: th.Tensor, mean: bool) -> th.Tensor:
        """
        The smallest or the mean of all outputs of some MLPs.

        :param critics: the layers of each MLP, on [features, actions], two or more
        :param features: of the states, (batch_size, features_dim)
        :param actions: (batch_size, action_dim)
        :param mean: whether it is the mean
        :return: (batch_size, 1)
        """
        return self.improve(critics, features, actions, mean)[1]

    def improve(
        self,
        critics: Sequence[Sequence[Layer]],
        features: th.Tensor,
        actions: th.Tensor,
        mean: bool,
        bounds: tuple[th.Tensor, th.Tensor] | None = None,
        steps: int = 0,
        rate: float = 0.0,
        max_norm: float = 0.0,
        betas: tuple[float, float] = (0.0, 0.0),
        epsilon: float = 0.0,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        As :func:`sb3_dipo.improve_actions` on the smallest or the mean of all outputs of some MLPs.

        :param critics: as :meth:`values`
        :param features: as :meth:`values`
        :param actions: as :meth:`values`
        :param mean: as :meth:`values`
        :param bounds: the lowest and the highest improved action, (batch_size, action_dim); None is -1 and 1
        :param steps: number of steps; 0 computes the values alone
        :param rate: step size of Adam
        :param max_norm: largest joint norm of a gradient
        :param betas: of Adam
        :param epsilon: of Adam
        :return: improved actions, (batch_size, action_dim), and the values at the given ones, (batch_size, 1)
        """
        improved, features = _copy(actions), _dense(features)
        (rows, action_dim), features_dim = _sizes(improved), _sizes(features)[1]
        values = th.empty(rows, 1, dtype=th.float32, device="cpu")
        outputs = None if mean else 1
        number, array = _layers(*critics, inputs=features_dim + action_dim, outputs=outputs)
        dense = None if bounds is None else [_dense(each) for each in bounds]  # alive until the call has returned
        low, high = (None, None) if dense is None else (_pointer(each, rows, action_dim) for each in dense)
        self._call(
            "action_gradient",
            len(critics),
            number,
            array,
            mean,
            ctypes.byref(_Climb(steps, rate, max_norm, *betas, epsilon)),
            rows,
            features_dim,
            action_dim,
            _pointer(features, rows, features_dim),
            low,
            high,
            th.get_num_threads(),
            _pointer(improved, rows, action_dim),
            _pointer(values, rows, 1),
        )
        return improved, values

    def forward(self, mlps: Sequence[Sequence[Layer]], x: th.Tensor, keep: bool = False) -> tuple[th.Tensor, th.Tensor | None]:
        """
        The outputs of some MLPs.

        :param mlps: the layers of each, two or more
        :param x: their input, (batch_size, in)
        :param keep: whether :meth:`backward` will be called
        :return: (batch_size, number of MLPs, out), and what that needs, or None
        """
        x, (rows, inputs) = _dense(x), _sizes(x)
        outputs = mlps[0][-1].weight.shape[0]
        networks = len(mlps), *_layers(*mlps, inputs=inputs, outputs=outputs)
        y = x.new_empty(rows, len(mlps), outputs)
        kept = x.new_empty(self._library.mlp_kept(*networks, rows)) if keep else None
        places = _pointer(x, rows, inputs), None if kept is None else _pointer(kept, kept.numel()), _pointer(y, *y.shape)
        self._call("mlp_forward", *networks, rows, th.get_num_threads(), *places)
        return y, kept

    def backward(
        self,
        mlps: Sequence[Sequence[Layer]],
        x: th.Tensor,
        kept: th.Tensor,
        of_y: th.Tensor,
        of_x: bool,
        needed: Sequence[bool],
    ) -> list[th.Tensor | None]:
        """
        The gradients of some MLPs.

        :param mlps: as given to :meth:`forward`
        :param x: as given to it
        :param kept: as returned by it
        :param of_y: the gradient at the outputs, (batch_size, number of MLPs, out)
        :param of_x: whether that at the input is needed
        :param needed: whether those of the parameters are: of each layer's weight and bias, and, where it has a LayerNorm,
            of its weight and bias
        :return: the gradients at the input and the parameters, None where they are not needed
        """
        x, of_y, (rows, inputs) = _dense(x), _dense(of_y), _sizes(x)
        outputs = mlps[0][-1].weight.shape[0]
        networks = len(mlps), *_layers(*mlps, inputs=inputs, outputs=outputs)
        wanted = iter(needed)
        gradients: list[th.Tensor | None] = []
        pointers = (Pointer * (4 * len(mlps) * len(mlps[0])))()
        for i, layer in enumerate(layer for mlp in mlps for layer in mlp):
            for j, each in enumerate(layer.parameters()):
                gradient = th.empty_like(each, memory_format=th.contiguous_format) if next(wanted) else None
                gradients.append(gradient)
                pointers[4 * i + j] = None if gradient is None else _pointer(gradient, *each.shape)
        at_x = x.new_empty(len(mlps), rows, inputs) if of_x else None
        self._call(
            "mlp_backward",
            *networks,
            rows,
            th.get_num_threads(),
            _pointer(x, rows, inputs),
            _pointer(kept, self._library.mlp_kept(*networks, rows)),
            _pointer(of_y, rows, len(mlps), outputs),
            pointers,
            None if at_x is None else _pointer(at_x, *at_x.shape),
        )
        return [None if at_x is None else at_x.sum(dim=0), *gradients]

    def quantile_huber_loss(self, quantiles: th.Tensor, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        As :meth:`sb3_dipo.networks.Ops.quantile_huber_loss`, and its gradient.

        :param quantiles: (batch_size, n_critics, n_quantiles)
        :param targets: (batch_size, number of target quantiles)
        :return: the loss, a scalar, and the gradient at the quantiles, of their shape
        """
        quantiles, targets = _dense(quantiles), _dense(targets)
        slopes = th.empty_like(quantiles)
        sizes = (*_sizes(quantiles, 3), _sizes(targets)[1])
        places = _pointer(quantiles, *sizes[:3]), _pointer(targets, sizes[0], sizes[3]), _pointer(slopes, *sizes[:3])
        loss = self._library.quantile_huber_loss(*sizes, *places)
        return th.tensor(loss, dtype=th.float32, device="cpu"), slopes

    def clip_and_step(
        self,
        adams: Sequence[tuple[th.Tensor, ...]],
        max_norm: float,
        rate: float,
        betas: tuple[float, float],
        epsilon: float,
        may_step: Callable[[float], None],
    ) -> None:
        """
        Clip gradients by their joint norm, as PyTorch's ``clip_grad_norm_``, and take a step of Adam.

        :param adams: of each parameter itself, its gradient, Adam's means of gradients and of their squares, all of one shape,
            and the number of steps, a scalar; all are changed
        :param max_norm: largest norm
        :param rate: step size
        :param betas: of Adam
        :param epsilon: of Adam
        :param may_step: called with the norm before anything is changed; may raise an error
        """
        array = (_Adam * len(adams))()
        for i, (*tensors, step) in enumerate(adams):
            array[i] = _Adam(*(_pointer(each, *tensors[0].shape) for each in tensors), _pointer(step), tensors[0].numel())
        threads = th.get_num_threads()
        norm = self._library.gradient_norm_of(len(adams), array, threads)
        may_step(norm)
        scale = min(max_norm / (norm + 1e-6), 1.0)
        self._library.adam_step_of(len(adams), array, threads, scale, rate, *betas, epsilon)
        # what autograd keeps of them, or others have bound, is no longer what it was
        th.autograd.graph.increment_version([each for tensors in adams for each in tensors])

    def polyak_update(self, targets: Sequence[th.Tensor], parameters: Sequence[th.Tensor], tau: float) -> None:
        """
        Move targets to tau of the parameters and 1 - tau of themselves, as SB3's ``polyak_update``.

        :param targets: the tensors to change
        :param parameters: as many, of the same shapes
        :param tau: between 0 and 1
        """
        array = (_Average * len(targets))()
        for i, (target, parameter) in enumerate(zip(targets, parameters, strict=True)):
            array[i] = _Average(_pointer(target, *target.shape), _pointer(parameter, *target.shape), target.numel())
        self._library.polyak_update_of(len(targets), array, th.get_num_threads(), tau)
        th.autograd.graph.increment_version(targets)


def _dense(tensor: th.Tensor) -> th.Tensor:
    return tensor.contiguous() if not tensor.is_neg() else tensor.resolve_neg().contiguous()


def _copy(tensor: th.Tensor) -> th.Tensor:
    return tensor.detach().resolve_neg().clone(memory_format=th.contiguous_format)


def _sizes(tensor: th.Tensor, dimensions: int = 2) -> tuple[int, ...]:
    if tensor.dim() != dimensions or 0 in tensor.shape:
        raise RefusedError(
            f"The kernel takes tensors of {dimensions} dimensions here, none of them 0, not {tuple(tensor.shape)}."
        )
    return tuple(tensor.shape)


def _pointer(tensor: th.Tensor, *shape: int) -> int:
    """Where a tensor's numbers are, if they are what the kernel reads."""
    is_tensor = type(tensor) in TENSORS
    dense = is_tensor and tensor.layout is th.strided and tensor.is_contiguous() and not tensor.is_neg()
    if not dense or tensor.dtype is not th.float32 or not tensor.is_cpu or tensor.shape != shape:
        found = f"{tensor.dtype} on {tensor.device}, {tuple(tensor.shape)}, dense: {dense}" if is_tensor else repr(tensor)
        raise RefusedError(f"The kernel takes dense float32 tensors on the CPU, here of shape {shape}, not {found}.")
    return tensor.data_ptr()


def _layers(*mlps: Sequence[Layer], inputs: int, outputs: int | None = None) -> tuple[int, Any]:
    """How many layers each MLP has, and where those of all are."""
    number = len(mlps[0])
    if number < 2 or any(len(mlp) != number for mlp in mlps):
        raise RefusedError(
            f"The kernel takes MLPs of two or more layers, all of as many, not of {[len(mlp) for mlp in mlps]}."
        )
    array = (_Layer * (number * len(mlps)))()
    for i, mlp in enumerate(mlps):
        width = inputs
        for j, layer in enumerate(mlp):
            weight, *others = layer.parameters()
            before, width = width, _sizes(weight)[0]
            pointers = [_pointer(weight, width, before), *(_pointer(each, width) for each in others)]
            array[i * number + j] = _Layer(*pointers, *[None] * (4 - len(pointers)), before, width, layer.eps)
        if outputs not in (None, width):
            raise RefusedError(f"The kernel needs an MLP of {outputs} outputs, not {width}.")
    return number, array


def coefficients(table: SolverTable) -> th.Tensor:
    """What the kernel reads of a solver's table: 1 / alpha_t, sigma_t / alpha_t, a, b, c, s; (number of steps, 6)."""
    rows = [[1 / step.alpha_t, step.sigma_t / step.alpha_t, *step[2:]] for step in table.steps]
    return th.tensor(rows, dtype=th.float32, device="cpu")
