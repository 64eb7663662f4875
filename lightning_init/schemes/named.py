"""The table of named schemes, aliases included, and the way from a name to its scheme and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from lightning_init.checks import check_choice
from lightning_init.schemes.distributions import Constant, Normal, TruncatedNormal
from lightning_init.schemes.scheme import Fills, Initializer, ParameterRole, Scheme
from lightning_init.schemes.structured import DeltaOrthogonal, Identity, Orthogonal, Sparse, ZerO
from lightning_init.schemes.variance_scaling import DistributionName, Mode, Siren, SmallInit, VarianceScaling


@dataclass(frozen=True)
class TorchDefault(Scheme):
    """What each module's own ``reset_parameters`` draws, weights and biases, from the seeded streams.

    Linear and convolutions: U(±1 / √fan_in), a variance of 1 / (3·fan_in): a sixth of He's. The distribution is
    PyTorch's, the random numbers are not: each parameter has a stream of its own.
    """

    fills: ClassVar[Fills] = "known parameters"

    def resolve(self, role: ParameterRole | None, gain: float) -> Initializer:
        """The role's default."""
        if role is None:
            raise TypeError("TorchDefault needs a module type that is known")
        return role.default


@dataclass(frozen=True)
class Auto(Scheme):
    """What each weight needs for its place in the model, found by looking at it with one batch.

    In chains of six and more weights without normalisation: N(0, gain² / fan_in), where the gain is that of what feeds
    the weight, 1/√E[f(z)²], whatever function that is, divided by √N where N products are added up. Elsewhere, and for
    output layers, PyTorch's own draw; and what an author drew at a scale of his own is drawn again at it. Where nothing
    can be seen, the gain is √2, as ``he_normal`` has it.
    """

    @property
    def gain(self) -> float:
        """He's, for what nobody has seen the input of."""
        return math.sqrt(2.0)

    def resolve(self, role: ParameterRole | None, gain: float) -> Initializer:
        """N(0, gain² / fan_in)."""
        return VarianceScaling(1.0, "fan_in", "normal").resolve(role, gain)


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
    "auto",
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
        "auto": Auto(),
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
