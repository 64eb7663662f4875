"""What hooks show of every layer, its output and its gradient: three sums are kept, and the tensor is let go."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_init.distributed.shards import UnitShard, local_part
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.moments import (
    CentralMoments,
    Moments,
    Number,
    central_moments_of,
    merge,
    merge_central,
    moments_of,
    scale,
)
from lightning_init.monitor.statistics import ADDITIVE, largest
from lightning_init.monitor.units import UnitFinder, first_floating


@dataclass(slots=True)
class LayerRecord:
    """What one layer has shown since the tap was emptied.

    Attributes:
        outputs: moments of its outputs by number of units: a module shared at two widths has two.
        gradients: moments of d loss / d output, all elements together.
        extras: what else of its outputs was asked for and adds up.
        largest: the largest magnitude of an output, if asked for.
        central: central moments of its outputs, if asked for.
    """

    outputs: dict[int, Moments] = field(default_factory=dict)
    gradients: Moments | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    largest: Tensor | None = None
    central: CentralMoments | None = None


class ActivationCollector:
    """Hooks on layers, the records they fill, and the two switches that say what counts.

    ``partial`` names layers whose outputs or gradients were sums that ranks have not made, ``childs`` those that
    returned a child's tensor; ``strays`` counts gradients of a backward pass that nobody announced.

    Args:
        layers: where to listen.
        stats: which statistics will be asked for; what none of them needs is not measured.
        on_fault: called with the layer's name and the exception if a hook fails; the forward pass goes on.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        stats: Sequence[str],
        *,
        on_fault: Callable[[str, Exception], None],
    ) -> None:
        self.layers = list(layers)
        self._outer = _with_layers_inside(self.layers)
        spread = [layer for layer in self.layers if any(isinstance(p, DTensor) for p in layer.parameters)]
        self.with_gradients = "gradient_variance" in stats
        self._looks = {stat: ADDITIVE[stat].measure for stat in stats if stat in ADDITIVE}
        self._with_largest, self._with_central = "activation_max" in stats, "kurtosis" in stats
        self.records: dict[str, LayerRecord] = {}  # in the order of their first call
        self.should_record: Callable[[], bool] = lambda: False
        self.gradient_factor: Number | None = None
        self.unannounced_gradients = 0
        self.partial: dict[str, None] = {}
        self.returned_child_output: dict[str, None] = {}
        self._on_fault = on_fault
        self._handles: list[RemovableHandle] = []
        self._weights_hooks = [Hook(layer, self.note_weight_shards, on_fault) for layer in spread]
        self._output_hooks = [Hook(layer, self.record_output, on_fault) for layer in self.layers]
        self._gradient_hooks = {layer: GradientHook(layer, self.record_gradient, on_fault) for layer in self.layers}
        self._units = UnitFinder()
        self._bases: dict[int, weakref.ref[Tensor]] = {}
        self._memory: dict[str, Number] = {}  # sums to write over, but for those of a record in use

    def attach(self, should_record: Callable[[], bool] = lambda: True) -> None:
        """Put a hook on every layer. ``should_record`` is asked at each call whether outputs count now."""
        self.detach()
        self.should_record = should_record
        for hook in self._output_hooks:
            self._handles.append(hook.layer.module.register_forward_hook(hook))
        for before in self._weights_hooks:
            self._handles.append(before.layer.module.register_forward_pre_hook(before))

    def detach(self) -> None:
        """Take every hook off. What was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bases.clear()
        self._units.forget()
        self.gradient_factor = None

    @property
    def attached(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    def drain(self) -> dict[str, LayerRecord]:
        """Hand over the records and start again."""
        records, self.records, self.unannounced_gradients = self.records, {}, 0
        return records

    def reuse(self, records: dict[str, LayerRecord]) -> None:
        """Records that were handed over are packed: their memory serves the next step's."""
        for name, record in records.items():
            for moments in record.outputs.values():
                self._memory[name] = moments.sums

    def note_weight_shards(self, layer: Layer, module: nn.Module, args: Any) -> None:
        """A layer whose weights are spread over ranks is about to be called."""
        self._units.note_weight_shards(layer)

    def record_output(self, layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        """One call of a layer has returned ``output``."""
        recomputed = in_backward_pass()
        if not (recomputed or self.should_record()):
            return
        tensor = first_floating(output)
        if tensor is None:
            return
        if layer.name in self._outer and self._units.is_output_of_child(layer, tensor):
            self.returned_child_output.setdefault(layer.name)
            return
        if not recomputed:
            self._count(layer, args, tensor)
        if self.with_gradients and tensor.requires_grad:
            self._listen(layer, tensor)

    def record_gradient(self, layer: Layer, gradient: Tensor) -> None:
        """d loss / d output of one call, as the backward pass left it: scaled, and this rank's."""
        factor = self.gradient_factor
        if factor is None:
            self.unannounced_gradients += (
                1  # torch.autograd.grad inside the forward pass, or a backward nobody announced
            )
            return
        values = gradient if type(gradient) is Tensor else local_part(gradient)
        if values is None:
            self.partial.setdefault(layer.name)
            return
        moments = scale(moments_of(values), factor)
        record = self.records.get(layer.name) or self._new_record(layer)
        record.gradients = merge(record.gradients, moments) if record.gradients else moments

    def _count(self, layer: Layer, args: Any, tensor: Tensor) -> None:
        dim, share = self._units.find(layer, args, tensor)
        values = tensor if type(tensor) is Tensor else local_part(tensor)
        if values is None:
            self.partial.setdefault(layer.name)
            return
        record = self.records.get(layer.name) or self._new_record(layer)
        if dim is None:
            values, dim = values.reshape(1), 0
        moments = moments_of(values, dim, None if record.outputs else self._memory.pop(layer.name, None))
        if share.held < share.total:
            moments = _placed(moments, share)
        before = record.outputs.get(share.total)
        record.outputs[share.total] = merge(before, moments) if before else moments
        if self._looks or self._with_largest or self._with_central:
            self._look(layer, record, values)

    def _new_record(self, layer: Layer) -> LayerRecord:
        record = self.records[layer.name] = LayerRecord()
        return record

    def _look(self, layer: Layer, record: LayerRecord, values: Tensor) -> None:
        """Measure what was asked for on request."""
        for stat, measure in self._looks.items():
            found = measure(layer, values)
            if found is not None:
                record.extras[stat] = record.extras[stat] + found if stat in record.extras else found
        if self._with_largest:
            found = largest(values)
            record.largest = found if record.largest is None else torch.maximum(record.largest, found)
        if self._with_central:
            central = central_moments_of(values)
            record.central = merge_central(record.central, central) if record.central else central

    def _listen(self, layer: Layer, tensor: Tensor) -> None:
        """Hook the gradient of ``tensor``, at the node that made it: less than half the cost of a hook on the tensor.

        It is the gradient that flows into the layer: hooks that others put on the tensor have had their say, and
        where a backward pass ends at the tensor, nothing flows.

        ``nn.Linear`` returns a view when its input has three or more dimensions, and an in-place operation on a
        view takes the view's hooks away without a word. Then the hook goes to what is viewed, if that is the same
        numbers, has a history, and does not already stand for another layer's output.
        """
        base = tensor._base
        if base is not None and base.grad_fn is not None and base.numel() == tensor.numel():
            known = self._bases.get(id(base))
            if known is None or known() is not base:
                self._bases[id(base)] = weakref.ref(base)
                tensor = base
        node = tensor.grad_fn
        if node is None:  # a module that hands out its parameter: it outlives the batch, and so would the hook
            hook = Hook(layer, self.record_gradient, self._on_fault)
            self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
        elif (output_nr := tensor.output_nr) == 0:
            node.register_prehook(self._gradient_hooks[layer])
        else:
            node.register_prehook(GradientHook(layer, self.record_gradient, self._on_fault, output_nr))


def _with_layers_inside(layers: Iterable[Layer]) -> set[str]:
    """Names of modules that are around a layer: only these can return a child's tensor."""
    paths = (layer.name.split(".")[:-1] for layer in layers)
    return {name for path in paths for name in itertools.accumulate(path, "{}.{}".format)}


def _placed(moments: Moments, share: UnitShard) -> Moments:
    """Moments of some units, as moments of all: the others are other ranks' and zero here."""
    assert isinstance(moments.sums, Tensor)
    sums = moments.sums.new_zeros(share.total)
    sums[share.offset : share.offset + share.held] = moments.sums
    return moments._replace(sums=sums)


def in_backward_pass() -> bool:
    """Whether this thread is inside a backward pass, where a forward can only be checkpointing's second one.

    The autograd engine numbers its runs; -1 is none. There is no public name for it: this is the only use.
    """
    return bool(torch._C._current_graph_task_id() != -1)


class Hook:
    """Shows what it is called with to ``see``, after ``layer``; what that raises goes to ``on_fault``, with its name.

    It copies and pickles as a hook that does nothing: a model is saved as if it had none.
    """

    __slots__ = ("layer", "on_fault", "see")

    def __init__(self, layer: Layer, see: Callable[..., None], on_fault: Callable[[str, Exception], None]) -> None:
        self.layer, self.see, self.on_fault = layer, see, on_fault

    def __call__(self, *shown: Any) -> None:
        """On a module, before or after its forward, or on a tensor: something is to be seen."""
        try:
            self.see(self.layer, *shown)
        except Exception as error:
            self.on_fault(self.layer.name, error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return no_hook

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _make_no_hook, ()


class GradientHook(Hook):
    """Before the backward of the node that has made a tensor, which is its ``place``-th output."""

    __slots__ = ("output_nr",)

    def __init__(
        self, layer: Layer, see: Callable[..., None], on_fault: Callable[[str, Exception], None], output_nr: int = 0
    ) -> None:
        super().__init__(layer, see, on_fault)
        self.output_nr = output_nr

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """The node is about to be given the gradients of all its outputs; None is of one that nobody needs."""
        try:
            gradient = gradients[self.output_nr]
            if gradient is not None:
                self.see(self.layer, gradient)
        except Exception as error:
            self.on_fault(self.layer.name, error)


def no_hook(*args: Any) -> None:
    """What a copied or unpickled hook is."""


def _make_no_hook() -> Callable[..., None]:
    return no_hook


class EagerMoment:
    """Between ``start`` and ``stop`` everything under ``torch.compile`` runs as written.

    What was compiled stays compiled: outside, the same graphs run, without breaks, guards or recompilation.
    """

    def __init__(self) -> None:
        self._stance: Any = None

    def start(self) -> None:
        """From here on eagerly. Nothing happens in a process that has not loaded the compiler."""
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def stop(self) -> None:
        """Back to what it was."""
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)
