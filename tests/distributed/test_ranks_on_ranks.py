"""What ranks tell each other: messages in order of rank, sums and maxima; themselves where there is only one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_init.distributed.ranks import all_gather_object, all_reduce, is_distributed, world_size
from tests.support.ranks import run_ranks


def exchanged() -> tuple[int, bool, list[str], list[float], list[float]]:
    rank = dist.get_rank()
    added, largest = torch.tensor([1.0, rank]), torch.tensor([1.0, rank])
    all_reduce(added)
    all_reduce(largest, maximum=True)
    return world_size(), is_distributed(), all_gather_object(f"rank {rank}"), added.tolist(), largest.tolist()


def test_ranks_exchange_messages_and_vectors() -> None:
    expected = (3, True, ["rank 0", "rank 1", "rank 2"], [3.0, 3.0], [1.0, 2.0])
    assert run_ranks(exchanged, 3) == [expected] * 3


def test_ranks_of_a_group_of_one_exchange_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "all_gather_object", None)  # calling it would fail
        vector = torch.tensor([1.0, 2.0])
        all_reduce(vector)
        assert vector.tolist() == [1.0, 2.0]
        assert all_gather_object("me") == ["me"]
        assert not is_distributed()
        assert world_size() == 1
    finally:
        dist.destroy_process_group()
