"""Where every number of a logged step stands in the one vector that all ranks add up."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_init.distributed.ranks import reduce_
from lightning_init.monitor.collector import LayerRecord
from lightning_init.monitor.moments import Moments, Number, pack, shifted_to

FAULT, UNKNOWN_SLOT, FLAGS = 0, 1, 2
"""The vector's first numbers: ranks whose monitor has failed, ranks that saw a slot the layout lacks."""


class Slot(NamedTuple):
    """A layer's outputs with one number of units."""

    layer: str
    units: int


class VectorLayout:
    """Slots, layers and parameters in an order that all ranks share, and the vector's parts.

    The vector is: flags · slot counts · slot squares · gradient count, sum, squares of each layer ·
    norms · what was measured on request · sums of every unit of every slot. Its size depends on nothing but the model.

    Args:
        slots: in execution order.
        norms: how many numbers the norms are.
        widths: how many numbers each measurement on request is for a layer.
        device: of the vector.

    Attributes:
        units: of each slot, int64 [slots]; ``units_there`` the same on the device.
        layer_of_slot: places in ``layers``, int64 [slots].
        starts: where each slot's sums begin among the units' sums; None if a slot has none.
        scratch: memory for a number of every unit, float64 [units].
    """

    def __init__(
        self, slots: Sequence[Slot], norms: int, device: torch.device, widths: Mapping[str, int] | None = None
    ) -> None:
        self.widths = dict(widths or {})
        self.slots = tuple(slots)
        self.layers = tuple(dict.fromkeys(slot.layer for slot in slots))
        self.device = device
        num_slots, num_layers = len(self.slots), len(self.layers)
        extras, units = num_layers * sum(self.widths.values()), sum(slot.units for slot in slots)
        sizes = (FLAGS, num_slots, num_slots, num_layers, num_layers, num_layers, norms, extras, units)
        ends = list(itertools.accumulate(sizes))
        parts = iter([slice(start, end) for start, end in itertools.pairwise([0, *ends])])
        self.flags, self.counts, self.squares = next(parts), next(parts), next(parts)
        self.gradient_counts, self.gradient_sums, self.gradient_squares = next(parts), next(parts), next(parts)
        self.norms, self.extras, self.sums = parts
        self.size = ends[-1]
        begins = list(itertools.accumulate((slot.units for slot in slots), initial=0))[:-1]
        self.starts = begins if slots and all(slot.units for slot in slots) else None  # which leaves no slot empty
        place = {layer: i for i, layer in enumerate(self.layers)}
        self.units = np.array([slot.units for slot in slots], dtype=np.int64)  # [slots]
        self.layer_of_slot = np.array([place[slot.layer] for slot in slots], dtype=np.int64)
        self.units_there = torch.from_numpy(self.units).to(device)
        self._known = frozenset(slots)
        self._vector = torch.empty(self.size, dtype=torch.float64, device=device)
        self.scratch = np.empty(units)
        nothing = torch.zeros(max((slot.units for slot in slots), default=1), dtype=torch.float64, device=device)
        self._nothing = {slot.units: Moments(0, nothing[: slot.units], 0.0) for slot in slots}

    @functools.cached_property
    def _layers_there(self) -> tuple[Tensor, Tensor]:
        """The layers of slots and of units, int64 on the device."""
        of_units = self.layer_of_slot.repeat(self.units)
        return torch.from_numpy(self.layer_of_slot).to(self.device), torch.from_numpy(of_units).to(self.device)

    def knows(self, records: Mapping[str, LayerRecord]) -> bool:
        """Whether every slot of ``records`` has its place."""
        return all((name, units) in self._known for name, record in records.items() for units in record.outputs)

    def means(self, total: Tensor) -> Tensor:
        """The mean of all outputs of each layer, [layers], from a summed vector; NaN of nothing."""
        of_slots, of_units = self._layers_there
        sums = total.new_zeros(len(self.layers)).index_add_(0, of_units, total[self.sums])
        return sums / total.new_zeros(len(self.layers)).index_add_(0, of_slots, total[self.counts])

    def pack(self, records: Mapping[str, LayerRecord], norms: Sequence[Number], flags: Sequence[float]) -> Tensor:
        """This rank's vector, float64. Slots the layout lacks are left out; absent ones are zero.

        It is written over by the next one: fresh memory of its size costs more than what is written to it.
        """
        nobody, nothing = LayerRecord(), Moments(0, 0.0, 0.0)
        outputs = [records.get(name, nobody).outputs.get(units, self._nothing[units]) for name, units in self.slots]
        gradients = [records.get(name, nobody).gradients or nothing for name in self.layers]
        numbers: list[Number] = [*flags, *(moments.n for moments in outputs), *(moments.squares for moments in outputs)]
        for column in zip(*gradients, strict=True):
            numbers += column
        numbers += norms
        sums = [moments.sums for moments in outputs if isinstance(moments.sums, Tensor)]  # all of them: by unit
        return torch.cat([pack(numbers, self.device), *self._extras(records), *sums], out=self._vector)

    def _extras(self, records: Mapping[str, LayerRecord]) -> list[Tensor]:
        """What was measured on request, [layers · width] each."""
        nothing = {stat: torch.zeros(n, dtype=torch.float64, device=self.device) for stat, n in self.widths.items()}
        found = [records[name].extras if name in records else {} for name in self.layers]
        return [extras.get(stat, zeros) for stat, zeros in nothing.items() for extras in found]


def slots_of(records: Mapping[str, LayerRecord]) -> list[Slot]:
    """The slots of ``records``, in the order of their first call."""
    return [Slot(name, units) for name, record in records.items() for units in record.outputs]


def in_one_order(orders: Iterable[Sequence[Slot]]) -> list[Slot]:
    """All slots of all ranks: the first rank's order, what it lacks after the slot it follows elsewhere."""
    merged: list[Slot] = []
    known: set[Slot] = set()
    for order in orders:
        if known.issuperset(order):
            continue  # the usual case, and the only one that has to be fast with many ranks
        position = 0
        for slot in order:
            if slot in known:
                position = merged.index(slot) + 1
            else:
                merged.insert(position, slot)
                known.add(slot)
                position += 1
    return merged


class PackedState(Metric):
    """A float64 vector that adds up over updates and over ranks.

    ``compute`` costs one ``all_reduce`` of the vector's size, whatever the number of ranks. It is a collective:
    every rank has to call it, with vectors of one size, which is the caller's business to agree on.

    Args:
        device: where it lives. Kept off the model, it is never cast and in no state dict.
    """

    full_state_update = False
    packed: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(dist_sync_fn=_summed_over_ranks)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        self.add_state("packed", default=nothing, dist_reduce_fx="sum")
        self.to(device)

    def update(self, vector: Tensor) -> None:
        """Add ``vector``, [size]. The first becomes the state as it is, and ranks write their sum over it."""
        self.packed = self.packed + vector if self.packed.dim() else vector

    def compute(self) -> Tensor:
        """The sum over updates and ranks."""
        return self.packed


def _summed_over_ranks(vector: Tensor, group: Any = None) -> list[Tensor]:
    """What torchmetrics expects of a gather, as one reduction: a list to sum, of the sum alone."""
    dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=group)
    return [vector]


class SecondPass:
    """What has to wait for the first sum: fourth powers about the common mean, and a maximum.

    Args:
        stats: the chosen statistics; without ``activation_max`` and ``kurtosis`` nothing happens.
        layout: of the first exchange.
        records: of this rank, empty if it has failed. It takes part all the same.
    """

    def __init__(self, stats: Sequence[str], layout: VectorLayout, records: Mapping[str, LayerRecord]) -> None:
        self.largest: Tensor | None = None  # [layers]
        self.fourth: Tensor | None = None  # Σ(x - mean)⁴, [layers]
        self._stats, self._layout, self._records = stats, layout, records

    def exchange(self, total: Tensor, on_fault: Callable[[str, Exception], None]) -> None:
        """One collective per statistic; a rank that cannot tell its part makes it NaN for this step."""
        if "activation_max" in self._stats:
            self.largest = self._guarded(self._own_largest, on_fault)
            reduce_(self.largest, maximum=True)
        if "kurtosis" in self._stats:
            self.fourth = self._guarded(lambda: self._own_fourth(total), on_fault)
            reduce_(self.fourth)

    def _guarded(self, own: Callable[[], Tensor], on_fault: Callable[[str, Exception], None]) -> Tensor:
        try:
            return own()
        except Exception as error:
            on_fault("second exchange", error)
            return torch.full((len(self._layout.layers),), torch.nan, dtype=torch.float64, device=self._layout.device)

    def _own_largest(self) -> Tensor:
        values = self._zeros()
        for i, record in self._found():
            if record.largest is not None:
                values[i] = record.largest
        return values

    def _own_fourth(self, total: Tensor) -> Tensor:
        values, means = self._zeros(), self._layout.means(total)
        for i, record in self._found():
            if record.central is not None:
                values[i] = shifted_to(record.central, means[i])[2]
        return values

    def _found(self) -> list[tuple[int, LayerRecord]]:
        return [(i, self._records[name]) for i, name in enumerate(self._layout.layers) if name in self._records]

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._layout.layers), dtype=torch.float64, device=self._layout.device)
