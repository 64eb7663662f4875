"""Which statistics there are, and what a logged step looks like in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from lightning_init.checks import check_choice, check_list

StatName = Literal[
    "default",
    "activation_variance",
    "signal_variance",
    "gradient_variance",
    "gradient_norm",
    "dead_units",
    "activation_mean",
    "activation_rms",
    "activation_max",
    "saturation",
    "kurtosis",
    "weight_norm",
    "update_ratio",
    "gradient_norm_clipped",
    "histogram",
]
DEFAULT_STATS: tuple[StatName, ...] = (
    "activation_variance",
    "signal_variance",
    "gradient_variance",
    "gradient_norm",
    "dead_units",
)


def chosen_stats(stats: Sequence[str] | None) -> tuple[str, ...]:
    """The statistics asked for, each once; None is the default set, which "default" also stands for.

    Raises:
        ValueError: a name that does not exist.
        TypeError: a single name instead of a list.
    """
    check_list("stats", stats)
    chosen: list[str] = []
    for name in DEFAULT_STATS if stats is None else stats:
        check_choice("a member of stats", name, get_args(StatName))
        chosen += DEFAULT_STATS if name == "default" else [name]
    return tuple(dict.fromkeys(chosen))


class Histogram(NamedTuple):
    """How a layer's outputs are distributed.

    Attributes:
        counts: elements in each bin between :data:`~lightning_init.monitor.extras.EDGES`.
        n: number of elements.
        mean: of all of them.
        rms: root of their mean square.
    """

    counts: list[float]
    n: float
    mean: float
    rms: float


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What a step looked like: ``values[statistic][layer]``, layers in execution order.

    A layer is absent where there was nothing to measure: it was not called, or no gradient reached it.

    Attributes:
        values: the chosen statistics; norms also of ``total``.
        histograms: by layer, if chosen.
    """

    values: dict[str, dict[str, float]]
    histograms: dict[str, Histogram] = field(default_factory=dict)

    @property
    def tags(self) -> dict[str, float]:
        """The values by the names they are logged under: ``statistic/layer``."""
        return {f"{stat}/{layer}": value for stat, row in self.values.items() for layer, value in row.items()}
