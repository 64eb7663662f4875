"""Distributions of single elements: constant, normal, uniform, truncated normal."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_init.checks import check_finite, check_positive
from lightning_init.schemes.scheme import Fills, Initializer


class Distribution(Initializer):
    """Independent, identically distributed elements with a known mean and standard deviation."""

    fills: ClassVar[Fills] = "any parameter"

    @property
    @abstractmethod
    def target_mean(self) -> float:
        """Population mean of one element."""

    @property
    @abstractmethod
    def target_std(self) -> float:
        """Population standard deviation of one element."""

    @property
    @abstractmethod
    def kurtosis(self) -> float:
        """E[(x - mean)^4] / std^4, which sets the sampling error of a measured std (0 for a constant)."""

    def sampling_error(self, count: int) -> float:
        """Relative standard error of the std measured on ``count`` elements: √((kurtosis - 1) / (4·count))."""
        return math.sqrt(max(self.kurtosis - 1, 0.0) / (4 * count))

    @abstractmethod
    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Fill a contiguous one-dimensional float32 or float64 CPU ``block`` in place."""


@dataclass(frozen=True)
class Constant(Distribution):
    """Every element is ``value``."""

    value: float

    def __post_init__(self) -> None:
        check_finite("Constant(value)", self.value)

    @property
    def target_mean(self) -> float:
        """The value itself."""
        return self.value

    @property
    def target_std(self) -> float:
        """Always 0."""
        return 0.0

    @property
    def kurtosis(self) -> float:
        """A constant has none; 0 by convention."""
        return 0.0

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Fill with the value; the generator is not used."""
        block.fill_(self.value)


@dataclass(frozen=True)
class Normal(Distribution):
    """N(mean, std²).

    Raises:
        ValueError: ``std`` is not a finite number above 0.
    """

    std: float = 1.0
    mean: float = 0.0

    def __post_init__(self) -> None:
        check_positive("Normal(std)", self.std)
        check_finite("Normal(mean)", self.mean)

    @property
    def target_mean(self) -> float:
        """The given mean."""
        return self.mean

    @property
    def target_std(self) -> float:
        """The given std."""
        return self.std

    def scaled(self, factor: float) -> Normal:
        """The distribution of its values times a factor."""
        return Normal(self.std * factor, self.mean * factor)

    @property
    def kurtosis(self) -> float:
        """3."""
        return 3.0

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Draw N(0, 1), then scale and shift, so that the stream does not depend on std and mean."""
        block.normal_(generator=generator)
        scale_and_shift_(block, self.std, self.mean)


@dataclass(frozen=True)
class Uniform(Distribution):
    """U(low, high): mean (low + high) / 2, std (high - low) / √12.

    Raises:
        ValueError: not ``low < high``, or one of them not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        check_finite("Uniform(low)", self.low)
        check_finite("Uniform(high)", self.high)
        if not self.low < self.high:
            raise ValueError(f"Uniform(low, high) needs low < high, got low={self.low!r}, high={self.high!r}")

    @property
    def target_mean(self) -> float:
        """Middle of the interval."""
        return (self.low + self.high) / 2

    @property
    def target_std(self) -> float:
        """(high - low) / √12."""
        return (self.high - self.low) / math.sqrt(12)

    def scaled(self, factor: float) -> Uniform:
        """The distribution of its values times a factor above 0."""
        return Uniform(self.low * factor, self.high * factor)

    @property
    def kurtosis(self) -> float:
        """9/5."""
        return 1.8

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Draw U(0, 1), then scale and shift: torch's own ``uniform_(a, b)`` rounds by CPU type.

        Rounding takes a few to the upper end, or beyond it, which is no part of the interval.
        """
        block.uniform_(generator=generator)
        scale_and_shift_(block, self.high - self.low, self.low)
        block.clamp_(max=_largest_below(self.high, block.dtype))


@dataclass(frozen=True)
class TruncatedNormal(Distribution):
    """N(mean, ·) with everything beyond ``cut`` standard deviations drawn again; ``std`` is what is measured.

    Cutting N(0, 1) at ±c leaves a variance of 1 - 2c·φ(c) / (2Φ(c) - 1), so the distribution underneath
    has std / √that, and the bounds are ``cut`` times the std underneath. The cut is in units of std,
    never an absolute number.

    Raises:
        ValueError: ``std`` or ``cut`` is not a finite number above 0.
    """

    std: float = 1.0
    mean: float = 0.0
    cut: float = 2.0

    def __post_init__(self) -> None:
        check_positive("TruncatedNormal(std)", self.std)
        check_finite("TruncatedNormal(mean)", self.mean)
        check_positive("TruncatedNormal(cut)", self.cut)

    @property
    def target_mean(self) -> float:
        """The given mean."""
        return self.mean

    @property
    def target_std(self) -> float:
        """The given std: the correction is inside."""
        return self.std

    @property
    def bound(self) -> float:
        """Largest possible |x - mean|: cut · std / (std of N(0, 1) cut at ±cut)."""
        return self.cut * self.std / truncated_std(self.cut)

    @property
    def kurtosis(self) -> float:
        """(3 - 2c(c² + 3)φ(c)/Z) / variance², with Z = 2Φ(c) - 1."""
        c = self.cut
        density, mass = _density_and_mass(c)
        return (3 - 2 * c * (c * c + 3) * density / mass) / truncated_std(c) ** 4

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Draw N(0, 1), draw again only what lies beyond the cut, then scale and shift."""
        block.normal_(generator=generator)
        beyond = (block.abs() > self.cut).nonzero().squeeze(1)
        while beyond.numel():
            again = torch.empty(beyond.numel(), dtype=block.dtype, device=block.device).normal_(generator=generator)
            block[beyond] = again
            beyond = beyond[again.abs() > self.cut]
        scale_and_shift_(block, self.std / truncated_std(self.cut), self.mean)
        lowest, highest = self.mean - self.bound, self.mean + self.bound
        block.clamp_(
            -_largest_below(-lowest, block.dtype, or_equal=True), _largest_below(highest, block.dtype, or_equal=True)
        )


def _largest_below(number: float, dtype: torch.dtype, *, or_equal: bool = False) -> float:
    """The largest value of a dtype below a number; ``number`` itself if it is one and that is allowed."""
    kind = np.float64 if dtype is torch.float64 else np.float32
    rounded = float(kind(number))
    if rounded < number or (or_equal and rounded == number):
        return rounded
    return float(np.nextafter(kind(rounded), kind(-np.inf)))


def scale_and_shift_(block: Tensor, scale: float, shift: float) -> None:
    """``block * scale + shift`` in place as two separate operations: a fused one rounds by CPU type."""
    if scale != 1.0:
        block.mul_(scale)
    if shift != 0.0:
        block.add_(shift)


def truncated_std(cut: float) -> float:
    """Standard deviation of N(0, 1) cut at ±``cut``: √(1 - 2c·φ(c) / (2Φ(c) - 1)).

    >>> abs(truncated_std(2.0) - 0.87962566103423978) < 1e-15
    True
    """
    density, mass = _density_and_mass(cut)
    return math.sqrt(1 - 2 * cut * density / mass)


def _density_and_mass(cut: float) -> tuple[float, float]:
    """φ(cut) and P(|z| < cut) for z ~ N(0, 1)."""
    return math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi), math.erf(cut / math.sqrt(2))
