"""From summed moments to the numbers that are shown, in one copy to the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_init.moments import waits
from lightning_init.monitor.extras import ADDITIVE
from lightning_init.monitor.layers import Layer
from lightning_init.monitor.layout import Layout
from lightning_init.monitor.norms import Norms
from lightning_init.monitor.second import Second
from lightning_init.monitor.stats import Histogram, LayerStats

Rows = dict[str, list[float]]
Columns = list[list[float]]


class Reading:
    """A summed vector, read from the device.

    Args:
        total: the vector, summed over ranks.
        layout: what stands where in it.
        second: what a second exchange has brought.
        norms: who fills the norms' part.
    """

    def __init__(self, total: Tensor, layout: Layout, second: Second, norms: Norms) -> None:
        head, slots, rest = _read(total, layout, [v for v in (second.largest, second.fourth) if v is not None])
        self.flags = head[layout.flags]
        self._layers = layout.layers
        self._rows = {**_outputs(head, slots, layout), **_gradients(head, layout)}
        if second.largest is not None:
            self._rows["activation_max"] = rest.pop(0)
        if second.fourth is not None:
            columns = zip(rest.pop(0), self._rows["counts"], self._rows["activation_variance"], strict=True)
            self._rows["kurtosis"] = [_ratio(fourth, n * variance * variance) for fourth, n, variance in columns]
        norm_numbers, extras = head[layout.norms], head[layout.extras]
        self._norms = {
            kind: _split(block, [1 + len(norms.owners)] * 2)
            for kind, block in zip(norms.kinds, _split_evenly(norm_numbers, len(norms.kinds)), strict=True)
        }
        self._owners = norms.owners
        widths = [len(layout.layers) * width for width in layout.widths.values()]
        self._extras = dict(zip(layout.widths, _split(extras, widths), strict=True))

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
                shares = [_ratio(n, of) for n, of in zip(self._extras[stat], self._rows["counts"], strict=True)]
                values[stat] = self._where("counts", shares, saturating)
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
            return self._roots(kinds[stat])
        moved, weights = self._roots("update"), self._roots("weight")
        return {name: _ratio(norm, weights[name]) for name, norm in moved.items() if weights.get(name)}

    def _roots(self, kind: str) -> dict[str, float]:
        squares, counts = self._norms[kind]
        norms = {n: s**0.5 for n, s, count in zip(("total", *self._owners), squares, counts, strict=True) if count}
        order = [*self._layers, *self._owners, "total"]
        return {name: norms[name] for name in dict.fromkeys(order) if name in norms}

    def _histograms(self) -> dict[str, Histogram]:
        width = ADDITIVE["histogram"].width
        bins = _split(self._extras["histogram"], [width] * len(self._layers))
        moments = zip(*(self._rows[row] for row in ("counts", "activation_mean", "activation_rms")), strict=True)
        found = zip(self._layers, bins, moments, strict=True)
        return {layer: Histogram(counts, *numbers) for layer, counts, numbers in found if numbers[0]}


def _read(total: Tensor, layout: Layout, beside: list[Tensor]) -> tuple[list[float], Columns, Columns]:
    """In one copy: the numbers before the units' sums; sums, their squares and zeros of each slot; what is beside.

    On the CPU by NumPy, whose calls cost a fifth where caches are cold; ``segment_reduce`` does the same anywhere.
    """
    head, by_unit = total[: layout.sums.start], total[layout.sums]
    if layout.starts is not None and not waits(total):
        units = by_unit.numpy()
        with np.errstate(all="ignore"):  # what overflows is shown as it is
            of_units = units, units * units, (units == 0) * 1.0
            by_slot = [np.add.reduceat(values, layout.starts).tolist() for values in of_units]
        return head.tolist(), by_slot, [values.tolist() for values in beside]
    # index_add_ costs four times as much; unsafe: the lengths are right, and checking would read them
    sums, squares, zeros = (
        torch.segment_reduce(values, "sum", lengths=layout.units, unsafe=True)
        for values in (by_unit, by_unit * by_unit, (by_unit == 0).double())
    )
    blocks = [head, sums, squares, zeros, *beside]
    first, *rest = _split(torch.cat(blocks).tolist(), [block.numel() for block in blocks])
    return first, rest[:3], rest[3:]


def _outputs(head: list[float], slots: Sequence[list[float]], layout: Layout) -> Rows:
    """Statistics of each layer's outputs, and the number of their elements, [layers] each.

    In Python numbers: a few operations on a few hundred numbers cost less so than by as many calls of torch.
    """
    found = {layer: [0.0] * 6 for layer in layout.layers}
    columns = zip(layout.slots, head[layout.counts], head[layout.squares], *slots, strict=True)
    for (layer, units), n, squares, total, sums_squared, dead in columns:
        if n:
            per_unit = n / units  # elements that each unit of the slot has seen
            within = (squares - sums_squared / per_unit) / per_unit  # sum over units of their variances
            numbers = (n, total, squares, within, units, dead)
            found[layer] = [a + b for a, b in zip(found[layer], numbers, strict=True)]
    rows = [_of_layer(*numbers) for numbers in found.values()]
    names = "counts", "activation_mean", "activation_rms", "activation_variance", "signal_variance", "dead_units"
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _of_layer(n: float, total: float, squares: float, within: float, units: float, dead: float) -> tuple[float, ...]:
    mean, square = _ratio(total, n), _ratio(squares, n)
    return n, mean, square**0.5, _variance(square, mean), _positive(_ratio(within, units)), _ratio(dead, units)


def _gradients(head: list[float], layout: Layout) -> Rows:
    """Variance of the gradients of each layer's outputs, and the number of their elements, [layers] each."""
    counts = head[layout.gradient_counts]
    columns = zip(counts, head[layout.gradient_sums], head[layout.gradient_squares], strict=True)
    variances = [_variance(_ratio(squares, n), _ratio(total, n)) for n, total, squares in columns]
    return {"gradient_counts": counts, "gradient_variance": variances}


def _variance(square: float, mean: float) -> float:
    return _positive(square - mean * mean)  # ** would raise where this overflows


def _positive(value: float) -> float:
    """What rounding has made negative is 0; NaN stays."""
    return 0.0 if value < 0 else value


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _split(numbers: list[float], sizes: Sequence[int]) -> list[list[float]]:
    """Consecutive pieces of the given sizes."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(numbers[start : start + size])
        start += size
    return pieces


def _split_evenly(numbers: list[float], parts: int) -> list[list[float]]:
    return _split(numbers, [len(numbers) // parts] * parts) if parts else []
