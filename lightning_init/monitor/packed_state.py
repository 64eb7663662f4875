"""The sum of a logged step's vector over ranks, as a metric of torchmetrics.

A file of its own, imported at the first logged step: torchmetrics loads matplotlib, SciPy and transformers where they
are installed, which would make ``import lightning_init`` twice as expensive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_init.distributed.ranks import all_reduce


class PackedState(Metric):
    """A float64 vector that adds up over updates and over ranks.

    ``compute`` costs one ``all_reduce`` of the vector's size, whatever the number of ranks. It is a collective: every
    rank has to call it, with a vector of the same size.

    Args:
        device: where it lives. It is no submodule of the model, so it is never cast and in no state dict.
    """

    full_state_update = False
    packed: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__(dist_sync_fn=_sum_over_ranks)
        empty = torch.zeros((), dtype=torch.float64, device=device)
        self.add_state("packed", default=empty, dist_reduce_fx="sum")
        self.to(device)

    def update(self, vector: Tensor) -> None:
        """Add ``vector``, [size]. The first is kept without a copy: the all_reduce overwrites the caller's tensor."""
        self.packed = self.packed + vector if self.packed.dim() else vector

    def compute(self) -> Tensor:
        """The sum over updates and ranks."""
        return self.packed


def _sum_over_ranks(vector: Tensor, group: Any = None) -> list[Tensor]:
    """Stands in for the all_gather that torchmetrics expects, whose result it sums: a list that holds only the sum."""
    all_reduce(vector)  # over all ranks: a PackedState is made without a process group
    return [vector]
