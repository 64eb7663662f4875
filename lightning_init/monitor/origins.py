"""Where the units of a tensor are, when it is no layer's own output: found by following its autograd graph backwards.

Between two modules there is often code of a model's own: a gate, a sum, a permutation. The graph that autograd keeps
says what really produced the tensor. :func:`origin_of` follows it, through what leaves every unit at a place of its
own, to an output of a layer, or to an operation whose unit dimension is known, such as a convolution's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

_MOST_NODES = 64
"""How many operations are followed at most: between two layers there are rarely more than ten."""

_UNITS_AT: dict[str, int] = {
    "Convolution": 1,  # which has a batch dimension always: PyTorch adds one where there is none
    "MkldnnConvolution": 1,
    "CudnnConvolution": 1,
    "NativeBatchNorm": 1,
    "CudnnBatchNorm": 1,
    "NativeGroupNorm": 1,
    "NativeLayerNorm": -1,
    "FusedRmsNorm": -1,
    "Addmm": -1,
    "Mm": -1,
    "Embedding": -1,
}
"""By operation, the dimension of its result that holds the units."""

_MIXES = ("Bmm", "Baddbmm", "ScaledDotProduct")
"""Operations whose result may have an input's shape by chance, and other units."""

_LENGTHENS = ("Cat", "Slice", "ConstantPadNd")
"""Operations by which a dimension gets another length and keeps its meaning."""

T = TypeVar("T")


class Origin(NamedTuple):
    """What a tensor goes back to.

    Attributes:
        known: what ``known_at`` gave for the layer's output; None: an operation that is no layer's.
        dim: the dimension of the tensor that holds the units, counted from the front.
    """

    known: Any
    dim: int


def origin_of(node: Any, known_at: Callable[[int, Sequence[int]], tuple[T, int] | None]) -> Origin | None:
    """What the result of an autograd node goes back to, and where its units are; None if that cannot be told.

    Args:
        node: ``tensor.grad_fn``.
        known_at: called with a node's sequence number and the shape of its result: a layer's output with the dimension
            of its units, or None.

    >>> import torch
    >>> conv = torch.nn.Conv2d(3, 4, 1)
    >>> origin_of((conv(torch.ones(2, 3, 5, 5)) * 2).permute(0, 2, 3, 1).grad_fn, lambda *_: None)
    Origin(known=None, dim=3)
    """
    return _Search(known_at).of(node)


class _Search:
    """One walk back; it visits no node twice."""

    def __init__(self, known_at: Callable[[int, Sequence[int]], tuple[Any, int] | None]) -> None:
        self.known_at = known_at
        self.visited: set[int] = set()

    def of(self, node: Any) -> Origin | None:
        shape = _shape_of(node)
        number = node._sequence_nr()
        if shape is None or number in self.visited or len(self.visited) >= _MOST_NODES:
            return None
        self.visited.add(number)
        if (found := self.known_at(number, shape)) is not None:
            return Origin(*found)
        operation = node.name().rsplit("::", 1)[-1].partition("Backward")[0]
        if (dim := _UNITS_AT.get(operation)) is not None:
            return Origin(None, dim % len(shape)) if len(shape) > 1 else None
        if operation.startswith(_MIXES):
            return None
        if (moves := _MOVES.get(operation)) is not None:
            return self._behind_view(node, shape, moves)
        return self._behind_others(node, shape, longer=operation in _LENGTHENS)

    def _behind_view(self, node: Any, shape: Sequence[int], moves: Callable[..., int | None]) -> Origin | None:
        before = node.next_functions[0][0]
        if before is None or (origin := self.of(before)) is None:
            return None
        source = _shape_of(before)
        dim = moves(node, source, shape, origin.dim)
        return None if dim is None else origin._replace(dim=dim)

    def _behind_others(self, node: Any, shape: tuple[int, ...], *, longer: bool) -> Origin | None:
        """Of the inputs that have the result's shape, the origin of the first that has one; inputs must not differ.

        Args:
            longer: inputs may be shorter in some dimension.
        """
        origins = []
        for before, _ in node.next_functions:
            source = None if before is None else _shape_of(before)
            fits = source == shape or (longer and source is not None and len(source) == len(shape))
            if fits and (origin := self.of(before)) is not None:
                origins.append(origin)
        if not origins or any(origin.dim != origins[0].dim for origin in origins):
            return None
        return next((origin for origin in origins if origin.known is not None), origins[0])


def _shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of a node's first result; None of a parameter, and where a later batch has other sizes (symbols)."""
    metadata = getattr(node, "_input_metadata", None)
    if not metadata or hasattr(node, "variable"):
        return None
    return tuple(metadata[0].shape)


def _permuted(node: Any, source: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    return [to % len(shape) for to in node._saved_dims].index(dim)


def _transposed(node: Any, source: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    one, other = (_dim(number, len(shape)) for number in (node._saved_dim0, node._saved_dim1))
    return {one: other, other: one}.get(dim, dim)


def _selected(node: Any, source: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    gone = _dim(node._saved_dim, len(source))
    return None if gone == dim else dim - (gone < dim)


def _expanded(node: Any, source: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    return dim + len(shape) - len(source)


def _turned(node: Any, source: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    return len(shape) - 1 - dim


def _reshaped(node: Any, source: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    """The dimension of the same size with as many elements before it: there every unit is kept whole."""
    before = math.prod(source[:dim])
    same = [i for i, size in enumerate(shape) if size == source[dim] and math.prod(shape[:i]) == before]
    return same[-1] if len(same) == 1 or (same and source[dim] > 1) else None


def _dim(number: int, num_dims: int) -> int:
    """A saved dimension, which may be a negative number that was stored without its sign."""
    return (number - 2**64 if number >= 2**63 else number) % num_dims


_MOVES: dict[str, Callable[..., int | None]] = {
    "Permute": _permuted,
    "Transpose": _transposed,
    "T": _turned,
    "View": _reshaped,
    "UnsafeView": _reshaped,
    "ReshapeAlias": _reshaped,
    "Unsqueeze": _reshaped,
    "Squeeze": _reshaped,
    "Select": _selected,
    "Expand": _expanded,
}
"""By operation that only looks at the same numbers in another way, where the unit dimension goes."""
