"""What a module returned: the tensor that counts, and which of its dimensions are units."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # no public name tells
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_init.distributed.shards import UnitShard, unit_shard_from_weights, unit_shard_of
from lightning_init.introspect.layers import Layer


def first_floating(output: object) -> Tensor | None:
    """The first floating-point tensor in a tensor, tuple, list, mapping or dataclass (PackedSequence: its data)."""
    if isinstance(output, Tensor):  # whose numbers can be read: not sparse, not nested, not inside torch.func
        readable = output.layout is torch.strided and not output.is_nested and not is_functorch_wrapped_tensor(output)
        return output if readable and output.is_floating_point() else None
    members: Iterable[object]
    if isinstance(output, (tuple, list)):  # ahead of mappings, which are slow to rule out
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


class UnitRule(NamedTuple):
    """What is known about a layer's units before its output is seen.

    Attributes:
        units: how many there should be; None if nothing tells.
        dim: the dimension they usually have: from the front (1) or the back (-1, -3).
    """

    units: int | None = None
    dim: int = -1


_INSTANCE_NORMS = {nn.InstanceNorm1d: -2, nn.InstanceNorm2d: -3, nn.InstanceNorm3d: -4}


def unit_rule(module: nn.Module) -> UnitRule:
    """The rule that ``module``'s type and parameters give; without any (activations), the empty rule."""
    if isinstance(module, _ConvNd):
        return UnitRule(module.out_channels, -1 - len(module.kernel_size))
    for norm, dim in _INSTANCE_NORMS.items():
        if isinstance(module, norm):
            return UnitRule(module.num_features, dim)
    if isinstance(module, _BatchNorm):
        return UnitRule(module.num_features, 1)
    if isinstance(module, nn.GroupNorm):
        return UnitRule(module.num_channels, 1)
    if isinstance(module, nn.PReLU):
        return UnitRule(module.num_parameters, 1) if module.num_parameters > 1 else UnitRule()
    if isinstance(module, nn.RNNBase):
        return UnitRule((module.proj_size or module.hidden_size) * (1 + module.bidirectional))
    if isinstance(module, nn.RNNCellBase):
        return UnitRule(module.hidden_size)
    for attribute in ("out_features", "embedding_dim", "embed_dim"):  # Linear, Bilinear, Embedding, attention
        if isinstance(units := getattr(module, attribute, None), int):
            return UnitRule(units)
    return UnitRule(_units_of_unknown(module))


def _units_of_unknown(module: nn.Module) -> int | None:
    """Units of a type nobody told us about: the size all its vectors share (biases, norms), if they do."""
    sizes = {parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() == 1}
    return sizes.pop() if len(sizes) == 1 else None


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
