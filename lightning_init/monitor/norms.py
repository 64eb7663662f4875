"""Squared norms of parameters, their gradients and their updates: per layer and in total, however they are spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_init import moments
from lightning_init.monitor.layers import Layer

KINDS_OF = {
    "gradient_norm": ("gradient",),
    "gradient_norm_clipped": ("clipped",),
    "weight_norm": ("weight",),
    "update_ratio": ("weight", "update"),
}
"""What each statistic is made of."""


class Norms:
    """Collects, between two exchanges, squared norms of tensors that belong to parameters.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same numbers, so
    that the sum over all ranks is the squared norm of the whole tensor, however it is spread.

    Args:
        layers: whose parameters form the rows; a parameter shared by two layers is in both, and once in total.
        stats: which statistics will be asked for.
        world_size: number of ranks that will be summed over.
    """

    def __init__(self, layers: Sequence[Layer], stats: Sequence[str], world_size: int = 1) -> None:
        self.owners = [layer.name for layer in layers if layer.parameters]
        self.kinds = tuple(dict.fromkeys(kind for stat in stats for kind in KINDS_OF.get(stat, ())))
        self.world_size = world_size
        self._rows: dict[nn.Parameter, list[int]] = {}
        for row, layer in enumerate(layer for layer in layers if layer.parameters):
            for parameter in layer.parameters:
                self._rows.setdefault(parameter, []).append(row)
        self._squares: dict[str, dict[nn.Parameter, Tensor]] = {kind: {} for kind in self.kinds}
        self._before: dict[nn.Parameter, Tensor] = {}

    @property
    def size(self) -> int:
        """Length of the packed vector: per kind, total and rows twice."""
        return len(self.kinds) * 2 * (1 + len(self.owners))

    @property
    def look_back(self) -> bool:
        """Whether something has to be measured when the optimizer has stepped."""
        return bool({"update", "clipped"} & set(self.kinds))

    def before_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: float | Tensor = 1.0) -> None:
        """Take whole gradients times ``factor``, and weights as they are now. A parameter's last step counts."""
        if "gradient" in self.kinds:
            self.add("gradient", gradients, factor)
        if "weight" in self.kinds:
            self.add("weight", {parameter: parameter.detach() for parameter in self._rows})
        if "update" in self.kinds:
            self._before.update({parameter: parameter.detach().clone() for parameter in gradients})

    def after_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: float | Tensor = 1.0) -> None:
        """Take gradients that have been clipped, and how far weights have moved."""
        if "clipped" in self.kinds:
            self.add("clipped", gradients, factor)
        moved = {parameter: parameter.detach() - self._before.pop(parameter) for parameter in list(self._before)}
        if moved:
            self.add("update", moved)

    def add(self, kind: str, tensors: Mapping[nn.Parameter, Tensor], factor: float | Tensor = 1.0) -> None:
        """Remember the squared norms of ``tensors`` times ``factor``."""
        squares = self._squares[kind]
        for parameter, tensor in tensors.items():
            squares[parameter] = sum_of_squares(tensor, self.world_size) * factor**2

    def empty(self) -> None:
        """Forget what was collected."""
        for squares in self._squares.values():
            squares.clear()
        self._before.clear()

    def packed(self, device: torch.device) -> Tensor:
        """Float64 [size]: per kind, total and rows' sums of squares, then how many parameters each summed."""
        blocks = [self._block(squares, device) for squares in self._squares.values()]
        return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.float64, device=device)

    def _block(self, squares: Mapping[nn.Parameter, Tensor], device: torch.device) -> Tensor:
        rows = len(self.owners)
        sums = torch.zeros(1 + rows, dtype=torch.float64, device=device)
        counts = [len(squares)] + [0] * rows
        if squares:
            values = torch.stack(list(squares.values())).to(device)
            sums[0] = values.sum()
            places = [(row, i) for i, parameter in enumerate(squares) for row in self._rows.get(parameter, ())]
            for row, _ in places:
                counts[1 + row] += 1
            if places:
                to, of = torch.tensor(places, device=device).T
                sums[1:].index_add_(0, to, values[of])
        return torch.cat((sums, torch.tensor(counts, dtype=torch.float64, device=device)))


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


def sum_of_squares(tensor: Tensor, world_size: int = 1) -> Tensor:
    """This rank's share of Σx², [] float64: summed over all ranks it is the squared norm."""
    copies = world_size
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                copies //= tensor.device_mesh.size(dim)
        tensor = tensor.to_local()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return moments.sum_of_squares(tensor) / copies
