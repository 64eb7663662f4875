"""Whole matrices: orthogonal and Haar, identity, sparse, ZerO; for each gate and group, at the centre tap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product

import pytest
import torch
from scipy import linalg, stats
from torch import Tensor, nn

from lightning_init import (
    DeltaOrthogonal,
    Identity,
    Normal,
    Orthogonal,
    Rule,
    Scheme,
    Sparse,
    StructuredScheme,
    ZerO,
    initialize,
)
from lightning_init.initialization.streams import Key, draw_all
from lightning_init.schemes.structured import DrawNormal, Matrix, haar

# A layer, its weight, how many slices and groups it holds, and whether it is stored (in, out, …).
LAYERS: Mapping[str, tuple[Callable[[], nn.Module], str, int, int, bool]] = {
    "Linear": (lambda: nn.Linear(24, 24), "weight", 1, 1, False),
    "Linear contracting": (lambda: nn.Linear(60, 7), "weight", 1, 1, False),
    "Linear expanding": (lambda: nn.Linear(7, 60), "weight", 1, 1, False),
    "Linear to one": (lambda: nn.Linear(9, 1), "weight", 1, 1, False),
    "Conv1d": (lambda: nn.Conv1d(4, 9, 5), "weight", 1, 1, False),
    "Conv2d": (lambda: nn.Conv2d(3, 64, 3), "weight", 1, 1, False),
    "Conv2d channels last": (lambda: nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last), "weight", 1, 1, False),
    "Conv2d grouped": (lambda: nn.Conv2d(12, 24, 3, groups=3), "weight", 1, 3, False),
    "Conv2d depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5), "weight", 1, 5, False),
    "Conv3d": (lambda: nn.Conv3d(2, 5, 2), "weight", 1, 1, False),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 10, 3), "weight", 1, 1, True),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(6, 8, 2, groups=2), "weight", 1, 2, True),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(12, 2), "in_proj_weight", 3, 1, False),
    "LSTM": (lambda: nn.LSTM(5, 9), "weight_hh_l0", 4, 1, False),
    "GRU": (lambda: nn.GRU(5, 9), "weight_ih_l0", 3, 1, False),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def drawn(scheme: Scheme | str, layer: str, dtype: torch.dtype = torch.float32, gain: float | None = None) -> Tensor:
    """The layer's weight after initialisation."""
    make, weight, *_ = LAYERS[layer]
    module = make().to(dtype)
    initialize(module, scheme, seed=5, rules=[Rule(weight, scheme, gain)] if gain else [])
    return module.get_parameter(weight).detach()


def matrices(weight: Tensor, layer: str) -> list[Tensor]:
    """Every slice's and group's own matrix, from the definition of the layer. Each: [outputs, inputs, *taps]."""
    _, _, num_slices, groups, transposed = LAYERS[layer]
    pieces = [group for part in weight.chunk(num_slices) for group in part.chunk(groups)]
    wide = torch.complex128 if weight.is_complex() else torch.float64
    return [(piece.transpose(0, 1) if transposed else piece).to(wide) for piece in pieces]


def assert_orthonormal(matrix: Tensor, scale: float, atol: float) -> None:
    """Rows of length ``scale`` at right angles, or columns where there are fewer of them."""
    gram = matrix @ matrix.mH if matrix.shape[0] <= matrix.shape[1] else matrix.mH @ matrix
    expected = torch.eye(len(gram), dtype=matrix.dtype) * scale**2
    torch.testing.assert_close(gram, expected, rtol=0, atol=atol * scale**2)


def expansion(rows: int, columns: int) -> float:
    return max(1.0, math.sqrt(rows / columns))


@layers
@pytest.mark.parametrize("gain", [None, 1.7])
def test_orthogonal_is_exact_for_each_gate_and_group(layer: str, gain: float | None) -> None:
    for piece in matrices(drawn("orthogonal", layer, gain=gain), layer):
        matrix = piece.flatten(1)
        assert_orthonormal(matrix, (gain or 1.0) * expansion(*matrix.shape), atol=1e-6)


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_structured_schemes_round_to_other_dtypes(layer: str, dtype: torch.dtype) -> None:
    for scheme in ("orthogonal", "sparse"):
        assert torch.equal(drawn(scheme, layer, dtype), drawn(scheme, layer, torch.float64).float().to(dtype))


@layers
def test_orthogonal_is_exact_in_double_precision(layer: str) -> None:
    for piece in matrices(drawn("orthogonal", layer, torch.float64), layer):
        matrix = piece.flatten(1)
        assert_orthonormal(matrix, expansion(*matrix.shape), atol=1e-14)


@pytest.mark.parametrize("layer", ["Linear", "Linear expanding", "Linear contracting", "Conv2d grouped"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_orthogonal_complex_matrices_are_unitary(layer: str, dtype: torch.dtype) -> None:
    for piece in matrices(drawn("orthogonal", layer, dtype), layer):
        matrix = piece.flatten(1)
        assert matrix.imag.abs().max() > 0.01
        assert_orthonormal(matrix, expansion(*matrix.shape), atol=1e-6)


def test_orthogonal_expanding_keeps_the_variance_only_with_the_gain() -> None:
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    kept, lost = (drawn_linear(128, 512, Orthogonal(keep_variance)) for keep_variance in (True, False))
    # The norm of x is kept, so the variance per unit is 128/512; 2000·128 values have std 1 ± 0.0014.
    assert (x @ lost.T).square().mean().item() == pytest.approx(0.25, rel=0.014)
    assert (x @ kept.T).square().mean().item() == pytest.approx(1.0, rel=0.014)


def drawn_linear(inputs: int, outputs: int, scheme: Scheme, seed: int = 0) -> Tensor:
    layer = nn.Linear(inputs, outputs)
    initialize(layer, scheme, seed=seed)
    return layer.weight.detach()


def stream(number: int) -> DrawNormal:
    return lambda count: draw_all(Normal(), Key(number, "w"), count)


@cache
def many(matrix: Matrix) -> Tensor:
    return torch.stack([haar(matrix, stream(number)) for number in range(1500)])


@pytest.mark.parametrize("place", list(product(range(3), range(3))), ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3)], ids=str)
def test_orthogonal_real_matrices_are_haar_distributed(shape: tuple[int, int], place: tuple[int, int]) -> None:
    """A row of length 1 is uniform on a sphere: (q + 1)/2 ~ Beta((n-1)/2, (n-1)/2); without fixing signs q₀₀ < 0."""
    elements = many(Matrix(*shape))[:, place[0], place[1]].numpy()
    half = (max(shape) - 1) / 2
    assert stats.kstest(elements, stats.beta(half, half, -1, 2).cdf).pvalue > 1e-6


def test_orthogonal_complex_matrices_are_haar_distributed() -> None:
    """For U(2): |u|² is uniform, the phase is uniform, and E|trace|² = 1 with a variance of 1."""
    unitary = many(Matrix(2, 2, is_complex=True))
    for i, j in product(range(2), range(2)):
        element = unitary[:, i, j].numpy()
        assert stats.kstest(abs(element) ** 2, "uniform").pvalue > 1e-6
        phase = torch.from_numpy(element).angle().numpy()
        assert stats.kstest(phase, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-6
    traces = (unitary[:, 0, 0] + unitary[:, 1, 1]).abs().square()
    assert traces.mean().item() == pytest.approx(1.0, abs=5 / math.sqrt(len(traces)))


@pytest.mark.parametrize(
    "matrix",
    [Matrix(8, 8), Matrix(5, 12), Matrix(12, 5), Matrix(6, 4, (3,)), Matrix(4, 6, (3, 2)), Matrix(9, 4, (), True)],
    ids=str,
)
@pytest.mark.parametrize(
    "scheme", [Orthogonal(), Orthogonal(keep_variance=False), DeltaOrthogonal(), Identity(), ZerO()], ids=repr
)
def test_target_std_is_that_of_the_matrix(scheme: StructuredScheme, matrix: Matrix) -> None:
    gain = 1.3 if scheme.takes_gain else 1.0
    built = scheme.build(matrix, gain, stream(0))
    assert built.shape == (matrix.rows, matrix.columns, *matrix.taps)
    assert built.dtype == (torch.complex128 if matrix.is_complex else torch.float64)
    assert built.abs().square().mean().sqrt().item() == pytest.approx(scheme.target_rms(matrix, gain), rel=1e-12)
    assert scheme.sampling_error(matrix) == 0


@pytest.mark.parametrize(
    ("kind", "taps"),
    [(nn.Conv1d, (3,)), (nn.Conv1d, (4,)), (nn.Conv2d, (3, 3)), (nn.Conv2d, (2, 5)), (nn.Conv3d, (3, 2, 1))],
)
@pytest.mark.parametrize("channels", [(6, 6), (4, 10)])
def test_delta_orthogonal_keeps_the_norm_of_a_signal(
    kind: type[nn.Conv1d], taps: tuple[int, ...], channels: tuple[int, int]
) -> None:
    """With circular padding the layer is a shift and an orthogonal map at each position."""
    conv = kind(*channels, taps, bias=False).double()
    initialize(conv, "delta_orthogonal", seed=1)
    x = torch.randn(3, channels[0], *[7] * len(taps), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padding = [side for size in reversed(taps) for side in (size // 2, (size - 1) // 2)]
    y = conv(nn.functional.pad(x, padding, mode="circular"))
    assert y.shape[2:] == x.shape[2:]
    scale = expansion(channels[1], channels[0])
    torch.testing.assert_close(y.flatten(1).norm(dim=1), scale * x.flatten(1).norm(dim=1), rtol=1e-6, atol=0)


@layers
def test_identity_is_torchs_dirac(layer: str) -> None:
    """At every slice's and group's centre tap; torch stores a transposed convolution the same way round."""
    for piece in matrices(drawn("identity", layer), layer):
        expected = torch.zeros_like(piece)
        if piece.ndim == 2:
            nn.init.eye_(expected)
        else:
            nn.init.dirac_(expected)
        assert torch.equal(piece, expected)
    if layer == "Conv2d grouped":
        whole = nn.init.dirac_(torch.empty_like(drawn("dirac", layer)), groups=3)
        assert torch.equal(drawn("dirac", layer), whole)


@pytest.mark.parametrize(
    ("layer", "shift"),
    [
        (nn.Linear(6, 6), 0),
        (nn.Conv1d(6, 6, 3, padding=1), 0),
        (nn.Conv1d(6, 6, 4, padding=2), 0),
        (nn.Conv1d(6, 6, 3, padding=1, groups=3), 0),
        (nn.Conv1d(6, 6, 5, padding=2, groups=6), 0),
        (nn.ConvTranspose1d(6, 6, 3, padding=1), 0),
        (nn.ConvTranspose1d(6, 6, 3, padding=1, groups=2), 0),
        (nn.ConvTranspose1d(6, 6, 4, padding=1), 1),
    ],
    ids=str,
)
def test_identity_keeps_the_signal(layer: nn.Module, shift: int) -> None:
    initialize(layer, "identity")
    x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    length = x.shape[-1] - shift
    torch.testing.assert_close(y[..., shift : shift + length], x[..., :length], rtol=0, atol=0)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (9, 4), (4, 9), (5, 8), (3, 17), (1, 2), (1, 1), (6, 7)])
def test_zero_init_follows_the_papers_formula(inputs: int, outputs: int) -> None:
    """Zhao et al., algorithm 1: I* where outputs ≤ inputs, else c·I*·H_m·I*, m = ⌈log₂ outputs⌉, c = 2^(-(m-1)/2)."""
    if outputs <= inputs:
        expected = torch.eye(outputs, inputs, dtype=torch.float64)
    else:
        m = math.ceil(math.log2(outputs))
        hadamard = torch.from_numpy(linalg.hadamard(2**m)).double()
        partial_in = torch.eye(2**m, inputs, dtype=torch.float64)
        partial_out = torch.eye(outputs, 2**m, dtype=torch.float64)
        expected = 2 ** (-(m - 1) / 2) * partial_out @ hadamard @ partial_in
    weight = drawn_linear(inputs, outputs, ZerO(), seed=0)
    assert torch.equal(weight, expected.float())
    assert torch.equal(weight, drawn_linear(inputs, outputs, ZerO(), seed=1))
    conv = nn.Conv2d(inputs, outputs, 3)
    initialize(conv, "zero_init")
    assert torch.equal(conv.weight[..., 1, 1], expected.float())
    assert conv.weight.count_nonzero() == expected.count_nonzero()


@layers
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999])
def test_sparse_leaves_the_same_number_in_every_row(layer: str, sparsity: float) -> None:
    for piece in matrices(drawn(Sparse(sparsity), layer), layer):
        matrix = piece.flatten(1)
        width = matrix.shape[1]
        left = max(1, width - math.ceil(sparsity * width))  # as torch's sparse_ rounds, but never none
        assert (matrix.count_nonzero(dim=1) == left).all()


def test_sparse_keeps_the_variance_and_is_normal_where_it_is_not_zero() -> None:
    weight = drawn_linear(1000, 300, Sparse(0.9))
    values = weight[weight != 0].double()
    assert len(values) == 300 * 100
    assert stats.kstest((values * 10).numpy(), "norm").pvalue > 1e-6  # 100 connections: std 1/10
    # The sum over a row of 100 squares of N(0, 1/100) is 1; the std of 30,000 normals is right to 5/√60000.
    assert weight.square().sum(1).mean().sqrt().item() == pytest.approx(1.0, rel=5 / math.sqrt(2 * len(values)))
    assert drawn_linear(1000, 300, Sparse(0.9, std=2.0))[weight != 0].std().item() == pytest.approx(2.0, rel=0.03)


def test_sparse_complex_matrices_have_the_same_variance() -> None:
    built = Sparse(0.5).build(Matrix(100, 60, is_complex=True), 1.0, stream(0))
    values = built[built != 0]
    assert len(values) == 100 * 30
    # |z|² of 3000 complex normals is a sum of 6000 squares: its root is right to 1/√12000, five of those.
    expected = pytest.approx(Sparse(0.5).target_rms(Matrix(100, 60), 1.0), rel=5 / math.sqrt(12000))
    assert built.abs().square().mean().sqrt().item() == expected
    assert values.real.std().item() == pytest.approx(values.imag.std().item(), rel=0.1)


def test_sparse_chooses_every_position_equally_often_and_by_the_seed() -> None:
    weight = drawn_linear(50, 4000, Sparse(0.9))
    per_column = (weight != 0).sum(0)
    assert stats.chisquare(per_column.numpy()).pvalue > 1e-6
    assert len({tuple(row.nonzero().flatten().tolist()) for row in weight[:10]}) == 10
    assert torch.equal(weight, drawn_linear(50, 4000, Sparse(0.9)))
    assert not torch.equal(weight != 0, drawn_linear(50, 4000, Sparse(0.9), seed=1) != 0)


def test_sparse_sampling_error_is_that_of_many_samples() -> None:
    matrix, scheme = Matrix(10, 40), Sparse(0.9)
    measured = torch.stack([scheme.build(matrix, 1.0, stream(n)).square().mean().sqrt() for n in range(2000)])
    relative = measured / scheme.target_rms(matrix, 1.0)
    # 2000 measurements of a std have a relative error of 1/√4000, and 40 normals bend the root by another 1/160.
    assert relative.std().item() == pytest.approx(scheme.sampling_error(matrix), rel=5 / math.sqrt(4000) + 1 / 160)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparse(1.0), r"Sparse\(sparsity\) must be in \[0, 1\), got 1.0"),
        (lambda: Sparse(-0.1), r"Sparse\(sparsity\) must be in \[0, 1\), got -0.1"),
        (lambda: Sparse(0.5, std=0.0), r"Sparse\(std\) must be a finite number above 0, got 0.0"),
    ],
)
def test_structured_scheme_arguments_are_checked(make: Callable[[], Scheme], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
