"""The registry of statistics: everything the monitor can say about a layer, one entry each.

An entry says what the statistic is made of (a layer's output, the gradient of that output, the layer's parameters),
what has to be measured for it, how these measurements add up over calls and ranks, and how the number is finished from
the sums. Everything else in this package, from the hooks to the charts, reads the entries: to add a statistic, add an
entry to :data:`STATISTICS` and its name to :data:`StatName`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from lightning_init.checks import check_choice, check_list
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.histograms import BINS, EXTREMES, Histogram, histograms_of
from lightning_init.monitor.measures import (
    FOURTH_MOMENT,
    LARGEST,
    MAGNITUDE_BINS,
    SATURATED,
    Array,
    Measure,
    near_zero_share,
)

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
    "gradient_rms",
    "near_zero",
    "gradient_histogram",
    "weight_histogram",
    "parameter_gradient_norm",
    "parameter_norm",
]
"""What the argument ``stats`` may hold: the names of all statistics, and "default" for the default set."""

NormKind: TypeAlias = Literal["gradient", "clipped", "weight", "update"]
"""A tensor of every parameter whose norm can be taken: its gradient before and after clipping, itself before the
optimizer's step, and what that step adds to it."""


# What a logged step looks like in statistics


@dataclass(frozen=True, slots=True)
class LayerStats:
    """The statistics of one logged step: ``values[statistic][layer]``, layers in execution order.

    A layer is left out where there was nothing to measure: it was not called, or no gradient reached it.

    Attributes:
        values: the chosen statistics; norms also have an entry ``total``, over all parameters.
        histograms: ``histograms[statistic][layer]``, if chosen.
    """

    values: dict[str, dict[str, float]]
    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)

    @property
    def tags(self) -> dict[str, float]:
        """The values by the names they are logged under: ``statistic/layer``.

        What a histogram cannot show is a number of its own, where there is any: how many elements were NaN
        (``histogram_nan/layer``) and how many infinite (``histogram_infinite/layer``).
        """
        tags = {f"{stat}/{layer}": value for stat, row in self.values.items() for layer, value in row.items()}
        for stat, row in self.histograms.items():
            tags.update({f"{stat}_nan/{layer}": h.nan for layer, h in row.items() if h.nan})
            tags.update({f"{stat}_infinite/{layer}": h.infinite for layer, h in row.items() if h.infinite})
        return tags


# What a statistic is finished from: sums over all calls, micro-batches and ranks


class OutputSums(NamedTuple):
    """Sums over all outputs of each layer, [layers] each.

    Attributes:
        n: number of elements.
        sum: Σx.
        squares: Σx².
        unit_variances: Σ of the population variances of single units.
        units: number of units. A module that is called at two widths has the units of both; NaN where units are not
            known.
        unit_zeros: number of units whose sum is exactly 0: after a ReLU, those that were never positive.
    """

    n: Array
    sum: Array
    squares: Array
    unit_variances: Array
    units: Array
    unit_zeros: Array


class GradientSums(NamedTuple):
    """Sums over the gradients of all outputs of each layer, [layers] each: count, Σg, Σg²."""

    n: Array
    sum: Array
    squares: Array


class StepSums(NamedTuple):
    """Everything that was summed in a logged step.

    Attributes:
        outputs: of the layers' outputs.
        gradients: of d loss / d output.
        measured: by name, what a :class:`Measure` has added up to: [layers, width] for "sum" and "max", and for
            "central" Σ(x - mean)ᵏ with the measure's k, [layers].
        norms: by kind, L2 norms of each layer that owns such parameters, and of "total".
        parameter_norms: by kind, those of each parameter, by its name.
    """

    outputs: OutputSums
    gradients: GradientSums
    measured: Mapping[str, Array]
    norms: Mapping[str, Mapping[str, float]]
    parameter_norms: Mapping[str, Mapping[str, float]]


# An entry of the registry


Finished: TypeAlias = Array | Sequence[Histogram | None] | Mapping[str, float]
"""One number (or histogram) of each layer, [layers]; for norms, one by name, "total" included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """A number per layer and logged step.

    Attributes:
        name: as users write it, and the first part of its tags.
        title: of its chart.
        unit: of its numbers, in terms of the output, the loss and so on; "1" is a plain number.
        source: what it tells about. Where a layer had no output or no gradient, those of that source are left out.
        finish: gives the numbers from the sums. Divisions by 0 are silent there.
        measures: by name, what to measure for it; the moments that are measured anyway are enough for most.
        norms: for source "parameters", the norms it is made of.
        layers: which layers it makes sense for; None: all.
        needs_step: whether something has to be measured when the optimizer has stepped.
        in_default_set: whether it is logged if nothing is chosen.
        shown_as: "scalar" is written to every logger, "histogram" to TensorBoard only.
        least: how many numbers it takes: one number has no variance, and a layer with fewer is left out. A number "of
            each unit" takes units that are known.
    """

    name: str
    title: str
    unit: str
    source: Literal["output", "gradient", "parameters"]
    finish: Callable[[StepSums], Finished]
    measures: Mapping[str, Measure] = field(default_factory=dict)
    norms: tuple[NormKind, ...] = ()
    layers: Callable[[Layer], bool] | None = None
    needs_step: bool = False
    in_default_set: bool = False
    shown_as: Literal["scalar", "histogram"] = "scalar"
    least: Literal["one", "two", "one of each unit", "two of each unit"] = "one"


# Which layers a statistic makes sense for


def rectifies(layer: Layer) -> bool:
    """Whether ``layer`` is an activation of the ReLU family, which makes every negative number exactly 0."""
    return layer.activation is not None and layer.activation.rectifies


def saturates(layer: Layer) -> bool:
    """Whether ``layer`` is an activation with two flat ends, such as a sigmoid or tanh."""
    return layer.activation is not None and layer.activation.saturates


# How numbers are finished from sums


def _variance(sums: OutputSums | GradientSums) -> Array:
    """Population variance of all elements, [layers]. What rounding has made negative is 0; NaN stays."""
    mean = sums.sum / sums.n
    return np.maximum(sums.squares / sums.n - mean * mean, 0.0)


def _rms(sums: OutputSums | GradientSums) -> Array:
    """Root of the mean square of all elements, [layers]."""
    return np.sqrt(sums.squares / sums.n)


def _activation_variance(sums: StepSums) -> Array:
    return _variance(sums.outputs)


def _gradient_variance(sums: StepSums) -> Array:
    return _variance(sums.gradients)


def _activation_mean(sums: StepSums) -> Array:
    return sums.outputs.sum / sums.outputs.n


def _activation_rms(sums: StepSums) -> Array:
    return _rms(sums.outputs)


def _signal_variance(sums: StepSums) -> Array:
    """Mean of the units' own variances."""
    return np.maximum(sums.outputs.unit_variances / sums.outputs.units, 0.0)


def _dead_units(sums: StepSums) -> Array:
    """Share of units without a positive output: a ReLU's outputs are not negative, so their sum is 0 only then."""
    return sums.outputs.unit_zeros / sums.outputs.units


def _activation_max(sums: StepSums) -> Array:
    largest: Array = sums.measured["activation_max"][:, 0]
    return largest


def _saturation(sums: StepSums) -> Array:
    share: Array = sums.measured["saturation"][:, 0] / sums.outputs.n
    return share


def _kurtosis(sums: StepSums) -> Array:
    """Σ(x - mean)⁴ / n / variance²; NaN of a constant."""
    spread = sums.outputs.n * _variance(sums.outputs) ** 2
    return np.where(spread != 0, sums.measured["kurtosis"] / spread, np.nan)


def _histogram(stat: str, sums: StepSums) -> list[Histogram | None]:
    return histograms_of(sums.measured[stat], sums.measured[f"{stat} extremes"])


def _gradient_rms(sums: StepSums) -> Array:
    return _rms(sums.gradients)


def _near_zero(sums: StepSums) -> Array:
    return near_zero_share(sums.measured["near_zero"], sums.outputs.n, _rms(sums.outputs))


def _norm(kind: NormKind, sums: StepSums) -> Mapping[str, float]:
    return sums.norms[kind]


def _parameter_norm(kind: NormKind, sums: StepSums) -> Mapping[str, float]:
    return sums.parameter_norms[kind]


def _update_ratio(sums: StepSums) -> dict[str, float]:
    """Norm of the update over norm of the weight; what has no weight, or one of norm 0, has no ratio."""
    weights = sums.norms["weight"]
    return {name: norm / weights[name] for name, norm in sums.norms["update"].items() if weights.get(name)}


# The registry


def _histogram_measures(stat: str, of: Literal["output", "weight", "gradient"]) -> dict[str, Measure]:
    return {stat: BINS._replace(of=of), f"{stat} extremes": EXTREMES._replace(of=of)}


def _by_name(statistics: Iterable[Statistic]) -> Mapping[str, Statistic]:
    return MappingProxyType({statistic.name: statistic for statistic in statistics})


STATISTICS: Mapping[str, Statistic] = _by_name(
    [
        Statistic(
            name="activation_variance",
            title="Activation variance",
            unit="output²",
            source="output",
            finish=_activation_variance,
            in_default_set=True,
            least="two",
        ),
        Statistic(
            name="signal_variance",
            title="Signal variance",
            unit="output²",
            source="output",
            finish=_signal_variance,
            in_default_set=True,
            least="two of each unit",
        ),
        Statistic(
            name="gradient_variance",
            title="Gradient variance",
            unit="(loss / output)²",
            source="gradient",
            finish=_gradient_variance,
            in_default_set=True,
            least="two",
        ),
        Statistic(
            name="gradient_norm",
            title="Gradient norm",
            unit="loss / parameter",
            source="parameters",
            finish=functools.partial(_norm, "gradient"),
            norms=("gradient",),
            in_default_set=True,
        ),
        Statistic(
            name="dead_units",
            title="Dead units",
            unit="share of units",
            source="output",
            finish=_dead_units,
            layers=rectifies,
            in_default_set=True,
            least="one of each unit",
        ),
        Statistic(
            name="activation_mean",
            title="Activation mean",
            unit="output",
            source="output",
            finish=_activation_mean,
        ),
        Statistic(
            name="activation_rms",
            title="Activation rms",
            unit="output",
            source="output",
            finish=_activation_rms,
        ),
        Statistic(
            name="activation_max",
            title="Activation max",
            unit="output",
            source="output",
            finish=_activation_max,
            measures={"activation_max": LARGEST},
        ),
        Statistic(
            name="saturation",
            title="Saturation",
            unit="share of outputs",
            source="output",
            finish=_saturation,
            measures={"saturation": SATURATED},
            layers=saturates,
        ),
        Statistic(
            name="kurtosis",
            title="Kurtosis",
            unit="1",
            source="output",
            finish=_kurtosis,
            measures={"kurtosis": FOURTH_MOMENT},
        ),
        Statistic(
            name="weight_norm",
            title="Weight norm",
            unit="parameter",
            source="parameters",
            finish=functools.partial(_norm, "weight"),
            norms=("weight",),
        ),
        Statistic(
            name="update_ratio",
            title="Update ratio",
            unit="1",
            source="parameters",
            finish=_update_ratio,
            norms=("weight", "update"),
            needs_step=True,
        ),
        Statistic(
            name="gradient_norm_clipped",
            title="Gradient norm clipped",
            unit="loss / parameter",
            source="parameters",
            finish=functools.partial(_norm, "clipped"),
            norms=("clipped",),
            needs_step=True,
        ),
        Statistic(
            name="histogram",
            title="Histogram",
            unit="outputs",
            source="output",
            finish=functools.partial(_histogram, "histogram"),
            measures=_histogram_measures("histogram", "output"),
            shown_as="histogram",
        ),
        Statistic(
            name="gradient_rms",
            title="Gradient rms",
            unit="loss / output",
            source="gradient",
            finish=_gradient_rms,
        ),
        Statistic(
            name="near_zero",
            title="Near zero",
            unit="share of outputs",
            source="output",
            finish=_near_zero,
            measures={"near_zero": MAGNITUDE_BINS},
        ),
        Statistic(
            name="gradient_histogram",
            title="Gradient histogram",
            unit="loss / parameter",
            source="parameters",
            finish=functools.partial(_histogram, "gradient_histogram"),
            measures=_histogram_measures("gradient_histogram", "gradient"),
            shown_as="histogram",
        ),
        Statistic(
            name="weight_histogram",
            title="Weight histogram",
            unit="parameter",
            source="parameters",
            finish=functools.partial(_histogram, "weight_histogram"),
            measures=_histogram_measures("weight_histogram", "weight"),
            shown_as="histogram",
        ),
        Statistic(
            name="parameter_gradient_norm",
            title="Gradient norm of each parameter",
            unit="loss / parameter",
            source="parameters",
            finish=functools.partial(_parameter_norm, "gradient"),
            norms=("gradient",),
        ),
        Statistic(
            name="parameter_norm",
            title="Norm of each parameter",
            unit="parameter",
            source="parameters",
            finish=functools.partial(_parameter_norm, "weight"),
            norms=("weight",),
        ),
    ]
)
"""Every statistic by its name."""

DEFAULT_STATS = tuple(name for name, statistic in STATISTICS.items() if statistic.in_default_set)
"""The statistics that are logged if nothing is chosen."""


def chosen_stats(stats: Sequence[str] | None) -> tuple[str, ...]:
    """The names asked for, each once; None is the default set, which "default" also stands for.

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


def measures_of(stats: Iterable[str], of: Sequence[str] = ("output", "weight", "gradient")) -> dict[str, Measure]:
    """By name, what has to be measured for ``stats`` beside moments and norms.

    Args:
        stats: names of statistics.
        of: only what is measured of these.
    """
    measures = {name: measure for stat in stats for name, measure in STATISTICS[stat].measures.items()}
    return {name: measure for name, measure in measures.items() if measure.of in of}


def norm_kinds_of(stats: Iterable[str]) -> tuple[NormKind, ...]:
    """The kinds of norms that ``stats`` are made of, each once."""
    return tuple(dict.fromkeys(kind for stat in stats for kind in STATISTICS[stat].norms))
