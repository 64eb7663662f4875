"""What this process holds of a tensor: all of a plain one, a shard of a DTensor.

Two questions, with two ways to an answer. :class:`LocalShard` says where every local element of a parameter lies in the
full one, for any placements; it asks DTensor itself to shard the indices, which costs a few small tensors and is done
once per parameter. :class:`UnitShard` says which entries along one dimension are held; it is asked in hooks at every
forward pass, where only arithmetic on sizes is cheap enough, and where shards are consecutive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class LocalShard:
    """The local elements of one parameter, and where they lie in the full one (flattened, row by row).

    Attributes:
        local: this process's tensor: shares memory with the parameter. Shape: [local sizes]
        full_shape: shape of the full parameter.
        offset: flat position of the first local element, where the local elements are consecutive.
        positions: else the flat position of each local element, in local order. Shape: [local.numel()]
        is_sharded: whether what is held differs from process to process, even if this one holds everything.
    """

    local: Tensor
    full_shape: torch.Size
    offset: int = 0
    positions: Tensor | None = None
    is_sharded: bool = False

    def take(self, full: Tensor) -> Tensor:
        """This process's elements of a full parameter's values, in local order. Shape: [local.numel()]"""
        flat = full.reshape(-1)
        if self.positions is not None:
            return flat[self.positions]
        return flat[self.offset : self.offset + self.local.numel()]

    def overlap(self, first: int, stop: int) -> tuple[slice, Tensor | slice] | None:
        """Where the full parameter's flat elements ``first`` to ``stop`` lie here; None if none of them is held.

        Returns:
            The local flat range, and which of the elements ``first`` to ``stop`` go there.
        """
        if self.positions is None:
            held_first = max(first, self.offset)
            held_stop = min(stop, self.offset + self.local.numel())
            if held_first >= held_stop:
                return None
            return slice(held_first - self.offset, held_stop - self.offset), slice(
                held_first - first, held_stop - first
            )
        start, end = torch.searchsorted(self.positions, torch.tensor([first, stop])).tolist()
        return None if start >= end else (slice(start, end), self.positions[start:end] - first)


def local_shard_of(tensor: Tensor) -> LocalShard:
    """The shard of a plain tensor, which is all of it, or of a DTensor with any Shard and Replicate placements.

    Raises:
        ValueError: a DTensor with partial sums, or one whose shard is not in ascending order.
    """
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor.detach(), tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a parameter with partial placements {tensor.placements} cannot be initialised")
    local = tensor.to_local().detach()  # in this order: detaching a DTensor may hand out an equal, older mesh
    is_sharded = any(hasattr(placement, "dim") for placement in tensor.placements)
    indices = [_held_indices(tensor, dim) for dim in range(tensor.ndim)]
    if all(len(held) == size for held, size in zip(indices[1:], tensor.shape[1:], strict=True)):
        first = indices[0] if indices else torch.zeros(1, dtype=torch.int64)
        if first.numel() == 0 or int(first[-1]) - int(first[0]) == first.numel() - 1:
            row = tensor.numel() // tensor.shape[0] if tensor.ndim and tensor.shape[0] else 1
            offset = int(first[0]) * row if first.numel() else 0
            return LocalShard(local, tensor.shape, offset, is_sharded=is_sharded)
    return LocalShard(local, tensor.shape, positions=_flat_positions(indices, tensor.shape), is_sharded=is_sharded)


def _held_indices(tensor: DTensor, dim: int) -> Tensor:
    """The indices along one dimension that this process holds; without communication. Shape: [local size]

    Sharding ``arange`` exactly as the parameter's dimension is sharded asks DTensor itself, uneven shards,
    two-dimensional meshes and strided shards included.
    """
    placements = [_along(placement, dim) for placement in tensor.placements]
    indices = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type)
    return distribute_tensor(indices, tensor.device_mesh, placements, src_data_rank=None).to_local().cpu()


def _along(placement: Placement, dim: int) -> Placement:
    """The placement of a vector that is cut like dimension ``dim`` of the parameter."""
    if getattr(placement, "dim", None) != dim:  # a strided shard is no Shard: ask for its dim
        return Replicate()
    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)  # type: ignore[call-arg]


def _flat_positions(indices: list[Tensor], shape: torch.Size) -> Tensor:
    """Flat position in the full parameter of each local element. Shape: [product of the local sizes]"""
    positions = torch.zeros((), dtype=torch.int64)
    for held, size in zip(indices, shape, strict=True):
        positions = positions.unsqueeze(-1) * size + held
    flat = positions.flatten()
    if flat.numel() > 1 and not bool((flat[1:] > flat[:-1]).all()):
        raise ValueError("a shard whose elements are not in ascending order cannot be initialised")
    return flat


class UnitShard(NamedTuple):
    """The units ``offset`` to ``offset + held`` of ``total``."""

    held: int
    offset: int
    total: int


def local_numbers(tensor: Tensor) -> Tensor | None:
    """This rank's numbers; a plain tensor as it is; None for a sum that ranks have not made yet.

    Such numbers exist nowhere, and making them would be a collective inside a hook, where nobody may wait.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return None if any(placement.is_partial() for placement in tensor.placements) else tensor.to_local()


def unit_shard_of(tensor: DTensor, dim: int) -> UnitShard:
    """Which entries along ``dim`` this rank holds; no communication.

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
                shard = unit_shard_of(parameter, dim)
                if size == units and shard.held < size:
                    return shard
    return None
