"""Squared norms of parameters, their gradients and their updates: per layer and in total, however they are spread."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_init.introspect.layers import Layer
from lightning_init.monitor.moments import Number, add_up, has_fast_path, moments_of, needs_device_sync, pack

KINDS_OF = {
    "gradient_norm": ("gradient",),
    "gradient_norm_clipped": ("clipped",),
    "weight_norm": ("weight",),
    "update_ratio": ("weight", "update"),
}
"""What each statistic is made of."""


class _Squares(NamedTuple):
    """Squared norms of what belongs to ``parameters``."""

    parameters: tuple[nn.Parameter, ...]
    values: Sequence[Number]


class _Places(NamedTuple):
    """Where the squares of ``parameters`` go: (place, column) of those that layers own, the columns of the others."""

    parameters: tuple[nn.Parameter, ...]
    owned: list[tuple[int, int]]
    others: list[int]
    counts: list[float]


class ParameterNorms:
    """Collects, between two exchanges, squared norms of tensors that belong to parameters.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same numbers, so
    that the sum over all ranks is the squared norm of the whole tensor, however it is spread.

    Args:
        layers: whose norms are read; a parameter shared by two layers is in both, and once in total.
        stats: which statistics will be asked for.
        world_size: number of ranks that will be summed over.
    """

    def __init__(self, layers: Sequence[Layer], stats: Sequence[str], world_size: int = 1) -> None:
        self.kinds = tuple(dict.fromkeys(kind for stat in stats for kind in KINDS_OF.get(stat, ())))
        self.world_size = world_size
        self._owned = list(dict.fromkeys(parameter for layer in layers for parameter in layer.parameters))
        self._place = {parameter: place for place, parameter in enumerate(self._owned, 1)}
        rows = {layer.name: [self._place[p] for p in layer.parameters] for layer in layers if layer.parameters}
        self._owners = list(rows)
        self._members = np.array([place for row in rows.values() for place in row], dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, rows.values())])[:-1]
        self._squares: dict[str, list[_Squares]] = {kind: [] for kind in self.kinds}
        self._places: dict[str, _Places] = {}
        self._before: dict[nn.Parameter, Tensor] = {}

    @property
    def size(self) -> int:
        """How many numbers are packed: per kind, squares of all others and of each owned parameter, then counts."""
        return len(self.kinds) * 2 * (1 + len(self._owned))

    @property
    def needs_post_step(self) -> bool:
        """Whether something has to be measured when the optimizer has stepped."""
        return bool({"update", "clipped"} & set(self.kinds))

    def before_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Take whole gradients times ``factor``, and weights as they are now. A parameter's last step counts."""
        if "gradient" in self.kinds:
            self.add("gradient", gradients, factor)
        if "weight" in self.kinds:
            self.add("weight", {parameter: parameter.detach() for parameter in [*self._owned, *gradients]})
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
            values: Sequence[Number] = sums_of_squares(list(tensors.values()), self.world_size)
            if isinstance(factor, Tensor):
                values = (pack(values, factor.device) * factor**2).unbind()
            elif factor != 1.0:
                values = [value * factor**2 for value in values]
            self._squares[kind].append(_Squares(tuple(tensors), values))

    def clear(self) -> None:
        """Forget what was collected."""
        for squares in self._squares.values():
            squares.clear()
        self._before.clear()

    def packed(self) -> list[Number]:
        """[size]: per kind, squared norms, each at its parameter's place, and how many parameters each is of."""
        return [number for kind in self.kinds for number in self._block(kind)]

    def read(self, numbers: npt.NDArray[np.float64]) -> dict[str, dict[str, float]]:
        """By kind, norms of layers and "total" from packed numbers that ranks have added up; of none is none."""
        blocks = numbers.reshape(len(self.kinds), 2, 1 + len(self._owned))
        by_owner = blocks[..., self._members]
        sums = [np.add.reduceat(by_owner, self._starts, axis=-1)] if self._owners else []
        squares, counts = np.concatenate([*sums, blocks.sum(-1, keepdims=True)], -1).swapaxes(0, 1)
        names = [*self._owners, "total"]
        found = zip(self.kinds, np.sqrt(squares).tolist(), counts.tolist(), strict=True)
        return {kind: {name: norm for name, norm, n in zip(names, *row, strict=True) if n} for kind, *row in found}

    def _block(self, kind: str) -> list[Number]:
        found = self._squares[kind]
        parameters = tuple(parameter for squares in found for parameter in squares.parameters)
        values = [value for squares in found for value in squares.values]
        places = self._places.get(kind)
        if places is None or not _same(places.parameters, parameters):  # they are the next time, as a rule
            places = self._places[kind] = self._places_of(parameters)
        block: list[Number] = [0.0] * (1 + len(self._owned))
        for place, column in places.owned:
            block[place] = values[column]
        if places.others:
            block[0] = add_up([values[column] for column in places.others])
        return block + places.counts

    def _places_of(self, parameters: tuple[nn.Parameter, ...]) -> _Places:
        last = {parameter: column for column, parameter in enumerate(parameters)}
        owned = [(self._place[parameter], column) for parameter, column in last.items() if parameter in self._place]
        others = [column for parameter, column in last.items() if parameter not in self._place]
        counts = [float(len(others)), *(float(parameter in last) for parameter in self._owned)]
        return _Places(parameters, owned, others, counts)


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


_SMALL = 1 << 13
"""Elements up to which tensors are squared together, where the calls cost more than the numbers."""
_TOGETHER = 1 << 17
"""Elements that are enough for one go: their float64 copy stays in the cache."""


def sums_of_squares(tensors: Sequence[Tensor], world_size: int = 1) -> list[Number]:
    """This rank's share of Σx² of each tensor: summed over all ranks it is the squared norm."""
    sums: dict[int, Number] = {}
    small: list[tuple[int, Tensor]] = []
    copies = [world_size] * len(tensors)
    for i, tensor in enumerate(tensors):
        quick = has_fast_path(tensor)
        if not quick:
            tensor, copies[i] = _held(tensor, world_size)
            quick = has_fast_path(tensor)
        if quick or tensor.numel() > _SMALL or tensor.is_mps:  # which has no float64
            sums[i] = moments_of(tensor).squares
        else:
            small.append((i, tensor))
    for group in _groups(small):
        flat = torch.cat([tensor.reshape(-1) for _, tensor in group]).double()
        sizes = torch.tensor([tensor.numel() for _, tensor in group], device="cpu")
        lengths = sizes.to(flat.device, non_blocking=True)  # or it would wait for the backward pass
        together = torch.segment_reduce(flat * flat, "sum", lengths=lengths, unsafe=True)  # unsafe: lengths unread
        sums.update(
            zip((i for i, _ in group), together.unbind() if needs_device_sync(flat) else together.tolist(), strict=True)
        )
    return [sums[i] / copies[i] for i in range(len(tensors))]


def _held(tensor: Tensor, world_size: int) -> tuple[Tensor, int]:
    """This rank's real numbers of ``tensor``, and the number of ranks that hold the same."""
    copies = world_size
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                copies //= tensor.device_mesh.size(dim)
        tensor = tensor.to_local()
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor, copies


def _groups(tensors: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Tensors of one type and device together, in groups that are large enough."""
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for i, tensor in tensors:
        key = tensor.dtype, tensor.device
        groups.setdefault(key, []).append((i, tensor))
        sizes[key] = sizes.get(key, 0) + tensor.numel()
        if sizes[key] >= _TOGETHER:
            sizes[key] = 0
            yield groups.pop(key)
    yield from groups.values()
