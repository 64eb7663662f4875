"""FSDP2 and tensor parallelism: shards and replicas on any mesh add up to what one process sees."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_init import ActivationVarianceMonitor
from tests.support.oracle import (
    DEFAULT_STATS,
    Batch,
    BatchModule,
    MemoryLogger,
    assert_tags_close,
    expected_tags,
    share_left_by_clipping,
)
from tests.support.ranks import run_ranks
from tests.support.trainers import make_fsdp2_trainer

WIDTH, RATE = 12, 0.1
STATS: Any = ["default", "weight_norm", "update_ratio", "gradient_norm_clipped"]


class Block(nn.Module):
    """A norm, a wide hidden layer with a ReLU of its own, and the way back."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, hidden),
            nn.ReLU(),
            nn.Linear(hidden, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x)))) + x


class Network(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(5, WIDTH), Block(hidden), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.first(x))).clone()


PLANS: dict[str, dict[str, ParallelStyle]] = {
    "local outputs": {"block.up": ColwiseParallel(), "block.down": RowwiseParallel()},
    "DTensor outputs": {
        "block.up": ColwiseParallel(use_local_output=False),
        "block.down": RowwiseParallel(),
    },
    "gathered outputs": {
        "block.up": ColwiseParallel(output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
    "sequence": {
        "block": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True),
        "block.norm": SequenceParallel(),
        "block.up": ColwiseParallel(input_layouts=Shard(1)),
        "block.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


class Parallel(BatchModule):
    """Tensor parallel by a plan where the mesh has such a dimension, and FSDP2 over the other."""

    plan: str | None = None

    def configure_model(self) -> None:
        if self.plan:
            parallelize_module(self.network, self.device_mesh["tensor_parallel"], PLANS[self.plan])
        if self.device_mesh["data_parallel"].size() > 1:
            for module in (self.network.block, self.network):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


def loss(network: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]).flatten(0, 1), batch[1].flatten())


def batches_of(replica: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(replica)
    sizes = [16 - (replica + i) % 3 for i in range(count)]  # as many samples as there are units, once
    return [
        (torch.randn(n, 4, 5, generator=generator) + 1, torch.randint(0, 3, (n, 4), generator=generator)) for n in sizes
    ]


def monitored(
    network: nn.Module, plan: str | None, tensor_parallel_size: int, accumulation: int, clip: float
) -> dict[int, dict[str, float]]:
    memory = MemoryLogger()
    trainer = make_fsdp2_trainer(
        tensor_parallel_size,
        max_epochs=1,
        callbacks=[ActivationVarianceMonitor(1, stats=STATS)],
        logger=memory,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip,
        use_distributed_sampler=False,
    )
    replica = dist.get_rank() // tensor_parallel_size
    module = Parallel(network, batches_of(replica, 2 * accumulation), loss)
    module.plan = plan
    trainer.fit(module)
    return memory.steps


def check_step(actual: dict[str, float], expected: dict[str, float], clip: float) -> None:
    """SGD moves weights by the rate times the clipped gradient."""
    share = share_left_by_clipping(expected["gradient_norm/total"], clip)
    assert (share < 1) == bool(clip)
    for tag, norm in expected.items():
        if tag.startswith("gradient_norm/"):
            ratio = RATE * share * norm / expected[tag.replace("gradient_norm", "weight_norm")]
            clipped = actual[tag.replace("gradient_norm", "gradient_norm_clipped")]
            assert clipped == pytest.approx(share * norm, rel=1e-5)
            # differences of float32 weights, which are rounded by 6e-8 of themselves
            assert actual[tag.replace("gradient_norm", "update_ratio")] == pytest.approx(ratio, abs=1e-6)


def check(
    world_size: int,
    plan: str | None,
    tensor_parallel_size: int,
    accumulation: int,
    hidden: int = 16,
    clip: float = 0.0,
) -> None:
    torch.manual_seed(0)
    network = Network(hidden)
    slow = copy.deepcopy(network).double()
    results: list[Any] = run_ranks(monitored, world_size, network, plan, tensor_parallel_size, accumulation, clip)
    optimizer = torch.optim.SGD(slow.parameters(), lr=RATE)
    for step in range(2):
        window = slice(step * accumulation, (step + 1) * accumulation)
        replicas = range(world_size // tensor_parallel_size)
        batches = [[(x.double(), y) for x, y in batches_of(r, 2 * accumulation)[window]] for r in replicas]
        names = ["first", "block.norm", "block.up", "block.act", "block.down", "head"]
        expected = expected_tags(
            slow,
            batches,
            accumulation=accumulation,
            loss=loss,
            names=names,
            rectifiers=["block.act"],
            stats=(*DEFAULT_STATS, "weight_norm"),
        )
        actual = results[0][step]
        assert_tags_close({tag: v for tag, v in actual.items() if tag.partition("/")[0] not in STATS[2:]}, expected)
        check_step(actual, expected, clip)
        if clip:
            torch.nn.utils.clip_grad_norm_(slow.parameters(), clip)
        optimizer.step()
    assert sorted(results[0]) == [0, 1]


@pytest.mark.parametrize(("world_size", "accumulation", "hidden"), [(2, 1, 16), (2, 4, 7), (4, 1, 10)])
def test_fsdp2_even_and_uneven_shards(world_size: int, accumulation: int, hidden: int) -> None:
    check(world_size, None, 1, accumulation, hidden)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallel_alone_and_under_fsdp2(world_size: int, plan: str) -> None:
    check(world_size, plan, 2, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradient_norms_before_and_after_clipping(world_size: int) -> None:
    """Under FSDP2 alone: torch clips no model of which a part is tensor parallel."""
    check(world_size, None, 1, 1, clip=0.05)
