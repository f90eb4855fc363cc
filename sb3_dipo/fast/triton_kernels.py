"""
The kernels for NVIDIA's GPUs, written in Triton, which comes with PyTorch for CUDA: a whole reverse process as one launch,
and each step of the action gradient as two. A tile of states passes all layers and steps in one block, whose activations
never leave the chip's caches. They have the signatures of :class:`sb3_dipo.fast.kernels.Kernels`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch as th
import triton
import triton.language as tl
from torch.nn import functional as F

from sb3_dipo.fast.kernels import triton_kernels_at_hand
from sb3_dipo.fast.layers import Layer

ROWS = 16  # of a tile, the fewest that tensor cores multiply
MAX_WIDTH = 256  # of a hidden layer, whose tiles the chip still has room for
ELEMENTS = 2048  # of actions that a step of Adam reads at once
SIZES = ["rows", "action_dim", "first_inputs"]  # are not compiled into the kernels

# ------------------------------------------------------------------------------------------------- parts of the kernels


@triton.jit
def _mish(x):
    # tanh(log(1 + w)) = n / (n + 2), n = w (w + 2), w = e^x; above 20 it is 1
    w = tl.exp(tl.minimum(x, 20.0))
    n = w * (w + 2)
    return x * (n / (n + 2))


@triton.jit
def _mish_slope(x):
    w = tl.exp(tl.minimum(x, 20.0))
    n = w * (w + 2)
    by = 1 / (n + 2)
    return n * by + x * (4 * w * (w + 1)) * (by * by)


@triton.jit
def _normalised(x, epsilon, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """What LayerNorm divides, over the true width, and what it multiplies with."""
    inside = (tl.arange(0, PADDED) < WIDTH)[None, :]
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + epsilon)
    return centred * scale[:, None], scale[:, None]


@triton.jit
def _vector(of_layers, layer, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A layer's bias, or another of its vectors, (1, PADDED)."""
    column = tl.arange(0, PADDED)
    return tl.load(of_layers + layer * WIDTH + column, mask=column < WIDTH, other=0.0)[None, :]


@triton.jit
def _activated(x, layer, scales, shifts, epsilons, WIDTH: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr):
    if NORM:
        x, _ = _normalised(x, tl.load(epsilons + layer), WIDTH, PADDED)
        x = x * _vector(scales, layer, WIDTH, PADDED) + _vector(shifts, layer, WIDTH, PADDED)
    return _mish(x)


@triton.jit
def _product(
    x, weights, scratch, accumulator, WIDTH: tl.constexpr, PADDED: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr
):
    """
    accumulator + x W^T of a tile, (ROWS, PADDED), and a matrix in memory, (WIDTH, WIDTH). A tile that is in registers cannot
    be cut into pieces; so it goes through memory, of which the nearest cache keeps it.
    """
    row, column, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :], tl.arange(0, DEPTH)
    tl.debug_barrier()  # all have read what was there before
    tl.store(scratch + row * PADDED + column, x.to(scratch.dtype.element_ty))
    tl.debug_barrier()
    for start in range(0, PADDED, DEPTH):
        k = start + depth
        piece = tl.load(scratch + row * PADDED + k[None, :])
        inside = (k[:, None] < WIDTH) & (column < WIDTH)
        w = tl.load(weights + column * WIDTH + k[:, None], mask=inside, other=0.0)
        # sums of three products of tensor cores, as exact as float32
        accumulator = tl.dot(piece, w, accumulator, input_precision="tf32x3")
    return accumulator


# ------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=SIZES)
def _reverse_process(
    actions,  # (rows, action_dim): a_K, and at the end a_0
    noise,  # (steps, rows, action_dim)
    coefficients,  # (steps, 6)
    of_state,  # what the features add to the first layer, (rows, WIDTH)
    of_time,  # and the time, (steps, WIDTH)
    first,  # the first layer's weight, (WIDTH, first_inputs), whose first columns are the actions'
    hidden,  # the weights between hidden layers, (HIDDEN, WIDTH, WIDTH)
    biases,  # theirs, (HIDDEN, WIDTH)
    scales,  # of the LayerNorms, (1 + HIDDEN, WIDTH)
    shifts,
    epsilons,  # (1 + HIDDEN,)
    last,  # (action_dim, WIDTH)
    last_bias,
    scratch,  # (rows, PADDED), rows in full tiles
    rows,
    action_dim,
    first_inputs,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    NOISY: tl.constexpr,
    CLIP: tl.constexpr,
):
    tile = tl.program_id(0)
    row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    column, dim = tl.arange(0, PADDED), tl.arange(0, ACTIONS)
    scratch += tile * ROWS * PADDED
    here = row * action_dim + dim[None, :]
    present = (row < rows) & (dim[None, :] < action_dim)
    x = tl.load(actions + here, mask=present, other=0.0)
    on_action = tl.load(
        first + column[None, :] * first_inputs + dim[:, None],
        mask=(column[None, :] < WIDTH) & (dim[:, None] < action_dim),
        other=0.0,
    )
    onto_action = tl.load(
        last + dim[None, :] * WIDTH + column[:, None],
        mask=(column[:, None] < WIDTH) & (dim[None, :] < action_dim),
        other=0.0,
    )
    of_last = tl.load(last_bias + dim, mask=dim < action_dim, other=0.0)[None, :]
    constant = tl.load(of_state + row * WIDTH + column[None, :], mask=(row < rows) & (column[None, :] < WIDTH), other=0.0)
    previous = tl.zeros((ROWS, ACTIONS), dtype=tl.float32)
    for step in range(STEPS):
        h = tl.dot(x, on_action, constant + _vector(of_time, step, WIDTH, PADDED), input_precision="tf32x3")
        h = _activated(h, 0, scales, shifts, epsilons, WIDTH, PADDED, NORM)
        for i in range(HIDDEN):
            start = tl.zeros((ROWS, PADDED), dtype=tl.float32) + _vector(biases, i, WIDTH, PADDED)
            h = _product(h, hidden + i * WIDTH * WIDTH, scratch, start, WIDTH, PADDED, DEPTH, ROWS)
            h = _activated(h, i + 1, scales, shifts, epsilons, WIDTH, PADDED, NORM)
        predicted = tl.dot(h, onto_action, input_precision="tf32x3") + of_last
        row_of_table = coefficients + step * 6
        clean = x * tl.load(row_of_table) - tl.load(row_of_table + 1) * predicted
        if CLIP:
            clean = tl.clamp(clean, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.load(row_of_table + 2) * x + tl.load(row_of_table + 3) * clean + tl.load(row_of_table + 4) * previous
        if NOISY:
            z = tl.load(noise + step * rows * action_dim + here, mask=present, other=0.0)
            x += tl.load(row_of_table + 5) * z
        previous = clean
    tl.store(actions + here, tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=present)


@triton.jit(do_not_specialize=SIZES)
def _value_and_gradient(
    actions,  # (rows, action_dim)
    values,  # of each critic, (n_critics, rows)
    gradients,  # at the actions, (n_critics, rows, action_dim)
    of_state,  # what the features add to the first layers, (n_critics, rows, WIDTH)
    first,  # the first layers' weights on actions, (n_critics, WIDTH, action_dim)
    hidden,  # the weights between hidden layers, (n_critics, HIDDEN, WIDTH, WIDTH)
    hidden_back,  # the same, transposed
    biases,  # theirs, (n_critics, HIDDEN, WIDTH)
    scales,  # of the LayerNorms, (n_critics, 1 + HIDDEN, WIDTH)
    shifts,
    epsilons,  # (n_critics, 1 + HIDDEN)
    last,  # (n_critics, WIDTH)
    last_bias,  # (n_critics,)
    kept,  # what comes before each activation, (n_critics, 1 + HIDDEN, rows, PADDED), rows in full tiles
    scratch,  # (n_critics, rows, PADDED), rows in full tiles
    rows,
    action_dim,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    tile, critic, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    inner = tl.arange(0, ROWS)[:, None]
    row = tile * ROWS + inner
    column, dim = tl.arange(0, PADDED), tl.arange(0, ACTIONS)
    here = row * action_dim + dim[None, :]
    present = (row < rows) & (dim[None, :] < action_dim)
    scratch += (critic * tiles + tile) * ROWS * PADDED
    of_tile = inner * PADDED + column[None, :]
    kept += (critic * (HIDDEN + 1) * tiles + tile) * ROWS * PADDED + of_tile
    of_layer = tiles * ROWS * PADDED
    hidden += critic * HIDDEN * WIDTH * WIDTH
    hidden_back += critic * HIDDEN * WIDTH * WIDTH
    biases += critic * HIDDEN * WIDTH
    scales += critic * (HIDDEN + 1) * WIDTH
    shifts += critic * (HIDDEN + 1) * WIDTH
    epsilons += critic * (HIDDEN + 1)
    on_action = first + critic * WIDTH * action_dim + column[None, :] * action_dim + dim[:, None]
    on_action = tl.load(on_action, mask=(column[None, :] < WIDTH) & (dim[:, None] < action_dim), other=0.0)

    x = tl.load(actions + here, mask=present, other=0.0)
    constant = of_state + (critic * rows + row) * WIDTH + column[None, :]
    constant = tl.load(constant, mask=(row < rows) & (column[None, :] < WIDTH), other=0.0)
    h = tl.dot(x, on_action, constant, input_precision="tf32x3")
    for i in range(HIDDEN):
        if BACKWARD:
            tl.store(kept + i * of_layer, h)
        h = _activated(h, i, scales, shifts, epsilons, WIDTH, PADDED, NORM)
        start = tl.zeros((ROWS, PADDED), dtype=tl.float32) + _vector(biases, i, WIDTH, PADDED)
        h = _product(h, hidden + i * WIDTH * WIDTH, scratch, start, WIDTH, PADDED, DEPTH, ROWS)
    if BACKWARD:
        tl.store(kept + HIDDEN * of_layer, h)
    h = _activated(h, HIDDEN, scales, shifts, epsilons, WIDTH, PADDED, NORM)
    on_value = _vector(last, critic, WIDTH, PADDED)
    value = tl.sum(h * on_value, axis=1) + tl.load(last_bias + critic)
    flat = tile * ROWS + tl.arange(0, ROWS)
    tl.store(values + critic * rows + flat, value, mask=flat < rows)
    if BACKWARD:
        gradient = tl.zeros((ROWS, PADDED), dtype=tl.float32) + on_value
        for j in range(HIDDEN + 1):
            i = HIDDEN - j
            before = tl.load(kept + i * of_layer)
            if NORM:
                before, by = _normalised(before, tl.load(epsilons + i), WIDTH, PADDED)
                scale = _vector(scales, i, WIDTH, PADDED)
                gradient *= _mish_slope(before * scale + _vector(shifts, i, WIDTH, PADDED)) * scale
                mean = tl.sum(gradient, axis=1)[:, None] / WIDTH
                along = tl.sum(gradient * before, axis=1)[:, None] / WIDTH
                inside = (column < WIDTH)[None, :]
                gradient = tl.where(inside, (gradient - mean - before * along) * by, 0.0)
            else:
                gradient *= _mish_slope(before)
            if i > 0:
                start = tl.zeros((ROWS, PADDED), dtype=tl.float32)
                back = hidden_back + (i - 1) * WIDTH * WIDTH
                gradient = _product(gradient, back, scratch, start, WIDTH, PADDED, DEPTH, ROWS)
        at_action = tl.dot(gradient, tl.trans(on_action), input_precision="tf32x3")
        tl.store(gradients + critic * rows * action_dim + here, at_action, mask=present)


@triton.jit
def _chosen(gradients, values, place, rows, action_dim, CRITICS: tl.constexpr, MEAN: tl.constexpr):
    """The gradient of each row's smallest critic, or the mean of all."""
    inside = place < rows * action_dim
    row = place // action_dim
    gradient = tl.load(gradients + place, mask=inside, other=0.0)
    smallest = tl.load(values + row, mask=inside, other=0.0)
    for i in tl.static_range(1, CRITICS):
        other = tl.load(gradients + i * rows * action_dim + place, mask=inside, other=0.0)
        if MEAN:
            gradient += other
        else:
            value = tl.load(values + i * rows + row, mask=inside, other=0.0)
            smaller = (value < smallest) | (value != value)
            gradient, smallest = tl.where(smaller, other, gradient), tl.where(smaller, value, smallest)
    return gradient / CRITICS if MEAN else gradient


@triton.jit(do_not_specialize=SIZES)
def _adam_step(
    actions,  # (rows, action_dim)
    gradients,  # (CRITICS, rows, action_dim)
    values,  # (CRITICS, rows)
    moments,  # (2, rows, action_dim)
    low,  # (rows, action_dim)
    high,
    rows,
    action_dim,
    max_norm,
    share1,  # 1 - beta1, which float32 must not subtract
    beta2,
    share2,  # 1 - beta2
    rate,  # over 1 - beta1^step
    correction,  # 1 - beta2^step
    epsilon,
    CRITICS: tl.constexpr,
    MEAN: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    size = rows * action_dim
    squares = tl.zeros((ELEMENTS,), dtype=tl.float32)
    for block in range(BLOCKS):
        place = block * ELEMENTS + tl.arange(0, ELEMENTS)
        gradient = _chosen(gradients, values, place, rows, action_dim, CRITICS, MEAN)
        squares += gradient * gradient
    norm = tl.sqrt(tl.sum(squares))
    factor = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    for block in range(BLOCKS):
        place = block * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = place < size
        gradient = _chosen(gradients, values, place, rows, action_dim, CRITICS, MEAN) * factor
        first = tl.load(moments + place, mask=inside, other=0.0)
        second = tl.load(moments + size + place, mask=inside, other=0.0)
        first += (gradient - first) * share1
        second = second * beta2 + gradient * gradient * share2
        tl.store(moments + place, first, mask=inside)
        tl.store(moments + size + place, second, mask=inside)
        action = tl.load(actions + place, mask=inside, other=0.0)
        action += rate * first / (tl.sqrt(second / correction) + epsilon)
        if BOUNDED:
            below, above = tl.load(low + place, mask=inside, other=0.0), tl.load(high + place, mask=inside, other=0.0)
            action = tl.clamp(action, below, above, propagate_nan=tl.PropagateNan.ALL)
        else:
            action = tl.clamp(action, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(actions + place, action, mask=inside)


# ------------------------------------------------------------------------------------------------- calls


class TritonKernels:
    """
    The kernels, for MLPs whose hidden layers are all as wide as each other, at most ``MAX_WIDTH``.

    :param bfloat16: whether both sides of the products between hidden layers are rounded
    """

    device_type = "cuda"
    fewest_rows = 17  # of a batch for which they are faster than operators in a CUDA graph

    def __init__(self, bfloat16: bool = False):
        self.dtype = th.bfloat16 if bfloat16 else th.float32

    def __reduce__(self) -> tuple[Any, ...]:
        return triton_kernels_at_hand, (self.dtype is th.bfloat16,)

    def tried(self) -> "TritonKernels":
        """Themselves, after a first launch, which raises an error where none can be compiled."""
        one = th.zeros(2, 1, device=self.device_type)
        _adam_step[(1,)](one, *[one] * 5, 1, 1, *[1.0] * 7, CRITICS=1, MEAN=True, BOUNDED=False, BLOCKS=1, ELEMENTS=ELEMENTS)
        return self

    def take(self, *mlps: Sequence[Layer]) -> bool:
        """Whether they compute these MLPs."""
        hidden = [layer for layers in mlps for layer in layers[:-1]]
        alike = {(len(layer.bias), layer.scale is None) for layer in hidden}
        ends = {(len(layers), layers[-1].scale is None) for layers in mlps}
        # two matrices of as many columns lie beside the pieces of three more
        memory = 4 * MAX_WIDTH * (4 * max(_padded(len(layers[-1].bias)) for layers in mlps) + 68)
        known = len(alike) == 1 and ends == {(len(mlps[0]), True)} and alike.pop()[0] <= MAX_WIDTH
        return known and memory <= shared_memory()

    def rounded(self, *mlps: Sequence[Layer]) -> "TritonKernels":
        """The kernels that round."""
        return TritonKernels(bfloat16=True)

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
        """See :meth:`sb3_dipo.fast.kernels.Kernels.reverse_process`."""
        with th.no_grad(), th.cuda.device_of(features):  # where Triton launches
            actions = initial_noise.clone(memory_format=th.contiguous_format)
            rows, action_dim = actions.shape
            sizes = _Sizes(layers, rows, action_dim)
            _, on_time, on_state = layers[0].weight.split([action_dim, embedding.shape[1], features.shape[1]], dim=1)
            hidden, *others = self._packed([layers])
            _reverse_process[(sizes.tiles,)](
                actions,
                actions if noise is None else noise.contiguous(),
                coefficients,
                F.linear(features, on_state, layers[0].bias),
                F.linear(embedding, on_time),
                layers[0].weight,
                hidden,
                *others,
                layers[-1].weight,
                layers[-1].bias,
                actions.new_empty(sizes.tiles * ROWS, sizes.padded, dtype=self.dtype),
                rows,
                action_dim,
                layers[0].weight.shape[1],
                STEPS=len(coefficients),
                NOISY=noise is not None,
                CLIP=clip_sample,
                **sizes.options,
            )
            return actions

    def values(self, critics: Sequence[Sequence[Layer]], features: th.Tensor, actions: th.Tensor, mean: bool) -> th.Tensor:
        """See :meth:`sb3_dipo.fast.kernels.Kernels.values`."""
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
        """See :meth:`sb3_dipo.fast.kernels.Kernels.improve`."""
        with th.no_grad(), th.cuda.device_of(features):  # where Triton launches
            improved = actions.clone(memory_format=th.contiguous_format)
            (rows, action_dim), number, (beta1, beta2) = improved.shape, len(critics), betas
            sizes = _Sizes(critics[0], rows, action_dim)
            first = th.stack([layers[0].weight for layers in critics])
            on_state, on_action = first.split([features.shape[1], action_dim], dim=2)
            of_first = th.stack([layers[0].bias for layers in critics]).unsqueeze(1)
            of_state = th.baddbmm(of_first, features.expand(number, -1, -1), on_state.transpose(1, 2))
            hidden, *others = self._packed(critics)
            back = hidden.transpose(-1, -2).contiguous() if steps > 0 and len(critics[0]) > 2 else hidden
            last = th.stack([layers[-1].weight.mean(dim=0) for layers in critics])  # of one output, that is the weight itself
            last_bias = th.stack([layers[-1].bias.mean() for layers in critics])
            values, gradients = improved.new_empty(number, rows), improved.new_empty(number, rows, action_dim)
            padded = (sizes.tiles * ROWS, sizes.padded)
            kept = improved.new_empty(number, len(critics[0]) - 1, *padded)
            scratch = improved.new_empty(number, *padded, dtype=self.dtype)
            moments = improved.new_zeros(2, rows, action_dim)
            low, high = (improved, improved) if bounds is None else (each.contiguous() for each in bounds)
            matrices = (
                of_state,
                on_action.contiguous(),
                hidden,
                back,
                *others,
                last,
                last_bias,
                kept,
                scratch,
            )
            for step in range(1, max(steps, 1) + 1):
                _value_and_gradient[(sizes.tiles, number)](
                    improved, values, gradients, *matrices, rows, action_dim, BACKWARD=steps > 0, **sizes.options
                )
                if step == 1:
                    at_start = (values.mean(dim=0) if mean else values.amin(dim=0)).unsqueeze(1)
                if steps > 0:
                    _adam_step[(1,)](
                        improved,
                        gradients,
                        values,
                        moments,
                        low,
                        high,
                        rows,
                        action_dim,
                        max_norm,
                        1 - beta1,
                        beta2,
                        1 - beta2,
                        rate / (1 - beta1**step),
                        1 - beta2**step,
                        epsilon,
                        CRITICS=number,
                        MEAN=mean,
                        BOUNDED=bounds is not None,
                        BLOCKS=triton.cdiv(rows * action_dim, ELEMENTS),
                        ELEMENTS=ELEMENTS,
                        num_warps=8,
                    )
            return improved, at_start

    def _packed(self, mlps: Sequence[Sequence[Layer]]) -> list[th.Tensor]:
        """
        Weights (n_mlps, HIDDEN, WIDTH, WIDTH) and biases between hidden layers, and the LayerNorms' scales, shifts and eps,
        (n_mlps, 1 + HIDDEN, WIDTH) or (n_mlps, 1 + HIDDEN); anything for what there is not.
        """
        between = [layer for layers in mlps for layer in layers[1:-1]]
        first = mlps[0][0].bias
        hidden = th.stack([layer.weight for layer in between]).to(self.dtype) if between else first
        biases = th.stack([layer.bias for layer in between]) if between else first
        normed = [layer for layers in mlps for layer in layers[:-1] if layer.scale is not None]
        scales, shifts = (th.stack([layer.parameters()[i] for layer in normed]) if normed else first for i in (2, 3))
        # filled, not copied from the host, as a graph may be capturing
        epsilons = th.stack([th.full_like(layer.bias[0], layer.eps) for layer in normed]) if normed else first
        return [hidden, biases, scales, shifts, epsilons]


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


@functools.cache
def shared_memory() -> int:
    """Bytes of it that a block of the current GPU may have."""
    properties: Any = th.cuda.get_device_properties()
    return int(properties.shared_memory_per_block_optin)


class _Sizes:
    """Of tiles, and what the kernels are compiled for."""

    def __init__(self, layers: Sequence[Layer], rows: int, action_dim: int):
        width = len(layers[0].bias)
        self.tiles = triton.cdiv(rows, ROWS)
        self.padded = _padded(width)
        self.options: dict[str, Any] = dict(
            WIDTH=width,
            PADDED=self.padded,
            ACTIONS=_padded(action_dim),
            HIDDEN=len(layers) - 2,
            DEPTH=min(self.padded, max(8192 // self.padded, 16)),
            ROWS=ROWS,
            NORM=layers[0].scale is not None,
            num_warps=8,
            num_stages=3,
        )
