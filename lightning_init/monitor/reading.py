"""From summed moments to the numbers that are shown, in one copy to the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_init.monitor.extras import ADDITIVE
from lightning_init.monitor.layers import Layer
from lightning_init.monitor.layout import Layout
from lightning_init.monitor.norms import Norms
from lightning_init.monitor.second import Second
from lightning_init.monitor.stats import Histogram, LayerStats

Rows = dict[str, list[float]]


class Reading:
    """A summed vector, read from the device.

    Args:
        total: the vector, summed over ranks.
        layout: what stands where in it.
        second: what a second exchange has brought.
        norms: who fills the norms' part.
    """

    def __init__(self, total: Tensor, layout: Layout, second: Second, norms: Norms) -> None:
        table = {**_outputs(total, layout), **_gradients(total, layout)}  # [layers] each
        if second.largest is not None:
            table["activation_max"] = second.largest
        if second.fourth is not None:
            table["kurtosis"] = second.fourth / table["counts"] / table["activation_variance"] ** 2
        blocks = [total[layout.flags], total[layout.norms], total[layout.extras], *table.values()]
        numbers = torch.cat(blocks).tolist()
        flags, norm_numbers, extras, *rows = _split(numbers, [len(block) for block in blocks])
        self.flags = flags
        self._layers = layout.layers
        self._rows: Rows = dict(zip(table, rows, strict=True))
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


def _outputs(total: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Statistics of each layer's outputs, and the number of their elements, [layers] each."""
    counts, squares, sums = total[layout.counts], total[layout.squares], total[layout.sums]
    by_slot = grouped(torch.stack((sums**2, (sums == 0).double())), layout.slot_of_unit, len(layout.slots))
    sums_squared, dead = by_slot
    per_unit = counts / layout.units  # elements that each unit of the slot has seen
    within = (squares - sums_squared / per_unit) / per_unit  # sum over units of their variances
    rows = torch.stack((counts, squares, within, layout.units.double(), dead)).where(counts > 0, 0.0)
    n, second, within, units, dead = grouped(rows, layout.layer_of_slot, len(layout.layers))
    mean = layout.means(total)
    return {
        "counts": n,
        "activation_mean": mean,
        "activation_rms": (second / n).sqrt(),
        "activation_variance": (second / n - mean**2).clamp_min(0),
        "signal_variance": (within / units).clamp_min(0),
        "dead_units": dead / units,
    }


def _gradients(total: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Variance of the gradients of each layer's outputs, and the number of their elements, [layers] each."""
    n = total[layout.gradient_counts]
    mean = total[layout.gradient_sums] / n
    return {
        "gradient_counts": n,
        "gradient_variance": (total[layout.gradient_squares] / n - mean**2).clamp_min(0),
    }


def grouped(rows: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum the columns of ``rows`` by group: [k, n] -> [k, groups]."""
    return rows.new_zeros(len(rows), num_groups).index_add_(1, group, rows)


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
