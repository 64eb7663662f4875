"""Which dimension of an output holds its units, and which of all units they are."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_init.monitor.layers import Layer
from lightning_init.monitor.outputs import UnitRule, first_floating, unit_dim, unit_rule
from lightning_init.monitor.shards import UnitShard, unit_shard_from_weights, unit_shard_of


class _Units(NamedTuple):
    """The dimension of an output's units, None for a scalar; which they are; what that says of the next layer's."""

    dim: int | None
    share: UnitShard
    rule: UnitRule


@dataclass(slots=True)
class _Seen:
    """An output of this batch: whose it is and where its units are. Does not keep the tensor alive."""

    tensor: weakref.ref[Tensor]
    version: int
    layer: Layer
    units: _Units


class UnitFinder:
    """Knows the units of every output, from the layer's parameters or from the layer before.

    An activation has the units of the layer whose very tensor it was given, else of the layer that ran before it.
    """

    def __init__(self) -> None:
        self._rules: dict[str, UnitRule] = {}
        self._weights: dict[str, UnitShard | None] = {}
        self._seen: dict[int, _Seen] = {}
        self._latest: _Seen | None = None

    def forget(self) -> None:
        """The outputs of this batch are gone."""
        self._seen.clear()
        self._latest = None

    def note_weight_shards(self, layer: Layer) -> None:
        """Look at weights that are spread over ranks, when the forward pass is about to use them."""
        units = self._rule(layer).units
        self._weights[layer.name] = unit_shard_from_weights(layer.module, units) if units else None

    def find(self, layer: Layer, args: Any, tensor: Tensor) -> tuple[int | None, UnitShard]:
        """The dimension of the units of ``tensor``, None for a scalar, and which units they are; remembered."""
        rule, share = self._rule(layer), self._weights.get(layer.name)
        if rule.units is None and layer.activation and (before := self._predecessor(args)):
            rule, share = before.units.rule, before.units.share
        units = _units_of(tensor, rule, share)
        self._latest = self._seen[id(tensor)] = _Seen(weakref.ref(tensor), tensor._version, layer, units)
        return units.dim, units.share

    def is_output_of_child(self, layer: Layer, tensor: Tensor) -> bool:
        """Whether a layer inside ``layer`` has returned this very tensor, unchanged since."""
        seen = self._lookup(tensor)
        if seen is None or seen.version != tensor._version:
            return False
        return seen.layer.name.startswith(f"{layer.name}.")

    def _rule(self, layer: Layer) -> UnitRule:
        rule = self._rules.get(layer.name)
        if rule is None:  # now, not earlier: a lazy module knows its sizes only when it is called
            rule = self._rules[layer.name] = unit_rule(layer.module)
        return rule

    def _predecessor(self, args: Any) -> _Seen | None:
        if type(args) is tuple and len(args) == 1 and (seen := self._lookup(args[0])):
            return seen  # as nearly always
        source = first_floating(args)
        return (self._lookup(source) if source is not None else None) or self._latest

    def _lookup(self, tensor: object) -> _Seen | None:
        seen = self._seen.get(id(tensor))
        return seen if seen is not None and seen.tensor() is tensor else None


@functools.lru_cache(maxsize=4096)
def _whole(shape: torch.Size, rule: UnitRule) -> _Units:
    """Of an output that has all units. Remembered: a layer's outputs have the same shape at every logged step."""
    if not shape:
        return _Units(None, UnitShard(1, 0, 1), UnitRule(1))
    dim = unit_dim(shape, rule)
    return _units(dim, UnitShard(shape[dim], 0, shape[dim]), len(shape))


def _units_of(tensor: Tensor, rule: UnitRule, share: UnitShard | None) -> _Units:
    """Of any output; ``share`` is what this rank has of the units by what was seen before it."""
    if tensor.dim() == 0:
        return _whole(tensor.shape, rule)
    if isinstance(tensor, DTensor):  # has all units, wherever they are
        dim = unit_dim(tensor.shape, rule)
        return _units(dim, unit_shard_of(tensor, dim), tensor.dim())
    if share is not None and share.held < share.total:  # unless the output was gathered, it has the share
        dim = unit_dim(tensor.shape, UnitRule(None, rule.dim))
        if tensor.shape[dim] == share.held:
            return _units(dim, share, tensor.dim())
    return _whole(tensor.shape, rule)


def _units(dim: int, share: UnitShard, num_dims: int) -> _Units:
    return _Units(dim, share, UnitRule(share.total, dim - num_dims))
