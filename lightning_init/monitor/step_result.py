"""From the summed vector to the statistics of a logged step, with one copy from the device to the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_init.introspect.layers import Layer
from lightning_init.monitor.exchange import SecondPass, VectorLayout
from lightning_init.monitor.measures import Array
from lightning_init.monitor.moments import needs_device_sync
from lightning_init.monitor.parameter_norms import ParameterNorms
from lightning_init.monitor.statistics import (
    STATISTICS,
    GradientSums,
    LayerStats,
    OutputSums,
    StepSums,
)


class StepResult:
    """What ranks have summed in a logged step, on the host.

    Args:
        total: the vector, summed over ranks.
        layout: where each number is in it.
        second: after its exchange.
        norms: whose packed numbers are in the vector.

    Attributes:
        flags: the vector's flags: how many ranks have failed, how many miss a slot.
    """

    def __init__(self, total: Tensor, layout: VectorLayout, second: SecondPass, norms: ParameterNorms) -> None:
        self._layers = layout.layers
        with np.errstate(all="ignore"):  # a sum that overflowed is shown as it is, infinite
            head, of_slots, exchanged = _copy_to_host(total, layout, list(second.results.values()))
            self.flags: list[float] = head[layout.flags].tolist()
            self._sums = StepSums(
                outputs=_output_sums(head, of_slots, layout),
                gradients=GradientSums(
                    n=head[layout.gradient_counts],
                    sum=head[layout.gradient_sums],
                    squares=head[layout.gradient_squares],
                ),
                measured={**_measured(head, layout), **_exchanged(second, exchanged, len(layout.layers))},
                norms=norms.read(head[layout.norms]),
                parameter_norms=norms.read_parameters(head[layout.norms]),
            )

    def stats(self, chosen: Sequence[str], layers: Mapping[str, Layer]) -> LayerStats:
        """The chosen statistics.

        Args:
            chosen: names of statistics.
            layers: the layers by the names of the layout, for statistics that make sense for some of them only.
        """
        result = LayerStats({}, {})
        outputs, gradients = self._sums.outputs, self._sums.gradients
        counts = {"output": outputs.n.tolist(), "gradient": gradients.n.tolist()}
        of_each_unit = (outputs.n / np.maximum(outputs.units, 1)).tolist()  # NaN, and so too few, of unknown units
        with np.errstate(all="ignore"):  # no elements, no variance: such layers are left out below
            for stat in chosen:
                statistic = STATISTICS[stat]
                finished = statistic.finish(self._sums)
                if isinstance(finished, Mapping):
                    result.values[stat] = self._in_execution_order(finished)
                    continue
                rows = finished.tolist() if isinstance(finished, np.ndarray) else finished
                least, of_unit = 1 + statistic.least.startswith("two"), statistic.least.endswith("unit")
                numbers = of_each_unit if of_unit else counts.get(statistic.source, [least] * len(rows))
                fits = statistic.layers
                found = {
                    name: row
                    for name, n, row in zip(self._layers, numbers, rows, strict=True)
                    if row is not None and n >= least and (fits is None or fits(layers[name]))
                }
                if statistic.shown_as == "histogram":
                    result.histograms[stat] = found
                else:
                    result.values[stat] = found
        return result

    def _in_execution_order(self, norms: Mapping[str, float]) -> dict[str, float]:
        """``norms``, layers in execution order, those that were not called behind them, and the total at the end."""
        ordered = {name: norms[name] for name in self._layers if name in norms}
        ordered.update({name: norm for name, norm in norms.items() if name not in ordered and name != "total"})
        if "total" in norms:
            ordered["total"] = norms["total"]
        return ordered


def _copy_to_host(
    total: Tensor, layout: VectorLayout, exchanged: Sequence[Tensor]
) -> tuple[Array, list[Array], list[Array]]:
    """In one copy: the vector up to ``layout.sums``, three numbers of each slot, and ``exchanged``.

    The three are what the statistics need of the units' sums: of each slot, [slots], the sum of its units' sums, the
    sum of their squares, and how many of them are 0. Computed before the copy, they keep it small.
    """
    head, unit_sums = total[: layout.sums.start], total[layout.sums]
    if layout.starts is not None and not needs_device_sync(total):
        # on the CPU by NumPy, whose calls cost a fifth of torch's where caches are cold
        units, scratch = unit_sums.numpy(), layout.scratch
        sums = np.add.reduceat(units, layout.starts)
        squares = np.add.reduceat(np.multiply(units, units, out=scratch), layout.starts)
        zeros = np.add.reduceat(np.equal(units, 0.0, out=scratch), layout.starts)
        return head.numpy(), [sums, squares, zeros], [vector.numpy() for vector in exchanged]
    # segment_reduce, because index_add_ costs four times as much; unsafe=True, because the lengths are right, and
    # checking them would read them from the device
    of_slots = [
        torch.segment_reduce(numbers, "sum", lengths=layout.num_sums_on_device, unsafe=True)
        for numbers in (unit_sums, unit_sums * unit_sums, (unit_sums == 0).double())
    ]
    blocks = [head, *of_slots, *exchanged]
    on_host = torch.cat(blocks).cpu().numpy()
    first, *others = np.split(on_host, list(itertools.accumulate(block.numel() for block in blocks[:-1])))
    return first, others[:3], others[3:]


def _output_sums(head: Array, of_slots: Sequence[Array], layout: VectorLayout) -> OutputSums:
    """Sums over each layer's outputs: those of its slots together."""
    n, squares, units = head[layout.counts], head[layout.squares], layout.units
    sums, squared_sums, zeros = of_slots
    per_unit = n / units  # elements of each unit
    # of one unit, Σx² - (Σx)² / per_unit is per_unit times its variance; summed over units:
    unit_variances = (squares - squared_sums / per_unit) / per_unit
    rows = np.where(n > 0, (n, sums, squares, unit_variances, units, zeros), 0.0)  # [6, slots]
    if len(layout.slots) > len(layout.layers):
        rows = np.array([np.bincount(layout.layer_of_slot, row, len(layout.layers)) for row in rows])
    return OutputSums(*rows)


def _exchanged(second: SecondPass, exchanged: Sequence[Array], num_layers: int) -> dict[str, Array]:
    """By name, what a second pass has exchanged: [layers] of powers, [layers, width] of maxima."""
    return {
        name: array if second.measures[name].adds_up == "central" else array.reshape(num_layers, -1)
        for name, array in zip(second.results, exchanged, strict=True)
    }


def _measured(head: Array, layout: VectorLayout) -> dict[str, Array]:
    """By statistic, what its measure has added up to, [layers, width]."""
    shapes = {stat: (len(layout.layers), width) for stat, width in layout.widths.items()}
    blocks = np.split(head[layout.measured], list(itertools.accumulate(map(math.prod, shapes.values()))))
    return {stat: block.reshape(shape) for (stat, shape), block in zip(shapes.items(), blocks[:-1], strict=True)}
