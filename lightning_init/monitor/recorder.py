"""One logged step from the first hook to the finished numbers: tap and norms filled, one exchange, one reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_init.distributed.ranks import all_gather_object, world_size
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.collector import ActivationCollector, LayerRecord
from lightning_init.monitor.exchange import (
    FAULT,
    FLAGS,
    UNKNOWN_SLOT,
    PackedState,
    SecondPass,
    Slot,
    VectorLayout,
    in_one_order,
    slots_of,
)
from lightning_init.monitor.parameter_norms import ParameterNorms, whole_gradients
from lightning_init.monitor.statistics import ADDITIVE, LayerStats
from lightning_init.monitor.step_result import StepResult


class _Hello(NamedTuple):
    """What ranks tell each other when they agree on a layout, or on switching off."""

    slots: list[Slot]
    fault: str | None


class Recorder:
    """Measures a model's layers and agrees with all ranks on the numbers.

    Anything that fails on a rank is kept as its ``fault``. The rank goes on taking part in the exchanges, so
    that nobody waits for it, and the next one tells all ranks to stop: then ``off`` is the reason.

    Args:
        layers: what to measure.
        stats: which statistics, names of :data:`~lightning_init.monitor.statistics.StatName` without "default".
        device: where the summed vector lives.
    """

    def __init__(self, layers: Sequence[Layer], stats: Sequence[str], device: torch.device) -> None:
        self.layers = list(layers)
        self.stats = tuple(stats)
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self.collector = ActivationCollector(layers, stats, on_fault=self._hook_fault)
        self.norms = ParameterNorms(layers, stats, world_size())
        self.local_error: str | None = None
        self.disabled_reason: str | None = None
        self._layout: VectorLayout | None = None
        self._state: PackedState | None = None

    @property
    def silent_layers(self) -> list[str]:
        """Layers no rank has called so far."""
        known = {
            *(self._layout.layers if self._layout else ()),
            *self.collector.partial,
            *self.collector.returned_child_output,
        }
        return [layer.name for layer in self.layers if layer.name not in known]

    def start(self) -> None:
        """Begin a new step: forget what an unfinished one left."""
        self.collector.drain()
        self.norms.clear()

    def before_step(
        self, parameters: Iterable[nn.Parameter], factor: Callable[[], float | Tensor] = lambda: 1.0
    ) -> None:
        """Take the norms of ``parameters``, which are about to be stepped, and of their gradients times ``factor()``.

        Can be a collective, as ``after_step`` can: every rank has to call it, failed or not.
        """
        if self.norms.kinds:
            gradients = whole_gradients(parameters)
            if self.local_error is None:
                self.norms.before_step(gradients, factor())

    def after_step(
        self, parameters: Iterable[nn.Parameter], factor: Callable[[], float | Tensor] = lambda: 1.0
    ) -> None:
        """Take what has to be taken when the optimizer has stepped."""
        gradients = whole_gradients(parameters)
        if self.local_error is None:
            self.norms.after_step(gradients, factor())

    def fail(self, where: str, error: BaseException) -> None:
        """Remember the first thing that went wrong."""
        self.local_error = self.local_error or f"{where}: {type(error).__name__}: {error}"

    def exchange(self) -> LayerStats | None:
        """Sum the step over all ranks; None if a rank has failed, and then ``off`` says why.

        A collective: every rank has to call it, failed or not.
        """
        records = self.collector.drain()
        if self._layout is None:
            self._agree(records)
        flags, reading = self._summed(records)
        if flags[UNKNOWN_SLOT] and not flags[FAULT]:
            self._agree(records)
            flags, reading = self._summed(records)
        self.norms.clear()
        self.collector.reuse(records)
        if flags[FAULT]:
            self._agree({})
        return reading.stats(self.stats, self.layers) if reading and not self.disabled_reason else None

    def _agree(self, records: dict[str, LayerRecord]) -> None:
        """All ranks learn all slots and each other's faults.

        Known slots stay, except of a layer that has come with other units now: if its width is a sequence's length,
        the vector would grow for ever.
        """
        hellos = all_gather_object(_Hello(slots_of(records), self.local_error))
        faults = [f"rank {rank}: {hello.fault}" for rank, hello in enumerate(hellos) if hello.fault]
        if faults:
            self.disabled_reason = "; ".join(faults)
        else:
            seen = in_one_order(hello.slots for hello in hellos)
            present = {slot.layer for slot in seen}
            known = self._layout.slots if self._layout else ()
            slots = in_one_order([seen, [slot for slot in known if slot in seen or slot.layer not in present]])
            widths = {stat: ADDITIVE[stat].width for stat in self.stats if stat in ADDITIVE}
            self._layout = VectorLayout(slots, self.norms.size, self.device, widths)
            self._state = PackedState(self.device)

    def _summed(self, records: dict[str, LayerRecord]) -> tuple[list[float], StepResult | None]:
        """The one collective of a step, and the one copy to the host: the flags, and what was measured."""
        if self.disabled_reason or self._layout is None or self._state is None:
            return [0.0] * FLAGS, None
        self._state.reset()
        self._state.update(self._vector(self._layout, records))
        total = self._state.compute()
        second = SecondPass(self.stats, self._layout, records if self.local_error is None else {})
        second.exchange(total, self.fail)
        if self.local_error is None:
            try:
                reading = StepResult(total, self._layout, second, self.norms)
                return reading.flags, reading
            except Exception as error:
                self.fail("reading", error)
        return total[self._layout.flags].tolist(), None  # a rank that has failed still does what the flags say

    def _vector(self, layout: VectorLayout, records: dict[str, LayerRecord]) -> Tensor:
        if self.local_error is None:
            try:
                return layout.pack(records, self.norms.packed(), [0.0, float(not layout.knows(records))])
            except Exception as error:
                self.fail("packing", error)
        vector = torch.zeros(layout.size, dtype=torch.float64, device=self.device)
        vector[FAULT] = 1.0
        return vector

    def _hook_fault(self, layer: str, error: Exception) -> None:
        self.fail(f"hook on layer {layer!r}", error)
