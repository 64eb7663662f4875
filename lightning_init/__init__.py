"""Start every training run from the right weights, and see whether signal and gradient stay healthy.

A name is imported from its home when it is first asked for (PEP 562): ``initialize``, ``plan`` and ``observe`` load
PyTorch but not Lightning, and ``import lightning_init`` alone loads neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names once more, where type checkers and editors look for them
    from lightning_init.callbacks.init import InitCallback
    from lightning_init.callbacks.monitor import ActivationVarianceMonitor
    from lightning_init.cli.init_cli import InitCLI
    from lightning_init.initialization.calibration import Calibration
    from lightning_init.initialization.initialize import initialize, plan
    from lightning_init.initialization.plan import Assignment
    from lightning_init.initialization.report import Entry, InitReport
    from lightning_init.initialization.rules import Rule
    from lightning_init.introspect.probe import trace
    from lightning_init.introspect.role import Role
    from lightning_init.introspect.roles import fans_of, register
    from lightning_init.introspect.trace import Trace
    from lightning_init.monitor.histograms import Histogram
    from lightning_init.monitor.observe import observe
    from lightning_init.monitor.statistics import LayerStats, StatName
    from lightning_init.schemes.distributions import Constant, Distribution, Normal, TruncatedNormal, Uniform
    from lightning_init.schemes.fans import Fans
    from lightning_init.schemes.gains import gain_of
    from lightning_init.schemes.named import SCHEMES, SchemeName, TorchDefault
    from lightning_init.schemes.scheme import Initializer, Scheme
    from lightning_init.schemes.structured import (
        DeltaOrthogonal,
        DrawNormal,
        Identity,
        Matrix,
        Orthogonal,
        Sparse,
        StructuredScheme,
        ZerO,
    )
    from lightning_init.schemes.variance_scaling import FanScheme, Siren, SmallInit, VarianceScaling

__version__ = "0.1.0"

_HOMES = {
    "callbacks.init": ["InitCallback"],
    "callbacks.monitor": ["ActivationVarianceMonitor"],
    "cli.init_cli": ["InitCLI"],
    "initialization.calibration": ["Calibration"],
    "initialization.initialize": ["initialize", "plan"],
    "initialization.plan": ["Assignment"],
    "initialization.report": ["Entry", "InitReport"],
    "initialization.rules": ["Rule"],
    "introspect.probe": ["trace"],
    "introspect.role": ["Role"],
    "introspect.roles": ["fans_of", "register"],
    "introspect.trace": ["Trace"],
    "monitor.observe": ["observe"],
    "monitor.histograms": ["Histogram"],
    "monitor.statistics": ["LayerStats", "StatName"],
    "schemes.distributions": ["Constant", "Distribution", "Normal", "TruncatedNormal", "Uniform"],
    "schemes.fans": ["Fans"],
    "schemes.gains": ["gain_of"],
    "schemes.named": ["SCHEMES", "SchemeName", "TorchDefault"],
    "schemes.scheme": ["Initializer", "Scheme"],
    "schemes.structured": [
        *("DeltaOrthogonal", "DrawNormal", "Identity", "Matrix", "Orthogonal", "Sparse", "StructuredScheme", "ZerO"),
    ],
    "schemes.variance_scaling": ["FanScheme", "Siren", "SmallInit", "VarianceScaling"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "SCHEMES",
    "ActivationVarianceMonitor",
    "Assignment",
    "Calibration",
    "Constant",
    "DeltaOrthogonal",
    "Distribution",
    "DrawNormal",
    "Entry",
    "FanScheme",
    "Fans",
    "Histogram",
    "Identity",
    "InitCLI",
    "InitCallback",
    "InitReport",
    "Initializer",
    "LayerStats",
    "Matrix",
    "Normal",
    "Orthogonal",
    "Role",
    "Rule",
    "Scheme",
    "SchemeName",
    "Siren",
    "SmallInit",
    "Sparse",
    "StatName",
    "StructuredScheme",
    "TorchDefault",
    "Trace",
    "TruncatedNormal",
    "Uniform",
    "VarianceScaling",
    "ZerO",
    "fans_of",
    "gain_of",
    "initialize",
    "observe",
    "plan",
    "register",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value  # from now on an attribute like any other
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
