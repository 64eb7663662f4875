"""Squared norms of parameters, their gradients and their updates: per layer and in total, however they are spread."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_init.moments import Number, pack
from lightning_init.monitor.layers import Layer
from lightning_init.monitor.squares import sums_of_squares

KINDS_OF = {
    "gradient_norm": ("gradient",),
    "gradient_norm_clipped": ("clipped",),
    "weight_norm": ("weight",),
    "update_ratio": ("weight", "update"),
}
"""What each statistic is made of."""


class _Squares(NamedTuple):
    """Squared norms, and what the tensors they are of have to be multiplied by."""

    parameters: tuple[nn.Parameter, ...]
    values: list[Number]
    factor: Number


class _Places(NamedTuple):
    """Which of ``parameters`` (columns) add up to which numbers of the packed vector (rows), and how many do."""

    parameters: tuple[nn.Parameter, ...]
    rows: Tensor
    columns: Tensor
    counts: Tensor


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
        self._squares: dict[str, list[_Squares]] = {kind: [] for kind in self.kinds}
        self._places: dict[str, _Places] = {}
        self._before: dict[nn.Parameter, Tensor] = {}

    @property
    def size(self) -> int:
        """Length of the packed vector: per kind, total and rows twice."""
        return len(self.kinds) * 2 * (1 + len(self.owners))

    @property
    def look_back(self) -> bool:
        """Whether something has to be measured when the optimizer has stepped."""
        return bool({"update", "clipped"} & set(self.kinds))

    def before_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Take whole gradients times ``factor``, and weights as they are now. A parameter's last step counts."""
        if "gradient" in self.kinds:
            self.add("gradient", gradients, factor)
        if "weight" in self.kinds:
            self.add("weight", {parameter: parameter.detach() for parameter in self._rows})
        if "update" in self.kinds:
            self._before.update({parameter: parameter.detach().clone() for parameter in gradients})

    def after_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Take gradients that have been clipped, and how far weights have moved."""
        if "clipped" in self.kinds:
            self.add("clipped", gradients, factor)
        moved = {parameter: parameter.detach() - self._before.pop(parameter) for parameter in list(self._before)}
        if moved:
            self.add("update", moved)

    def add(self, kind: str, tensors: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Remember the squared norms of ``tensors`` times ``factor``."""
        if tensors:
            values = sums_of_squares(list(tensors.values()), self.world_size)
            self._squares[kind].append(_Squares(tuple(tensors), values, factor))

    def empty(self) -> None:
        """Forget what was collected."""
        for squares in self._squares.values():
            squares.clear()
        self._before.clear()

    def packed(self, device: torch.device) -> Tensor:
        """Float64 [size]: per kind, total and rows' sums of squares, then how many parameters each summed."""
        blocks = [self._block(kind, device) for kind in self.kinds]
        return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.float64, device=device)

    def _block(self, kind: str, device: torch.device) -> Tensor:
        found = self._squares[kind]
        parameters = found[0].parameters if len(found) == 1 else tuple(p for some in found for p in some.parameters)
        places = self._places.get(kind)
        if places is None or not _same(places.parameters, parameters):  # they are the next time, as a rule
            places = self._places[kind] = self._places_of(parameters, device)
        sums = torch.zeros(1 + len(self.owners), dtype=torch.float64, device=device)
        if found:
            values = _squares_of(found, device)
            sums.index_add_(0, places.rows, values[places.columns])
        return torch.cat((sums, places.counts))

    def _places_of(self, parameters: tuple[nn.Parameter, ...], device: torch.device) -> _Places:
        last = {parameter: column for column, parameter in enumerate(parameters)}
        pairs = [(0, column) for column in last.values()]
        pairs += [(1 + row, column) for parameter, column in last.items() for row in self._rows.get(parameter, ())]
        rows, columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        counts = torch.bincount(rows, minlength=1 + len(self.owners)).double()
        return _Places(parameters, rows.to(device), columns.to(device), counts.to(device))


def _squares_of(found: Sequence[_Squares], device: torch.device) -> Tensor:
    """Float64 [parameters of all], their factors applied."""
    vectors = [pack(some.values, device) for some in found]
    for vector, (_, _, factor) in zip(vectors, found, strict=True):
        if isinstance(factor, Tensor) or factor != 1.0:
            vector *= factor**2
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether both hold the same objects; ``==`` would compare the parameters' elements."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


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
