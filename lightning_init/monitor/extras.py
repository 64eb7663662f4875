"""Measurements on request: what three sums of an output cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_init.monitor.layers import Layer

_MARGIN = 0.01
"""Share of an activation's range within which an output counts as saturated: tanh beyond ±2.3, sigmoid beyond ±4.6."""

EDGES = (*(-(2.0**k) for k in range(10, -21, -1)), 0.0, *(2.0**k for k in range(-20, 11)))
"""Between the histogram's 64 bins: powers of two from 2^-20 to 2^10 of either sign, the same on every rank."""


class OutputMeasure(NamedTuple):
    """Something to measure on each output that adds up over calls and ranks.

    Attributes:
        width: how many numbers it is.
        measure: gives them, float64 [width]; None where the question makes no sense.
    """

    width: int
    measure: Callable[[Layer, Tensor], Tensor | None]


def saturated(layer: Layer, values: Tensor) -> Tensor | None:
    """How many elements of a bounded activation are within a hundredth of its range from either end, [1]."""
    activation = layer.activation
    if activation is None or not activation.saturates:
        return None
    margin = _MARGIN * (activation.high - activation.low)
    values = values.float()
    flat = (values < activation.low + margin) | (values > activation.high - margin)
    return flat.sum(dtype=torch.float64).reshape(1)


def binned(layer: Layer, values: Tensor) -> Tensor:
    """How many elements are in each bin, [64]: bin i is from EDGES[i - 1], exclusive, to EDGES[i]."""
    edges = torch.tensor(EDGES, dtype=torch.float32, device=values.device)
    bins = torch.bucketize(values.detach().reshape(-1).float(), edges)
    return torch.bincount(bins, minlength=len(EDGES) + 1).double()


def largest(values: Tensor) -> Tensor:
    """The largest magnitude, [] float64; NaN if there is one, 0 of nothing."""
    return values.detach().abs().max().double() if values.numel() else values.new_zeros((), dtype=torch.float64)


ADDITIVE: dict[str, OutputMeasure] = {
    "saturation": OutputMeasure(1, saturated),
    "histogram": OutputMeasure(len(EDGES) + 1, binned),
}
