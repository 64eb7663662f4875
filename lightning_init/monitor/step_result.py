"""From summed moments to the numbers that are shown, in one copy to the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_init.introspect.layers import Layer
from lightning_init.monitor.exchange import SecondPass, VectorLayout
from lightning_init.monitor.moments import needs_device_sync
from lightning_init.monitor.parameter_norms import ParameterNorms
from lightning_init.monitor.statistics import Histogram, LayerStats

Numbers: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = dict[str, list[float]]


class StepResult:
    """A summed vector, read from the device.

    Args:
        total: the vector, summed over ranks.
        layout: what stands where in it.
        second: what a second exchange has brought.
        norms: who fills the norms' part.
    """

    def __init__(self, total: Tensor, layout: VectorLayout, second: SecondPass, norms: ParameterNorms) -> None:
        beside = {"activation_max": second.largest, "fourth": second.fourth}
        self._layers = layout.layers
        with np.errstate(all="ignore"):  # what overflows is shown as it is
            head, of_slots, rest = _read(total, layout, [values for values in beside.values() if values is not None])
            self._extras = _extras(head, layout)
            rows = {**_outputs(head, of_slots, layout), **_gradients(head, layout)}
            rows.update(zip((stat for stat, values in beside.items() if values is not None), rest, strict=True))
            if "fourth" in rows:
                spread = rows["counts"] * rows["activation_variance"] ** 2
                rows["kurtosis"] = np.where(spread != 0, rows["fourth"] / spread, np.nan)
            if "saturation" in self._extras:
                rows["saturation"] = self._extras["saturation"][:, 0] / rows["counts"]
            self._norms = norms.read(head[layout.norms])
        self.flags: list[float] = head[layout.flags].tolist()
        self._rows: Rows = {stat: row.tolist() for stat, row in rows.items()}

    def stats(self, chosen: Sequence[str], layers: Iterable[Layer]) -> LayerStats:
        """The chosen statistics; ``layers`` say which of them make sense where."""
        rectifiers = {layer.name for layer in layers if layer.activation and layer.activation.rectifies}
        saturating = {layer.name for layer in layers if layer.activation and layer.activation.saturates}
        values = {}
        for stat in chosen:
            if stat == "gradient_variance":
                values[stat] = self._where("gradient_counts", self._rows[stat])
            elif stat == "dead_units":
                values[stat] = self._where("counts", self._rows[stat], rectifiers)
            elif stat == "saturation":
                values[stat] = self._where("counts", self._rows[stat], saturating)
            elif stat in self._rows:
                values[stat] = self._where("counts", self._rows[stat])
            elif stat != "histogram":
                values[stat] = self._norms_of(stat)
        return LayerStats(values, self._histograms() if "histogram" in chosen else {})

    def _where(self, counts: str, row: Sequence[float], names: set[str] | None = None) -> dict[str, float]:
        """The values of layers that have any, and are among ``names``."""
        found = zip(self._layers, self._rows[counts], row, strict=True)
        return {layer: value for layer, n, value in found if n and (names is None or layer in names)}

    def _norms_of(self, stat: str) -> dict[str, float]:
        kinds = {"gradient_norm": "gradient", "gradient_norm_clipped": "clipped", "weight_norm": "weight"}
        if stat != "update_ratio":
            return self._ordered(kinds[stat])
        moved, weights = self._ordered("update"), self._ordered("weight")
        return {name: norm / weights[name] for name, norm in moved.items() if weights.get(name)}

    def _ordered(self, kind: str) -> dict[str, float]:
        """The norms, layers in execution order, the total at the end."""
        norms = self._norms[kind]
        order = dict.fromkeys([*self._layers, *norms])
        order.pop("total", None)
        return {name: norms[name] for name in [*order, "total"] if name in norms}

    def _histograms(self) -> dict[str, Histogram]:
        bins = self._extras["histogram"].tolist()
        moments = zip(*(self._rows[row] for row in ("counts", "activation_mean", "activation_rms")), strict=True)
        found = zip(self._layers, bins, moments, strict=True)
        return {layer: Histogram(counts, *numbers) for layer, counts, numbers in found if numbers[0]}


def _read(
    total: Tensor, layout: VectorLayout, beside: Sequence[Tensor]
) -> tuple[Numbers, list[Numbers], list[Numbers]]:
    """In one copy: the numbers before the units' sums; sums, their squares and zeros of each slot; what is beside.

    On the CPU by NumPy, whose calls cost a fifth where caches are cold; ``segment_reduce`` does the same anywhere.
    """
    head, by_unit = total[: layout.sums.start], total[layout.sums]
    if layout.starts is not None and not needs_device_sync(total):
        units, scratch = by_unit.numpy(), layout.scratch
        sums = np.add.reduceat(units, layout.starts)
        squares = np.add.reduceat(np.multiply(units, units, out=scratch), layout.starts)
        zeros = np.add.reduceat(np.equal(units, 0.0, out=scratch), layout.starts)
        return head.numpy(), [sums, squares, zeros], [values.numpy() for values in beside]
    # index_add_ costs four times as much; unsafe: the lengths are right, and checking would read them
    of_slots = [
        torch.segment_reduce(values, "sum", lengths=layout.units_there, unsafe=True)
        for values in (by_unit, by_unit * by_unit, (by_unit == 0).double())
    ]
    blocks = [head, *of_slots, *beside]
    numbers = torch.cat(blocks).cpu().numpy()
    first, *rest = np.split(numbers, list(itertools.accumulate(block.numel() for block in blocks[:-1])))
    return first, rest[:3], rest[3:]


def _outputs(head: Numbers, of_slots: Sequence[Numbers], layout: VectorLayout) -> dict[str, Numbers]:
    """Statistics of each layer's outputs, and the number of their elements, [layers] each."""
    n, squares, units = head[layout.counts], head[layout.squares], layout.units
    total, sums_squared, dead = of_slots
    per_unit = n / units  # elements that each unit of the slot has seen
    within = (squares - sums_squared / per_unit) / per_unit  # sum over units of their variances
    slots = np.where(n > 0, (n, total, squares, within, units, dead), 0.0)
    if len(layout.slots) > len(layout.layers):
        slots = np.array([np.bincount(layout.layer_of_slot, row, len(layout.layers)) for row in slots])
    n, total, squares, within, units, dead = slots
    mean, square = total / n, squares / n
    return {
        "counts": n,
        "activation_mean": mean,
        "activation_rms": np.sqrt(square),
        "activation_variance": _variance(square, mean),
        "signal_variance": np.maximum(within / units, 0.0),
        "dead_units": dead / units,
    }


def _gradients(head: Numbers, layout: VectorLayout) -> dict[str, Numbers]:
    """Variance of the gradients of each layer's outputs, and the number of their elements, [layers] each."""
    n = head[layout.gradient_counts]
    variance = _variance(head[layout.gradient_squares] / n, head[layout.gradient_sums] / n)
    return {"gradient_counts": n, "gradient_variance": variance}


def _extras(head: Numbers, layout: VectorLayout) -> dict[str, Numbers]:
    """What was measured on request, [layers, width] each."""
    shapes = {stat: (len(layout.layers), width) for stat, width in layout.widths.items()}
    blocks = np.split(head[layout.extras], list(itertools.accumulate(map(math.prod, shapes.values()))))
    return {stat: block.reshape(shape) for (stat, shape), block in zip(shapes.items(), blocks[:-1], strict=True)}


def _variance(square: Numbers, mean: Numbers) -> Numbers:
    """What rounding has made negative is 0; NaN stays."""
    return np.maximum(square - mean * mean, 0.0)
