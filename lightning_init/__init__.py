"""Start every training run from the right weights, and see whether signal and gradient stay healthy."""

from lightning_init.callbacks.init import InitCallback
from lightning_init.callbacks.monitor import ActivationVarianceMonitor
from lightning_init.cli.init_cli import InitCLI
from lightning_init.initialization.initialize import initialize, plan
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.report import InitReport
from lightning_init.initialization.rules import Rule
from lightning_init.introspect.role import Role
from lightning_init.introspect.roles import fans_of, register
from lightning_init.monitor.observe import observe
from lightning_init.monitor.statistics import LayerStats
from lightning_init.schemes.distributions import (
    Constant,
    Distribution,
    Normal,
    Scheme,
    TruncatedNormal,
    Uniform,
)
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.gains import gain_of
from lightning_init.schemes.named import (
    SCHEMES,
    FanScheme,
    SchemeName,
    Siren,
    SmallInit,
    TorchDefault,
    VarianceScaling,
)
from lightning_init.schemes.structured import (
    DeltaOrthogonal,
    Identity,
    Orthogonal,
    Sparse,
    StructuredScheme,
    ZerO,
)

__all__ = [
    "SCHEMES",
    "ActivationVarianceMonitor",
    "Assignment",
    "Constant",
    "DeltaOrthogonal",
    "Distribution",
    "FanScheme",
    "Fans",
    "Identity",
    "InitCLI",
    "InitCallback",
    "InitReport",
    "LayerStats",
    "Normal",
    "Orthogonal",
    "Role",
    "Rule",
    "Scheme",
    "SchemeName",
    "Siren",
    "SmallInit",
    "Sparse",
    "StructuredScheme",
    "TorchDefault",
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
]
