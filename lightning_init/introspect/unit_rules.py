"""How many units a module computes, and in which dimension of its output: known from its type and its parameters.

Units are what is computed side by side: the features of a linear layer, the channels of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class UnitRule(NamedTuple):
    """What is known about a layer's units before it is called.

    A ``Conv2d(3, 16, 1)`` has ``UnitRule(units=16, dim=-3)``: 16 channels, in front of height and width.

    Attributes:
        units: how many there should be; None if nothing tells.
        dim: the dimension they usually have: from the front (1) or the back (-1, -3); None if nothing tells.
    """

    units: int | None = None
    dim: int | None = None


def _conv(module: Any) -> UnitRule:
    return UnitRule(module.out_channels, -1 - len(module.kernel_size))


def _prelu(module: Any) -> UnitRule:
    # One slope for all units says nothing about their number.
    return UnitRule(module.num_parameters, 1) if module.num_parameters > 1 else UnitRule()


def _rnn(module: Any) -> UnitRule:
    return UnitRule((module.proj_size or module.hidden_size) * (1 + module.bidirectional), -1)


def _layer_norm(module: Any) -> UnitRule:
    # What is normalised together are the last dimensions, the units before the places of an image.
    return UnitRule(module.normalized_shape[0], -len(module.normalized_shape))


_RULES: tuple[tuple[type[nn.Module], Callable[[Any], UnitRule]], ...] = (
    (_ConvNd, _conv),
    (nn.InstanceNorm1d, lambda module: UnitRule(module.num_features, -2)),  # with or without a batch dimension
    (nn.InstanceNorm2d, lambda module: UnitRule(module.num_features, -3)),
    (nn.InstanceNorm3d, lambda module: UnitRule(module.num_features, -4)),
    (_BatchNorm, lambda module: UnitRule(module.num_features, 1)),
    (nn.GroupNorm, lambda module: UnitRule(module.num_channels, 1)),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _rnn),
    (nn.RNNCellBase, lambda module: UnitRule(module.hidden_size, -1)),
)
"""Module type, subclasses included, to its rule; the first entry that fits decides."""


def unit_rule(module: nn.Module) -> UnitRule:
    """The number of units of ``module`` and their usual dimension, from its type, attributes and parameters.

    A module of an unknown type has as many units as its vectors (biases, scales) have elements, if all of them have
    the same number; in which dimension is not known, nor is it of a subclass with a ``forward`` of its own. An
    activation, which has no parameters, gets the empty rule.

    >>> unit_rule(nn.Conv2d(3, 16, 5)), unit_rule(nn.Linear(4, 8)), unit_rule(nn.ReLU())
    (UnitRule(units=16, dim=-3), UnitRule(units=8, dim=-1), UnitRule(units=None, dim=None))
    """
    for module_type, rule in _RULES:
        if isinstance(module, module_type):
            return rule(module) if _has_forward_of_torch(type(module)) else UnitRule(rule(module).units)
    for attribute in ("out_features", "embedding_dim", "embed_dim"):  # Linear, Bilinear, Embedding, attention
        if isinstance(units := vars(module).get(attribute), int):
            return UnitRule(units, -1)
    return UnitRule(_units_of_unknown(module))


def _has_forward_of_torch(kind: type[nn.Module]) -> bool:
    """Whether a subclass of a class of torch's computes what that class does."""
    owner = next(one for one in kind.__mro__ if "forward" in vars(one))
    return owner.__module__.startswith("torch.")


def _units_of_unknown(module: nn.Module) -> int | None:
    """Units of a type that is not known: the size that all its vectors share, if they do."""
    sizes = {parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() == 1}
    return sizes.pop() if len(sizes) == 1 else None
