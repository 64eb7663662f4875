"""What a module returned: the tensor that counts, and which of its dimensions are units."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # no public name tells
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


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
