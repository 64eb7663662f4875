"""Count, sum and sum of squares of a tensor: what every variance in this package is made of.

The three numbers add up: over micro-batches, over calls, over ranks. ``merge`` is that addition, and the only
formula by which measurements meet. Everything is kept in float64, where the raw sums lose about
1e-16 · (mean/std)² of a variance: 1e-8 at mean/std = 1e4, and no gradient is small or large enough to
under- or overflow when squared. (In float32 the same sums return 0 at mean 100, std 0.01.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 17
"""Elements turned into float64 at a time: 1 MiB, so that the copy lives in the cache and never in the peak."""


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
    blocks = _as_blocks(values.detach(), unit_dim)  # [outer, units, inner]
    if blocks.numel() == 0:
        zeros = torch.zeros(blocks.shape[1] + 1, dtype=torch.float64, device=_float64_device(blocks))
        return Moments(0, zeros[:-1], zeros[-1])
    if blocks.device.type != "cpu":
        return _observe_fused(blocks)
    return _observe_in_float64(blocks)


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


def _as_blocks(values: Tensor, unit_dim: int | None) -> Tensor:
    """View ``values`` as [outer, units, inner], without copying where its strides allow it."""
    if unit_dim is None or values.dim() == 0:
        return values.reshape(values.numel(), 1, 1)
    if (units_last := values.movedim(unit_dim, -1)).is_contiguous():  # also channels_last images
        values, unit_dim = units_last, -1
    dim = unit_dim % values.dim()
    outer, inner = values.shape[:dim].numel(), values.shape[dim + 1 :].numel()
    return values.reshape(outer, values.shape[dim], inner)


def _observe_in_float64(blocks: Tensor) -> Moments:
    """Plain sums over float64 copies of a cache's size: as fast as centred float32, and nothing can go wrong."""
    outer, units, inner = blocks.shape
    sums = torch.zeros(units, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for block in torch.split(blocks, max(1, _BLOCK // (units * inner))):
        copy = block.to(torch.float64, memory_format=torch.contiguous_format)
        sums += copy.sum((0, 2)) if inner > 1 else copy.sum(0).squeeze(1)
        flat = copy.view(-1)
        squares += torch.dot(flat, flat)
    return Moments(outer * units * inner, sums, squares)


def _observe_fused(blocks: Tensor) -> Moments:
    """Welford's mean and variance in one kernel: what an accelerator does best, float64 or not.

    The kernel's float32 mean is off by 6e-8 of itself, that is 4e-7 of the variance at mean/std = 1e4.
    Values are scaled by a power of two near their largest, so that no square under- or overflows.
    """
    wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
    exponent = torch.frexp(wide.abs().amax()).exponent
    variance, mean = torch.var_mean(torch.ldexp(wide, -exponent), dim=(0, 2), correction=0)
    device = _float64_device(blocks)
    factor = torch.ldexp(torch.ones((), dtype=torch.float64, device=device), exponent.to(device))
    mean, variance = mean.to(device, torch.float64) * factor, variance.to(device, torch.float64) * factor**2
    per_unit = blocks.shape[0] * blocks.shape[2]
    return Moments(blocks.numel(), mean * per_unit, (variance + mean**2).sum() * per_unit)


def _float64_device(values: Tensor) -> torch.device:
    """Where float64 sums can live: Apple's GPUs have none."""
    return torch.device("cpu") if values.device.type == "mps" else values.device
