"""Which tensor of a module's output is recorded, which of its dimensions holds the units, and which units it has.

Units are what a layer computes side by side: the features of a linear layer, the channels of a convolution. Statistics
such as dead units are shares of them. How many units there should be is known from the layer's parameters
(``unit_rule``); an activation has none and takes over the units of the layer before it (:class:`UnitFinder`).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # no public name tells
from torch._subclasses.fake_tensor import FakeTensor  # as exporting a model makes them
from torch.distributed.tensor import DTensor

from lightning_init.distributed.shards import UnitShard, unit_shard_from_weights, unit_shard_of
from lightning_init.introspect.layers import Layer
from lightning_init.introspect.unit_rules import UnitRule, unit_rule
from lightning_init.monitor.origins import origin_of


def signal_of(output: object) -> Tensor | None:
    """The floating-point tensor that carries the signal in a tensor, tuple, list, mapping or dataclass; None if none.

    Of several it is the first, but no mask beside tensors with a gradient, and no single number, such as a loss,
    beside larger tensors. Tensors whose elements cannot be read are passed over: sparse and nested ones, and those
    inside ``torch.func``.
    """
    if isinstance(output, Tensor):
        return output if _is_readable(output) else None
    found = list(_floating_tensors(output))
    if len(found) > 1:
        found = [tensor for tensor in found if tensor.numel() > 1] or found
        found = [tensor for tensor in found if tensor.requires_grad] or found
    return found[0] if found else None


def _floating_tensors(output: object) -> Iterator[Tensor]:
    members: Iterable[object] = ()
    if isinstance(output, Tensor):
        if _is_readable(output):
            yield output
    elif isinstance(output, (tuple, list)):  # asked before Mapping, whose isinstance is slow
        members = output  # a PackedSequence's first member is its data
    elif isinstance(output, Mapping):
        members = output.values()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        members = [getattr(output, field.name) for field in dataclasses.fields(output)]
    for member in members:
        yield from _floating_tensors(member)


def _is_readable(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not is_functorch_wrapped_tensor(tensor)
        and not isinstance(tensor, FakeTensor)
    )


def unit_dim(shape: Sequence[int], rule: UnitRule) -> int | None:
    """The dimension of ``shape`` that holds the units, counted from the front; None if ``rule`` does not tell.

    The usual dimension if its size is right, else the only dimension of the right size.

    >>> unit_dim((8, 16, 32), UnitRule(32, -1)), unit_dim((8, 32, 16), UnitRule(32, -1)), unit_dim((8, 9), UnitRule(32))
    (2, 1, None)
    """
    if rule.dim is not None and -len(shape) <= rule.dim < len(shape):
        usual = rule.dim % len(shape)
        if rule.units is None or shape[usual] == rule.units:
            return usual
    right = [dim for dim, size in enumerate(shape) if size == rule.units]
    return right[0] if len(right) == 1 else None


class _Units(NamedTuple):
    """The units of one output.

    Attributes:
        dim: the dimension that holds them; None for a scalar.
        shard: which of all units this rank has.
        rule: the rule for an activation that is called with this output.
    """

    dim: int | None
    shard: UnitShard
    rule: UnitRule


@dataclass(slots=True)
class _KnownOutput:
    """An output of this batch: which layer returned it, and its units. Does not keep the tensor alive.

    Attributes:
        version: of the tensor, which every in-place operation increases.
        shape: of the tensor.
    """

    tensor: weakref.ref[Tensor]
    version: int
    layer: Layer
    units: _Units
    shape: torch.Size


class FoundUnits(NamedTuple):
    """The units of an output.

    Attributes:
        dim: the dimension of the tensor that holds them; None of a scalar, and where they are not known.
        shard: which of all units this rank has; its ``total`` is :data:`UNKNOWN_UNITS` where they are not known.
        behind: name of the layer whose output it goes back to, asked for activations only; "" if that is not known.
    """

    dim: int | None
    shard: UnitShard
    behind: str


class UnitFinder:
    """Finds the units of every output: from the layer's type and parameters, or from what really produced it.

    An activation has the units of the layer whose output is its input. If no layer returned that very tensor, for
    example because something was added in between, the autograd graph is followed back (:func:`origin_of`). Where
    nothing tells, the units are not known, save that a matrix has its samples in rows.
    """

    def __init__(self) -> None:
        self._rules: dict[str, UnitRule] = {}
        self._weight_shards: dict[str, UnitShard | None] = {}
        self._known: dict[int, _KnownOutput] = {}
        self._known_nodes: dict[int, _KnownOutput] = {}

    def forget(self) -> None:
        """Forget the outputs of this batch."""
        self._known.clear()
        self._known_nodes.clear()

    def record_weight_shards(self, layer: Layer) -> None:
        """Remember which units this rank's shard of ``layer``'s weights has, just before the forward pass uses them."""
        units = self._rule(layer).units
        self._weight_shards[layer.name] = unit_shard_from_weights(layer.module, units) if units else None

    def find(self, layer: Layer, args: Any, tensor: Tensor) -> FoundUnits:
        """The units of what a layer has returned.

        Args:
            layer: what returned ``tensor``.
            args: what it was called with.
        """
        rule, shard, behind = self._rule(layer), self._weight_shards.get(layer.name), ""
        node = tensor.grad_fn
        if layer.activation:
            before = self._lookup(args[0]) if type(args) is tuple and len(args) == 1 else None
            if before is not None:
                rule, shard, behind = before.units.rule, before.units.shard, before.layer.name
            elif node is not None:
                rule, shard, behind = self._traced(node)
        units = _units_of(tensor, rule, shard)
        if units.dim is None and node is not None and not layer.activation:
            units = _units_of(tensor, *self._traced(node)[:2])
        if units.dim is None and tensor.dim() == 2:
            units = _units_of(tensor, UnitRule(None, -1), None)
        version = -1 if tensor.is_inference() else tensor._version  # which such tensors do not have
        known = self._known[id(tensor)] = _KnownOutput(weakref.ref(tensor), version, layer, units, tensor.shape)
        if node is not None:
            self._known_nodes[node._sequence_nr()] = known
        return FoundUnits(units.dim, units.shard, behind)

    def is_output_of_child(self, layer: Layer, tensor: Tensor) -> bool:
        """Whether a layer inside ``layer`` has returned this very tensor, unchanged since."""
        known = self._lookup(tensor)
        if known is None or (not tensor.is_inference() and known.version != tensor._version):
            return False
        return known.layer.name.startswith(f"{layer.name}.")

    def _rule(self, layer: Layer) -> UnitRule:
        rule = self._rules.get(layer.name)
        if rule is None:  # only now, because a lazy module has no sizes before it is called
            rule = UnitRule() if layer.activation else unit_rule(layer.module)
            self._rules[layer.name] = rule
        return rule

    def _traced(self, node: Any) -> tuple[UnitRule, UnitShard | None, str]:
        """What is known about the units of an autograd node's result, and the layer that it goes back to."""
        origin = origin_of(node, self._known_at)
        if origin is None:
            return UnitRule(), None, ""
        num_dims = len(node._input_metadata[0].shape)
        rule = UnitRule(None, origin.dim - num_dims)
        known: _KnownOutput | None = origin.known
        return (rule, None, "") if known is None else (rule, known.units.shard, known.layer.name)

    def _known_at(self, number: int, shape: Sequence[int]) -> tuple[_KnownOutput, int] | None:
        known = self._known_nodes.get(number)
        if known is None or known.units.dim is None or known.shape != tuple(shape):
            return None
        return known, known.units.dim

    def _lookup(self, tensor: object) -> _KnownOutput | None:
        known = self._known.get(id(tensor))
        return known if known is not None and known.tensor() is tensor else None


UNKNOWN_UNITS = -1
"""Stands for the number of units of an output whose units are not known; a number of its own in every layout."""

_NOT_KNOWN = UnitShard(1, 0, UNKNOWN_UNITS)


@functools.lru_cache(maxsize=4096)
def _units_of_whole(shape: torch.Size, rule: UnitRule) -> _Units:
    """The units of an output that has all of them. Cached: a layer's outputs rarely change their shape."""
    if not shape:
        return _Units(None, UnitShard(1, 0, 1), UnitRule(1))
    dim = unit_dim(shape, rule)
    if dim is None:
        return _Units(None, _NOT_KNOWN, UnitRule())
    return _units(dim, UnitShard(shape[dim], 0, shape[dim]), len(shape))


def _units_of(tensor: Tensor, rule: UnitRule, shard: UnitShard | None) -> _Units:
    """The units of any output.

    Args:
        tensor: the output.
        rule: what is known about its units.
        shard: which units this rank has according to the layer's weights or the layer before; None if nothing tells.
    """
    if tensor.dim() == 0:
        return _units_of_whole(tensor.shape, rule)
    if isinstance(tensor, DTensor):  # its shape is that of the whole output
        dim = unit_dim(tensor.shape, rule)
        if dim is None:
            return _Units(None, _NOT_KNOWN, UnitRule())
        return _units(dim, unit_shard_of(tensor, dim), tensor.dim())
    if shard is not None and shard.held < shard.total:  # the output has this shard, unless it was gathered
        dim = unit_dim(tensor.shape, UnitRule(None, rule.dim))
        if dim is not None and tensor.shape[dim] == shard.held:
            return _units(dim, shard, tensor.dim())
    return _units_of_whole(tensor.shape, rule)


def _units(dim: int, shard: UnitShard, num_dims: int) -> _Units:
    return _Units(dim, shard, UnitRule(shard.total, dim - num_dims))
