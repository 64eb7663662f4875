"""Hooks that record sums of every layer's output and of its gradient, and keep no tensor alive.

While an :class:`ActivationCollector` is attached, a hook is called after each layer. It records the output's moments
and puts a second hook where autograd will deliver the gradient of that output. What is recorded are a few sums per
layer (:class:`LayerRecord`); the tensors themselves are freed as early as without hooks.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # no public name tells
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from lightning_init.distributed.shards import UnitShard, local_numbers
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.autograd import (
    current_node_number,
    current_pass,
    graph_is_kept,
    in_backward_pass,
    reaches_any,
)
from lightning_init.monitor.eager import hold_eager, release_eager
from lightning_init.monitor.moments import Moments, Number, merge, moments_of, scale
from lightning_init.monitor.record import LayerRecord, Place
from lightning_init.monitor.statistics import STATISTICS, measures_of
from lightning_init.monitor.units import FoundUnits, UnitFinder, signal_of


def always() -> bool:
    """The answer to ``should_record`` where everything is recorded."""
    return True


class ActivationCollector:
    """Puts hooks on layers and keeps what they record.

    Outputs are recorded while ``should_record()`` is true, gradients while ``gradient_factor`` is a number.

    Args:
        layers: whose outputs and gradients are recorded.
        stats: which statistics will be asked for; what none of them needs is not measured.
        on_fault: called with the layer's name and the exception if a hook fails; the forward pass goes on.
        neighbours: other layers of the model. Nothing is recorded of them, but an activation's units are theirs.

    Attributes:
        records: by layer and place, in the order of their first calls.
        gradient_factor: what gradients are multiplied by; None while no backward pass was announced.
        parameters: if given, gives the model's parameters, and only backward passes that reach one of them count.
        unannounced: names of layers whose gradients came while ``gradient_factor`` was None.
        with_gradient: names of layers whose gradients were recorded.
        eager_modules: compiled modules that ran eagerly since hooks were attached last.
        partial_layers: names of layers whose outputs or gradients were sums that ranks had not made yet.
        returned_child_output: names of layers that returned a tensor of a layer inside them, which has recorded it.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        stats: Sequence[str],
        *,
        on_fault: Callable[[str, Exception], None],
        neighbours: Iterable[Layer] = (),
    ) -> None:
        self.layers = list(layers)
        self.records: dict[Place, LayerRecord] = {}
        self.gradient_factor: Number | None = None
        self.parameters: Callable[[], Iterable[nn.Parameter]] | None = None
        self.unannounced: dict[str, None] = {}
        self.with_gradient: set[str] = set()
        self.eager_modules: list[nn.Module] = []
        self.partial_layers: dict[str, None] = {}
        self.returned_child_output: dict[str, None] = {}
        self.with_gradients = any(STATISTICS[stat].source == "gradient" for stat in stats)
        self._should_record: Callable[[], bool] = always
        self._measures = measures_of(stats, of=["output"])
        self._neighbours = list(neighbours)
        self._containers = _names_of_containers([*self.layers, *self._neighbours])
        self._on_fault = on_fault
        self._handles: list[RemovableHandle] = []
        sharded = [layer for layer in self.layers if any(isinstance(p, DTensor) for p in layer.parameters)]
        self._weight_hooks = [_Hook(layer, self.record_weight_shards, on_fault) for layer in sharded]
        self._output_hooks = [_Hook(layer, self.record_output, on_fault) for layer in self.layers]
        self._output_hooks += [_Hook(layer, self.note_output, _ignore) for layer in self._neighbours]
        self._gradient_hooks: dict[Place, _NodeHook] = {}
        self._units = UnitFinder()
        self._has_own_hook: set[int] = set()
        self._left_out: set[str] = set()
        self._hooked_bases: dict[int, weakref.ref[Tensor]] = {}
        self._kept_gradients: dict[tuple[Place, int], Tensor] = {}
        self._counted_pass: tuple[int, bool] = (-1, True)
        self._reusable_sums: dict[Place, Number] = {}
        self._around_layers = list(dict.fromkeys(m for layer in self.layers for m in (*layer.within, layer.module)))
        self._hook_of = {id(hook.layer.module): hook for hook in self._output_hooks}

    def attach(self, should_record: Callable[[], bool] = always) -> None:
        """Have every layer's outputs recorded, until ``detach``; until then, what is compiled around it runs eagerly.

        One hook for all modules of the process, so that the model itself has none: a copy, a scripted or a saved one
        is as it would be without, and code that asks whether a module has hooks gets the answer that it would get.
        Only a module with hooks of others, which may change its output, gets one of its own, behind theirs; and so do
        all of a compiled model, which would warn of the one for all.

        Args:
            should_record: asked at each call of a layer whether its output is recorded.
        """
        self.detach()
        self._should_record = should_record
        try:
            self.eager_modules = hold_eager(self, self._around_layers)
            apart = [hook for hook in self._output_hooks if hook.layer.is_compiled or has_hooks(hook.layer.module)]
            self._has_own_hook = {id(hook.layer.module) for hook in apart}
            for hook in apart:
                self._handles.append(hook.layer.module.register_forward_hook(hook))
            if len(apart) < len(self._output_hooks):
                self._handles.append(register_module_forward_hook(self._after_any_module))
            for hook in self._weight_hooks:
                self._handles.append(hook.layer.module.register_forward_pre_hook(hook))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off, and let compiled modules run compiled again. What was recorded stays."""
        release_eager(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked_bases.clear()
        self._kept_gradients.clear()
        self._units.forget()
        self.gradient_factor = None

    def _after_any_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called when any module of the process has returned ``output``."""
        if torch.compiler.is_compiling():
            return
        hook = self._hook_of.get(id(module))
        if hook is not None and id(module) not in self._has_own_hook:
            hook(module, args, output)

    def leave_out(self, layers: Iterable[str]) -> None:
        """Record nothing more of these layers."""
        self._left_out.update(layers)

    def drain(self) -> dict[Place, LayerRecord]:
        """Hand over what was recorded, and begin anew."""
        records, self.records = self.records, {}
        return records

    def reuse(self, records: dict[Place, LayerRecord]) -> None:
        """Overwrite the sums of ``records`` at the next logged step, instead of allocating: nobody reads them now."""
        for place, record in records.items():
            for moments in record.outputs.values():
                self._reusable_sums[place] = moments.sums

    def record_weight_shards(self, layer: Layer, module: nn.Module, args: Any) -> None:
        """Called before the forward pass of a layer whose weights are spread over ranks."""
        self._units.record_weight_shards(layer)

    def record_output(self, layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        """Called when a layer has returned ``output``."""
        if layer.name in self._left_out:
            return
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace, which would record what is measured
            return
        recomputed = in_backward_pass()  # by activation checkpointing: recorded before, but only now with a gradient
        if not (recomputed or self._should_record()):
            return
        tensor = signal_of(output)
        if tensor is None:
            return
        if layer.name in self._containers and self._units.is_output_of_child(layer, tensor):
            self.returned_child_output.setdefault(layer.name)
            return
        found = self._units.find(layer, args, tensor)
        place = Place(layer.name, found.behind)
        if not recomputed:
            self._record_moments(layer, place, found, tensor)
        if self.with_gradients and tensor.requires_grad:
            self._hook_gradient(layer, place, tensor)

    def note_output(self, layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        """Called when a layer of which nothing is recorded has returned ``output``: activations behind it ask."""
        recording = in_backward_pass() or self._should_record()
        if recording and torch._C._get_tracing_state() is None and (tensor := signal_of(output)) is not None:
            self._units.find(layer, args, tensor)

    def record_gradient(self, layer: Layer, place: Place, gradient: Tensor) -> None:
        """Called with the gradient of one output, as the backward pass computed it: of this rank's, scaled loss."""
        factor = self.gradient_factor
        if layer.name in self._left_out:
            return
        if factor is None:  # torch.autograd.grad inside the forward pass, or a loss.backward() nobody announced
            self.unannounced.setdefault(layer.name)
            return
        if is_functorch_wrapped_tensor(gradient) or not self._is_pass_counted():
            return
        local = gradient if type(gradient) is Tensor else local_numbers(gradient)
        if local is None:
            self.partial_layers.setdefault(layer.name)
            return
        moments = moments_of(local)
        if (may_come_again := graph_is_kept()) or self._kept_gradients:
            moments = self._added_to_earlier(place, local, moments, may_come_again)
        moments = scale(moments, factor)
        record = self._record_of(place)
        if record.gradients is None:
            self.with_gradient.add(layer.name)
        record.gradients = merge(record.gradients, moments) if record.gradients else moments

    def _is_pass_counted(self) -> bool:
        """Whether the present backward pass computes the gradient of a parameter, asked once a pass."""
        if self.parameters is None:
            return True
        number = current_pass()
        if number != self._counted_pass[0]:
            self._counted_pass = number, reaches_any(self.parameters())
        return self._counted_pass[1]

    def _added_to_earlier(self, place: Place, gradient: Tensor, moments: Moments, may_come_again: bool) -> Moments:
        """What moments change by if ``gradient`` is added to that of earlier passes through the same output.

        Several losses may be differentiated one after the other; what is measured is the gradient of their sum.
        """
        key = place, current_node_number()
        earlier = self._kept_gradients.pop(key, None)
        total = gradient if earlier is None else earlier + gradient
        if may_come_again:
            self._kept_gradients[key] = total.detach()
        if earlier is None:
            return moments
        before, after = moments_of(earlier), moments_of(total)
        return Moments(after.n - before.n, after.sums - before.sums, after.squares - before.squares)

    def _record_moments(self, layer: Layer, place: Place, found: FoundUnits, tensor: Tensor) -> None:
        """Record an output's moments, and what else was asked for.

        Of a layer that is called with and without a graph in one step, only calls with one count: an agent that plays
        a thousand moves under ``no_grad`` before it learns from sixteen would else be all that is seen.
        """
        local = tensor if type(tensor) is Tensor else local_numbers(tensor)
        if local is None:
            self.partial_layers.setdefault(layer.name)
            return
        record, with_graph = self._record_of(place), torch.is_grad_enabled()
        if record.with_graph and not with_graph:
            return
        if with_graph and not record.with_graph:
            record.outputs.clear()
            record.measured.clear()
            record.with_graph = True
        shard, dim = found.shard, found.dim
        # the sums of an earlier call in this step are in use
        moments = moments_of(local, dim, None if record.outputs else self._reusable_sums.pop(place, None))
        if dim is None:
            sums = torch.as_tensor(moments.sums, dtype=torch.float64, device=None if local.is_mps else local.device)
            moments = moments._replace(sums=sums.reshape(1))
        elif shard.held < shard.total:
            moments = _with_all_units(moments, shard)
        before = record.outputs.get(shard.total)
        record.outputs[shard.total] = merge(before, moments) if before else moments
        if self._measures:
            self._record_measures(layer, record, local)

    def _record_measures(self, layer: Layer, record: LayerRecord, local: Tensor) -> None:
        """Record what statistics on request measure."""
        for stat, measure in self._measures.items():
            measured = measure.measure(layer, local)
            if measured is not None:
                before = record.measured.get(stat)
                record.measured[stat] = measured if before is None else measure.merge(before, measured)

    def _record_of(self, place: Place) -> LayerRecord:
        record = self.records.get(place)
        if record is None:
            record = self.records[place] = LayerRecord()
        return record

    def _hook_gradient(self, layer: Layer, place: Place, tensor: Tensor) -> None:
        """Have the gradient of ``tensor`` recorded when it is computed.

        The hook goes on the autograd node that made the tensor, which costs less than half of a hook on the tensor.
        It records the gradient that flows into the layer: after hooks that others put on the tensor, and nothing if
        the backward pass ends at the tensor.

        ``nn.Linear`` returns a view when its input has three or more dimensions, and an in-place operation on a view
        silently replaces its node. Then the hook goes on the node of the viewed tensor instead, provided it holds the
        same numbers, has a node, and has not been hooked for another layer's output.
        """
        base = tensor._base
        if base is not None and base.grad_fn is not None and base.numel() == tensor.numel():
            known = self._hooked_bases.get(id(base))
            if known is None or known() is not base:
                self._hooked_bases[id(base)] = weakref.ref(base)
                tensor = base
        node = tensor.grad_fn
        if node is None:  # a module that returns its parameter; that outlives the batch, so the hook is removed later
            record = partial(self.record_gradient, layer, place)
            hook = _Hook(layer, lambda _, gradient: record(gradient), self._on_fault)
            self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]
        elif (output_nr := tensor.output_nr) == 0:
            if (of_place := self._gradient_hooks.get(place)) is None:
                of_place = self._gradient_hooks[place] = _NodeHook(layer, place, self.record_gradient, self._on_fault)
            node.register_prehook(of_place)
        else:
            node.register_prehook(_NodeHook(layer, place, self.record_gradient, self._on_fault, output_nr))


def _names_of_containers(layers: Iterable[Layer]) -> set[str]:
    """Names of modules with a layer inside: only these can return the output of a layer below them.

    Of the layers "a.b.c" and "d", these are "a" and "a.b".
    """
    paths = (layer.name.split(".")[:-1] for layer in layers)
    return {name for path in paths for name in itertools.accumulate(path, "{}.{}".format)}


def _with_all_units(moments: Moments, shard: UnitShard) -> Moments:
    """Moments of one shard's units as moments of all units; the units of other ranks are zero here."""
    assert isinstance(moments.sums, Tensor)
    sums = moments.sums.new_zeros(shard.total)
    sums[shard.offset : shard.offset + shard.held] = moments.sums
    return moments._replace(sums=sums)


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody has put a hook on a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Hook:
    """Calls ``record(layer, *hook_args)``; exceptions go to ``on_fault(layer.name, error)`` instead of the pass.

    Its copies and its unpickled selves do nothing, so that a model is copied and saved as if it had no hooks.
    """

    __slots__ = ("layer", "on_fault", "record")

    def __init__(self, layer: Layer, record: Callable[..., None], on_fault: Callable[[str, Exception], None]) -> None:
        self.layer, self.record, self.on_fault = layer, record, on_fault

    def __call__(self, *hook_args: Any) -> None:
        """Called by PyTorch: before or after a module's forward, or with a tensor's gradient.

        The compiler, which follows it where a compiled function calls a layer, makes nothing of it.
        """
        if torch.compiler.is_compiling():
            return
        try:
            self.record(self.layer, *hook_args)
        except Exception as error:
            self.on_fault(self.layer.name, error)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _make_no_hook, ()


class _NodeHook(_Hook):
    """Before an autograd node runs backward, calls ``record(layer, place, gradient)`` for one of the node's outputs.

    Args:
        place: where the layer was called.
        output_nr: which of the node's outputs the layer returned, as ``Tensor.output_nr`` says.
    """

    __slots__ = ("output_nr", "place")

    def __init__(
        self,
        layer: Layer,
        place: Place,
        record: Callable[..., None],
        on_fault: Callable[[str, Exception], None],
        output_nr: int = 0,
    ) -> None:
        super().__init__(layer, record, on_fault)
        self.place, self.output_nr = place, output_nr

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Called with the gradients of all outputs of the node; None stands for an output the loss does not need."""
        try:
            gradient = gradients[self.output_nr]
            if gradient is not None:
                self.record(self.layer, self.place, gradient)
        except Exception as error:
            self.on_fault(self.layer.name, error)


def _ignore(layer: str, error: Exception) -> None:
    """What becomes of the fault of a layer of which nothing is recorded."""


def _no_hook(*args: Any) -> None:
    """What a hook becomes when it is copied or unpickled."""


def _make_no_hook() -> Callable[..., None]:
    return _no_hook
