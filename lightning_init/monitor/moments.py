"""Count, sum and sum of squares of a tensor: what every variance in this package is made of.

The three numbers add up: over micro-batches, over calls, over ranks. ``merge`` is that addition, and the only
formula by which measurements meet. They meet in float64, where the raw sums lose up to 3e-14 · (mean/std)² of a
variance: 3e-6 at mean/std = 1e4, and no gradient is small or large enough to under- or overflow when squared.

On the CPU, float32 tensors take a fast path, compiled from ``_sums.c`` when the package is installed with a C compiler
at hand: both sums in one pass, without a copy. Every other tensor, or without it every tensor, is summed by PyTorch
over float64 copies of a cache's size. Inside a training step, whose matrices have taken the caches, every function of
PyTorch costs 5 to 50 µs before it has added anything: that one call replaces a dozen of them is what makes it fast.
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
"""A float where it is known without waiting for a device, else a float64 tensor, []."""

_LOWEST_ADDRESS = 1 << 32
"""What lies below is no memory but a distance from 0: of nothing, and of the zeros that autograd makes without any."""
_BLOCK = 1 << 17
"""Elements turned into float64 at a time: 1 MiB, so that the copy lives in the cache and not in the peak."""
_BLOCK_OF_ACCELERATORS = 1 << 22
"""The same where every block costs three kernel launches."""


class Moments(NamedTuple):
    """Sums over some elements, laid out in units (features, channels), or of all elements together.

    Attributes:
        n: number of elements, all units together. A plain number: shapes are known without a device read.
        sums: Σx of each unit, float64 [units]; of all elements together, a number.
        squares: Σx² over all units.
    """

    n: float
    sums: Number
    squares: Number


def moments_of(values: Tensor, unit_dim: int | None = None, memory: Number | None = None) -> Moments:
    """Moments of ``values``, per unit along ``unit_dim``; None takes all elements together.

    Runs without waiting for a device, without autograd and the same under autocast or any default dtype.

    Args:
        values: any floating dtype, any shape, any strides, also empty.
        unit_dim: the dimension whose entries are units.
        memory: the ``sums`` of moments that nobody needs any more, to be written over if they fit.

    Returns:
        The moments, with ``values.shape[unit_dim]`` units, on the device of ``values`` (on the CPU where the
        device has no float64).

    >>> observe(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), unit_dim=1)
    Moments(n=4, sums=tensor([4., 8.], dtype=torch.float64), squares=50.0)
    >>> observe(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    Moments(n=4, sums=12.0, squares=50.0)
    """
    moments = _in_one_pass(values, unit_dim, memory)
    return _in_float64(values.detach(), unit_dim) if moments is None else moments


def needs_device_sync(values: Tensor) -> bool:
    """Whether reading a number of ``values`` would wait for a device."""
    return not values.is_cpu


def has_fast_path(values: Tensor) -> bool:
    """Whether sums of ``values`` cost one call, if its memory has no gaps: there is nothing to gain by grouping."""
    quick = native.sums is not None and type(values) is Tensor and values.dtype is torch.float32
    return quick and values.is_cpu and values.layout is torch.strided


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of elements together: associative, and the order does not matter."""
    return Moments(a.n + b.n, a.sums + b.sums, a.squares + b.squares)


def scale(moments: Moments, factor: Number) -> Moments:
    """Moments of ``factor * x``."""
    if isinstance(factor, float) and factor == 1.0:
        return moments
    return Moments(moments.n, moments.sums * factor, moments.squares * factor**2)


def pack(numbers: Sequence[Number], device: torch.device) -> Tensor:
    """``numbers`` as one float64 vector on ``device``: what is known here in one copy, the rest without waiting."""
    # Asked this way round, because Tensor has a type check of its own, which takes longer.
    on_device = {i: number for i, number in enumerate(numbers) if not isinstance(number, (float, int))}
    known = [0.0 if i in on_device else number for i, number in enumerate(numbers)] if on_device else numbers
    vector = torch.from_numpy(np.array(known, dtype=np.float64)).to(device, non_blocking=True)
    if on_device:
        vector[list(on_device)] = torch.stack([number.to(device) for number in on_device.values()])
    return vector


def add_up(numbers: Sequence[Number]) -> Number:
    """Their sum, on the device of the first that is on one, without waiting for it."""
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
    """What rounding has made negative is 0; NaN stays."""
    return value.clamp_min(0) if isinstance(value, Tensor) else 0.0 if value < 0 else value


def _in_one_pass(values: Tensor, unit_dim: int | None, memory: Number | None = None) -> Moments | None:
    """By ``_sums.c``, straight from memory; None for what it cannot read there."""
    if not has_fast_path(values):
        return None
    n = values.numel()
    address = values.data_ptr()
    sizes = _sizes(values.shape, unit_dim) if values.is_contiguous() else _sizes_in_memory(values, unit_dim)
    if sizes is None or address < _LOWEST_ADDRESS or values.is_neg():
        return None
    if unit_dim is None:
        return Moments(n, *native.sums.whole(address, n))
    outer, units, inner = sizes
    if type(memory) is Tensor and memory.is_cpu and memory.dtype is torch.float64 and len(memory) == units:
        sums = memory
    else:
        sums = torch.empty(units, dtype=torch.float64, device="cpu")
    return Moments(n, sums, native.sums.by_unit(address, outer, units, inner, sums.data_ptr()))


def _sizes_in_memory(values: Tensor, unit_dim: int | None) -> tuple[int, int, int] | None:
    """``values`` as [outer, units, inner] in the order of its memory; None if that has gaps or overlaps."""
    shape, strides = values.shape, values.stride()
    order = sorted((dim for dim in range(len(shape)) if shape[dim] > 1), key=lambda dim: -strides[dim])
    step = 1
    for dim in reversed(order):
        if strides[dim] != step:
            return None
        step *= shape[dim]
    if unit_dim is None or (unit := unit_dim % len(shape)) not in order:
        return 1, 1, values.numel()  # all together, or one unit
    return _sizes(tuple(shape[dim] for dim in order), order.index(unit))


def _in_float64(values: Tensor, unit_dim: int | None) -> Moments:
    """Sums over float64 copies of a cache's size: nothing can go wrong."""
    blocks = _as_blocks(values.cpu() if values.is_mps else values, unit_dim)  # Apple's GPUs have no float64
    _, units, inner = blocks.shape
    limit = _BLOCK_OF_ACCELERATORS if needs_device_sync(blocks) else _BLOCK
    parts = torch.split(blocks, max(1, limit // max(1, units * inner)))
    sums, squares = _float64_sums(parts[0])
    for block in parts[1:]:
        more_sums, more_squares = _float64_sums(block)
        sums += more_sums
        squares += more_squares
    total = sums.sum() if unit_dim is None else sums
    if needs_device_sync(blocks):
        return Moments(values.numel(), total, squares)
    return Moments(values.numel(), total.item() if unit_dim is None else total, squares.item())


def _float64_sums(block: Tensor) -> tuple[Tensor, Tensor]:
    """Σx of each unit, [units], and Σx², [], of any [outer, units, inner]."""
    copy = block.to(torch.float64, memory_format=torch.contiguous_format)
    flat = copy.view(-1)
    return copy.sum((0, 2)) if copy.shape[2] > 1 else copy.sum(0).squeeze(1), torch.dot(flat, flat)


def _as_blocks(values: Tensor, unit_dim: int | None) -> Tensor:
    """``values`` as [outer, units, inner], without copying where its strides allow it."""
    if unit_dim is None or values.dim() == 0:
        return values.reshape(values.numel(), 1, 1)
    if not values.is_contiguous() and (units_last := values.movedim(unit_dim, -1)).is_contiguous():
        values, unit_dim = units_last, -1  # a channels_last image
    return values.reshape(_sizes(values.shape, unit_dim))


@functools.lru_cache(maxsize=4096)
def _sizes(shape: tuple[int, ...], unit_dim: int | None) -> tuple[int, int, int]:
    """[outer, units, inner]. Remembered: a layer's outputs have the same shape at every logged step."""
    if unit_dim is None or not shape:
        return 1, 1, math.prod(shape)
    dim = unit_dim % len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


_BLOCK = 1 << 17


class CentralMoments(NamedTuple):
    """Sums of powers of the distance from the mean of ``n`` elements; all float64, []."""

    n: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor


def central_moments_of(values: Tensor) -> CentralMoments:
    """The central moments of all elements, in float64."""
    flat = values.detach().reshape(-1)
    return functools.reduce(merge_central, map(_of_block, flat.split(_BLOCK)))  # type: ignore[no-untyped-call]


def _of_block(block: Tensor) -> CentralMoments:
    numbers = block.to(torch.float64)
    n = torch.tensor(float(len(numbers)), dtype=torch.float64, device=numbers.device)
    mean = numbers.sum() / n.clamp_min(1)
    distance = numbers - mean
    square = distance * distance
    return CentralMoments(n, mean, square.sum(), torch.dot(square, distance), torch.dot(square, square))


def merge_central(a: CentralMoments, b: CentralMoments) -> CentralMoments:
    """Moments of both sets of elements: both shifted to the common mean."""
    n = a.n + b.n
    mean = (a.n * a.mean + b.n * b.mean) / n.clamp_min(1)
    return CentralMoments(n, mean, *(x + y for x, y in zip(shifted_to(a, mean), shifted_to(b, mean), strict=True)))


def shifted_to(central: CentralMoments, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ(x - c)², Σ(x - c)³, Σ(x - c)⁴: with s = mean - c, Σ(d + s)ᵏ by the binomial theorem."""
    n, mean, second, third, fourth = central
    shift = mean - centre
    return (
        second + n * shift**2,
        third + 3 * shift * second + n * shift**3,
        fourth + 4 * shift * third + 6 * shift**2 * second + n * shift**4,
    )
