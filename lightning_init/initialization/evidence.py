"""What a parameter holds before it is drawn, in a few numbers that add up over shards.

They are enough to tell a random draw from what an author set on purpose: a constant, a structure, a scale.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_init.distributed.shards import LocalShard
from lightning_init.introspect.role import Role

SIGMAS = 5
"""How many standard errors are still chance."""

SAMPLE = 1 << 12
"""Elements in which structure is looked for, at most: the leading rows."""

READ = 1 << 14
"""Elements that are read of a weight or a bias, at most: its scale within 3 %, at no cost beside drawing it."""

BLOCK = 1 << 20
"""Elements that are summed in float64 at once."""

_NOTHING = (math.inf, -math.inf)
"""The smallest and the largest of no values."""

MIN_COUNT = 16
"""Of fewer numbers neither the mean nor its error says anything."""

VECTORS = 8
"""Rows or columns whose angles tell an orthogonal matrix."""


@dataclass(frozen=True)
class Evidence:
    """What a parameter holds.

    Attributes:
        lows: the smallest value of each slice. [slices]
        highs: the largest value of each slice. [slices]
        count: number of elements that were summed, without rows of a lookup table that are all zero.
        total: Σx, in float64.
        squares: Σx², in float64.
        has_structure: elements depend on each other, or values repeat.
        column_products: products of the first columns of a matrix that has more rows than columns, summed over rows,
            [VECTORS², at most]; they are 0 but on the diagonal where columns are orthogonal.
        is_written: whether an operation of PyTorch has written to the memory since it was allocated; a copy's has not.
    """

    lows: tuple[float, ...]
    highs: tuple[float, ...]
    count: int
    total: float
    squares: float
    has_structure: bool
    column_products: tuple[float, ...] = ()
    is_written: bool = True

    def __add__(self, other: Evidence) -> Evidence:
        """The evidence of both shards together."""
        products = [self.column_products, other.column_products]
        return Evidence(
            tuple(map(min, self.lows, other.lows)),
            tuple(map(max, self.highs, other.highs)),
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.has_structure or other.has_structure,
            tuple(map(sum, zip(*products, strict=True))) if all(products) else products[0] or products[1],
            self.is_written or other.is_written,
        )

    def divided_by(self, copies: float) -> Evidence:
        """The evidence of one copy, where ranks hold several of every shard and all were added up."""
        return replace(self, count=round(self.count / copies), total=self.total / copies, squares=self.squares / copies)

    @property
    def constants(self) -> tuple[float, ...] | None:
        """The one value of each slice; None if a slice has several."""
        return self.lows if self.lows == self.highs else None

    @property
    def ends(self) -> tuple[float, ...]:
        """The smallest and the largest value of every slice of which something is held."""
        held = [(low, high) for low, high in zip(self.lows, self.highs, strict=True) if (low, high) != _NOTHING]
        return tuple(number for pair in held for number in pair)

    @property
    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return all(map(math.isfinite, (*self.ends, self.squares)))

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def mean_is_off(self) -> bool:
        """Whether the mean is farther from 0 than chance and a twentieth of the rms explain; not of a few numbers."""
        if self.count < MIN_COUNT:
            return False
        mean = self.total / self.count
        std = math.sqrt(max(0.0, self.squares / self.count - mean**2))
        return abs(mean) > 6 * std / math.sqrt(self.count) and abs(mean) > self.rms / 20

    @property
    def columns_are_orthogonal(self) -> bool:
        """Whether the first columns of a tall matrix are at right angles."""
        size = math.isqrt(len(self.column_products))
        return size > 1 and _is_orthogonal(
            torch.tensor(self.column_products, dtype=torch.float64, device="cpu").view(size, size)
        )


@dataclass(frozen=True)
class Held:
    """A parameter that is about to be drawn, and what it holds.

    Attributes:
        name: full name of what the forward pass reads.
        role: what the parameter is to its module; None where that is not known.
        evidence: None where there is nothing to read.
        is_table: a lookup table, whose scale is kept anyway.
        has_reset: its module draws its parameters by a method of its own, as PyTorch's do.
    """

    name: str
    role: Role | None
    evidence: Evidence | None
    is_table: bool = False
    has_reset: bool = True


def evidence_of(shard: LocalShard, slices: int, *, is_table: bool, version: int) -> Evidence | None:
    """What this process holds of a parameter; None where there is nothing to read: on meta, complex or empty.

    Args:
        shard: the local elements.
        slices: number of equal chunks along dimension 0 that are filled by themselves.
        is_table: a lookup table: rows that are all zero are padding, and every element counts for the scale.
        version: how often PyTorch has written to the parameter since it was allocated.
    """
    local = shard.local
    if local.is_meta or local.is_complex() or not local.numel():
        return None
    rows = local if local.ndim else local.reshape(1)
    lows, highs = _ranges(shard, rows, slices, everything=is_table)
    read = rows if is_table else _leading(shard, READ)
    count, total, squares = _sums(read, without_zero_rows=is_table)
    sample = leading_rows(rows, SAMPLE).detach().to("cpu", torch.float32)
    if is_table and sample.ndim > 1:
        sample = sample[sample.flatten(1).abs().amax(1) > 0]
    full_rows = shard.full_shape[0] if shard.full_shape else 1
    width = max(1, shard.full_shape.numel() // max(1, full_rows))
    products = _column_products(rows) if full_rows > width > 1 and rows[0].numel() == width else ()
    return Evidence(
        lows, highs, count, total, squares, _has_structure(sample, full_rows <= width), products, version > 0
    )


def _column_products(rows: Tensor) -> tuple[float, ...]:
    """The scalar products of the first columns with each other."""
    columns = rows.reshape(len(rows), -1)[:, :VECTORS].detach().to("cpu", torch.float64)
    return tuple((columns.T @ columns).flatten().tolist())


def leading_rows(rows: Tensor, count: int) -> Tensor:
    """As many rows as make up ``count`` elements, at least one: they show what the rest would, and cost no memory."""
    if rows.numel() <= count:
        return rows
    return rows[: max(1, count // (rows.numel() // rows.shape[0]))]


def _leading(shard: LocalShard, count: int) -> Tensor:
    """What is held here of the parameter's leading rows, as many as make up ``count`` elements: on all ranks together
    they are the same ones, however they are shared out. Shape: [elements]
    """
    rows = shard.full_shape[0] if shard.full_shape else 1
    width = shard.full_shape.numel() // max(1, rows)
    overlap = shard.overlap(0, min(rows, max(1, count // max(1, width))) * width)
    flat = shard.local.reshape(-1)
    return flat[:0] if overlap is None else flat[overlap[0]]


def slices_held(shard: LocalShard, flat: Tensor, slices: int) -> list[Tensor]:
    """What is held here of each of so many equal slices along dimension 0; empty where nothing is.

    Args:
        shard: the local elements.
        flat: their values in local order, or the first of them. Shape: [at most shard.local.numel()]
        slices: how many.
    """
    size = shard.full_shape.numel() // slices
    overlaps = (shard.overlap(i * size, (i + 1) * size) for i in range(slices))
    return [flat[:0] if overlap is None else flat[overlap[0]] for overlap in overlaps]


def _ranges(
    shard: LocalShard, rows: Tensor, slices: int, *, everything: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The smallest and the largest value of each slice that are held here; ∞ and -∞ where none is."""
    lows, highs = [], []
    for held in slices_held(shard, rows.reshape(-1), slices):
        read = held if everything else held[:READ]
        low, high = map(float, torch.aminmax(read.float())) if read.numel() else _NOTHING
        lows.append(low)
        highs.append(high)
    return tuple(lows), tuple(highs)


def _sums(values: Tensor, *, without_zero_rows: bool) -> tuple[int, float, float]:
    """Number of elements, Σx and Σx², in float64."""
    count, total, squares = values.numel(), 0.0, 0.0
    if without_zero_rows and values.ndim > 1:
        zero_rows = int((values.flatten(1).abs().amax(1) == 0).sum())
        count -= zero_rows * (values.numel() // len(values))
    for block in torch.split(values.detach().reshape(-1), BLOCK):
        wide = block.double() if block.device.type != "mps" else block.cpu().double()
        total += float(wide.sum())
        squares += float(wide.square().sum())
    return count, total, squares


def _has_structure(sample: Tensor, is_wide: bool) -> bool:
    """Whether values repeat, neighbours are alike, or the rows of a wide matrix are orthogonal.

    Args:
        sample: leading rows, float32. Shape: [rows, …]
        is_wide: the full matrix has no more rows than columns, so that its rows can be orthogonal.
    """
    if sample.numel() < 3:
        return False
    if _values_repeat(sample):
        return True
    if (
        sample.ndim > 1
        and sample.numel() >= 64
        and any(_neighbours_are_alike(sample, dim) for dim in range(sample.ndim))
    ):
        return True
    vectors = sample.flatten(1)[:VECTORS].double() if sample.ndim > 1 else sample[:0]
    return is_wide and len(vectors) > 1 and vectors.shape[1] > 1 and _is_orthogonal(vectors @ vectors.T)


def _values_repeat(sample: Tensor) -> bool:
    """Whether more values are equal than in a draw: beyond a twentieth of them, or rows of them in 16 bits.

    A draw of float32 numbers hardly ever repeats one; one that was rounded to 16 bits does, and only its most frequent
    value tells: 0 in an identity or a sparse matrix.
    """
    _, counts = torch.unique(sample, return_counts=True)
    rounded = any(torch.equal(sample.to(dtype).float(), sample) for dtype in (torch.bfloat16, torch.float16))
    if rounded:
        return int(counts.max()) >= max(3, sample.numel() / 4)
    return len(counts) < 0.95 * sample.numel()


def _neighbours_are_alike(sample: Tensor, dim: int) -> bool:
    """Whether elements next to each other along a dimension correlate beyond chance and a tenth: sinusoids, filters."""
    if sample.shape[dim] < 2:
        return False
    centred = (sample - sample.mean()).double()
    first, second = centred.narrow(dim, 0, sample.shape[dim] - 1), centred.narrow(dim, 1, sample.shape[dim] - 1)
    scale = float(first.square().sum().sqrt() * second.square().sum().sqrt())
    correlation = float((first * second).sum()) / scale if scale else 0.0
    return abs(correlation) > 0.1 + 6 / math.sqrt(first.numel())


def _is_orthogonal(products: Tensor) -> bool:
    """Whether a matrix of scalar products is that of vectors at right angles; 1e-4 is rounding.

    Their lengths may differ: adapters that start from the largest singular values of a weight are such matrices.
    """
    lengths = products.diagonal().sqrt()
    if not bool((lengths > 0).all()):
        return False
    cosines = products / lengths.outer(lengths)
    return bool((cosines - torch.eye(len(products), dtype=torch.float64, device="cpu")).abs().max() < 1e-4)


_authors: MutableMapping[nn.Module, dict[str, tuple[torch.Size, Evidence]]] = weakref.WeakKeyDictionary()
"""What each module's parameters held before they were first drawn, for as long as the module lives.

By module, because PyTorch cannot swap a parameter that has a weak reference.
"""


def remember_author(module: nn.Module, attribute: str, shape: torch.Size, evidence: Evidence) -> None:
    """Remember what a parameter held before it is drawn: afterwards nothing can be read of its author any more."""
    _authors.setdefault(module, {}).setdefault(attribute, (shape, evidence))


def authors_evidence(module: nn.Module, attribute: str, shape: torch.Size) -> Evidence | None:
    """What a parameter of this shape held before it was first drawn; None if it never was."""
    then, evidence = _authors.get(module, {}).get(attribute, (None, None))
    return evidence if then == shape else None
