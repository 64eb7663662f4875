"""A logged step from the first hook to the finished statistics: record on every rank, exchange once, finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lightning_init.distributed.ranks import all_gather_object, world_size
from lightning_init.introspect.layers import Layer, Parts, find_layers, select_layers
from lightning_init.monitor.collector import ActivationCollector, always
from lightning_init.monitor.coverage import Coverage
from lightning_init.monitor.exchange import (
    FAULT,
    NUM_FLAGS,
    UNKNOWN_SLOT,
    SecondPass,
    Slot,
    VectorLayout,
    in_one_order,
)
from lightning_init.monitor.moments import Number
from lightning_init.monitor.parameter_measures import ParameterMeasures
from lightning_init.monitor.parameter_norms import ParameterNorms, whole_gradients
from lightning_init.monitor.record import LayerRecord, Place, label_of
from lightning_init.monitor.statistics import STATISTICS, LayerStats, measures_of
from lightning_init.monitor.step_result import StepResult

if TYPE_CHECKING:
    from lightning_init.monitor.packed_state import PackedState


class _RankState(NamedTuple):
    """What each rank tells the others when they agree on a layout, or on switching off.

    Attributes:
        outputs: where which number of units was recorded, in the order of the first calls.
        num_norms: how many numbers this rank's norms are.
        has_new_layers: whether the model has changed here since the last layout.
        local_error: what has failed here.
        left_out: by layer, why its hooks failed here.
    """

    outputs: list[tuple[Place, int]]
    num_norms: int
    has_new_layers: bool
    local_error: str | None
    left_out: dict[str, str]


def unscaled() -> float:
    """The factor of gradients that are what they should be."""
    return 1.0


class Recorder:
    """Records a model's statistics on every rank and agrees with all ranks on the numbers.

    A logged step is: ``start_step``; ``attach``, forward passes, ``announce_backward``, backward passes and ``detach``,
    once for each micro-batch; ``before_optimizer_step``, and where ``needs_post_step``, ``after_optimizer_step``;
    then ``exchange``.

    Whatever fails on a rank is kept there as its ``local_error``. The rank goes on taking part in the exchanges, so
    that no other rank waits for it in vain, and the next exchange tells all ranks to stop: it sets
    ``disabled_reason``.

    A hook that fails costs its layer only: all ranks leave it out from the same step on. If no layer is left, the
    first such failure is a rank's error like any other.

    Args:
        layers: what is recorded.
        stats: which statistics, names of :data:`~lightning_init.monitor.statistics.StatName` without "default".
        device: where the summed vector lives.
        model_layers: all layers of the model, if ``layers`` are only some: an activation has the units of the layer
            behind which it is called.
        parts: what the model consisted of when its layers were found; None: it will not change.

    Attributes:
        local_error: the first thing that failed on this rank.
        disabled_reason: why all ranks have stopped, once they have.
        left_out: by name, the layers that no rank records any more, and why.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        stats: Sequence[str],
        device: torch.device,
        model_layers: Sequence[Layer] = (),
        parts: Parts | None = None,
    ) -> None:
        self.stats = tuple(stats)
        self.device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
        self.needs_post_step = any(STATISTICS[stat].needs_step for stat in stats)
        self.local_error: str | None = None
        self.disabled_reason: str | None = None
        self.left_out: dict[str, str] = {}
        self._failed_hooks: dict[str, str] = {}
        self._layout: VectorLayout | None = None
        self._state: PackedState | None = None
        self._names: dict[Place, str] = {}
        self._layer_of: dict[str, str] = {}
        self._missing_on: dict[int, tuple[str, ...]] = {}
        self._has_new_layers = False
        self._parts = parts
        self._watch(layers, model_layers)

    def keep_up_with(self, model: nn.Module, patterns: Sequence[str] | None) -> bool:
        """Record the layers that the model has now, if it has changed since they were found; says whether it has.

        Nothing may be attached.

        Args:
            model: whose layers are recorded.
            patterns: globs on their names, which may match none any more.
        """
        if self._parts is None or self._parts.are_those_of(model):
            return False
        self._parts, found = Parts(model), find_layers(model)
        self._watch(select_layers(found, patterns, missing_ok=True), found)
        return True

    def _watch(self, layers: Sequence[Layer], model_layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        neighbours = [layer for layer in model_layers if layer not in self.layers]
        self._collector = ActivationCollector(layers, self.stats, on_fault=self._fail_in_hook, neighbours=neighbours)
        self._collector.leave_out(self.left_out)
        self._norms = ParameterNorms(layers, self.stats, world_size())
        self._parameter_measures = ParameterMeasures(layers, self.stats, world_size())
        self._has_new_layers = self._layout is not None

    @property
    def coverage(self) -> Coverage:
        """What has been seen of the layers so far."""
        collector = self._collector
        seen = {self._layer_of[name] for name in (self._layout.layers if self._layout else ())}
        return Coverage(
            expected=tuple(layer.name for layer in self.layers),
            seen=tuple(layer.name for layer in self.layers if layer.name in seen),
            not_called=tuple(self.silent_layers),
            left_out=dict(self.left_out),
            returned_by_child=tuple(name for name in collector.returned_child_output if name not in seen),
            partial=tuple(name for name in collector.partial_layers if name not in seen),
            missing_on=dict(self._missing_on),
            disabled_reason=self.disabled_reason,
        )

    @property
    def silent_layers(self) -> list[str]:
        """Layers of which no rank has recorded an output so far."""
        known = {
            *self.left_out,
            *(self._layer_of[name] for name in (self._layout.layers if self._layout else ())),
            *self._collector.partial_layers,
            *self._collector.returned_child_output,
        }
        return [layer.name for layer in self.layers if layer.name not in known]

    @property
    def eager_modules(self) -> list[nn.Module]:
        """Compiled modules that ran eagerly when hooks were attached last, because of the layers inside of them."""
        return self._collector.eager_modules

    @property
    def partial_layers(self) -> list[str]:
        """Layers whose outputs or gradients were sums that ranks had not made yet, and could not be recorded."""
        return list(self._collector.partial_layers)

    @property
    def lost_gradients(self) -> list[str]:
        """Layers whose gradients have only come without ``announce_backward`` so far, and were not recorded."""
        return [layer for layer in self._collector.unannounced if layer not in self._collector.with_gradient]

    def start_step(self) -> None:
        """Begin a logged step: forget what an unfinished one has recorded."""
        self._collector.reuse(self._collector.drain())
        self._norms.clear()
        self._parameter_measures.clear()

    def attach(self, should_record: Callable[[], bool] = always) -> None:
        """Put hooks on the layers; until ``detach``, what is compiled around them runs eagerly.

        Args:
            should_record: asked at each call of a layer whether its output is recorded.
        """
        self._collector.attach(should_record)

    def detach(self) -> None:
        """Take the hooks off. What was recorded stays."""
        self._collector.detach()

    def announce_backward(self, factor: Number, parameters: Callable[[], Iterable[nn.Parameter]] | None = None) -> None:
        """Record the gradients of backward passes from here on, times ``factor``, until ``end_backward``.

        Args:
            factor: what gradients are multiplied by.
            parameters: if given, only passes that compute the gradient of one of these count: that of a loss does,
                while derivatives by the inputs may be part of one.
        """
        self._collector.gradient_factor, self._collector.parameters = factor, parameters

    def end_backward(self) -> None:
        """Record no more gradients."""
        self._collector.gradient_factor = None

    def after_backward(self, parameters: Iterable[nn.Parameter], factor: Callable[[], Number] = unscaled) -> None:
        """Keep the norms of gradients as they are now, for ``before_optimizer_step``: they may be clipped in between.

        Can be a collective, as ``before_optimizer_step`` can.
        """
        if "gradient" in self._norms.kinds:
            gradients = whole_gradients(parameters)
            if self.local_error is None:
                self._norms.keep(gradients, factor())

    def before_optimizer_step(
        self, parameters: Iterable[nn.Parameter], factor: Callable[[], Number] = unscaled
    ) -> None:
        """Record the norms of ``parameters``, which the optimizer is about to change, and of their gradients.

        Can be a collective, as ``after_optimizer_step`` can: every rank has to call it, failed or not.

        Args:
            parameters: of one optimizer.
            factor: called for what gradients are multiplied by.
        """
        if self._norms.kinds or self._parameter_measures.measures:
            gradients = whole_gradients(parameters)
            if self.local_error is None:
                multiplied_by = factor()
                self._norms.before_step(gradients, multiplied_by)
                self._parameter_measures.before_step(gradients, multiplied_by)

    def after_optimizer_step(self, parameters: Iterable[nn.Parameter], factor: Callable[[], Number] = unscaled) -> None:
        """Record clipped gradients and updates, when the optimizer has changed ``parameters``."""
        gradients = whole_gradients(parameters)
        if self.local_error is None:
            self._norms.after_step(gradients, factor())

    def fail(self, where: str, error: BaseException) -> None:
        """Remember the first thing that went wrong."""
        self.local_error = self.local_error or f"{where}: {type(error).__name__}: {error}"

    def exchange(self, *, keep: bool = False) -> LayerStats | None:
        """Sum the step over all ranks; None if a rank has failed, and then ``disabled_reason`` says why.

        A collective: every rank has to call it, failed or not.

        Args:
            keep: the next exchange sums what was recorded so far once more, with what comes until then.
        """
        records = self._collector.records if keep else self._collector.drain()
        self._parameter_measures.add_to(records)
        if self._layout is None:
            self._agree(records)
        flags, result = self._sum_over_ranks(records)
        if flags[UNKNOWN_SLOT] and not flags[FAULT]:
            self._agree(records)
            flags, result = self._sum_over_ranks(records)
        if not keep:
            self._norms.clear()
            self._parameter_measures.clear()
            self._collector.reuse(records)
        if flags[FAULT]:
            self._agree({})
        if result is None or self.disabled_reason:
            return None
        by_name = {layer.name: layer for layer in self.layers}
        return result.stats(self.stats, {name: by_name[layer] for name, layer in self._layer_of.items()})

    def _agree(self, records: dict[Place, LayerRecord]) -> None:
        """Tell each other all slots and errors, and make a layout of the slots, or stop.

        Known slots stay, but not those of a layer that has only come with other numbers of units now: if its "units"
        are the positions of a sequence, the vector would grow with every new length.
        """
        outputs = [(place, units) for place, record in records.items() for units in record.outputs]
        here = _RankState(outputs, self._norms.size, self._has_new_layers, self.local_error, self._failed_hooks)
        ranks = all_gather_object(here)
        if any(state.has_new_layers for state in ranks):
            self._names, self._layer_of, self._has_new_layers = {}, {}, True
        errors = [f"rank {rank}: {state.local_error}" for rank, state in enumerate(ranks) if state.local_error]
        if not errors and len({state.num_norms for state in ranks}) > 1:
            errors = ["ranks have models of different parameters"]
        for rank, state in enumerate(ranks):
            for layer, why in state.left_out.items():
                self.left_out.setdefault(layer, f"rank {rank}: {why}")
        recorded = self._slots_of(state.outputs for state in ranks)
        if self.left_out and not recorded:
            errors = errors or [next(iter(self.left_out.values()))]
        if errors:
            self.disabled_reason = "; ".join(errors)
            return
        by_rank = [{place.layer for place, _ in state.outputs} for state in ranks]
        missing = {rank: tuple(sorted(set().union(*by_rank) - seen)) for rank, seen in enumerate(by_rank)}
        self._missing_on = {rank: names for rank, names in missing.items() if names}
        self._collector.leave_out(self.left_out)
        for place in [place for place in records if place.layer in self.left_out]:
            del records[place]
        called = {slot.layer for slot in recorded}
        before = self._layout.slots if self._layout and not self._has_new_layers else ()
        known = [slot for slot in before if self._layer_of[slot.layer] not in self.left_out]
        slots = in_one_order([recorded, [slot for slot in known if slot in recorded or slot.layer not in called]])
        widths = {stat: m.width for stat, m in measures_of(self.stats).items() if m.adds_up == "sum"}
        self._layout, self._has_new_layers = VectorLayout(slots, self._norms.size, self.device, widths), False
        from lightning_init.monitor.packed_state import PackedState  # loads torchmetrics

        self._state = PackedState(self.device)

    def _slots_of(self, outputs: Iterable[Sequence[tuple[Place, int]]]) -> list[Slot]:
        """The slots of all ranks' outputs in one order, and the names of new places: ``relu``, ``relu:2``, ...

        All ranks hear of places in the same order, so that all number them alike.
        """
        slots = []
        wanted = ([output for output in one if output[0].layer not in self.left_out] for one in outputs)
        for place, units in in_one_order(wanted):
            if place not in self._names:
                before = sum(layer == place.layer for layer in self._layer_of.values())
                name = f"{place.layer}:{before + 1}" if before else label_of(place.layer)
                self._names[place], self._layer_of[name] = name, place.layer
            slots.append(Slot(self._names[place], units))
        return slots

    def _named(self, records: dict[Place, LayerRecord]) -> dict[str, LayerRecord]:
        """``records`` by the names of places; a place that ranks have not agreed on yet gets one that no layout has."""
        return {self._names.get(place, repr(place)): record for place, record in records.items()}

    def _sum_over_ranks(self, records: dict[Place, LayerRecord]) -> tuple[list[float], StepResult | None]:
        """The one collective of a step and the one copy to the host: the flags, and what was recorded."""
        if self.disabled_reason or self._layout is None or self._state is None:
            return [0.0] * NUM_FLAGS, None
        named = self._named(records)
        self._state.reset()
        self._state.update(self._vector(self._layout, named))
        total = self._state.compute()
        second = SecondPass(self.stats, self._layout, named if self.local_error is None else {})
        second.exchange(total, self.fail)
        if self.local_error is None and not self._has_new_layers:
            try:
                result = StepResult(total, self._layout, second, self._norms)
                return result.flags, result
            except Exception as error:
                self.fail("reading", error)
        return total[self._layout.flags].tolist(), None  # a rank that has failed still does what the flags say

    def _vector(self, layout: VectorLayout, records: dict[str, LayerRecord]) -> Tensor:
        """What this rank adds to the sum: what it has recorded, or if it has failed, a raised flag."""
        flag = FAULT
        if self._has_new_layers and self.local_error is None:  # its norms are not the layout's
            flag = UNKNOWN_SLOT
        elif self.local_error is None:
            try:
                is_unknown = (
                    not layout.has_all_slots_of(records) or not self.left_out.keys() >= self._failed_hooks.keys()
                )
                flags = [0.0, float(is_unknown)]
                return layout.pack(records, self._norms.packed(), flags)
            except Exception as error:
                self.fail("packing", error)
        vector = torch.zeros(layout.size, dtype=torch.float64, device=self.device)
        vector[flag] = 1.0
        return vector

    def _fail_in_hook(self, layer: str, error: Exception) -> None:
        """That layer is left out from now on, and on all ranks after the next exchange."""
        self._failed_hooks.setdefault(layer, f"hook on layer {layer!r}: {type(error).__name__}: {error}")
        self._collector.leave_out([layer])
