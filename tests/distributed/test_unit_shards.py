"""Which units a rank holds: against DTensor itself, for every rank of one- and two-dimensional meshes."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_init.distributed.shards import UnitShard, unit_shard_from_weights, unit_shard_of
from tests.support.sharded import as_rank

LAYOUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((3, 2), [Shard(1), Shard(1)]),
    ((3, 2), [_StridedShard(0, split_factor=2), Shard(0)]),  # FSDP2 over tensor parallel
    ((2, 3), [_StridedShard(1, split_factor=3), Shard(1)]),
]
SHAPES = [(12, 8), (7, 5), (1, 3), (5, 1), (0, 4)]


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS, ids=str)
def test_unit_shard_is_what_dtensor_holds(mesh_shape: tuple[int, ...], placements: list[Placement]) -> None:
    for rank in range(prod(mesh_shape)):
        with as_rank(rank, mesh_shape) as mesh:
            for shape in SHAPES:
                for dim in range(2):
                    # Every element is its own index along dim.
                    numbers = torch.arange(shape[dim]).unsqueeze(1 - dim).expand(shape).contiguous()
                    tensor = distribute_tensor(numbers, mesh, placements, src_data_rank=None)
                    local = tensor.to_local()
                    held, offset, total = unit_shard_of(tensor, dim)
                    assert (held, total) == (local.shape[dim], shape[dim])
                    if local.numel():
                        assert offset == local.flatten()[0]
                    if held == 0:
                        assert offset == total


def test_unit_shard_costs_no_operation() -> None:
    """It is called in hooks, where the other ranks may not be: no collective, nor anything else that torch runs."""
    with as_rank(1, (2,)) as mesh:
        tensor = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)], src_data_rank=None)
        layer = nn.Linear(3, 5)
        layer.weight = nn.Parameter(tensor)
        dispatched = []

        class Recorded(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                dispatched.append(func)
                return func(*args, **(kwargs or {}))

        with Recorded():
            assert unit_shard_of(tensor, 0) == UnitShard(2, 3, 5)
            assert unit_shard_from_weights(layer, 5) == UnitShard(2, 3, 5)
        assert not dispatched
