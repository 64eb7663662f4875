"""How many terms meet in one output (fan_in) and in one input gradient (fan_out) of a layer.

Weights of variance 1/fan_in turn inputs of variance 1 into outputs of variance 1; weights of variance
1/fan_out do the same for the gradient on its way back. Both are averages over positions in the interior:
what padding cuts off at the border is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Fans(NamedTuple):
    """The two fans of one weight (of one slice of it, where several gates or projections are packed).

    Args:
        fan_in: number of terms summed into one output element; an average where positions differ.
        fan_out: number of terms summed into the gradient of one input element; NaN where the input has
            no gradient (an embedding's indices).
    """

    fan_in: float
    fan_out: float


def conv_fans(
    in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int], groups: int
) -> Fans:
    """Fans of a convolution: (C_in/g)·∏k and (C_out/g)·∏k/∏s.

    An input position is seen from ∏k/∏s output positions on average, and only by the channels of its own
    group. Dilation moves the taps without changing their number.

    >>> conv_fans(256, 256, (3, 3), (1, 1), groups=256)  # depthwise
    Fans(fan_in=9.0, fan_out=9.0)
    """
    taps = math.prod(kernel_size)
    return Fans(
        in_channels / groups * taps,
        out_channels / groups * taps / math.prod(stride),
    )


def conv_transpose_fans(
    in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int], groups: int
) -> Fans:
    """Fans of a transposed convolution: (C_in/g)·∏k/∏s and (C_out/g)·∏k, a convolution's the other way round.

    Unless every stride divides its kernel size, outputs at different phases sum different numbers of taps:
    fan_in is then the average, and no choice of one variance makes all phases equal.

    >>> conv_transpose_fans(64, 32, (4,), (2,), groups=1)
    Fans(fan_in=128.0, fan_out=128.0)
    """
    return Fans(*reversed(conv_fans(out_channels, in_channels, kernel_size, stride, groups)))


def embedding_bag_fans(mode: str, bag_size: float = 1) -> Fans:
    """Fans of a bag of n embedding rows: n for their sum, 1/n for their mean, NaN for a maximum of several.

    >>> embedding_bag_fans("mean", 4).fan_in
    0.25
    """
    fan_in = {"sum": bag_size, "mean": 1 / bag_size, "max": 1 if bag_size == 1 else math.nan}[mode]
    return Fans(float(fan_in), math.nan)


def bilinear_fans(in1_features: int, in2_features: int, out_features: int) -> Fans:
    """Fans of xᵀWy: in1·in2, and out·in2 for the gradient of the first input (the second has out·in1)."""
    return Fans(float(in1_features * in2_features), float(out_features * in2_features))
