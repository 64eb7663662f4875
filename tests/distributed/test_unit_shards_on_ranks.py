"""What a rank holds, told by DTensors of every placement."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_init.distributed.shards import local_numbers, unit_shard_from_weights, unit_shard_of
from lightning_init.introspect.layers import find_layers
from lightning_init.monitor.collector import ActivationCollector
from tests.support.ranks import run_ranks


def shares() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2))
    numbers = torch.arange(35.0).reshape(7, 5)
    found = {}
    for placements in [(Shard(0), Replicate()), (Shard(0), Shard(0)), (Shard(1), Shard(0)), (Replicate(), Shard(1))]:
        spread = distribute_tensor(numbers, mesh, placements)
        local = local_numbers(spread)
        assert local is not None
        for dim in range(2):
            share = unit_shard_of(spread, dim)
            wanted = numbers.narrow(dim, share.offset, share.held)
            assert share.total == numbers.shape[dim]
            assert {*local.flatten().tolist()} <= {*wanted.flatten().tolist()}
            assert local.shape[dim] == share.held
    column, row = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
    parallelize_module(column, init_device_mesh("cpu", (4,)), ColwiseParallel())
    parallelize_module(row, init_device_mesh("cpu", (4,)), RowwiseParallel())
    found["column"] = unit_shard_from_weights(column, 6)
    found["row"] = unit_shard_from_weights(row, 4)
    found["plain"] = unit_shard_from_weights(nn.Linear(3, 4), 4)
    return found


def test_unit_shards_of_every_placement() -> None:
    results = run_ranks(shares, 4)
    assert [result["column"] for result in results] == [(2, 0, 6), (2, 2, 6), (2, 4, 6), (0, 6, 6)]
    assert {result["row"] for result in results} == {None}
    assert {result["plain"] for result in results} == {None}


class Summand(nn.Module):
    """Hands on a sum that is not made yet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> DTensor:
        return DTensor.from_local(x * self.weight, init_device_mesh("cpu", (2,)), [Partial()])


def recorded_summand() -> tuple[list[str], list[str], bool]:
    network = nn.Sequential(Summand())
    collector = ActivationCollector(find_layers(network), [], on_fault=lambda name, error: print(name, error))
    collector.attach()
    output = network(torch.ones(2, 3))
    assert local_numbers(output) is None
    whole = output.full_tensor()
    collector.detach()
    return (
        [place.layer for place in collector.records],
        list(collector.partial_layers),
        bool((whole == dist.get_world_size()).all()),
    )


def test_partial_sums_are_left_out_by_name() -> None:
    assert run_ranks(recorded_summand, 2) == [([], ["0"], True)] * 2
