"""Count, sum and sum of squares of a tensor: what every variance in this package is made of.

The three numbers add up: over micro-batches, over calls, over ranks. ``merge`` is that addition, and the only
formula by which measurements meet. Everything is kept in float64, where the raw sums lose about
1e-16 · (mean/std)² of a variance: 1e-8 at mean/std = 1e4, and no gradient is small or large enough to
under- or overflow when squared. (In float32 the same sums return 0 at mean 100, std 0.01.)
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 17
"""Elements turned into float64 at a time: 1 MiB, so that the copy lives in the cache and not in the peak."""
_BLOCK_OF_ACCELERATORS = 1 << 22
"""The same where every block costs three kernel launches."""

_WORTH_IT = 1 << 14
"""Elements from which float32 sums, with their check, cost less than float64 copies."""
_DOT = 1 << 15
"""Elements of one float32 dot product. Equal addends are its worst case, rounding every partial sum the same way:
4e-6 of the result at this length, 2e-5 at four times this; random ones, 1e-7."""
_LEAST_SQUARE = 1e-37
"""A mean square above which a float32 sum of squares has lost nothing to underflow: what it may lose is 1e-45 each."""
_LEAST_SIGNAL = 0.125
"""Share of Σx² that has to remain when the units' means are taken out. Below it, cancellation makes rounding count."""


class Moments(NamedTuple):
    """Sums over some elements, laid out in units (features, channels).

    Attributes:
        n: number of elements, all units together. A plain number: shapes are known without a device read.
        sums: Σx of each unit, float64, [units].
        squares: Σx² over all units, float64, [].
    """

    n: float
    sums: Tensor
    squares: Tensor


def observe(values: Tensor, unit_dim: int | None = None) -> Moments:
    """Moments of ``values``, per unit along ``unit_dim``; None treats all elements as one unit.

    Runs without a host decision, without autograd and the same under autocast or any default dtype.

    Args:
        values: any floating dtype, any shape, any strides, also empty.
        unit_dim: the dimension whose entries are units.

    Returns:
        The moments, with ``values.shape[unit_dim]`` units, on the device of ``values`` (on the CPU where the
        device has no float64).

    >>> observe(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), unit_dim=1)
    Moments(n=4, sums=tensor([4., 8.], dtype=torch.float64), squares=tensor(50., dtype=torch.float64))
    """
    values = values.detach()
    if values.device.type == "mps":
        values = values.cpu()  # Apple's GPUs have no float64
    blocks = _as_blocks(values, unit_dim)
    fast = values.dtype == torch.float32 and values.device.type == "cpu" and values.numel() >= _WORTH_IT
    return (_in_float32(blocks) if fast else None) or _in_float64(blocks)


def sum_of_squares(values: Tensor) -> Tensor:
    """Σx² alone, [] float64: half the work of :func:`observe`, with the same care."""
    if values.dtype == torch.float32 and values.device.type == "cpu" and values.numel() >= _WORTH_IT:
        total = _dot(values.detach().reshape(-1))
        if _LEAST_SQUARE * values.numel() < total < math.inf:
            return torch.tensor(total, dtype=torch.float64, device="cpu")
    return observe(values).squares


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of elements together: associative, and the order does not matter."""
    return Moments(a.n + b.n, a.sums + b.sums, a.squares + b.squares)


def scale(moments: Moments, factor: float | Tensor) -> Moments:
    """Moments of ``factor * x``."""
    return Moments(moments.n, moments.sums * factor, moments.squares * factor**2)


def pack(moments: Moments) -> Tensor:
    """One float64 vector [2 + units]: count, Σx², Σx of each unit. Vectors of the same units add up."""
    head = moments.squares.new_tensor([moments.n])
    return torch.cat((head, moments.squares.reshape(1), moments.sums))


def unpack(vector: Tensor) -> Moments:
    """The inverse of ``pack``; reads the count from the device."""
    return Moments(vector[0].item(), vector[2:], vector[1])


def variance(moments: Moments) -> Tensor:
    """Population variance of all elements: Σx²/n - (Σx/n)², [] float64; nan of nothing."""
    mean = moments.sums.sum() / moments.n if moments.n else moments.squares.new_tensor(torch.nan)
    return (moments.squares / (moments.n or 1) - mean**2).clamp_min(0)


def signal_variance(moments: Moments) -> Tensor:
    """Mean over units of each unit's population variance, [] float64; nan of nothing.

    With m = count / units elements a unit: (Σx² - Σ_u (Σx)_u² / m) / (m · units).
    """
    per_unit = moments.n / max(1, moments.sums.numel())
    between = (moments.sums**2).sum() / per_unit if per_unit else moments.squares.new_tensor(torch.nan)
    return ((moments.squares - between) / (moments.n or 1)).clamp_min(0)


def _in_float32(blocks: Tensor) -> Moments | None:
    """Sums without a copy, three to eight times as fast; None if they cannot be trusted.

    They are checked, so this decides on the host: only for the CPU, where that waits for nothing.
    """
    if not blocks.is_contiguous():
        return None
    outer, units, inner = blocks.shape
    count, total = outer * units * inner, 0.0
    sums = []
    for block in torch.split(blocks, max(1, _BLOCK // (units * inner))) if count > _BLOCK else (blocks,):
        sums.append(block.sum(2).sum(0) if inner > 1 else block.view(-1, units).sum(0))
        total += _dot(block.view(-1))  # finds the block in the cache
    sums_of_units = torch.stack(sums).sum(0, dtype=torch.float64) if len(sums) > 1 else sums[0].double()
    signal = total - _host(torch.dot(sums_of_units, sums_of_units)) * units / count
    if _LEAST_SQUARE * count < total < math.inf and signal > _LEAST_SIGNAL * total:
        return Moments(count, sums_of_units, sums_of_units.new_tensor(total))
    return None


def _dot(flat: Tensor) -> float:
    """Σx² of float32 numbers on the CPU, by dot products."""
    return sum(_host(torch.dot(part, part)) for part in (flat.split(_DOT) if len(flat) > _DOT else (flat,)))


def _host(scalar: Tensor) -> float:
    """A number that is on the host already: its memory is read, nothing is launched and nothing copied."""
    return float(scalar.numpy())


def _in_float64(blocks: Tensor) -> Moments:
    """Sums over float64 copies of a cache's size: nothing can go wrong."""
    outer, units, inner = blocks.shape
    sums = torch.zeros(units, dtype=torch.float64, device=blocks.device)
    squares = torch.zeros((), dtype=torch.float64, device=blocks.device)
    limit = _BLOCK if blocks.device.type == "cpu" else _BLOCK_OF_ACCELERATORS
    for block in torch.split(blocks, max(1, limit // max(1, units * inner))) if blocks.numel() else ():
        copy = block.to(torch.float64, memory_format=torch.contiguous_format)
        sums += copy.sum((0, 2)) if inner > 1 else copy.sum(0).squeeze(1)
        flat = copy.view(-1)
        squares += torch.dot(flat, flat)
    return Moments(outer * units * inner, sums, squares)


def _as_blocks(values: Tensor, unit_dim: int | None) -> Tensor:
    """``values`` as [outer, units, inner], without copying where its strides allow it."""
    if unit_dim is None or values.dim() == 0:
        return values.reshape(values.numel(), 1, 1)
    if (units_last := values.movedim(unit_dim, -1)).is_contiguous():  # also channels_last images
        values, unit_dim = units_last, -1
    dim = unit_dim % values.dim()
    outer, inner = values.shape[:dim].numel(), values.shape[dim + 1 :].numel()
    return values.reshape(outer, values.shape[dim], inner)


def _observe_block(block: Tensor) -> Moments:
    """Moments of [outer, units, inner] by way of one float64 copy.

    A product with ones is how a CPU adds up rows or columns fastest.
    """
    outer, units, inner = block.shape
    flat = block.to(torch.float64, memory_format=torch.contiguous_format).view(-1)
    sums = flat
    if inner != 1:
        sums = flat.view(outer * units, inner) @ flat.new_ones(inner)
    if units == 1:
        sums = sums.sum().view(1)
    elif outer != 1:
        sums = flat.new_ones(outer) @ sums.view(outer, units)
    elif sums is flat:
        sums = flat.clone()  # one row: its own sums, and nobody else's memory
    return Moments(flat.numel(), sums, torch.dot(flat, flat))
