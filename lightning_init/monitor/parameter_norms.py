"""Norms of parameters, of their gradients and of their updates: per layer and in total, on any number of ranks.

Squared norms add up over blocks, parameters and ranks, so squares are what is recorded and exchanged; the root is taken
at the end. :class:`ParameterNorms` records them for the parameters of a step, :func:`sums_of_squares` computes them for
a list of tensors.
"""

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
from lightning_init.monitor.record import label_of
from lightning_init.monitor.statistics import NormKind, norm_kinds_of


class _Squares(NamedTuple):
    """Squared norms, one for each of ``parameters``."""

    parameters: tuple[nn.Parameter, ...]
    numbers: Sequence[Number]


class _Destinations(NamedTuple):
    """Where the squared norms of ``parameters`` go in a packed block.

    Attributes:
        parameters: in the order of their squared norms.
        owned: (index in the block, index in ``parameters``) of those that a layer owns.
        others: indices in ``parameters`` of those that no layer owns: they are added up at the block's index 0.
        counts: the block's second half, as :meth:`ParameterNorms.packed` describes it.
    """

    parameters: tuple[nn.Parameter, ...]
    owned: list[tuple[int, int]]
    others: list[int]
    counts: list[float]


class ParameterNorms:
    """Records, between two exchanges, squared norms of tensors that belong to parameters.

    Each rank adds the squares of the elements it holds, divided by the number of ranks that hold the same elements, so
    that the sum over all ranks is the squared norm of the whole tensor, however it is spread.

    Args:
        layers: whose norms are wanted; a parameter shared by two layers is in both, and once in the total.
        stats: which statistics will be asked for; norms that none of them is made of are not taken.
        world_size: number of ranks that will be summed over.
    """

    def __init__(self, layers: Sequence[Layer], stats: Sequence[str], world_size: int = 1) -> None:
        self.kinds = norm_kinds_of(stats)
        self.world_size = world_size
        self._owned = list(dict.fromkeys(parameter for layer in layers for parameter in layer.parameters))
        names = {p: f"{layer.name}.{name}" for layer in layers for name, p in layer.module.named_parameters()}
        self._names = [names.get(parameter, "") for parameter in self._owned]
        self._index = {parameter: index for index, parameter in enumerate(self._owned, 1)}  # 0 is for all others
        by_owner = {
            label_of(layer.name): [self._index[p] for p in layer.parameters] for layer in layers if layer.parameters
        }
        self._owners = list(by_owner)
        # the indices of the first owner's parameters, then the second's, and where each owner's begin
        self._members = np.array([index for indices in by_owner.values() for index in indices], dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, by_owner.values())])[:-1]
        self._squares: dict[str, list[_Squares]] = {kind: [] for kind in self.kinds}
        self._destinations: dict[str, _Destinations] = {}
        self._before: dict[nn.Parameter, Tensor] = {}
        self._kept: dict[nn.Parameter, Number] = {}

    @property
    def size(self) -> int:
        """How many numbers :meth:`packed` gives; it depends on nothing but the model and the statistics."""
        return len(self.kinds) * 2 * (1 + len(self._owned))

    def keep(self, gradients: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Take the norms of ``gradients`` times ``factor`` now, for the ``before_step`` that follows."""
        self._kept = dict(zip(gradients, self._squares_of(gradients, factor), strict=True))

    def before_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Record the norms of ``gradients`` times ``factor``, and of weights before the optimizer's step.

        If a parameter is recorded several times between two exchanges, the last time counts.
        """
        if "gradient" in self.kinds:
            kept = {parameter: self._kept[parameter] for parameter in gradients if parameter in self._kept}
            self._squares["gradient"].append(_Squares(tuple(kept), list(kept.values())))
            others = {parameter: gradient for parameter, gradient in gradients.items() if parameter not in kept}
            self.add("gradient", others, factor)
        if "weight" in self.kinds:
            self.add("weight", {parameter: parameter.detach() for parameter in [*self._owned, *gradients]})
        if "update" in self.kinds:
            self._before.update({parameter: parameter.detach().clone() for parameter in gradients})

    def after_step(self, gradients: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Record the norms of gradients as they are after clipping, and of what the step has added to the weights."""
        if "clipped" in self.kinds:
            self.add("clipped", gradients, factor)
        updates = {parameter: parameter.detach() - self._before.pop(parameter) for parameter in list(self._before)}
        if updates:
            self.add("update", updates)

    def add(self, kind: NormKind, tensors: Mapping[nn.Parameter, Tensor], factor: Number = 1.0) -> None:
        """Record the squared norms of ``tensors`` times ``factor``."""
        if tensors:
            self._squares[kind].append(_Squares(tuple(tensors), self._squares_of(tensors, factor)))

    def _squares_of(self, tensors: Mapping[nn.Parameter, Tensor], factor: Number) -> Sequence[Number]:
        squares: Sequence[Number] = sums_of_squares(list(tensors.values()), self.world_size)
        if isinstance(factor, Tensor):
            return (pack(squares, factor.device) * factor**2).unbind() if squares else ()
        return squares if factor == 1.0 else [square * factor**2 for square in squares]

    def clear(self) -> None:
        """Forget what was recorded."""
        for squares in self._squares.values():
            squares.clear()
        self._before.clear()
        self._kept.clear()

    def packed(self) -> list[Number]:
        """What was recorded, [size], in a form that ranks can add up.

        For each kind, one block of twice 1 + the number of owned parameters: the squared norm of all parameters that no
        layer owns, and of each that one does; then the number of tensors behind each of these squared norms.
        """
        return [number for kind in self.kinds for number in self._block(kind)]

    def read(self, numbers: npt.NDArray[np.float64]) -> dict[str, dict[str, float]]:
        """By kind, the norm of each layer and of "total", from packed numbers that ranks have added up.

        A layer none of whose parameters was measured is left out, and so is a total of nothing.
        """
        blocks = numbers.reshape(len(self.kinds), 2, 1 + len(self._owned))  # [kinds, squares or counts, parameters]
        columns = [blocks.sum(-1, keepdims=True)]
        if self._owners:  # reduceat fails on no owners
            columns.insert(0, np.add.reduceat(blocks[..., self._members], self._starts, axis=-1))
        by_name = np.concatenate(columns, -1)  # [kinds, squares or counts, owners and total]
        norms, counts = np.sqrt(by_name[:, 0]).tolist(), by_name[:, 1].tolist()
        names = [*self._owners, "total"]
        return {
            kind: {name: norm for name, norm, count in zip(names, norms[i], counts[i], strict=True) if count}
            for i, kind in enumerate(self.kinds)
        }

    def read_parameters(self, numbers: npt.NDArray[np.float64]) -> dict[str, dict[str, float]]:
        """By kind, the norm of each parameter that a layer owns, by its name."""
        blocks = numbers.reshape(len(self.kinds), 2, 1 + len(self._owned))
        return {
            kind: {
                name: norm
                for name, norm, count in zip(
                    self._names, np.sqrt(squares[1:]).tolist(), counts[1:].tolist(), strict=True
                )
                if count
            }
            for kind, (squares, counts) in zip(self.kinds, blocks, strict=True)
        }

    def _block(self, kind: str) -> list[Number]:
        recorded = self._squares[kind]
        parameters = tuple(parameter for squares in recorded for parameter in squares.parameters)
        numbers = [number for squares in recorded for number in squares.numbers]
        destinations = self._destinations.get(kind)
        if destinations is None or not _are_same(destinations.parameters, parameters):  # as a rule they are
            destinations = self._destinations[kind] = self._destinations_of(parameters)
        block: list[Number] = [0.0] * (1 + len(self._owned))
        for index, column in destinations.owned:
            block[index] = numbers[column]
        if destinations.others:
            block[0] = add_up([numbers[column] for column in destinations.others])
        return block + destinations.counts

    def _destinations_of(self, parameters: tuple[nn.Parameter, ...]) -> _Destinations:
        last = {parameter: column for column, parameter in enumerate(parameters)}
        owned = [(self._index[parameter], column) for parameter, column in last.items() if parameter in self._index]
        others = [column for parameter, column in last.items() if parameter not in self._index]
        counts = [float(len(others)), *(float(parameter in last) for parameter in self._owned)]
        return _Destinations(parameters, owned, others, counts)


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether both hold the same objects; ``==`` would compare the parameters' elements."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def whole_gradients(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The gradients of those ``parameters`` that have one, summed where ranks have not summed them yet.

    Under sequence parallelism, the gradient of a normalisation's weight is spread over ranks as terms of a sum, and the
    squares of terms do not add up to the square of the sum. Summing it is a collective: every rank has to call this.
    """
    gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    for parameter, gradient in gradients.items():
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            whole = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
            gradients[parameter] = gradient.redistribute(placements=whole)
    return gradients


_SMALL = 1 << 13
"""Elements up to which tensors are concatenated before they are squared: below, calls cost more than arithmetic."""
_GROUP = 1 << 17
"""Elements of a group of small tensors: their float64 copy, 1 MiB, still fits into the cache."""


def sums_of_squares(tensors: Sequence[Tensor], world_size: int = 1) -> list[Number]:
    """This rank's contribution to Σx² of each tensor: summed over all ranks, the squared norm of the whole tensor.

    Args:
        tensors: of any dtype, sharded, sparse or complex ones among them.
        world_size: number of ranks; a tensor they all hold contributes 1 / world_size of its Σx² on each.
    """
    sums: dict[int, Number] = {}
    small: list[tuple[int, Tensor]] = []
    copies = [world_size] * len(tensors)
    for i, tensor in enumerate(tensors):
        fast = has_fast_path(tensor)
        if not fast:
            tensor, copies[i] = local_elements(tensor, world_size)
            fast = has_fast_path(tensor)
        if fast or tensor.numel() > _SMALL or tensor.is_mps:  # Apple's GPUs have no float64; moments_of knows
            sums[i] = moments_of(tensor).squares
        else:
            small.append((i, tensor))
    for group in _groups(small):
        flat = torch.cat([tensor.reshape(-1) for _, tensor in group]).double()
        sizes = torch.tensor([tensor.numel() for _, tensor in group], device="cpu")
        lengths = sizes.to(flat.device, non_blocking=True)  # a blocking copy would wait for the backward pass
        # unsafe=True: the lengths are right, and checking them would read them from the device
        together = torch.segment_reduce(flat * flat, "sum", lengths=lengths, unsafe=True)
        sums.update(
            zip((i for i, _ in group), together.unbind() if needs_device_sync(flat) else together.tolist(), strict=True)
        )
    return [sums[i] / copies[i] for i in range(len(tensors))]


def local_elements(tensor: Tensor, world_size: int) -> tuple[Tensor, int]:
    """The elements of ``tensor`` that this rank holds, as real numbers, and how many ranks hold the same ones."""
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
    """Groups of tensors of one dtype and device, each of at least ``_GROUP`` elements but for the last."""
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for i, tensor in tensors:
        key = tensor.dtype, tensor.device
        groups.setdefault(key, []).append((i, tensor))
        sizes[key] = sizes.get(key, 0) + tensor.numel()
        if sizes[key] >= _GROUP:
            sizes[key] = 0
            yield groups.pop(key)
    yield from groups.values()
