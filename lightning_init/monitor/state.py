"""One float64 vector per logged step, summed over ranks by one collective: the monitor's torchmetrics state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


class PackedState(Metric):
    """A float64 vector that adds up over updates and over ranks.

    ``compute`` costs one ``all_reduce`` of the vector's size, whatever the number of ranks. It is a collective:
    every rank has to call it, with vectors of one size, which is the caller's business to agree on.

    Args:
        device: where it lives. Kept off the model, it is never cast and in no state dict.
    """

    full_state_update = False
    packed: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(dist_sync_fn=_summed_over_ranks)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        self.add_state("packed", default=nothing, dist_reduce_fx="sum")
        self.to(device)

    def update(self, vector: Tensor) -> None:
        """Add ``vector``, [size]. The first becomes the state as it is, and ranks write their sum over it."""
        self.packed = self.packed + vector if self.packed.dim() else vector

    def compute(self) -> Tensor:
        """The sum over updates and ranks."""
        return self.packed


def _summed_over_ranks(vector: Tensor, group: Any = None) -> list[Tensor]:
    """What torchmetrics expects of a gather, as one reduction: a list to sum, of the sum alone."""
    dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=group)
    return [vector]
