"""What can be measured of a layer's output, and of its parameters and their gradients, beside their moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_init.introspect.layers import Layer
from lightning_init.monitor.moments import CentralMoments, Measured, central_moments_of, merge_central

Array: TypeAlias = npt.NDArray[np.float64]


class Measure(NamedTuple):
    """Something to measure on each tensor, beside the moments that are measured anyway.

    Attributes:
        measure: called with the layer and this rank's elements of its output, or of another tensor. Gives float64
            [width] for "sum" and "max", central moments for "central"; None where it makes no sense.
        width: how many numbers a "sum" or a "max" has.
        adds_up: how measurements are joined over calls and ranks. "sum" travels with the moments, in the one collective
            of a logged step; "max" and "central" take one more each.
        of: what is measured: the output; a parameter or its gradient before the optimizer's step.
        power: k of the Σ(x - mean)ᵏ that a "central" measure is for: 2, 3 or 4.
    """

    measure: Callable[[Layer, Tensor], Measured | None]
    width: int = 1
    adds_up: Literal["sum", "max", "central"] = "sum"
    power: int = 4
    of: Literal["output", "weight", "gradient"] = "output"

    def merge(self, a: Measured, b: Measured) -> Measured:
        """The measurement of both sets of elements together."""
        if isinstance(a, CentralMoments) or isinstance(b, CentralMoments):
            assert isinstance(a, CentralMoments)
            assert isinstance(b, CentralMoments)
            return merge_central(a, b)
        return torch.maximum(a, b) if self.adds_up == "max" else a + b


_MARGIN = 0.01
"""Share of an activation's range within which an output counts as saturated: tanh beyond ±2.3, sigmoid beyond ±4.6."""

_NEAR_ZERO = 1e-3
"""Of the rms: what is smaller adds less than a millionth of the mean square, so that it hardly takes part."""

_EXPONENT_BITS = 8
_SUBDIVISION_BITS = 2
"""Bits of a float32's mantissa that tell apart the bins of near_zero within an octave: four bins, at 1, 1.25, 1.5 and
1.75 times a power of two. Two bits more would cost four times as much memory and traffic for a threshold within 6 %."""

_MAGNITUDE_BINS = 1 << (_EXPONENT_BITS + _SUBDIVISION_BITS)


def saturated(layer: Layer, output: Tensor) -> Tensor | None:
    """How many elements of a bounded activation are within a hundredth of its range from either end, [1]."""
    activation = layer.activation
    if activation is None or not activation.saturates:
        return None
    margin = _MARGIN * (activation.high - activation.low)
    output = output.float()
    flat = (output < activation.low + margin) | (output > activation.high - margin)
    return flat.sum(dtype=torch.float64).reshape(1)


def largest(layer: Layer, output: Tensor) -> Tensor:
    """The largest magnitude, [1] float64: NaN if any element is NaN, 0 if there are no elements."""
    most = output.detach().abs().max() if output.numel() else output.new_zeros(())
    return most.double().reshape(1)


def magnitude_bins(layer: Layer, output: Tensor) -> Tensor:
    """How many elements are in each bin of magnitude, [1024]: by the exponent and first mantissa bits as float32.

    The bits of a positive float, read as an integer, grow with it; without the last 21 of them they are the bin.
    """
    bits = output.detach().reshape(-1).float().abs().view(torch.int32)
    return torch.bincount(bits >> (23 - _SUBDIVISION_BITS), minlength=_MAGNITUDE_BINS).double()


def _central_moments(layer: Layer, output: Tensor) -> CentralMoments:
    return central_moments_of(output)


LARGEST = Measure(largest, adds_up="max")
SATURATED = Measure(saturated)
MAGNITUDE_BINS = Measure(magnitude_bins, width=_MAGNITUDE_BINS)
FOURTH_MOMENT = Measure(_central_moments, adds_up="central", power=4)


def near_zero_share(bins: Array, n: Array, rms: Array) -> Array:
    """Share of elements in the bins below the one that holds 1e-3 · rms, [layers]; NaN where the rms is not finite.

    The rms is that of all calls and ranks, which none of them knows while it counts; that is why they count bins. The
    threshold is therefore the bin edge below 1e-3 · rms, between 0.8e-3 and 1e-3 · rms. The lowest bin always belongs
    to the share, so that outputs that are all 0 are near zero, though their rms is 0 as well.

    Args:
        bins: what :data:`MAGNITUDE_BINS` has counted, [layers, 1024].
        n: number of elements, [layers].
        rms: of the elements, [layers].
    """
    threshold = (_NEAR_ZERO * rms).astype(np.float32)
    lowest = np.maximum(threshold.view(np.int32) >> (23 - _SUBDIVISION_BITS), 1)  # [layers]
    below = np.arange(_MAGNITUDE_BINS) < lowest[:, None]  # [layers, bins]
    share = (bins * below).sum(1) / n
    return np.where(np.isfinite(threshold), share, np.nan)
