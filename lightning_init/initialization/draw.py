"""The values of one parameter: cut into slices and blocks, drawn, measured. No model in sight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_init.distributed.shards import LocalShard
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.streams import BLOCK, Block, Key, blocks, draw_all
from lightning_init.introspect.role import Role
from lightning_init.schemes.distributions import Distribution, Normal
from lightning_init.schemes.structured import Matrix, StructuredScheme


@dataclass
class Measured:
    """What was written: sums that add up over blocks and over ranks.

    Attributes:
        squares: Σ (x - target mean)², summed within blocks in float32 and over them in float64.
        count: number of elements.
        checksum: sum of the values' bits, modulo 2⁶⁴.
        is_transformed: whether a parametrization makes other values of those that were written.
    """

    squares: float = 0.0
    count: int = 0
    checksum: int = 0
    is_transformed: bool = False

    def __iadd__(self, other: Measured) -> Measured:
        """Add the sums of another block."""
        self.squares += other.squares
        self.count += other.count
        self.checksum = _wrapped(self.checksum + other.checksum)
        self.is_transformed |= other.is_transformed
        return self

    @property
    def std(self) -> float:
        """Root mean square deviation from the target mean."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@dataclass(frozen=True)
class DrawChunk:
    """One independently drawn chunk of a parameter: flat elements ``start`` to ``stop``."""

    start: int
    stop: int
    initializer: Distribution | StructuredScheme
    gain: float
    key: Key


def chunks_of(assignment: Assignment, seed: int, count: int) -> list[DrawChunk]:
    """A parameter of ``count`` elements in equal chunks along dimension 0, each with a stream of its own."""
    size = count // len(assignment.initializers)
    names = assignment.slices if len(assignment.initializers) > 1 else ("",)
    return [
        DrawChunk(i * size, (i + 1) * size, value, assignment.gain, Key(seed, assignment.site.forward_fqn, name))
        for i, (value, name) in enumerate(zip(assignment.initializers, names, strict=True))
    ]


GENERIC_ROLE = Role("other", Normal())
"""The role of a parameter whose module type is not known: one matrix, stored (out, in, …)."""


def block_jobs(chunk: DrawChunk, shard: LocalShard, flat: Tensor) -> Iterator[Callable[[], Measured]]:
    """One job per block of a slice that has elements in the window: draw it, write it to ``flat``, measure it.

    Args:
        chunk: an elementwise slice.
        window: which elements of the parameter are held here.
        flat: where they are written to. Shape: [window.local.numel()]
    """
    assert isinstance(chunk.initializer, Distribution)
    distribution = chunk.initializer
    for block in blocks(chunk.start, chunk.stop):
        overlap = shard.overlap(block.start, block.stop)
        if overlap is not None:
            yield lambda b=block, o=overlap: _write_block(b, o, distribution, chunk.key, flat)  # type: ignore[misc]


def _write_block(
    block: Block, overlap: tuple[slice, Tensor | slice], distribution: Distribution, key: Key, flat: Tensor
) -> Measured:
    """Draw straight into the parameter's memory where it can hold the block, else copy what belongs here."""
    where, which = overlap
    target = flat[where]
    if target.dtype == torch.float32 and target.device.type == "cpu" and target.numel() == len(block):
        return measure(block.draw(distribution, key, target), distribution)
    values = block.draw(distribution, key)[which]
    target.copy_(values)
    return measure(values.to(target.dtype), distribution)


def measure(values: Tensor, drawn_from: Distribution | StructuredScheme) -> Measured:
    """The sums of a tensor, as held in its own dtype; a complex number counts once."""
    count = values.numel()
    mean = drawn_from.target_mean if isinstance(drawn_from, Distribution) else 0.0
    if values.is_complex():
        values = torch.view_as_real(values - mean)
        mean = 0.0
    held = values.float().cpu().flatten()
    sums = Measured(count=count)
    for chunk in torch.split(held, BLOCK):  # a float32 dot product of 2²⁴ elements is off by 6e-5, of a block by 1e-7
        deviation = chunk - mean if mean else chunk
        sums += Measured(float(torch.dot(deviation, deviation)), 0, _checksum(chunk))
    return sums


def draw_full(chunk: DrawChunk, shape: tuple[int, ...], role: Role | None, dtype: torch.dtype) -> Tensor:
    """All values of one slice at once, in float32 or complex64. Shape: ``shape``, the slice's own.

    The slow, plain way: for structured schemes, complex numbers, and whatever is not written block by block.
    """
    if isinstance(chunk.initializer, StructuredScheme):
        return _structured(chunk, chunk.initializer, shape, role or GENERIC_ROLE, dtype.is_complex)
    count = math.prod(shape)
    if not dtype.is_complex:
        return draw_all(chunk.initializer, chunk.key, count).view(shape)
    # Real and imaginary chunk each have half the variance around half the mean's share: E|z - mean|² = std².
    standard = draw_all(chunk.initializer, chunk.key, 2 * count).view(*shape, 2)
    mean = chunk.initializer.target_mean
    return torch.view_as_complex((standard - mean) / math.sqrt(2)) + mean


def stream_fingerprint(chunk: DrawChunk) -> int:
    """Bits of a few values from the start of a slice's stream: the same on every rank, whatever it holds."""
    if isinstance(chunk.initializer, StructuredScheme):
        return _checksum(draw_all(Normal(), chunk.key, 16))
    return _checksum(draw_all(chunk.initializer, chunk.key, 16))


def _structured(
    chunk: DrawChunk, scheme: StructuredScheme, shape: tuple[int, ...], role: Role, is_complex: bool
) -> Tensor:
    """Build each group of a slice as a matrix of its own and put it where the layer stores it."""
    matrix = matrix_of(shape, role, is_complex)
    gain = chunk.gain * stride_gain(matrix, role)
    groups = []
    for group in range(role.groups):
        name = f"{chunk.key.part}/{group}" if role.groups > 1 else chunk.key.part
        key = Key(chunk.key.seed, chunk.key.name, name)
        built = scheme.build(matrix, gain, lambda count, key=key: draw_all(Normal(), key, count))  # type: ignore[misc]
        groups.append(built.transpose(0, 1) if role.transposed else built)
    return torch.cat(groups).to(torch.complex64 if is_complex else torch.float32).reshape(shape)


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
