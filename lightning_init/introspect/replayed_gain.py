"""The gain of any function that a model computes: its recorded operations, replayed with normal numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_init.introspect.destinations import constant_factor
from lightning_init.introspect.operation_kinds import LINEAR, LINEAR_IN_ONE, MOST_BETWEEN, SUMS
from lightning_init.introspect.operations import Value, replay

_PASSES = (LINEAR | LINEAR_IN_ONE) - {"sum"}


def gain_between(value: Value, origins: frozenset[Value]) -> float | None:
    """1/√E[f(z)²] of the function between origins and a value, up to what only moves, averages or scales its result.

    Averages do not count: values beside each other in an image are alike, and random numbers are not.
    """
    factor = 1.0
    while value not in origins:
        operation = value.operation
        data = [one for one in value.inputs if one.is_data]
        if operation is None or len(data) != 1 or operation.name not in _PASSES:
            break
        factor *= constant_factor(operation)
        value = data[0]
    mean_square = _mean_square(value, sorted(origins, key=lambda one: one.number))
    return 1 / (factor * math.sqrt(mean_square)) if mean_square > 0 and math.isfinite(mean_square) else None


def _mean_square(value: Value, origins: Sequence[Value]) -> float:
    """E[f(z)²] with z ~ N(0, 1) at all origins, from as many replays as it takes to have seen all of ``_NORMALS``."""
    size = max(one.tensor.numel() for one in origins)
    total, count = 0.0, 0
    for start in range(0, len(_NORMALS), size):
        given = {one: _normals_for(one, start, shuffled=index) for index, one in enumerate(origins)}
        result = replay(value, given, MOST_BETWEEN)[value].double()
        is_elementwise = len(origins) == 1 and result.shape == origins[0].tensor.shape
        kept = min(size, len(_NORMALS) - start) if is_elementwise else result.numel()
        total += float(result.reshape(-1)[:kept].square().sum())
        count += kept
    return total / count


def _normal_quantiles(count: int) -> Tensor:
    """Normal numbers without randomness: the middles of ``count`` intervals of equal probability, of variance 1."""
    middles = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    quantiles = math.sqrt(2) * torch.erfinv(2 * middles - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (quantiles / quantiles.square().mean().sqrt())[order]


_NORMALS = _normal_quantiles(1 << 13)
"""What stands for N(0, 1): the same numbers for a tensor of any size, so that a gain does not depend on the batch."""


def _normals_for(value: Value, start: int, *, shuffled: int) -> Tensor:
    """Numbers of ``_NORMALS`` from ``start`` on, over and over again, in a value's shape."""
    if not value.tensor.is_floating_point():
        return value.tensor
    normals = _NORMALS if not shuffled else _NORMALS[_shuffle(shuffled)]
    index = (torch.arange(value.tensor.numel(), device="cpu") + start) % len(normals)
    return normals[index].reshape(value.tensor.shape).to(value.tensor.device, value.tensor.dtype)


@functools.cache
def _shuffle(seed: int) -> Tensor:
    return torch.randperm(len(_NORMALS), generator=torch.Generator().manual_seed(seed))


def names_between(value: Value, origins: frozenset[Value]) -> tuple[str, ...]:
    """The names of operations between origins and a value that are not known to be linear, first to last."""
    waiting, seen, names = [value], set(origins), {}
    while waiting:
        current = waiting.pop()
        if current in seen or current.operation is None:
            continue
        seen.add(current)
        name = current.operation.name
        if name not in LINEAR and name not in SUMS and constant_factor(current.operation) == 1.0:
            names[name.rstrip("_")] = current.number
        waiting += [one for one in current.inputs if one.is_data]
    return tuple(sorted(names, key=lambda name: names[name]))
