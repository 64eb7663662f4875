"""Which part of a sharded tensor this rank holds.

:class:`LocalShard` says it for all elements, in the order in which they are drawn; :class:`UnitShard` says it for one
dimension, in whole units. Both ask :func:`_held_runs`, which computes what a DTensor's placements mean for one
dimension: on the CPU, without communication, and fast enough for hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class LocalShard:
    """The local elements of one parameter, and their flat (row-major) positions in the full parameter.

    Rank 1 of 2 that hold a [4, 3] parameter by rows has the last six of its twelve elements: ``offset`` 6. By columns
    ([4, 2] and [4, 1]), it has the elements 2, 5, 8 and 11: these are its ``positions``.

    Attributes:
        local: this rank's tensor, which shares memory with the parameter. Shape: [local sizes]
        full_shape: shape of the full parameter.
        offset: flat position of the first local element, where the local elements are consecutive.
        positions: else the flat position of each local element, ascending. Shape: [local.numel()]
        is_sharded: whether ranks hold different elements, even if this one happens to hold all of them.
    """

    local: Tensor
    full_shape: torch.Size
    offset: int = 0
    positions: Tensor | None = None
    is_sharded: bool = False

    def take(self, full: Tensor) -> Tensor:
        """This rank's elements of a full parameter's values, in local order. Shape: [local.numel()]"""
        flat = full.reshape(-1)
        if self.positions is not None:
            return flat[self.positions]
        return flat[self.offset : self.offset + self.local.numel()]

    def overlap(self, first: int, stop: int) -> tuple[slice, Tensor | slice] | None:
        """Which of the full parameter's flat elements ``first`` to ``stop`` (exclusive) this rank holds.

        A shard of ten elements from offset 20 on gives ``(slice(0, 5), slice(5, 10))`` for the elements 15 to 25: its
        first five elements are the last five of those ten.

        Returns:
            Where they are among the local elements, and where among the elements ``first`` to ``stop``; None if this
            rank holds none of them.
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
    """The local shard of a DTensor with any number of Shard and Replicate placements; of a plain tensor, all of it.

    Raises:
        ValueError: a DTensor with partial sums, or one whose local elements are not in ascending order.
    """
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor.detach(), tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a parameter with partial placements {tensor.placements} cannot be initialised")
    local = tensor.to_local().detach()  # in this order: detaching a DTensor may return one on an equal, older mesh
    is_sharded = any(hasattr(placement, "dim") for placement in tensor.placements)
    indices = [_held_indices(tensor, dim) for dim in range(tensor.ndim)]
    if all(len(held) == size for held, size in zip(indices[1:], tensor.shape[1:], strict=True)):
        # Complete rows: they are consecutive in the full parameter if their indices are.
        rows = indices[0] if indices else torch.zeros(1, dtype=torch.int64)
        if rows.numel() == 0 or int(rows[-1]) - int(rows[0]) == rows.numel() - 1:
            row_size = tensor.numel() // tensor.shape[0] if tensor.ndim and tensor.shape[0] else 1
            offset = int(rows[0]) * row_size if rows.numel() else 0
            return LocalShard(local, tensor.shape, offset, is_sharded=is_sharded)
    return LocalShard(local, tensor.shape, positions=_flat_positions(indices, tensor.shape), is_sharded=is_sharded)


def _flat_positions(indices: list[Tensor], shape: torch.Size) -> Tensor:
    """Flat position in the full parameter of each local element. Shape: [product of the local sizes]

    Args:
        indices: for each dimension, the indices along it that this rank holds. [dims][local size]
        shape: of the full parameter.
    """
    positions = torch.zeros((), dtype=torch.int64)
    for held, size in zip(indices, shape, strict=True):
        positions = positions.unsqueeze(-1) * size + held
    flat = positions.flatten()
    if flat.numel() > 1 and not bool((flat[1:] > flat[:-1]).all()):  # overlap() finds blocks by bisection
        raise ValueError("a shard whose elements are not in ascending order cannot be initialised")
    return flat


class UnitShard(NamedTuple):
    """Which units of a layer this rank computes: the ``held`` units from ``offset`` on, of ``total``."""

    held: int
    offset: int
    total: int


def local_numbers(tensor: Tensor) -> Tensor | None:
    """This rank's part of a DTensor; a plain tensor as it is; None for partial sums, which ranks still have to add.

    The numbers of a partial sum exist on no rank, and adding them up would be a collective inside a hook, for which
    the other ranks may not be there.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return None if any(placement.is_partial() for placement in tensor.placements) else tensor.to_local()


def unit_shard_of(tensor: DTensor, dim: int) -> UnitShard:
    """Which entries along ``dim`` this rank holds; where it holds none, ``offset`` is ``total``."""
    runs = _held_runs(tensor, dim)
    total = tensor.shape[dim]
    return UnitShard(sum(map(len, runs)), runs[0].start if runs else total, total)


def unit_shard_from_weights(module: nn.Module, units: int) -> UnitShard | None:
    """Which units a column-parallel module computes on this rank; None if no own parameter is split by units.

    To be called in the forward pass, while the weights are gathered: outside of it, FSDP2 splits their rows as well,
    which has nothing to do with the units that are computed here.
    """
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, DTensor):
            for dim, size in enumerate(parameter.shape):
                shard = unit_shard_of(parameter, dim)
                if size == units and shard.held < size:
                    return shard
    return None


def _held_indices(tensor: DTensor, dim: int) -> Tensor:
    """The indices along ``dim`` that this rank holds, in local order. Shape: [local size]"""
    runs = _held_runs(tensor, dim)
    # On the CPU, whatever the default device is: positions are compared with Python numbers.
    return torch.cat([torch.arange(run.start, run.stop, device="cpu") for run in (range(0), *runs)])


def _held_runs(tensor: DTensor, dim: int) -> list[range]:
    """The indices along ``dim`` that this rank holds, in local order, as runs of consecutive ones; none is empty.

    DTensor applies its placements from the first mesh dimension to the last, each to what the ones before have left:
    ``[Shard(0), Shard(0)]`` on a (2, 2) mesh cuts the rows in halves and each half in halves. Torch has a function for
    this, but it is private (and slower); distributing an ``arange`` like the tensor would wait for the device. Tests
    compare with what ``distribute_tensor`` gives to every rank.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the tensor's mesh
        return []
    runs = [range(tensor.shape[dim])]
    for mesh_dim, placement in enumerate(tensor.placements):
        if getattr(placement, "dim", None) == dim:  # Shard, or torch's private _StridedShard, which is no subclass
            split_factor = getattr(placement, "split_factor", 1)
            kept = _kept(sum(map(len, runs)), split_factor, tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim])
            runs = [part for positions in kept for part in _cut(runs, positions)]
    return [run for run in runs if run]


def _kept(size: int, split_factor: int, num_ranks: int, rank: int) -> list[range]:
    """The positions 0 to ``size`` that one placement leaves to ``rank``: as many ranges as its ``split_factor``.

    Shard has split factor 1: rank 1 of 2 keeps 2 and 3 of the positions 0 to 3. A strided shard first cuts into
    ``split_factor`` chunks, then each chunk: with factor 2, rank 1 of 2 keeps 1 and 3. FSDP2 over tensor parallel is
    written so: its factor is the number of tensor-parallel ranks, which have cut the parameter before.
    """
    return [_chunk(_chunk(range(size), split_factor, i), num_ranks, rank) for i in range(split_factor)]


def _chunk(run: range, chunks: int, index: int) -> range:
    """One chunk of ``run`` as ``torch.chunk`` cuts it: all have the same size, rounded up, until nothing is left."""
    size = -(-len(run) // chunks)
    return run[index * size : (index + 1) * size]


def _cut(runs: list[range], positions: range) -> list[range]:
    """What stands at ``positions`` of the runs laid end to end: ``_cut([range(4, 6), range(8, 10)], range(1, 3))``
    is ``[range(5, 6), range(8, 9)]``.
    """
    found, before = [], 0  # how many elements the earlier runs have
    for run in runs:
        found.append(run[max(positions.start - before, 0) : max(positions.stop - before, 0)])
        before += len(run)
    return found
