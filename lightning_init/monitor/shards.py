"""What a rank holds of a tensor that is spread over ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class UnitShard(NamedTuple):
    """The units ``offset`` to ``offset + held`` of ``total``."""

    held: int
    offset: int
    total: int


def local_part(tensor: Tensor) -> Tensor | None:
    """This rank's numbers; a plain tensor as it is; None for a sum that ranks have not made yet.

    Such numbers exist nowhere, and making them would be a collective inside a hook, where nobody may wait.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return None if any(placement.is_partial() for placement in tensor.placements) else tensor.to_local()


def unit_shard_of(tensor: DTensor, dim: int) -> UnitShard:
    """Which entries along ``dim`` this rank holds.

    The function behind it is private, and the only one that knows every placement, strided shards included.
    """
    held, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return UnitShard(held[dim], offset[dim], tensor.shape[dim])


def unit_shard_from_weights(module: nn.Module, units: int) -> UnitShard | None:
    """Which units a column-parallel module computes here; None if its own parameters are not split by units.

    To be asked while the forward pass has the weights: FSDP2 splits them otherwise, for reasons of its own.
    """
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, DTensor):
            for dim, size in enumerate(parameter.shape):
                share = unit_shard_of(parameter, dim)
                if size == units and share.held < size:
                    return share
    return None
