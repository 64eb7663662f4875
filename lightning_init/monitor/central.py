"""Central moments up to the fourth: what kurtosis needs, and what raw sums cannot give.

Raw fourth powers lose everything at mean/std = 1e4, in float64 too. So each rank keeps its moments about its own
mean, and when all ranks know the common mean, each shifts its own there, which cancels nothing; those add up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

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
