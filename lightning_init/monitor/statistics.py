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
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_init.checks import check_choice, check_list
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.moments import CentralMoments, Measured, central_moments_of, merge_central

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
]
"""What the argument ``stats`` may hold: the names of all statistics, and "default" for the default set."""

Array: TypeAlias = npt.NDArray[np.float64]
NormKind: TypeAlias = Literal["gradient", "clipped", "weight", "update"]
"""A tensor of every parameter whose norm can be taken: its gradient before and after clipping, itself before the
optimizer's step, and what that step adds to it."""


# What a logged step looks like in statistics


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
    """The statistics of one logged step: ``values[statistic][layer]``, layers in execution order.

    A layer is left out where there was nothing to measure: it was not called, or no gradient reached it.

    Attributes:
        values: the chosen statistics; norms also have an entry ``total``, over all parameters.
        histograms: by layer, if chosen.
    """

    values: dict[str, dict[str, float]]
    histograms: dict[str, Histogram] = field(default_factory=dict)

    @property
    def tags(self) -> dict[str, float]:
        """The values by the names they are logged under: ``statistic/layer``."""
        return {f"{stat}/{layer}": value for stat, row in self.values.items() for layer, value in row.items()}


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
        measured: by statistic, what its :class:`OutputMeasure` has added up to: [layers, width] for "sum", [layers]
            for "max", and for "central" Σ(x - mean)ᵏ with the statistic's k, [layers].
        norms: by kind, L2 norms of each layer that owns such parameters, and of "total".
    """

    outputs: OutputSums
    gradients: GradientSums
    measured: Mapping[str, Array]
    norms: Mapping[str, Mapping[str, float]]


# An entry of the registry


class OutputMeasure(NamedTuple):
    """Something to measure on each output, beside the moments that are measured anyway.

    Attributes:
        measure: called with the layer and this rank's elements of its output. Gives float64 [width] for "sum", a
            float64 [] that is not negative for "max", central moments for "central"; None where it makes no sense.
        width: how many numbers a "sum" has.
        adds_up: how measurements are joined over calls and ranks. "sum" travels with the moments, in the one collective
            of a logged step; "max" and "central" take one more each.
        power: k of the Σ(x - mean)ᵏ that a "central" measure is for: 2, 3 or 4.
    """

    measure: Callable[[Layer, Tensor], Measured | None]
    width: int = 1
    adds_up: Literal["sum", "max", "central"] = "sum"
    power: int = 4

    def merge(self, a: Measured, b: Measured) -> Measured:
        """The measurement of both sets of elements together."""
        if isinstance(a, CentralMoments) or isinstance(b, CentralMoments):
            assert isinstance(a, CentralMoments)
            assert isinstance(b, CentralMoments)
            return merge_central(a, b)
        return torch.maximum(a, b) if self.adds_up == "max" else a + b


Finished: TypeAlias = Array | Sequence[Histogram] | Mapping[str, float]
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
        measure: what to measure on each output for it; None: the moments that are measured anyway are enough.
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
    measure: OutputMeasure | None = None
    norms: tuple[NormKind, ...] = ()
    layers: Callable[[Layer], bool] | None = None
    needs_step: bool = False
    in_default_set: bool = False
    shown_as: Literal["scalar", "histogram"] = "scalar"
    least: Literal["one", "two", "one of each unit", "two of each unit"] = "one"


# What is measured on outputs

_MARGIN = 0.01
"""Share of an activation's range within which an output counts as saturated: tanh beyond ±2.3, sigmoid beyond ±4.6."""

EDGES = (*(-(2.0**k) for k in range(10, -21, -1)), 0.0, *(2.0**k for k in range(-20, 11)))
"""Between the histogram's 64 bins: powers of two from 2^-20 to 2^10 of either sign, the same on every rank."""


_NEAR_ZERO = 1e-3
"""Of the rms: what is smaller adds less than a millionth of the mean square, so that it hardly takes part."""

_EXPONENT_BITS = 8
_SUBDIVISION_BITS = 2
"""Bits of a float32's mantissa that tell apart the bins of near_zero within an octave: four bins, at 1, 1.25, 1.5 and
1.75 times a power of two. Two bits more would cost four times as much memory and traffic for a threshold within 6 %."""

_MAGNITUDE_BINS = 1 << (_EXPONENT_BITS + _SUBDIVISION_BITS)


def rectifies(layer: Layer) -> bool:
    """Whether ``layer`` is an activation of the ReLU family, which makes every negative number exactly 0."""
    return layer.activation is not None and layer.activation.rectifies


def saturates(layer: Layer) -> bool:
    """Whether ``layer`` is an activation with two flat ends, such as a sigmoid or tanh."""
    return layer.activation is not None and layer.activation.saturates


def saturated(layer: Layer, output: Tensor) -> Tensor | None:
    """How many elements of a bounded activation are within a hundredth of its range from either end, [1]."""
    activation = layer.activation
    if activation is None or not activation.saturates:
        return None
    margin = _MARGIN * (activation.high - activation.low)
    output = output.float()
    flat = (output < activation.low + margin) | (output > activation.high - margin)
    return flat.sum(dtype=torch.float64).reshape(1)


def binned(layer: Layer, output: Tensor) -> Tensor:
    """How many elements are in each bin, [64]: bin i is from EDGES[i - 1], exclusive, to EDGES[i]."""
    edges = torch.tensor(EDGES, dtype=torch.float32, device=output.device)
    bins = torch.bucketize(output.detach().reshape(-1).float(), edges)
    return torch.bincount(bins, minlength=len(EDGES) + 1).double()


def largest(layer: Layer, output: Tensor) -> Tensor:
    """The largest magnitude, [] float64: NaN if any element is NaN, 0 if there are no elements."""
    return output.detach().abs().max().double() if output.numel() else output.new_zeros((), dtype=torch.float64)


def magnitude_bins(layer: Layer, output: Tensor) -> Tensor:
    """How many elements are in each bin of magnitude, [1024]: by the exponent and first mantissa bits as float32.

    The bits of a positive float, read as an integer, grow with it; without the last 21 of them they are the bin.
    """
    bits = output.detach().reshape(-1).float().abs().view(torch.int32)
    return torch.bincount(bits >> (23 - _SUBDIVISION_BITS), minlength=_MAGNITUDE_BINS).double()


def _central_moments(layer: Layer, output: Tensor) -> CentralMoments:
    return central_moments_of(output)


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
    return sums.measured["activation_max"]


def _saturation(sums: StepSums) -> Array:
    share: Array = sums.measured["saturation"][:, 0] / sums.outputs.n
    return share


def _kurtosis(sums: StepSums) -> Array:
    """Σ(x - mean)⁴ / n / variance²; NaN of a constant."""
    spread = sums.outputs.n * _variance(sums.outputs) ** 2
    return np.where(spread != 0, sums.measured["kurtosis"] / spread, np.nan)


def _histogram(sums: StepSums) -> list[Histogram]:
    bins = sums.measured["histogram"].tolist()
    of_layers = (sums.outputs.n, _activation_mean(sums), _activation_rms(sums))
    return [Histogram(*row) for row in zip(bins, *(numbers.tolist() for numbers in of_layers), strict=True)]


def _gradient_rms(sums: StepSums) -> Array:
    return _rms(sums.gradients)


def _near_zero(sums: StepSums) -> Array:
    """Share of elements in the bins below the one that holds 1e-3 · rms; NaN where the rms is not finite.

    The rms is that of all calls and ranks, which none of them knows while it counts; that is why they count bins. The
    threshold is therefore the bin edge below 1e-3 · rms, between 0.8e-3 and 1e-3 · rms. The lowest bin always belongs
    to the share, so that outputs that are all 0 are near zero, though their rms is 0 as well.
    """
    threshold = (_NEAR_ZERO * _rms(sums.outputs)).astype(np.float32)
    bins = np.maximum(threshold.view(np.int32) >> (23 - _SUBDIVISION_BITS), 1)  # [layers]
    below = np.arange(_MAGNITUDE_BINS) < bins[:, None]  # [layers, bins]
    share = (sums.measured["near_zero"] * below).sum(1) / sums.outputs.n
    return np.where(np.isfinite(threshold), share, np.nan)


def _norm(kind: NormKind, sums: StepSums) -> Mapping[str, float]:
    return sums.norms[kind]


def _update_ratio(sums: StepSums) -> dict[str, float]:
    """Norm of the update over norm of the weight; what has no weight, or one of norm 0, has no ratio."""
    weights = sums.norms["weight"]
    return {name: norm / weights[name] for name, norm in sums.norms["update"].items() if weights.get(name)}


# The registry


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
            measure=OutputMeasure(largest, adds_up="max"),
        ),
        Statistic(
            name="saturation",
            title="Saturation",
            unit="share of outputs",
            source="output",
            finish=_saturation,
            measure=OutputMeasure(saturated),
            layers=saturates,
        ),
        Statistic(
            name="kurtosis",
            title="Kurtosis",
            unit="1",
            source="output",
            finish=_kurtosis,
            measure=OutputMeasure(_central_moments, adds_up="central", power=4),
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
            finish=_histogram,
            measure=OutputMeasure(binned, width=len(EDGES) + 1),
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
            measure=OutputMeasure(magnitude_bins, width=_MAGNITUDE_BINS),
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


def measures_of(stats: Iterable[str]) -> dict[str, OutputMeasure]:
    """By statistic, what has to be measured on outputs for ``stats`` beside their moments."""
    measures = {stat: STATISTICS[stat].measure for stat in stats}
    return {stat: measure for stat, measure in measures.items() if measure is not None}


def norm_kinds_of(stats: Iterable[str]) -> tuple[NormKind, ...]:
    """The kinds of norms that ``stats`` are made of, each once."""
    return tuple(dict.fromkeys(kind for stat in stats for kind in STATISTICS[stat].norms))
