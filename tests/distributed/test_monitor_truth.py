"""On any number of ranks the monitor says what one process says about all their batches, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from lightning_init.callbacks.monitor import ActivationVarianceMonitor
from tests.distributed.harness import run_ranks
from tests.models import digits, mlp
from tests.oracle import Batch, BatchModule, MemoryLogger, assert_tags_close, expected_tags
from tests.trainers import make_ddp_trainer


def batches_of(rank: int, sizes: list[int], offset: int = 0) -> list[Batch]:
    """Micro-batches of the given sizes, cut from the digits; no two ranks share one."""
    pixels, classes = digits()
    starts = [offset + 400 * rank + sum(sizes[:i]) for i in range(len(sizes))]
    return [(pixels[a : a + n], classes[a : a + n]) for a, n in zip(starts, sizes, strict=True)]


def monitored(network: torch.nn.Module, sizes: list[list[int]], accumulation: int) -> dict[int, dict[str, float]]:
    rank = dist.get_rank()
    memory, monitor = MemoryLogger(), ActivationVarianceMonitor(1)
    trainer = make_ddp_trainer(
        max_epochs=1,
        callbacks=[monitor],
        logger=memory,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
    )
    trainer.fit(BatchModule(network, batches_of(rank, sizes[rank])))
    return memory.steps


@pytest.mark.parametrize(
    ("world_size", "sizes", "accumulation"),
    [
        (1, [[16, 16, 16]], 1),
        (2, [[16, 16], [16, 16]], 1),
        (2, [[24, 3, 8, 11, 5], [1, 17, 8, 2, 30]], 4),  # unequal batches, and a short last window
        (4, [[8, 9], [5, 8], [8, 1], [30, 8]], 2),
    ],
)
def test_ranks_agree_with_one_process(world_size: int, sizes: list[list[int]], accumulation: int) -> None:
    torch.manual_seed(0)
    network = mlp(32, 3)
    reference = copy.deepcopy(network).double()
    steps = run_ranks(monitored, world_size, network, sizes, accumulation)[0]
    ranks = [[(x.double(), y) for x, y in batches_of(rank, sizes[rank])] for rank in range(world_size)]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in sorted(steps):
        window = slice(step * accumulation, (step + 1) * accumulation)
        micro_batches = [batches[window] for batches in ranks]
        expected = expected_tags(reference, micro_batches, accumulation=accumulation, rectifiers=["1", "3", "5"])
        assert_tags_close(steps[step], expected)
        optimizer.step()
    assert len(steps) == -(-len(sizes[0]) // accumulation)
