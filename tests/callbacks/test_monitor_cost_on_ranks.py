"""Collectives a logged step costs: one, of a size that knows nothing of the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_init import ActivationVarianceMonitor
from tests.support.models import mlp
from tests.support.oracle import BatchModule, MemoryLogger
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "reduce", "gather", "barrier")


def collectives_of_a_fit(depth: int) -> list[list[tuple[str, int]]]:
    """Collectives from Python by step, of which 0, 1 and 3 are logged, with the size of their tensor.

    DDP's own come from C++. Lightning broadcasts a signal flag before every batch, which is left out.
    """
    steps: list[list[tuple[str, int]]] = [[]]
    patch = pytest.MonkeyPatch()
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            steps[-1].append((name, args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0))
            return original(*args, **kwargs)

        patch.setattr(dist, name, counted)

    class Monitor(ActivationVarianceMonitor):
        def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
            steps.append([])
            super().on_train_batch_start(*args, **kwargs)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append([])

    torch.manual_seed(0)
    trainer = make_ddp_trainer(max_steps=5, callbacks=[Monitor(2)], logger=MemoryLogger())
    trainer.fit(BatchModule(mlp(4, depth), [(torch.randn(4, 64), torch.zeros(4, dtype=torch.int64))] * 5))
    return steps[1:-1]


@pytest.mark.parametrize("depth", [5, 500])
def test_collectives_one_per_logged_step(depth: int) -> None:
    """Ten or a thousand layers. In the first step the ranks also agree on the layout."""
    first, *others = run_ranks(collectives_of_a_fit, 2, depth)[0]
    assert [name for name, _ in first].count("all_gather_object") == 1
    assert [name for name, _ in first].count("all_reduce") == 1
    assert [[name for name, _ in step] for step in others] == [["all_reduce"], [], ["all_reduce"], []]


def test_collective_size_depends_on_the_model_alone() -> None:
    sizes = {ranks: run_ranks(collectives_of_a_fit, ranks, 5)[0][1] for ranks in (1, 2, 4)}
    assert sizes[1] == sizes[2] == sizes[4]
    slots, layers, parameters, units = 11, 11, 12, 10 * 4 + 10
    assert sizes[2] == [("all_reduce", 2 + 2 * slots + 3 * layers + 2 * (1 + parameters) + units)]
