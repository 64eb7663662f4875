"""How ranks add up a logged step: one vector in a layout that all ranks share, and one all_reduce.

:class:`VectorLayout` says where every number of a step is in the vector and fills it from what a rank has recorded;
:class:`~lightning_init.monitor.packed_state.PackedState` sums it over ranks. A few statistics on request cannot be
summed with the rest, because they need the summed vector first or a maximum: :class:`SecondPass` exchanges those.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_init.distributed.ranks import all_reduce
from lightning_init.monitor.measures import Measure
from lightning_init.monitor.moments import CentralMoments, Moments, Number, pack, shifted_to
from lightning_init.monitor.record import LayerRecord
from lightning_init.monitor.statistics import measures_of
from lightning_init.monitor.units import UNKNOWN_UNITS

T = TypeVar("T")

FAULT, UNKNOWN_SLOT, NUM_FLAGS = 0, 1, 2
"""Indices of the vector's flags: the number of ranks whose monitor has failed, the number of ranks that recorded a slot
the layout does not have; and how many flags there are."""


class Slot(NamedTuple):
    """A layer's outputs with one number of units, or with units that are not known."""

    layer: str
    units: int

    @property
    def num_sums(self) -> int:
        """How many numbers Σx is: one of each unit, or one of all elements where units are not known."""
        return 1 if self.units == UNKNOWN_UNITS else self.units


class VectorLayout:
    """Where each number of a logged step is in the vector that ranks add up.

    The vector holds, one after the other (in brackets how many, if the slots are 2 units of layer "a", 3 of "b" and
    4 of "a"); each of these names is an attribute, a slice of the vector:

    - ``flags``: see :data:`FAULT` [2];
    - ``counts``, ``squares``: number of elements and Σx² of each slot [3 each];
    - ``gradient_counts``, ``gradient_sums``, ``gradient_squares``: of each layer's gradients [2 each];
    - ``norms``: what :meth:`ParameterNorms.packed` gives;
    - ``measured``: for each statistic that measures something of its own, its numbers of each layer [2 · its width];
    - ``sums``: Σx of every unit of every slot [2 + 3 + 4].

    Args:
        slots: in execution order; all ranks give the same.
        norms: how many numbers the norms are.
        device: of the vector.
        widths: by statistic, how many numbers its measure is for a layer, where it adds up as a sum.

    Attributes:
        size: of the vector. It depends on the model and the statistics, and not on the number of ranks.
        layers: names of the slots' layers, in execution order.
        units: of each slot, float64 [slots]; NaN where they are not known.
        num_sums: how many sums each slot has, int64 [slots]; ``num_sums_on_device`` is the same on ``device``.
        layer_of_slot: indices in ``layers``, int64 [slots].
        starts: where each slot's sums begin within ``sums``; None if a slot has no units, which ``reduceat`` cannot do.
        scratch: memory for one number of every unit, float64 [units].
    """

    def __init__(
        self, slots: Sequence[Slot], norms: int, device: torch.device, widths: Mapping[str, int] | None = None
    ) -> None:
        self.slots = tuple(slots)
        self.layers = tuple(dict.fromkeys(slot.layer for slot in slots))
        self.widths = dict(widths or {})
        self.device = device
        num_slots, num_layers = len(self.slots), len(self.layers)
        num_units = sum(slot.num_sums for slot in slots)

        num_measured = num_layers * sum(self.widths.values())
        of_slots, of_layers = [num_slots] * 2, [num_layers] * 3
        slices = _consecutive_slices([NUM_FLAGS, *of_slots, *of_layers, norms, num_measured, num_units])
        self.flags, self.counts, self.squares = slices[:3]
        self.gradient_counts, self.gradient_sums, self.gradient_squares = slices[3:6]
        self.norms, self.measured, self.sums = slices[6:]
        self.size = self.sums.stop

        index_of_layer = {layer: i for i, layer in enumerate(self.layers)}
        self.num_sums = np.array([slot.num_sums for slot in slots], dtype=np.int64)
        self.num_sums_on_device = torch.from_numpy(self.num_sums).to(device)
        self.units = np.array([np.nan if slot.units == UNKNOWN_UNITS else slot.units for slot in slots])
        self.layer_of_slot = np.array([index_of_layer[slot.layer] for slot in slots], dtype=np.int64)
        none_empty = bool(slots) and all(slot.num_sums for slot in slots)
        self.starts = [s.start for s in _consecutive_slices([slot.num_sums for slot in slots])] if none_empty else None

        # memory that every step uses again
        self._vector = torch.empty(self.size, dtype=torch.float64, device=device)
        self.scratch = np.empty(num_units)
        self._known_slots = frozenset(slots)
        zeros = torch.zeros(max((slot.num_sums for slot in slots), default=1), dtype=torch.float64, device=device)
        self._no_outputs = {slot.units: Moments(0, zeros[: slot.num_sums], 0.0) for slot in slots}

    @functools.cached_property
    def _layers_on_device(self) -> tuple[Tensor, Tensor]:
        """The index of the layer of each slot and of each unit, int64 on the device."""
        of_units = self.layer_of_slot.repeat(self.num_sums)
        return torch.from_numpy(self.layer_of_slot).to(self.device), torch.from_numpy(of_units).to(self.device)

    def has_all_slots_of(self, records: Mapping[str, LayerRecord]) -> bool:
        """Whether the layout has every slot of ``records``."""
        return all((name, units) in self._known_slots for name, record in records.items() for units in record.outputs)

    def means(self, total: Tensor) -> Tensor:
        """The mean of all outputs of each layer, [layers], from a summed vector; NaN of no outputs."""
        of_slots, of_units = self._layers_on_device
        sums = total.new_zeros(len(self.layers)).index_add_(0, of_units, total[self.sums])
        return sums / total.new_zeros(len(self.layers)).index_add_(0, of_slots, total[self.counts])

    def pack(self, records: Mapping[str, LayerRecord], norms: Sequence[Number], flags: Sequence[float]) -> Tensor:
        """This rank's vector, float64 [size]. Slots the layout does not have are left out; absent ones are zero.

        The next call overwrites it: fresh memory of its size costs more than what is written to it.
        """
        no_record, no_gradients = LayerRecord(), Moments(0, 0.0, 0.0)
        outputs = [records.get(name, no_record).outputs.get(n, self._no_outputs[n]) for name, n in self.slots]
        gradients = [records.get(name, no_record).gradients or no_gradients for name in self.layers]
        numbers: list[Number] = [*flags, *(moments.n for moments in outputs), *(moments.squares for moments in outputs)]
        for column in zip(*gradients, strict=True):
            numbers += column
        numbers += norms
        sums = [moments.sums for moments in outputs if isinstance(moments.sums, Tensor)]  # all are: they have units
        return torch.cat([pack(numbers, self.device), *self._measured_of(records), *sums], out=self._vector)

    def _measured_of(self, records: Mapping[str, LayerRecord]) -> list[Tensor]:
        """Of each statistic with a width, what was measured of each layer, [width] each."""
        blocks = []
        for stat, width in self.widths.items():
            zeros = torch.zeros(width, dtype=torch.float64, device=self.device)
            for name in self.layers:
                measured = records[name].measured.get(stat) if name in records else None
                blocks.append(measured if isinstance(measured, Tensor) else zeros)
        return blocks


def _consecutive_slices(sizes: Sequence[int]) -> list[slice]:
    """One slice of each size, each beginning where the one before ends.

    >>> _consecutive_slices([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def in_one_order(orders: Iterable[Sequence[T]]) -> list[T]:
    """All slots of all ranks in the first rank's order; a slot it lacks comes after the slot it follows on its rank.

    >>> in_one_order([["a", "c"], ["a", "b", "c"]])
    ['a', 'b', 'c']
    """
    merged: list[T] = []
    known: set[T] = set()
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


class SecondPass:
    """Exchanges what cannot be summed with the rest: maxima, and powers of the distance from the common mean.

    Args:
        stats: the chosen statistics. If all of them add up as sums, nothing happens.
        layout: of the first exchange.
        records: of this rank; empty if it has failed, because it has to take part in the collectives all the same.

    Attributes:
        results: by name of the measure, what was exchanged: [layers] of a "central" one, [layers · width] of a "max".
    """

    def __init__(self, stats: Sequence[str], layout: VectorLayout, records: Mapping[str, LayerRecord]) -> None:
        self.results: dict[str, Tensor] = {}
        self.measures = {stat: m for stat, m in measures_of(stats).items() if m.adds_up != "sum"}
        self._layout, self._records = layout, records

    def exchange(self, total: Tensor, on_fault: Callable[[str, Exception], None]) -> None:
        """One collective per statistic; a rank that fails makes the statistic NaN in this step.

        Args:
            total: the vector of the first exchange, summed over ranks.
            on_fault: called with what failed and the exception.
        """
        for stat, measure in self.measures.items():
            try:
                vector = self._vector(stat, measure, total)
            except Exception as error:
                on_fault("second exchange", error)
                vector = torch.full_like(self._empty(measure), torch.nan)
            all_reduce(vector, maximum=measure.adds_up == "max")
            self.results[stat] = vector

    def _vector(self, stat: str, measure: Measure, total: Tensor) -> Tensor:
        """This rank's numbers, [layers] or [layers · width]."""
        vector, width = self._empty(measure), measure.width
        means = self._layout.means(total) if measure.adds_up == "central" else vector
        for i, name in enumerate(self._layout.layers):
            measured = self._records[name].measured.get(stat) if name in self._records else None
            if isinstance(measured, CentralMoments):
                vector[i] = shifted_to(measured, means[i])[measure.power - 2]
            elif measured is not None:
                vector[i * width : (i + 1) * width] = measured
        return vector

    def _empty(self, measure: Measure) -> Tensor:
        """What a rank adds that has measured nothing."""
        nothing = -torch.inf if measure.adds_up == "max" else 0.0
        size = len(self._layout.layers) * measure.width
        return torch.full((size,), nothing, dtype=torch.float64, device=self._layout.device)
