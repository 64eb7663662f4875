"""Schemes that build a whole matrix: orthogonal, identity, sparse and their kin."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_init.checks import check_positive
from lightning_init.schemes.scheme import Initializer

DrawNormal: TypeAlias = Callable[[int], Tensor]
"""Gives that many N(0, 1) float32 values from the start of one stream."""


class Matrix(NamedTuple):
    """What a structured scheme has to fill: ``rows`` outputs from ``columns`` inputs at each of ``taps`` positions."""

    rows: int
    columns: int
    taps: tuple[int, ...] = ()  # the kernel's spatial size; () for a linear map
    is_complex: bool = False

    @property
    def num_taps(self) -> int:
        """Number of kernel positions; 1 for a linear map."""
        return math.prod(self.taps)

    def at_centre(self, matrix: Tensor) -> Tensor:
        """``matrix`` at the kernel's centre tap, zero elsewhere. Shape: [rows, columns, *taps]."""
        full = matrix.new_zeros(self.rows, self.columns, *self.taps)
        centre = full
        for size in reversed(self.taps):
            centre = centre.select(-1, size // 2)
        centre.copy_(matrix)
        return full


class StructuredScheme(Initializer):
    """A scheme whose elements depend on each other. Slices and groups of a weight are built one by one."""

    @abstractmethod
    def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
        """The values in float64 (complex128 where asked). Shape: [rows, columns, *taps]."""

    @abstractmethod
    def target_rms(self, matrix: Matrix, gain: float) -> float:
        """Root mean square of all elements of the built matrix."""

    def sampling_error(self, matrix: Matrix) -> float:
        """Relative standard error of the measured root mean square: 0 where the structure fixes it."""
        return 0.0


@dataclass(frozen=True)
class Orthogonal(StructuredScheme):
    """A Haar-distributed matrix with orthonormal rows or columns, [rows, columns·taps], times the gain.

    With ``keep_variance`` a map that expands is scaled by √(rows / columns), so that each unit keeps the variance
    of the input; without it the columns have length ``gain``. Computed by a QR factorisation in float64.

    Source: Saxe et al. 2013.
    """

    keep_variance: bool = True
    takes_gain: ClassVar[bool] = True

    def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
        """Q of a Gaussian matrix, its signs fixed by R's diagonal."""
        wide = matrix._replace(columns=matrix.columns * matrix.num_taps)
        scale = gain * (self.expansion(wide) if self.keep_variance else 1.0)
        return (haar(wide, draw) * scale).view(matrix.rows, matrix.columns, *matrix.taps)

    def target_rms(self, matrix: Matrix, gain: float) -> float:
        """gain / √columns where the variance is kept, else gain / √max(rows, columns)."""
        columns = matrix.columns * matrix.num_taps
        return gain / math.sqrt(columns if self.keep_variance else max(matrix.rows, columns))

    @staticmethod
    def expansion(matrix: Matrix) -> float:
        """√max(1, rows / columns)."""
        return math.sqrt(max(1.0, matrix.rows / matrix.columns))


@dataclass(frozen=True)
class DeltaOrthogonal(StructuredScheme):
    """An orthogonal matrix at the kernel's centre tap, zero elsewhere; for a linear map simply orthogonal.

    Source: Xiao et al. 2018.
    """

    takes_gain: ClassVar[bool] = True

    def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
        """As :class:`Orthogonal`, with the same gain when expanding."""
        return matrix.at_centre(Orthogonal().build(matrix._replace(taps=()), gain, draw))

    def target_rms(self, matrix: Matrix, gain: float) -> float:
        """gain / √(columns · taps)."""
        return gain / math.sqrt(matrix.columns * matrix.num_taps)


@dataclass(frozen=True)
class Identity(StructuredScheme):
    """The (partial) identity at the kernel's centre tap: output i is input i, within each group of a convolution.

    Known for convolutions as Dirac initialisation. Outputs beyond the number of inputs are zero.
    """

    def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
        """Ones on the diagonal."""
        dtype = torch.complex128 if matrix.is_complex else torch.float64
        return matrix.at_centre(torch.eye(matrix.rows, matrix.columns, dtype=dtype, device="cpu"))

    def target_rms(self, matrix: Matrix, gain: float) -> float:
        """√(min(rows, columns) / number of elements)."""
        return math.sqrt(1 / (max(matrix.rows, matrix.columns) * matrix.num_taps))


@dataclass(frozen=True)
class Sparse(StructuredScheme):
    """Normal weights, all but a share of each output's connections zero, at places drawn from the same stream.

    Args:
        sparsity: share of zeros in each row, in [0, 1); rounded up to whole connections, at least one remains.
        std: of the connections that remain; None: gain / √(their number), which keeps the variance.

    Raises:
        ValueError: ``sparsity`` outside of [0, 1), ``std`` not above 0.

    Source: Martens 2010.
    """

    sparsity: float = 0.9
    std: float | None = None
    takes_gain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"Sparse(sparsity) must be in [0, 1), got {self.sparsity!r}")
        if self.std is not None:
            check_positive("Sparse(std)", self.std)

    def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
        """A second set of normals ranks the connections of each row; the highest remain.

        Both are cut from one draw: the ends of a shorter and a longer one share random numbers.
        """
        width = matrix.columns * matrix.num_taps
        count = matrix.rows * width
        numbers = draw(count * (3 if matrix.is_complex else 2))
        values = _normals(matrix._replace(columns=width), lambda needed: numbers[:needed])
        ranking = numbers[-count:].view(matrix.rows, width)
        keep = ranking.argsort(dim=1, descending=True, stable=True)[:, : self.connections(width)]
        mask = torch.zeros_like(values).scatter_(1, keep, 1.0)
        return (values * mask * self._std(width, gain)).view(matrix.rows, matrix.columns, *matrix.taps)

    def target_rms(self, matrix: Matrix, gain: float) -> float:
        """std · √(share of connections that remain)."""
        width = matrix.columns * matrix.num_taps
        return self._std(width, gain) * math.sqrt(self.connections(width) / width)

    def sampling_error(self, matrix: Matrix) -> float:
        """1 / √(2n) for the n normals that remain."""
        return 1 / math.sqrt(2 * matrix.rows * self.connections(matrix.columns * matrix.num_taps))

    def connections(self, width: int) -> int:
        """How many of ``width`` inputs an output is connected to."""
        return max(1, width - math.ceil(self.sparsity * width))

    def _std(self, width: int, gain: float) -> float:
        return gain / math.sqrt(self.connections(width)) if self.std is None else self.std


@dataclass(frozen=True)
class ZerO(StructuredScheme):
    """ZerO: no randomness. The partial identity; where the map expands, c·I*·H·I* with a Hadamard matrix H.

    H has the size 2^m, m = ⌈log₂ rows⌉, and c = 2^(-(m - 1) / 2). Sits at the kernel's centre tap.

    Source: Zhao et al. 2021.
    """

    def build(self, matrix: Matrix, gain: float, draw: DrawNormal) -> Tensor:
        """Partial identity, or the upper left corner of the scaled Hadamard matrix."""
        if matrix.rows <= matrix.columns:
            return Identity().build(matrix, gain, draw)
        corner = _hadamard(self._order(matrix))[: matrix.rows, : matrix.columns] * self._scale(matrix)
        return matrix.at_centre(corner.to(torch.complex128) if matrix.is_complex else corner)

    def target_rms(self, matrix: Matrix, gain: float) -> float:
        """That of the identity, or c / √taps: a Hadamard matrix has only ±1."""
        if matrix.rows <= matrix.columns:
            return Identity().target_rms(matrix, gain)
        return self._scale(matrix) / math.sqrt(matrix.num_taps)

    @staticmethod
    def _order(matrix: Matrix) -> int:
        return (matrix.rows - 1).bit_length()

    def _scale(self, matrix: Matrix) -> float:
        return float(2 ** (-(self._order(matrix) - 1) / 2))


def haar(matrix: Matrix, draw: DrawNormal) -> Tensor:
    """A Haar-distributed [rows, columns] matrix with orthonormal rows or columns, whichever are fewer, in float64."""
    tall = matrix._replace(rows=max(matrix.rows, matrix.columns), columns=min(matrix.rows, matrix.columns))
    q, r = torch.linalg.qr(_normals(tall, draw))
    diagonal: Tensor = r.diagonal()
    q = q * (diagonal / diagonal.abs())  # without it Q is not Haar-distributed: LAPACK chooses the signs
    orthonormal: Tensor = q if matrix.rows >= matrix.columns else q.mH
    return orthonormal.contiguous()


def _normals(matrix: Matrix, draw: DrawNormal) -> Tensor:
    """Standard normals in float64, or complex normals with E|z|² = 1 in complex128. Shape: [rows, columns]."""
    count = matrix.rows * matrix.columns
    if not matrix.is_complex:
        return draw(count).double().view(matrix.rows, matrix.columns)
    pairs = draw(2 * count).double().view(matrix.rows, matrix.columns, 2) / math.sqrt(2)
    return torch.view_as_complex(pairs)


def _hadamard(order: int) -> Tensor:
    """Sylvester's Hadamard matrix. Shape: [2^order, 2^order], float64, elements ±1."""
    matrix: Tensor = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for _ in range(order):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
