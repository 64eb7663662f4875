"""From summed moments to the numbers that are shown: one value per statistic and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_init.checks import check_choice
from lightning_init.monitor.layout import FLAGS, Layout

StatName = Literal[
    "default",
    "activation_variance",
    "signal_variance",
    "gradient_variance",
    "gradient_norm",
    "dead_units",
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
    """
    chosen: list[str] = []
    for name in DEFAULT_STATS if stats is None else stats:
        check_choice("a member of stats", name, get_args(StatName))
        chosen += DEFAULT_STATS if name == "default" else [name]
    return tuple(dict.fromkeys(chosen))


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What a step looked like: ``values[statistic][layer]``, layers in execution order.

    A layer is absent where there was nothing to measure: it was not called, or no gradient reached it.
    """

    values: dict[str, dict[str, float]]

    @property
    def tags(self) -> dict[str, float]:
        """The same by the names they are logged under: ``statistic/layer``."""
        return {f"{stat}/{layer}": value for stat, row in self.values.items() for layer, value in row.items()}


class Reading:
    """A summed vector, read from the device in one copy.

    Args:
        total: the vector, summed over ranks.
        layout: what stands where in it.
    """

    def __init__(self, total: Tensor, layout: Layout) -> None:
        num_layers = len(layout.layers)
        table = torch.stack([*_outputs(total, layout), *_gradients(total, layout)])  # [6, layers]
        numbers = torch.cat((total[layout.flags], total[layout.norms], table.reshape(-1))).tolist()
        self.flags = numbers[:FLAGS]
        num_norms = layout.norms.stop - layout.norms.start
        self._norms = numbers[FLAGS : FLAGS + num_norms]
        flat = numbers[FLAGS + num_norms :]
        self._rows = [flat[i * num_layers : (i + 1) * num_layers] for i in range(len(table))]
        self._layers = layout.layers

    def stats(self, chosen: Sequence[str], owners: Sequence[str], rectifiers: frozenset[str]) -> LayerStats:
        """The chosen statistics. ``owners`` name the rows of the norms, ``rectifiers`` who can have dead units."""
        counts, pooled, signal, dead, gradient_counts, gradients = self._rows
        rows = {
            "activation_variance": self._where(counts, pooled),
            "signal_variance": self._where(counts, signal),
            "gradient_variance": self._where(gradient_counts, gradients),
            "gradient_norm": self._norms_by_owner(owners),
            "dead_units": {k: v for k, v in self._where(counts, dead).items() if k in rectifiers},
        }
        return LayerStats({stat: rows[stat] for stat in chosen})

    def _where(self, counts: list[float], values: list[float]) -> dict[str, float]:
        return {layer: value for layer, n, value in zip(self._layers, counts, values, strict=True) if n}

    def _norms_by_owner(self, owners: Sequence[str]) -> dict[str, float]:
        squares, counts = self._norms[: 1 + len(owners)], self._norms[1 + len(owners) :]
        norms = {name: s**0.5 for name, s, n in zip(("total", *owners), squares, counts, strict=True) if n}
        order = [*self._layers, *owners, "total"]
        return {name: norms[name] for name in dict.fromkeys(order) if name in norms}


def _outputs(total: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, pooled variance, signal variance and share of dead units of each layer, [layers] each."""
    counts, squares, sums = total[layout.counts], total[layout.squares], total[layout.sums]
    by_slot = _grouped(torch.stack((sums, sums**2, (sums == 0).double())), layout.slot_of_unit, len(layout.slots))
    slot_sums, slot_sums_squared, slot_dead = by_slot
    per_unit = counts / layout.units  # elements that each unit of the slot has seen
    within = (squares - slot_sums_squared / per_unit) / per_unit  # sum over units of their variances
    seen = counts > 0
    rows = torch.stack((counts, slot_sums, squares, within, layout.units.double(), slot_dead)).where(seen, 0.0)
    n, first, second, within, units, dead = _grouped(rows, layout.layer_of_slot, len(layout.layers))
    return n, (second / n - (first / n) ** 2).clamp_min(0), (within / units).clamp_min(0), dead / units


def _gradients(total: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Count and variance of the gradients of each layer's outputs, [layers] each."""
    n = total[layout.gradient_counts]
    mean = total[layout.gradient_sums] / n
    return n, (total[layout.gradient_squares] / n - mean**2).clamp_min(0)


def _grouped(rows: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum the columns of ``rows`` by group: [k, n] -> [k, groups]."""
    return rows.new_zeros(len(rows), num_groups).index_add_(1, group, rows)
