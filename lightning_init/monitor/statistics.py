"""Which statistics there are, and what a logged step looks like in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_init.checks import check_choice, check_list
from lightning_init.introspect.layers import Layer

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
        counts: elements in each bin between :data:`~lightning_init.monitor.statistics.EDGES`.
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


_MARGIN = 0.01
"""Share of an activation's range within which an output counts as saturated: tanh beyond ±2.3, sigmoid beyond ±4.6."""

EDGES = (*(-(2.0**k) for k in range(10, -21, -1)), 0.0, *(2.0**k for k in range(-20, 11)))
"""Between the histogram's 64 bins: powers of two from 2^-20 to 2^10 of either sign, the same on every rank."""


class OutputMeasure(NamedTuple):
    """Something to measure on each output that adds up over calls and ranks.

    Attributes:
        width: how many numbers it is.
        measure: gives them, float64 [width]; None where the question makes no sense.
    """

    width: int
    measure: Callable[[Layer, Tensor], Tensor | None]


def saturated(layer: Layer, values: Tensor) -> Tensor | None:
    """How many elements of a bounded activation are within a hundredth of its range from either end, [1]."""
    activation = layer.activation
    if activation is None or not activation.saturates:
        return None
    margin = _MARGIN * (activation.high - activation.low)
    values = values.float()
    flat = (values < activation.low + margin) | (values > activation.high - margin)
    return flat.sum(dtype=torch.float64).reshape(1)


def binned(layer: Layer, values: Tensor) -> Tensor:
    """How many elements are in each bin, [64]: bin i is from EDGES[i - 1], exclusive, to EDGES[i]."""
    edges = torch.tensor(EDGES, dtype=torch.float32, device=values.device)
    bins = torch.bucketize(values.detach().reshape(-1).float(), edges)
    return torch.bincount(bins, minlength=len(EDGES) + 1).double()


def largest(values: Tensor) -> Tensor:
    """The largest magnitude, [] float64; NaN if there is one, 0 of nothing."""
    return values.detach().abs().max().double() if values.numel() else values.new_zeros((), dtype=torch.float64)


ADDITIVE: dict[str, OutputMeasure] = {
    "saturation": OutputMeasure(1, saturated),
    "histogram": OutputMeasure(len(EDGES) + 1, binned),
}
