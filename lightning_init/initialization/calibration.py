"""How large a layer's output should be on real data.

A stack of L layers without normalisation multiplies the difference of two inputs by χ^L, with χ = σw²·E[φ′(√q z)²] and
σw² = q / E[φ(√q z)²], at variance q. For GELU, SiLU or tanh, χ is above 1 at q = 1 and near 1 for small q, so the
target is the largest q ≤ 1 with L·ln χ(q) ≤ 0.3.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from lightning_init.checks import check_positive
from lightning_init.schemes.gains import gain_of

MOST_GROWTH = 0.3
"""ln of the growth of a difference between two inputs, over a whole stack, that a target variance allows."""

_SMALLEST = 1e-4
"""Variance below which every activation is as good as linear."""

_SMOOTH = ("gelu", "silu", "tanh", "mish", "sigmoid", "softplus", "hardswish")
"""Functions, by PyTorch's names, that bend more at larger variances. A ReLU does not, and SELU is made for 1."""


@dataclass(frozen=True)
class Calibration:
    """How large the outputs of calibrated layers are made.

    Attributes:
        variance: the target of each layer's output, divided by N where N outputs are added up; None: by depth.

    Raises:
        ValueError: a variance that is not above 0.
    """

    variance: float | None = None

    def __post_init__(self) -> None:
        if self.variance is not None:
            check_positive("variance", self.variance)


@functools.lru_cache
def variance_for_depth(function: str, depth: int) -> float:
    """The largest q ≤ 1 with depth · ln χ(q) ≤ 0.3, to three digits, for a function by PyTorch's name.

    >>> variance_for_depth("relu", 50), variance_for_depth("gelu", 1)
    (1.0, 1.0)
    >>> 0.005 < variance_for_depth("gelu", 50) < 0.02
    True
    """
    if function not in _SMOOTH:
        return 1.0

    def is_small(variance: float) -> bool:
        forward = gain_of(function, input_variance=variance)
        backward = gain_of(function, "backward", input_variance=variance)
        return depth * math.log(variance * (forward / backward) ** 2) <= MOST_GROWTH

    if is_small(1.0):
        return 1.0
    low, high = math.log(_SMALLEST), 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if is_small(math.exp(middle)) else (low, middle)
    return math.exp(low)
