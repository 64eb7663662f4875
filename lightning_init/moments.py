"""Count, sum and sum of squares of a tensor: what every variance in this package is made of.

The three numbers add up: over micro-batches, over calls, over ranks. ``merge`` is that addition, and the only
formula by which measurements meet. They meet in float64, where the raw sums lose about 1e-16 · (mean/std)² of a
variance: 1e-8 at mean/std = 1e4, and no gradient is small or large enough to under- or overflow when squared.
In float32 the same sums return 0 at mean 100, std 0.01: on the CPU they are tried first, for they cost a quarter,
and kept only where a check shows that nothing was lost.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 17
"""Elements turned into float64 at a time: 1 MiB, so that the copy lives in the cache and not in the peak."""
_BLOCK_OF_ACCELERATORS = 1 << 22
"""The same where every block costs three kernel launches."""

_WORTH_IT = 1 << 12
"""Elements from which float32 sums, with their check, cost less than float64 copies."""
_ROW = 1 << 10
"""Elements whose squares are added up one after the other, 16 at a time."""
_LEAST_SQUARE, _LARGEST_SQUARE = 1e-36, 1e30
"""Mean squares between which float32 sums of squares lose nothing to underflow and have room to be merged."""
_LEAST_SIGNAL = 1 / 32
"""Share of Σx² that has to remain when the units' means are taken out, lest cancellation make rounding count."""


class Moments(NamedTuple):
    """Sums over some elements, laid out in units (features, channels).

    Attributes:
        n: number of elements, all units together. A plain number: shapes are known without a device read.
        sums: Σx of each unit, float64 (float32 where that is as good), [units].
        squares: Σx² over all units, likewise, [].
    """

    n: float
    sums: Tensor
    squares: Tensor


def observe(values: Tensor, unit_dim: int | None = None) -> Moments:
    """Moments of ``values``, per unit along ``unit_dim``; None treats all elements as one unit.

    Runs without waiting for a device, without autograd and the same under autocast or any default dtype.

    Args:
        values: any floating dtype, any shape, any strides, also empty.
        unit_dim: the dimension whose entries are units.

    Returns:
        The moments, with ``values.shape[unit_dim]`` units, on the device of ``values`` (on the CPU where the
        device has no float64).

    >>> observe(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), unit_dim=1)
    Moments(n=4, sums=tensor([4., 8.], dtype=torch.float64), squares=tensor(50., dtype=torch.float64))
    """
    if values.requires_grad:
        values = values.detach()
    if values.dtype == torch.float32 and values.numel() >= _WORTH_IT and values.is_cpu:
        moments = _in_float32(values, unit_dim)
        if moments is not None:
            return moments
    return _in_float64(values.cpu() if values.is_mps else values, unit_dim)  # Apple's GPUs have no float64


def sum_of_squares(values: Tensor) -> Tensor:
    """Σx² alone, [] float64: half the work of :func:`observe`, with the same care."""
    flat = values.detach().reshape(-1)
    count = flat.numel()
    if flat.dtype == torch.float32 and count >= _WORTH_IT and flat.is_cpu:
        squares = _squares(flat)
        if _LEAST_SQUARE < squares.item() / count < _LARGEST_SQUARE:
            return squares.double()
    if count <= _BLOCK and not flat.is_mps:
        wide = flat.double()
        return torch.dot(wide, wide)
    return observe(flat).squares.double()


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of elements together, in float64: associative, and the order does not matter.

    (In float32 a thousand merges, of a recurrent cell's calls say, would be off by 1e-5 and more.)
    """
    return Moments(a.n + b.n, a.sums.double() + b.sums, a.squares.double() + b.squares)


def scale(moments: Moments, factor: float | Tensor) -> Moments:
    """Moments of ``factor * x``."""
    if isinstance(factor, float) and factor == 1.0:
        return moments
    return Moments(moments.n, moments.sums.double() * factor, moments.squares.double() * factor**2)


def pack(moments: Moments) -> Tensor:
    """One float64 vector [2 + units]: count, Σx², Σx of each unit. Vectors of the same units add up."""
    head = torch.tensor([moments.n], dtype=torch.float64, device=moments.sums.device)
    return torch.cat((head, moments.squares.reshape(1), moments.sums)).double()


def unpack(vector: Tensor) -> Moments:
    """The inverse of ``pack``; reads the count from the device."""
    return Moments(vector[0].item(), vector[2:], vector[1])


def variance(moments: Moments) -> Tensor:
    """Population variance of all elements: Σx²/n - (Σx/n)², [] float64; nan of nothing."""
    mean = moments.sums.double().sum() / (moments.n or torch.nan)
    return (moments.squares.double() / (moments.n or 1) - mean**2).clamp_min(0)


def signal_variance(moments: Moments) -> Tensor:
    """Mean over units of each unit's population variance, [] float64; nan of nothing.

    With m = count / units elements a unit: (Σx² - Σ_u (Σx)_u² / m) / (m · units).
    """
    per_unit = moments.n / max(1, moments.sums.numel())
    between = (moments.sums.double() ** 2).sum() / (per_unit or torch.nan)
    return ((moments.squares.double() - between) / (moments.n or 1)).clamp_min(0)


def _in_float32(values: Tensor, unit_dim: int | None) -> Moments | None:
    """The sums without copies, in a quarter of the time; None where they cannot be trusted.

    Only on the CPU, where asking for a number waits for nothing. Inside a training step, whose matrices have taken
    the cache, the first call of any function of torch costs ten times what it costs in a loop: hence so few.
    """
    count = values.numel()
    if not values.is_contiguous():
        values, unit_dim = _as_blocks(values, unit_dim).contiguous(), 1
    sums, squares = _sums(values, unit_dim), _squares(values.view(-1))
    total = squares.item()
    between = (sums.item() ** 2 if unit_dim is None else torch.dot(sums, sums).item() * sums.numel()) / count
    if _LEAST_SQUARE * count < total < _LARGEST_SQUARE * count and total - between > _LEAST_SIGNAL * total:
        return Moments(count, sums, squares)
    return None


def _sums(values: Tensor, unit_dim: int | None) -> Tensor:
    """Σx of each unit of a contiguous tensor, [units]."""
    if unit_dim is None:
        return values.view(-1).sum(0, keepdim=True)
    if unit_dim in (-1, values.dim() - 1):
        return values.sum(0) if values.dim() == 2 else values.view(-1, values.shape[-1]).sum(0)
    outer, units, inner = _sizes(values.shape, unit_dim)
    return values.view(outer, units, inner).sum(2).sum(0)


def _squares(flat: Tensor) -> Tensor:
    """Σx² of float32 numbers, off by 1e-7.

    Equal magnitudes are the worst case: they round every partial sum the same way, by 2e-5 in a dot product of 2¹⁷,
    6e-5 in one of 2²⁰. Hence rows, and the dot product of their norms, where there are more.
    """
    count = flat.numel()
    if count <= _BLOCK:
        return torch.dot(flat, flat)
    if rest := count % _ROW:
        return _squares(flat[:-rest]) + _squares(flat[-rest:])
    norms = torch.linalg.vector_norm(flat.view(-1, _ROW), dim=1)
    return torch.dot(norms, norms)


def _in_float64(values: Tensor, unit_dim: int | None) -> Moments:
    """Sums over float64 copies of a cache's size: nothing can go wrong."""
    blocks = _as_blocks(values, unit_dim)
    outer, units, inner = blocks.shape
    limit = _BLOCK if blocks.is_cpu else _BLOCK_OF_ACCELERATORS
    if outer * units * inner <= limit:
        return Moments(outer * units * inner, *_float64_sums(blocks))
    sums = torch.zeros(units, dtype=torch.float64, device=blocks.device)
    squares = torch.zeros((), dtype=torch.float64, device=blocks.device)
    for block in torch.split(blocks, max(1, limit // (units * inner))):
        more_sums, more_squares = _float64_sums(block)
        sums += more_sums
        squares += more_squares
    return Moments(outer * units * inner, sums, squares)


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


def _sizes(shape: torch.Size, unit_dim: int) -> tuple[int, int, int]:
    dim = unit_dim % len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
