"""Every named scheme: a point on one formula (variance = gain² / fan), or a matrix with a structure of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias, get_args

from lightning_init.checks import check_choice, check_positive
from lightning_init.schemes.distributions import (
    Constant,
    Distribution,
    Normal,
    Scheme,
    TruncatedNormal,
    Uniform,
)
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.structured import DeltaOrthogonal, Identity, Orthogonal, Sparse, ZerO

Mode: TypeAlias = Literal["fan_in", "fan_out", "fan_avg", "fan_geo_avg"]
DistributionName: TypeAlias = Literal["normal", "uniform", "truncated_normal"]


class FanScheme(Scheme):
    """A scheme whose distribution depends on a weight's fans. Subclass it for a formula of your own."""

    @abstractmethod
    def resolve(self, fans: Fans, gain: float) -> Distribution:
        """The distribution of a weight with these fans (per slice: gate, projection, group)."""


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

    >>> abs(VarianceScaling(2.0).resolve(Fans(200, 100), gain=2**0.5).target_std - 0.1) < 1e-12
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

    def resolve(self, fans: Fans, gain: float) -> Distribution:
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

    def resolve(self, fans: Fans, gain: float) -> Distribution:
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

    def resolve(self, fans: Fans, gain: float) -> Distribution:
        """Uniform and symmetric, with the bound of the class's formula."""
        bound = 1 / fans.fan_in if self.first else math.sqrt(6 / fans.fan_in) / self.omega
        return Uniform(-bound, bound)


@dataclass(frozen=True)
class TorchDefault(Scheme):
    """What each module's own ``reset_parameters`` draws, weights and biases, from the seeded streams.

    Linear and convolutions: U(±1 / √fan_in), a variance of 1 / (3·fan_in): a sixth of He's. The distribution is
    PyTorch's, the random numbers are not: each parameter has a stream of its own.
    """


def _family(scale: float, mode: Mode, names: Iterable[str]) -> dict[str, Scheme]:
    """The normal, uniform and truncated form of one point on the formula, under each of its names."""
    return {
        f"{name}_{ending}": VarianceScaling(scale, mode, shape) for name in names for ending, shape in _ENDINGS.items()
    }


_ENDINGS: dict[str, DistributionName] = {
    "normal": "normal",
    "uniform": "uniform",
    "normal_truncated": "truncated_normal",
}

SchemeName: TypeAlias = Literal[
    "zeros",
    "ones",
    "standard_normal",
    "standard_normal_truncated",
    "truncated_normal",
    "xavier_normal",
    "xavier_uniform",
    "xavier_normal_truncated",
    "glorot_normal",
    "glorot_uniform",
    "glorot_normal_truncated",
    "he_normal",
    "he_uniform",
    "he_normal_truncated",
    "kaiming_normal",
    "kaiming_uniform",
    "kaiming_normal_truncated",
    "lecun_normal",
    "lecun_uniform",
    "lecun_normal_truncated",
    "orthogonal",
    "delta_orthogonal",
    "identity",
    "dirac",
    "sparse",
    "siren",
    "siren_first",
    "small_init",
    "zero_init",
    "torch_default",
]

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "zeros": Constant(0.0),
        "ones": Constant(1.0),
        "standard_normal": Normal(),
        "standard_normal_truncated": TruncatedNormal(),
        "truncated_normal": TruncatedNormal(),
        **_family(1.0, "fan_avg", ("xavier", "glorot")),
        **_family(2.0, "fan_in", ("he", "kaiming")),
        **_family(1.0, "fan_in", ("lecun",)),
        "orthogonal": Orthogonal(),
        "delta_orthogonal": DeltaOrthogonal(),
        "identity": Identity(),
        "dirac": Identity(),
        "sparse": Sparse(),
        "siren": Siren(),
        "siren_first": Siren(first=True),
        "small_init": SmallInit(),
        "zero_init": ZerO(),
        "torch_default": TorchDefault(),
    }
)
"""Every named scheme, aliases included. Schemes that need arguments (Normal, Uniform, Constant …) are classes only."""


def scheme_of(scheme: str | Scheme) -> Scheme:
    """The scheme a user gave by name or as an object.

    Raises:
        ValueError: an unknown name (with the allowed names and the nearest one).
        TypeError: neither a name nor a scheme.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"a scheme is a name or a Scheme object, got {scheme!r} of type {type(scheme).__name__}")
    check_choice("scheme", scheme, SCHEMES)
    return SCHEMES[scheme]


def name_of(scheme: Scheme) -> str:
    """The shortest description of a scheme: its first name in :data:`SCHEMES`, or its constructor call."""
    return next((name for name, known in SCHEMES.items() if known == scheme), repr(scheme))
