"""Which elements of a whole parameter this process holds: all of a plain tensor, a part of a sharded one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lightning_init.initialization.draw import Block


@dataclass(frozen=True)
class LocalShard:
    """The local elements of one parameter, and where they lie in the whole one (flattened, row by row).

    Attributes:
        local: this process's tensor: shares memory with the parameter. Shape: [local sizes]
        whole_shape: shape of the whole parameter.
        offset: flat position of the first local element, where the local elements are consecutive.
        positions: else the flat position of each local element, in local order. Shape: [local.numel()]
        is_sharded: whether what is held differs from process to process, even if this one holds everything.
    """

    local: Tensor
    whole_shape: torch.Size
    offset: int = 0
    positions: Tensor | None = None
    is_sharded: bool = False

    def take(self, whole: Tensor) -> Tensor:
        """This process's elements of a whole parameter's values, in local order. Shape: [local.numel()]"""
        flat = whole.reshape(-1)
        if self.positions is not None:
            return flat[self.positions]
        return flat[self.offset : self.offset + self.local.numel()]

    def overlap(self, block: Block) -> tuple[slice, Tensor | slice] | None:
        """The local flat range of a block and which of the block's values go there; None if there is nothing."""
        if self.positions is None:
            start = max(block.start, self.offset)
            stop = min(block.stop, self.offset + self.local.numel())
            if start >= stop:
                return None
            return slice(start - self.offset, stop - self.offset), slice(start - block.start, stop - block.start)
        edges = torch.tensor([block.start, block.stop])
        first, last = torch.searchsorted(self.positions, edges).tolist()
        return None if first >= last else (slice(first, last), self.positions[first:last] - block.start)


def local_shard_of(tensor: Tensor) -> LocalShard:
    """The window of a plain tensor or a DTensor with any number of Shard and Replicate placements.

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
    whole = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type)
    return distribute_tensor(whole, tensor.device_mesh, placements, src_data_rank=None).to_local().cpu()


def _along(placement: Placement, dim: int) -> Placement:
    """The placement of a vector that is cut like dimension ``dim`` of the parameter."""
    if getattr(placement, "dim", None) != dim:  # a strided shard is no Shard: ask for its dim
        return Replicate()
    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)  # type: ignore[call-arg]


def _flat_positions(indices: list[Tensor], shape: torch.Size) -> Tensor:
    """Flat position in the whole parameter of each local element. Shape: [product of the local sizes]"""
    positions = torch.zeros((), dtype=torch.int64)
    for held, size in zip(indices, shape, strict=True):
        positions = positions.unsqueeze(-1) * size + held
    flat = positions.flatten()
    if flat.numel() > 1 and not bool((flat[1:] > flat[:-1]).all()):
        raise ValueError("a shard whose elements are not in ascending order cannot be initialised")
    return flat
