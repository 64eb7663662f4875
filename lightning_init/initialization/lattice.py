"""Whether float32 numbers are still exactly what ``uniform_`` wrote: one training step, however small, leaves marks.

A generator gives u with 24 random bits, or as a float32 number, which is the same from 1/2 on. So what it writes from
there on, u·2b - b with or without rounding in between, is one of 2²³ numbers, where float32 has several times as many.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 24
"""Random bits of a uniform float32 number."""

MIN_COUNT = 16
"""Of fewer numbers, all may be on the lattice by chance: about every second is."""

FIRST, SEARCHED = 8, 48
"""Numbers that are held against every possible bound, and against those that pass: 2⁻⁴⁸ of the wrong ones remain."""

AT_ONCE = 1 << 14
"""Bounds that are tried at once."""


def is_as_written(values: Tensor, bound: float) -> bool | None:
    """Whether the numbers from 0 on are all ones that ``uniform_(-bound, bound)`` gives; None for too few of them.

    Args:
        values: float32 numbers. Shape: [any]
        bound: as it was given to ``uniform_``.

    >>> drawn = torch.empty(100).uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    >>> is_as_written(drawn, 0.3), is_as_written(drawn * 0.9999, 0.3)
    (True, False)
    """
    upper = values[values >= 0].detach().to("cpu", torch.float32)
    if len(upper) < MIN_COUNT:
        return None
    return bool(_is_on_lattice(upper, torch.tensor([bound], dtype=torch.float32, device="cpu")).all())


def is_uniform_as_written(values: Tensor, slack: float) -> bool | None:
    """Whether there is any bound for which :func:`is_as_written`; None for too few numbers.

    All float32 numbers from the largest value on are tried.

    Args:
        values: float32 numbers.
        slack: relative distance of the largest value from the bound, at most.

    >>> drawn = torch.empty(1000).uniform_(-0.123, 0.123, generator=torch.Generator().manual_seed(0))
    >>> is_uniform_as_written(drawn, 0.01), is_uniform_as_written(drawn + 1e-6, 0.01)
    (True, False)
    """
    upper = values[values >= 0].detach().to("cpu", torch.float32)
    if len(upper) < MIN_COUNT:
        return None
    largest = values.detach().abs().max().to("cpu", torch.float32)
    first, last = (int(number.view(torch.int32)) for number in (largest, largest * (1 + slack)))
    for start in range(first, last + 1, AT_ONCE):
        bounds = torch.arange(start, min(start + AT_ONCE, last + 1), dtype=torch.int32, device="cpu")
        bounds = bounds.view(torch.float32)
        possible = bounds[_is_on_lattice(upper[:FIRST], bounds).all(1)]
        possible = possible[_is_on_lattice(upper[:SEARCHED], possible).all(1)]
        if any(bool(_is_on_lattice(upper, bound.view(1)).all()) for bound in possible):
            return True
    return False


def _is_on_lattice(upper: Tensor, bounds: Tensor) -> Tensor:
    """Which numbers (from 0 on) each bound's draw can give. [bounds, numbers]"""
    half_width = bounds.unsqueeze(1)  # [bounds, 1]
    wide, numbers = half_width.double(), upper.double()
    step = 2 * wide * 2.0**-BITS
    nearest = torch.round((numbers + wide) / step)
    is_on = torch.zeros(len(bounds), len(upper), dtype=torch.bool, device="cpu")
    for neighbour in (-1, 0, 1):
        u = (nearest + neighbour) * 2.0**-BITS  # [bounds, numbers]
        is_on |= upper == u.float() * (2 * half_width) - half_width  # rounded after the product
        is_on |= upper == (u * 2 * wide - wide).float()  # rounded once
    return is_on
