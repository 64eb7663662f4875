"""Schemes that divide a variance by a fan: He, LeCun, Glorot and their kin, SIREN, small init."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from lightning_init.checks import check_choice, check_positive
from lightning_init.schemes.distributions import Distribution, Normal, TruncatedNormal, Uniform
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.scheme import ParameterRole, Scheme

Mode: TypeAlias = Literal["fan_in", "fan_out", "fan_avg", "fan_geo_avg"]
DistributionName: TypeAlias = Literal["normal", "uniform", "truncated_normal"]


class FanScheme(Scheme):
    """A scheme whose distribution depends on a weight's fans. Subclass it for a formula of your own."""

    @abstractmethod
    def distribution_of(self, fans: Fans, gain: float) -> Distribution:
        """The distribution of a weight with these fans.

        Args:
            fans: of one slice (gate, projection) and group.
            gain: the scheme's own, that of the activation, or the rule's.
        """

    def resolve(self, role: ParameterRole | None, gain: float) -> Distribution:
        """:meth:`distribution_of` the role's fans."""
        if role is None or role.fans is None:
            raise TypeError(f"{self!r} needs fans, which only weights have")
        return self.distribution_of(role.fans, gain)


@dataclass(frozen=True)
class VarianceScaling(FanScheme):
    """Zero mean, variance gain² / fan, with gain² = ``scale`` unless an activation or a rule gives the gain.

    ======== ===== ======= ====================================
    scheme   scale mode    std
    ======== ===== ======= ====================================
    LeCun    1     fan_in  1 / √fan_in
    He       2     fan_in  √(2 / fan_in)
    Glorot   1     fan_avg √(2 / (fan_in + fan_out))
    ======== ===== ======= ====================================

    Args:
        scale: gain², the variance times the fan; above 0.
        mode: what to divide by: ``fan_in``, ``fan_out``, their mean ``fan_avg``, ``fan_geo_avg`` = √(fan_in·fan_out).
        distribution: ``normal``; ``uniform`` on ±√3·std; ``truncated_normal``, cut at ±2 std, with the std corrected.

    Raises:
        ValueError: an argument outside of the above.

    >>> abs(VarianceScaling(2.0).distribution_of(Fans(200, 100), gain=2**0.5).target_std - 0.1) < 1e-12
    True

    Sources: LeCun et al. 1998; Glorot & Bengio 2010; He et al. 2015.
    """

    scale: float = 1.0
    mode: Mode = "fan_in"
    distribution: DistributionName = "normal"
    takes_gain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("VarianceScaling(scale)", self.scale)
        check_choice("VarianceScaling(mode)", self.mode, get_args(Mode))
        check_choice("VarianceScaling(distribution)", self.distribution, get_args(DistributionName))

    @property
    def gain(self) -> float:
        """√scale."""
        return math.sqrt(self.scale)

    def distribution_of(self, fans: Fans, gain: float) -> Distribution:
        """Zero mean and std = gain / √fan, in the chosen shape."""
        std = gain / math.sqrt(_effective_fan(fans, self.mode))
        if self.distribution == "normal":
            return Normal(std)
        if self.distribution == "uniform":
            return Uniform(-math.sqrt(3) * std, math.sqrt(3) * std)
        return TruncatedNormal(std)


def _effective_fan(fans: Fans, mode: Mode) -> float:
    """The one number a variance is divided by."""
    if mode == "fan_in":
        return fans.fan_in
    if math.isnan(fans.fan_out):
        raise ValueError(
            f"mode {mode!r} needs a fan_out, which a lookup table does not have: use mode 'fan_in' or Normal(std)"
        )
    if mode == "fan_out":
        return fans.fan_out
    if mode == "fan_avg":
        return (fans.fan_in + fans.fan_out) / 2
    return math.sqrt(fans.fan_in * fans.fan_out)


@dataclass(frozen=True)
class SmallInit(FanScheme):
    """N(0, 2 / (5·dim)): Xavier's variance for a layer from ``dim`` to 4·``dim``, for all layers of a transformer.

    Args:
        dim: the model's width; None: each weight's own fan_in.

    Source: Nguyen & Salazar 2019.
    """

    dim: int | None = None

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_positive("SmallInit(dim)", self.dim)

    def distribution_of(self, fans: Fans, gain: float) -> Distribution:
        """Zero mean and std = √(2 / (5·dim))."""
        return Normal(math.sqrt(2 / (5 * (self.dim or fans.fan_in))))


@dataclass(frozen=True)
class Siren(FanScheme):
    """For layers followed by sin(ω₀·x): U(±√(6 / fan_in) / ω₀), and U(±1 / fan_in) for the network's first layer.

    Args:
        omega: ω₀, the frequency of the sine; above 0.
        first: whether this is the first layer (scheme name ``siren_first``).

    Source: Sitzmann et al. 2020.
    """

    omega: float = 30.0
    first: bool = False

    def __post_init__(self) -> None:
        check_positive("Siren(omega)", self.omega)

    def distribution_of(self, fans: Fans, gain: float) -> Distribution:
        """Uniform and symmetric, with the bound of the class's formula."""
        bound = 1 / fans.fan_in if self.first else math.sqrt(6 / fans.fan_in) / self.omega
        return Uniform(-bound, bound)
