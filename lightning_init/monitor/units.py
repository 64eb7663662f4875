"""Which tensor of a module's output is recorded, which of its dimensions holds the units, and which units it has.

Units are what a layer computes side by side: the features of a linear layer, the channels of a convolution. Statistics
such as dead units are shares of them. How many units there should be is known from the layer's parameters
(``unit_rule``); an activation has none and takes over the units of the layer before it (:class:`UnitFinder`).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
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


def first_floating(output: object) -> Tensor | None:
    """The first floating-point tensor in a tensor, tuple, list, mapping or dataclass (PackedSequence: its data).

    Tensors whose elements cannot be read are passed over: sparse and nested ones, and those inside ``torch.func``.
    """
    if isinstance(output, Tensor):
        readable = (
            output.layout is torch.strided
            and not output.is_nested
            and not is_functorch_wrapped_tensor(output)
            and not isinstance(output, FakeTensor)
        )
        return output if readable and output.is_floating_point() else None
    members: Iterable[object]
    if isinstance(output, (tuple, list)):  # asked before Mapping, whose isinstance is slow
        members = output
    elif isinstance(output, Mapping):
        members = output.values()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        members = [getattr(output, field.name) for field in dataclasses.fields(output)]
    else:
        return None
    for member in members:
        if (tensor := first_floating(member)) is not None:
            return tensor
    return None


def unit_dim(shape: Sequence[int], rule: UnitRule) -> int:
    """The dimension of ``shape`` that holds the units, counted from the front; ``shape`` has at least one.

    The usual dimension if its size is right, else the only dimension of the right size, else the last.

    >>> unit_dim((8, 16, 32), UnitRule(32)), unit_dim((8, 32, 16), UnitRule(32)), unit_dim((8, 9), UnitRule(32))
    (2, 1, 1)
    """
    last = len(shape) - 1
    usual = rule.dim % len(shape) if -len(shape) <= rule.dim <= last else last
    if rule.units is None or shape[usual] == rule.units:
        return usual
    right = [dim for dim, size in enumerate(shape) if size == rule.units]
    return right[0] if len(right) == 1 else last


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
    """

    tensor: weakref.ref[Tensor]
    version: int
    layer: Layer
    units: _Units


class UnitFinder:
    """Finds the units of every output, from the layer's parameters or from the layer before it.

    An activation has the units of the layer whose output is its input. If no layer returned that very tensor, for
    example because something was added in between, it has the units of the layer that ran last.
    """

    def __init__(self) -> None:
        self._rules: dict[str, UnitRule] = {}
        self._weight_shards: dict[str, UnitShard | None] = {}
        self._known: dict[int, _KnownOutput] = {}
        self._latest: _KnownOutput | None = None

    def forget(self) -> None:
        """Forget the outputs of this batch."""
        self._known.clear()
        self._latest = None

    def record_weight_shards(self, layer: Layer) -> None:
        """Remember which units this rank's shard of ``layer``'s weights has, just before the forward pass uses them."""
        units = self._rule(layer).units
        self._weight_shards[layer.name] = unit_shard_from_weights(layer.module, units) if units else None

    def find(self, layer: Layer, args: Any, tensor: Tensor) -> tuple[int | None, UnitShard]:
        """The dimension of ``tensor`` that holds the units (None for a scalar), and which units this rank has.

        Args:
            layer: what returned ``tensor``.
            args: what it was called with.
        """
        rule, shard = self._rule(layer), self._weight_shards.get(layer.name)
        if rule.units is None and layer.activation and (before := self._predecessor(args)):
            rule, shard = before.units.rule, before.units.shard
        units = _units_of(tensor, rule, shard)
        version = -1 if tensor.is_inference() else tensor._version  # which such tensors do not have
        self._latest = self._known[id(tensor)] = _KnownOutput(weakref.ref(tensor), version, layer, units)
        return units.dim, units.shard

    def is_output_of_child(self, layer: Layer, tensor: Tensor) -> bool:
        """Whether a layer inside ``layer`` has returned this very tensor, unchanged since."""
        known = self._lookup(tensor)
        if known is None or (not tensor.is_inference() and known.version != tensor._version):
            return False
        return known.layer.name.startswith(f"{layer.name}.")

    def _rule(self, layer: Layer) -> UnitRule:
        rule = self._rules.get(layer.name)
        if rule is None:  # only now, because a lazy module has no sizes before it is called
            rule = self._rules[layer.name] = unit_rule(layer.module)
        return rule

    def _predecessor(self, args: Any) -> _KnownOutput | None:
        if type(args) is tuple and len(args) == 1 and (known := self._lookup(args[0])):
            return known  # nearly always
        source = first_floating(args)
        return (self._lookup(source) if source is not None else None) or self._latest

    def _lookup(self, tensor: object) -> _KnownOutput | None:
        known = self._known.get(id(tensor))
        return known if known is not None and known.tensor() is tensor else None


@functools.lru_cache(maxsize=4096)
def _units_of_whole(shape: torch.Size, rule: UnitRule) -> _Units:
    """The units of an output that has all of them. Cached: a layer's outputs rarely change their shape."""
    if not shape:
        return _Units(None, UnitShard(1, 0, 1), UnitRule(1))
    dim = unit_dim(shape, rule)
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
        return _units(dim, unit_shard_of(tensor, dim), tensor.dim())
    if shard is not None and shard.held < shard.total:  # the output has this shard, unless it was gathered
        dim = unit_dim(tensor.shape, UnitRule(None, rule.dim))
        if tensor.shape[dim] == shard.held:
            return _units(dim, shard, tensor.dim())
    return _units_of_whole(tensor.shape, rule)


def _units(dim: int, shard: UnitShard, num_dims: int) -> _Units:
    return _Units(dim, shard, UnitRule(shard.total, dim - num_dims))
