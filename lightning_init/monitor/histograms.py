"""How numbers are distributed: in 64 bins, the same on every rank, so that counts add up; and what is not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_init.introspect.layers import Layer
from lightning_init.monitor.measures import Array, Measure

EDGES = (*(-(2.0**k) for k in range(10, -21, -1)), 0.0, *(2.0**k for k in range(-20, 11)))
"""Between the histogram's 64 bins: powers of two from 2^-20 to 2^10 of either sign, the same on every rank."""

_NUM_BINS = len(EDGES) + 1


class Histogram(NamedTuple):
    """How numbers are distributed.

    Attributes:
        counts: finite numbers in each bin between :data:`~lightning_init.monitor.histograms.EDGES`; the first and the
            last bin hold all that is beyond.
        sum: of the finite numbers.
        squares: sum of their squares.
        least: the smallest finite number.
        most: the largest.
        nan: how many are NaN.
        infinite: how many are infinite.
    """

    counts: list[float]
    sum: float
    squares: float
    least: float
    most: float
    nan: float
    infinite: float

    @property
    def n(self) -> float:
        """How many numbers are finite."""
        return math.fsum(self.counts)


def _binned(layer: Layer, tensor: Tensor) -> Tensor:
    """Counts of the bins, Σx and Σx² of the finite elements, and how many are NaN and infinite, [64 + 4]."""
    flat = tensor.detach().reshape(-1)
    finite = flat.isfinite()
    numbers = flat[finite]
    edges = torch.tensor(EDGES, dtype=torch.float32, device=flat.device)
    bins = torch.bucketize(numbers.float(), edges)
    wide = numbers.double()
    others = [wide.sum(), wide.square().sum(), flat.isnan().sum().double(), flat.isinf().sum().double()]
    return torch.cat([torch.bincount(bins, minlength=_NUM_BINS).double(), torch.stack(others)])


def _extremes(layer: Layer, tensor: Tensor) -> Tensor:
    """The largest finite element and the negative of the smallest, [2]; -inf of none."""
    numbers = tensor.detach()[tensor.isfinite()]
    if not numbers.numel():
        return torch.full((2,), -math.inf, dtype=torch.float64, device=tensor.device)
    least, most = torch.aminmax(numbers)
    return torch.stack([most, -least]).double()


BINS = Measure(_binned, width=_NUM_BINS + 4)
EXTREMES = Measure(_extremes, width=2, adds_up="max")
"""What a histogram is made of. Bins add up with the sums of a logged step; extremes take a collective of their own."""


def histograms_of(bins: Array, extremes: Array) -> list[Histogram | None]:
    """Histograms from what ranks have added up; None of nothing.

    Args:
        bins: [layers, 64 + 4]
        extremes: [layers, 2]
    """
    found: list[Histogram | None] = []
    rows = bins.tolist(), extremes.tolist()
    for (*counts, total, squares, nan, infinite), (most, minus_least) in zip(*rows, strict=True):
        is_empty = not any(counts) and not nan + infinite
        found.append(None if is_empty else Histogram(counts, total, squares, -minus_least, most, nan, infinite))
    return found
