"""Drawing one parameter: which chunks and blocks it is cut into, what is expected of them, their values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_init.distributed.shards import LocalShard, local_shard_of
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.streams import BLOCK, Block, Key, blocks, draw_all
from lightning_init.introspect.role import Role
from lightning_init.schemes.distributions import Distribution, Normal
from lightning_init.schemes.scheme import Initializer
from lightning_init.schemes.structured import Matrix, StructuredScheme


@dataclass
class Measured:
    """What was written: sums that add up over blocks and over ranks.

    Attributes:
        squares: Σ (x - target mean)², summed within blocks in float32 and over them in float64.
        count: number of elements.
        checksum: sum of the values' bits, modulo 2⁶⁴.
        is_transformed: whether a parametrization makes other values of those that were written.
        is_refused: whether a parametrization cannot give such values, so that nothing was written.
    """

    squares: float = 0.0
    count: int = 0
    checksum: int = 0
    is_transformed: bool = False
    is_refused: bool = False

    def __iadd__(self, other: Measured) -> Measured:
        """Add the sums of another block."""
        self.squares += other.squares
        self.count += other.count
        self.checksum = _wrapped(self.checksum + other.checksum)
        self.is_transformed |= other.is_transformed
        self.is_refused |= other.is_refused
        return self

    @property
    def std(self) -> float:
        """Root mean square deviation from the target mean."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@dataclass(frozen=True)
class DrawChunk:
    """What is drawn independently: one slice of a parameter, its flat elements ``start`` to ``stop``."""

    start: int
    stop: int
    initializer: Initializer
    gain: float
    key: Key

    @property
    def is_elementwise(self) -> bool:
        """Whether its elements are independent, so that any block of them can be drawn alone."""
        return isinstance(self.initializer, Distribution)


@dataclass(frozen=True)
class DrawTask:
    """All that is needed to draw one parameter, found once.

    Attributes:
        assignment: what will be done.
        shard: which elements of the stored parameter are held here.
        shape: of what is drawn: what the forward pass reads, which a parametrization may store otherwise.
        chunks: equal chunks of it along dimension 0, each with a stream of its own.
    """

    assignment: Assignment
    shard: LocalShard
    shape: torch.Size
    chunks: tuple[DrawChunk, ...]

    @classmethod
    def of(cls, assignment: Assignment, seed: int) -> DrawTask:
        """The task of an assignment that draws something."""
        site = assignment.site
        shard = local_shard_of(site.parameter)
        shape = site.current.shape if site.is_computed else shard.full_shape
        count = shape.numel() // len(assignment.initializers)
        names = assignment.slices if len(assignment.initializers) > 1 else ("",)
        chunks = tuple(
            DrawChunk(
                i * count, (i + 1) * count, initializer, assignment.gain, Key(seed, assignment.site.forward_fqn, name)
            )
            for i, (initializer, name) in enumerate(zip(assignment.initializers, names, strict=True))
        )
        return cls(assignment, shard, shape, chunks)

    @property
    def role(self) -> Role:
        """The parameter's role, also where its module type is not known."""
        return self.assignment.role or GENERIC_ROLE

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return (self.shape[0] // len(self.chunks), *self.shape[1:]) if self.shape else ()

    def expected(self) -> Expected:
        """What will be measured of the drawn values, over all chunks."""
        dtype = self.assignment.site.parameter.dtype
        eps = torch.finfo(dtype).eps
        variance, sampling, rounding = 0.0, 0.0, 0.0
        for chunk in self.chunks:
            if isinstance(chunk.initializer, StructuredScheme):
                matrix = matrix_of(self.chunk_shape, self.role, dtype.is_complex)
                std = chunk.initializer.target_rms(matrix, chunk.gain * stride_gain(matrix, self.role))
                error = chunk.initializer.sampling_error(matrix)
                rounding = max(rounding, std * eps)  # equal elements are all rounded the same way
            else:
                assert isinstance(chunk.initializer, Distribution)
                std, error = chunk.initializer.target_std, chunk.initializer.sampling_error(self.shape.numel())
                rounding = max(rounding, abs(chunk.initializer.target_mean) * eps)
            variance += std**2 / len(self.chunks)
            sampling = max(sampling, error)
        return Expected(math.sqrt(variance), sampling, rounding)


def make_tasks(assignments: Iterable[Assignment], seed: int) -> list[DrawTask]:
    """One task for each assignment that draws something."""
    return [DrawTask.of(assignment, seed) for assignment in assignments if assignment.is_drawn]


class Expected(NamedTuple):
    """What will be measured of drawn values.

    Attributes:
        std: root mean square deviation from the target mean.
        sampling: relative standard error of a measured std, by chance.
        rounding: absolute error of it, from storing equal values in the parameter's dtype.
    """

    std: float
    sampling: float
    rounding: float


GENERIC_ROLE = Role("other", Normal())
"""The role of a parameter whose module type is not known: one matrix, stored (out, in, …)."""


def block_jobs(chunk: DrawChunk, shard: LocalShard, flat: Tensor) -> Iterator[Callable[[], Measured]]:
    """One job for each block of an elementwise chunk of which elements are held here: draw, write, measure.

    Args:
        chunk: an elementwise chunk.
        shard: which elements of the parameter are held here.
        flat: where they are written to. Shape: [shard.local.numel()]
    """
    assert isinstance(chunk.initializer, Distribution)
    for block in blocks(chunk.start, chunk.stop):
        overlap = shard.overlap(block.start, block.stop)
        if overlap is not None:
            yield functools.partial(_write_block, block, overlap, chunk.initializer, chunk.key, flat)


def _write_block(
    block: Block, overlap: tuple[slice, Tensor | slice], distribution: Distribution, key: Key, flat: Tensor
) -> Measured:
    """Draw straight into the parameter's memory where it can hold the block, else copy what belongs here."""
    where, which = overlap
    target = flat[where]
    dtype = drawn_dtype(target.dtype)
    if target.dtype == dtype and target.device.type == "cpu" and target.numel() == len(block):
        return measure(block.draw(distribution, key, target), distribution.target_mean)
    values = block.draw(distribution, key, dtype=dtype)[which]
    target.copy_(values)
    return measure(values.to(target.dtype), distribution.target_mean)


def drawn_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the numbers of a parameter are drawn in: float64 where it holds as much, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def measure(values: Tensor, target_mean: float) -> Measured:
    """The sums of a tensor, as held in its own dtype; a complex number counts once."""
    count, mean = values.numel(), target_mean
    if values.is_complex():
        values = torch.view_as_real(values - mean)
        mean = 0.0
    held = values.float().cpu().flatten()
    sums = Measured(count=count)
    for chunk in torch.split(held, BLOCK):  # a float32 dot product of 2²⁴ elements is off by 6e-5, of a block by 1e-7
        deviation = chunk - mean if mean else chunk
        sums += Measured(float(torch.dot(deviation, deviation)), 0, _checksum(chunk))
    return sums


def draw_full(task: DrawTask, dtype: torch.dtype) -> Tensor:
    """All chunks of a parameter, one after the other along dimension 0, in single or double precision.

    The slow, plain way: for structured schemes, complex numbers, and whatever is not written block by block.
    Shape: task.shape
    """
    chunks = [draw_chunk(chunk, task.chunk_shape, task.role, dtype) for chunk in task.chunks]
    return torch.cat(chunks) if task.shape else chunks[0]


def draw_chunk(chunk: DrawChunk, shape: tuple[int, ...], role: Role, dtype: torch.dtype) -> Tensor:
    """All values of one chunk, in single or double precision. Shape: ``shape``"""
    if isinstance(chunk.initializer, StructuredScheme):
        return _build(chunk, chunk.initializer, shape, role, dtype)
    assert isinstance(chunk.initializer, Distribution)
    count = math.prod(shape)
    if not dtype.is_complex:
        return draw_all(chunk.initializer, chunk.key, count, drawn_dtype(dtype)).view(shape)
    # Real and imaginary part each have half the variance around half the mean's share: E|z - mean|² = std².
    standard = draw_all(chunk.initializer, chunk.key, 2 * count, drawn_dtype(dtype)).view(*shape, 2)
    mean = chunk.initializer.target_mean
    return torch.view_as_complex((standard - mean) / math.sqrt(2)) + mean


def stream_fingerprint(chunk: DrawChunk) -> int:
    """Bits of a few values from the start of a chunk's stream: the same on every rank, whatever it holds."""
    drawn = chunk.initializer if isinstance(chunk.initializer, Distribution) else Normal()
    return _checksum(draw_all(drawn, chunk.key, 16))


def _build(
    chunk: DrawChunk, scheme: StructuredScheme, shape: tuple[int, ...], role: Role, dtype: torch.dtype
) -> Tensor:
    """Build each group of a chunk as a matrix of its own and put it where the layer stores it."""
    matrix, real = matrix_of(shape, role, dtype.is_complex), drawn_dtype(dtype)
    gain = chunk.gain * stride_gain(matrix, role)
    groups = []
    for group in range(role.groups):
        name = f"{chunk.key.slice_name}/{group}" if role.groups > 1 else chunk.key.slice_name
        key = Key(chunk.key.seed, chunk.key.name, name)
        built = scheme.build(matrix, gain, functools.partial(draw_all, Normal(), key))
        groups.append(built.transpose(0, 1) if role.transposed else built)
    return torch.cat(groups).to(real.to_complex() if dtype.is_complex else real).reshape(shape)


def matrix_of(shape: tuple[int, ...], role: Role, is_complex: bool = False) -> Matrix:
    """Outputs, inputs and taps of one group of a slice with this shape."""
    if len(shape) < 2:
        raise ValueError(f"a structured scheme needs a weight of two or more dimensions, got shape {tuple(shape)}")
    first, second, *taps = shape
    first //= role.groups
    rows, columns = (second, first) if role.transposed else (first, second)
    return Matrix(rows, columns, tuple(taps), is_complex)


def stride_gain(matrix: Matrix, role: Role) -> float:
    """√(taps of the kernel / taps that meet in one output): √∏s for a transposed convolution of stride s, else 1."""
    if role.fans is None or not role.transposed:
        return 1.0
    return math.sqrt(matrix.columns * matrix.num_taps / role.fans.fan_in)


def _checksum(held: Tensor) -> int:
    """Sum of the bits of float32 values, taken two by two, modulo 2⁶⁴."""
    if held.storage_offset() % 2:
        held = held.clone()  # only from an even offset can two floats be read as one integer
    even = held.numel() // 2 * 2
    pairs = int(held[:even].view(torch.int64).sum()) if even else 0
    last = int(held[even:].view(torch.int32)) if held.numel() > even else 0
    return _wrapped(pairs + last)


def _wrapped(number: int) -> int:
    """``number`` modulo 2⁶⁴, as a signed 64-bit integer."""
    return (number + 2**63) % 2**64 - 2**63
