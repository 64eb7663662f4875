"""Squared norms of parameter gradients: per layer and in total, of plain tensors and shards alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_init import moments
from lightning_init.monitor.layers import Layer


class GradientNorms:
    """Collects, between two exchanges, the squared gradient norm of every parameter that is about to step.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same numbers, so
    that the sum over all ranks is the squared norm of the whole gradient, however it is spread.

    Args:
        layers: whose parameters form the rows; a parameter shared by two layers is in both, and once in total.
        world_size: number of ranks that will be summed over.
    """

    def __init__(self, layers: Sequence[Layer], world_size: int = 1) -> None:
        self.owners = [layer.name for layer in layers if layer.parameters]
        self.world_size = world_size
        self._rows: dict[nn.Parameter, list[int]] = {}
        for row, layer in enumerate(layer for layer in layers if layer.parameters):
            for parameter in layer.parameters:
                self._rows.setdefault(parameter, []).append(row)
        self._squares: dict[nn.Parameter, Tensor] = {}

    def add(self, gradients: Mapping[nn.Parameter, Tensor], factor: float | Tensor = 1.0) -> None:
        """Take whole gradients as they are now, times ``factor``. A parameter's last call counts."""
        for parameter, gradient in gradients.items():
            self._squares[parameter] = sum_of_squares(gradient, self.world_size) * factor**2

    def empty(self) -> None:
        """Forget what was collected."""
        self._squares.clear()

    def packed(self, device: torch.device) -> Tensor:
        """Float64 [2 + 2 · owners]: total and row sums of squares, then how many parameters each summed."""
        rows = len(self.owners)
        squares = torch.zeros(1 + rows, dtype=torch.float64, device=device)
        counts = [len(self._squares)] + [0] * rows
        if self._squares:
            values = torch.stack(list(self._squares.values())).to(device)
            squares[0] = values.sum()
            places = [(row, i) for i, p in enumerate(self._squares) for row in self._rows.get(p, ())]
            for row, _ in places:
                counts[1 + row] += 1
            if places:
                to, of = torch.tensor(places, device=device).T
                squares[1:].index_add_(0, to, values[of])
        return torch.cat((squares, torch.tensor(counts, dtype=torch.float64, device=device)))


def whole_gradients(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The gradients of ``parameters``, as far as there are any.

    Under sequence parallelism a norm's gradient is a sum that ranks have not made yet, and squares of parts don't
    add up: it is made here. That is a collective, so every rank has to call this.
    """
    gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    for parameter, gradient in gradients.items():
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            whole = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
            gradients[parameter] = gradient.redistribute(placements=whole)
    return gradients


def sum_of_squares(gradient: Tensor, world_size: int = 1) -> Tensor:
    """This rank's share of Σg², [] float64: summed over all ranks it is the squared norm."""
    copies = world_size
    if isinstance(gradient, DTensor):
        for dim, placement in enumerate(gradient.placements):
            if not placement.is_replicate():
                copies //= gradient.device_mesh.size(dim)
        gradient = gradient.to_local()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return moments.sum_of_squares(gradient) / copies
