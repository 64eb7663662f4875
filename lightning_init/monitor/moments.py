"""Count, sum and sum of squares of a tensor, of which every variance in this package is made; and central moments.

The three numbers add up: over micro-batches, over calls, over ranks. ``merge`` is that addition, and the only
formula that joins two measurements. Everything is float64: there the raw sums lose up to 3e-14 · (mean/std)² of a
variance, which is 3e-6 at mean/std = 1e4, and no gradient is so small or large that its square under- or overflows.

On the CPU, float32 tensors take a fast path, compiled from ``_sums.c`` when the package is installed with a C compiler
at hand: both sums in one pass, without a copy. All other tensors, and all tensors where nothing was compiled, are
summed by PyTorch over float64 copies that fit into the cache. Inside a training step, whose matrices have filled the
caches, every function of PyTorch costs 5 to 50 µs before it has added anything; the compiled call is fast because it
replaces a dozen of them.

A kurtosis needs fourth powers, and those lose everything far from zero when they are summed as they are. They are
therefore summed as powers of the distance from the mean (:class:`CentralMoments`), and shifted when means differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

import lightning_init.native as native

Number: TypeAlias = float | Tensor
"""A float where it is known on the host without waiting for a device, else a float64 tensor of shape []."""

_LOWEST_ADDRESS = 1 << 32
"""Below it, ``data_ptr`` is not a real address: empty and efficient-zero tensors report 0 plus an offset."""
_BLOCK = 1 << 17
"""Elements copied to float64 at a time on the CPU: 1 MiB fits into the cache and does not show in peak memory."""
_BLOCK_OF_ACCELERATORS = 1 << 22
"""The same on an accelerator, where every block costs three kernel launches, so that blocks are larger: 32 MiB."""


class Moments(NamedTuple):
    """Count, sums and sum of squares of some elements, the sums for each unit (feature, channel) or in total.

    For example, of an output of shape [batch, features] the sums are those of its columns.

    Attributes:
        n: number of elements of all units. A plain number, because shapes are known on the host.
        sums: Σx of each unit, float64 [units]; a single number where units are not told apart.
        squares: Σx² over all elements.
    """

    n: float
    sums: Number
    squares: Number


def moments_of(tensor: Tensor, unit_dim: int | None = None, memory: Number | None = None) -> Moments:
    """The moments of ``tensor``: count, sum of each unit, and sum of squares.

    Never waits for a device, records nothing for autograd, and gives the same under autocast or any default dtype.

    Args:
        tensor: of any floating dtype, shape and strides; it may be empty.
        unit_dim: the dimension whose entries are units; None: the sum is over all elements.
        memory: ``sums`` of earlier moments that nobody reads any more; they are overwritten if the size is right.

    Returns:
        The moments, with ``tensor.shape[unit_dim]`` units, on the device of ``tensor`` (on the CPU where the
        device has no float64).

    >>> moments_of(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), unit_dim=1)
    Moments(n=4, sums=tensor([4., 8.], dtype=torch.float64), squares=50.0)
    >>> moments_of(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    Moments(n=4, sums=12.0, squares=50.0)
    """
    moments = _in_one_pass(tensor, unit_dim, memory)
    return _in_float64(tensor.detach(), unit_dim) if moments is None else moments


def needs_device_sync(tensor: Tensor) -> bool:
    """Whether the host would have to wait for a device before it could read a number of ``tensor``."""
    return not tensor.is_cpu


def has_fast_path(tensor: Tensor) -> bool:
    """Whether the compiled code can sum ``tensor`` in one call, provided its memory has no gaps.

    Grouping such tensors to save calls gains nothing.
    """
    compiled = native.sums is not None and type(tensor) is Tensor and tensor.dtype is torch.float32
    return compiled and tensor.is_cpu and tensor.layout is torch.strided


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of elements together: associative, and the order does not matter."""
    return Moments(a.n + b.n, a.sums + b.sums, a.squares + b.squares)


def scale(moments: Moments, factor: Number) -> Moments:
    """Moments of ``factor * x``."""
    if isinstance(factor, float) and factor == 1.0:
        return moments
    return Moments(moments.n, moments.sums * factor, moments.squares * factor**2)


def pack(numbers: Sequence[Number], device: torch.device) -> Tensor:
    """``numbers`` as one float64 vector on ``device``, without waiting for it.

    Numbers known on the host are copied together; numbers on a device are stacked there.
    """
    # "not a number" instead of "a tensor", because Tensor overrides isinstance, which then takes longer
    on_device = {i: number for i, number in enumerate(numbers) if not isinstance(number, (float, int))}
    known = [0.0 if i in on_device else number for i, number in enumerate(numbers)] if on_device else numbers
    vector = torch.from_numpy(np.array(known, dtype=np.float64)).to(device, non_blocking=True)
    if on_device:
        vector[list(on_device)] = torch.stack([number.to(device) for number in on_device.values()])
    return vector


def add_up(numbers: Sequence[Number]) -> Number:
    """The sum of ``numbers``: a float, or if any is on a device, a tensor there, without waiting for it."""
    device = next((number.device for number in numbers if isinstance(number, Tensor)), None)
    return sum(numbers) if device is None else pack(numbers, device).sum()


def variance(moments: Moments) -> Number:
    """Population variance of all elements: Σx²/n - (Σx/n)²; nan of nothing."""
    n = moments.n or math.nan
    total = moments.sums.sum() if isinstance(moments.sums, Tensor) else moments.sums
    return _not_negative(moments.squares / n - (total / n) ** 2)


def signal_variance(moments: Moments) -> Number:
    """Mean over units of each unit's population variance; nan of nothing.

    With m = count / units elements a unit: (Σx² - Σ_u (Σx)_u² / m) / (m · units).
    """
    n, sums = moments.n or math.nan, moments.sums
    between = sums.square().sum() * sums.numel() if isinstance(sums, Tensor) else sums**2
    return _not_negative((moments.squares - between / n) / n)


def _not_negative(value: Number) -> Number:
    """``value``, or 0 if rounding has made it negative; NaN stays NaN."""
    return value.clamp_min(0) if isinstance(value, Tensor) else 0.0 if value < 0 else value


def _in_one_pass(tensor: Tensor, unit_dim: int | None, memory: Number | None = None) -> Moments | None:
    """The moments by ``_sums.c``, straight from memory; None if it cannot read this tensor there."""
    if not has_fast_path(tensor):
        return None
    n = tensor.numel()
    address = tensor.data_ptr()
    sizes = _sizes(tensor.shape, unit_dim) if tensor.is_contiguous() else _sizes_in_memory(tensor, unit_dim)
    if sizes is None or address < _LOWEST_ADDRESS or tensor.is_neg():
        return None
    if unit_dim is None:
        return Moments(n, *native.sums.whole(address, n))
    outer, units, inner = sizes
    if type(memory) is Tensor and memory.is_cpu and memory.dtype is torch.float64 and len(memory) == units:
        sums = memory
    else:
        sums = torch.empty(units, dtype=torch.float64, device="cpu")
    return Moments(n, sums, native.sums.by_unit(address, outer, units, inner, sums.data_ptr()))


def _sizes_in_memory(tensor: Tensor, unit_dim: int | None) -> tuple[int, int, int] | None:
    """The sizes [outer, units, inner] of ``tensor`` in the order of its memory; None if that has gaps or overlaps.

    A transposed matrix, for example, has no gaps: its dimensions are only stored in another order.
    """
    shape, strides = tensor.shape, tensor.stride()
    order = sorted((dim for dim in range(len(shape)) if shape[dim] > 1), key=lambda dim: -strides[dim])
    dense_stride = 1
    for dim in reversed(order):
        if strides[dim] != dense_stride:
            return None
        dense_stride *= shape[dim]
    if unit_dim is None or (unit := unit_dim % len(shape)) not in order:
        return 1, 1, tensor.numel()  # no units, or only one
    return _sizes(tuple(shape[dim] for dim in order), order.index(unit))


def _in_float64(tensor: Tensor, unit_dim: int | None) -> Moments:
    """The moments by PyTorch, of any tensor, over float64 copies of a block at a time."""
    blocks = _as_blocks(tensor.cpu() if tensor.is_mps else tensor, unit_dim)  # Apple's GPUs have no float64
    _, units, inner = blocks.shape
    limit = _BLOCK_OF_ACCELERATORS if needs_device_sync(blocks) else _BLOCK
    first, *others = torch.split(blocks, max(1, limit // max(1, units * inner)))
    sums, squares = _float64_sums(first)
    for block in others:
        more_sums, more_squares = _float64_sums(block)
        sums += more_sums
        squares += more_squares
    total = sums.sum() if unit_dim is None else sums
    if needs_device_sync(blocks):
        return Moments(tensor.numel(), total, squares)
    return Moments(tensor.numel(), total.item() if unit_dim is None else total, squares.item())


def _float64_sums(block: Tensor) -> tuple[Tensor, Tensor]:
    """Σx of each unit, [units], and Σx², [], of a block [outer, units, inner]."""
    copy = block.to(torch.float64, memory_format=torch.contiguous_format)
    flat = copy.view(-1)
    return copy.sum((0, 2)) if copy.shape[2] > 1 else copy.sum(0).squeeze(1), torch.dot(flat, flat)


def _as_blocks(tensor: Tensor, unit_dim: int | None) -> Tensor:
    """``tensor`` as [outer, units, inner], without copying where its strides allow it."""
    if unit_dim is None or tensor.dim() == 0:
        return tensor.reshape(tensor.numel(), 1, 1)
    if not tensor.is_contiguous() and (units_last := tensor.movedim(unit_dim, -1)).is_contiguous():
        tensor, unit_dim = units_last, -1  # a channels_last image
    return tensor.reshape(_sizes(tensor.shape, unit_dim))


@functools.lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, ...], unit_dim: int | None) -> tuple[int, int, int]:
    """The sizes [outer, units, inner] of a shape. Cached: a layer's outputs rarely change their shape."""
    if unit_dim is None or not shape:
        return 1, 1, math.prod(shape)
    dim = unit_dim % len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


class CentralMoments(NamedTuple):
    """Sums of powers of the distance from the mean, each a float64 tensor of shape [].

    Attributes:
        n: number of elements.
        mean: their mean, 0 of none.
        m2: Σ(x - mean)².
        m3: Σ(x - mean)³.
        m4: Σ(x - mean)⁴.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor


Measured: TypeAlias = Tensor | CentralMoments
"""What a statistic measures of a layer's outputs beside their moments."""


def central_moments_of(tensor: Tensor) -> CentralMoments:
    """The central moments of all elements of ``tensor``."""
    flat = tensor.detach().reshape(-1)
    return functools.reduce(merge_central, map(_central_moments_of_block, flat.split(_BLOCK)))  # type: ignore[no-untyped-call]


def _central_moments_of_block(block: Tensor) -> CentralMoments:
    numbers = block.to(torch.float64)
    n = torch.tensor(float(len(numbers)), dtype=torch.float64, device=numbers.device)
    mean = numbers.sum() / n.clamp_min(1)
    distance = numbers - mean
    square = distance * distance
    return CentralMoments(n, mean, square.sum(), torch.dot(square, distance), torch.dot(square, square))


def merge_central(a: CentralMoments, b: CentralMoments) -> CentralMoments:
    """Central moments of both sets of elements together: each is shifted to their common mean, then they add up."""
    n = a.n + b.n
    mean = (a.n * a.mean + b.n * b.mean) / n.clamp_min(1)
    return CentralMoments(n, mean, *(x + y for x, y in zip(shifted_to(a, mean), shifted_to(b, mean), strict=True)))


def shifted_to(central: CentralMoments, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ(x - centre)², Σ(x - centre)³ and Σ(x - centre)⁴, from the powers of the distance from the mean.

    With d = x - mean and shift = mean - centre, x - centre is d + shift, and Σ(d + shift)ᵏ follows from the binomial
    theorem with Σd = 0.
    """
    n, mean, m2, m3, m4 = central
    shift = mean - centre
    return (
        m2 + n * shift**2,
        m3 + 3 * shift * m2 + n * shift**3,
        m4 + 4 * shift * m3 + 6 * shift**2 * m2 + n * shift**4,
    )
