"""Three float64 sums against exact fractions: any shape, any split, any dtype, any magnitude, with or without C."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_init import native
from lightning_init.monitor import moments
from lightning_init.monitor.moments import Moments, merge, moments_of, pack, scale, signal_variance, variance

CPU = torch.device("cpu")


@pytest.fixture(params=["compiled", "torch alone"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: as installed with a C compiler and without."""
    assert native.sums is not None, "the tests need the compiled sums: make install, with a C compiler at hand"
    if request.param == "torch alone":
        monkeypatch.setattr(native, "sums", None)


def numbers(measured: Moments) -> Tensor:
    """All of them in one vector."""
    return torch.cat(
        (pack([measured.n, measured.squares], CPU), torch.as_tensor(measured.sums, dtype=torch.float64).reshape(-1))
    )


SHAPES = [((8, 5), 1), ((8, 5), -1), ((5,), 0), ((4, 5, 3, 2), 1), ((3, 4, 5), -1), ((5, 4, 3), 0), ((2, 3, 4, 5), -3)]


def exact(values: Tensor, unit_dim: int) -> tuple[float, float]:
    """Pooled variance and mean of the units' variances, by fractions: no rounding at all."""
    rows = values.movedim(unit_dim, 0).flatten(1) if values.dim() > 1 else values.reshape(-1, 1)
    units = [[Fraction(x) for x in row] for row in rows.tolist()]
    pooled = statistics.pvariance([x for unit in units for x in unit])
    return float(pooled), float(sum(statistics.pvariance(unit) for unit in units) / len(units))


@pytest.mark.parametrize(("shape", "unit_dim"), SHAPES)
def test_variances_are_exact(shape: tuple[int, ...], unit_dim: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape) * 3 + 7
    pooled, signal = exact(values, unit_dim)
    measured = moments_of(values, unit_dim)
    assert measured.n == values.numel()
    assert isinstance(measured.sums, Tensor)
    assert measured.sums.shape == (values.shape[unit_dim],)
    assert measured.sums.dtype == torch.float64
    assert isinstance(measured.squares, float)
    assert float(variance(measured)) == pytest.approx(pooled, rel=1e-6)
    assert float(signal_variance(measured)) == pytest.approx(signal, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("mean", "std"), [(1e4, 1.0), (-1e4, 1.0), (1.0, 1e-4), (0.0, 1e-25), (0.0, 1e18), (1e-30, 1e-34)]
)
def test_variances_at_any_magnitude_and_mean(mean: float, std: float) -> None:
    """Mean/std of 1e4 costs a float64 square 1e-8; a float32 square would be gone, 0 or infinite."""
    torch.manual_seed(0)
    values = (torch.randn(64, 16, dtype=torch.float64) * std + mean).float()
    pooled, signal = exact(values, 1)
    measured = moments_of(values, 1)
    assert float(variance(measured)) == pytest.approx(pooled, rel=2e-6, abs=0)
    assert float(signal_variance(measured)) == pytest.approx(signal, rel=2e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_moments_ignore_default_dtype_and_autocast(dtype: torch.dtype, default: torch.dtype) -> None:
    values = torch.arange(1, 97, dtype=torch.float64).reshape(16, 6).to(dtype)
    plain = moments_of(values, 1)
    assert float(variance(plain)) == pytest.approx(exact(values, 1)[0], rel=1e-12)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = moments_of(values, 1)
            vector = numbers(again)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(vector, numbers(plain))
    assert vector.dtype == torch.float64


@pytest.mark.parametrize("unit_dim", [0, 1, 2, 3, -2])
def test_moments_of_any_strides(unit_dim: int) -> None:
    torch.manual_seed(0)
    dense = torch.randn(4, 6, 5, 3)
    expected = moments_of(dense.clone(), unit_dim)
    last = dense.to(memory_format=torch.channels_last)
    strided = torch.randn(8, 6, 5, 6)[::2, :, :, ::2].copy_(dense)
    transposed = dense.transpose(0, 2).contiguous().transpose(0, 2)
    for values in (last, strided, transposed, dense.requires_grad_()):
        torch.testing.assert_close(numbers(moments_of(values, unit_dim)), numbers(expected), rtol=1e-6, atol=1e-4)
    assert not expected.sums.requires_grad
    assert not moments_of(dense, unit_dim).sums.requires_grad


def test_moments_of_blocks_cover_a_large_tensor_once() -> None:
    """More than one block, the last one shorter; ones count themselves."""
    ones = torch.ones(3 * moments._BLOCK // 64 + 7, 64)
    measured = moments_of(ones, 1)
    assert measured.n == ones.numel()
    assert torch.equal(measured.sums, torch.full((64,), len(ones), dtype=torch.float64))
    assert measured.squares == ones.numel()
    assert moments_of(ones).squares == ones.numel()
    wide = moments_of(torch.ones(1, 2 * moments._BLOCK), 1)  # one row is more than a block
    assert wide.squares == 2 * moments._BLOCK
    image = moments_of(torch.ones(2, 3, 5 * moments._BLOCK // 4), 1)  # one sample is
    assert torch.equal(image.sums, torch.full((3,), 10 * moments._BLOCK / 4, dtype=torch.float64))
    assert image.squares == image.n == 3 * 10 * moments._BLOCK // 4


def test_moments_of_2_to_the_25_elements() -> None:
    """A float32 count would stop at 2^24; float32 sums of squares are off by 1e-5 and more."""
    torch.manual_seed(0)
    small = torch.randn(2**13, 64) + 100
    large = small.repeat(64, 1)
    assert large.numel() == 2**25
    measured = moments_of(large, 1)
    assert measured.n == 2**25
    assert float(variance(measured)) == pytest.approx(small.double().var(correction=0).item(), rel=1e-7)
    expected = small.double().var(0, correction=0).mean().item()
    assert float(signal_variance(measured)) == pytest.approx(expected, rel=1e-7)


def test_moments_of_nothing_are_nan() -> None:
    """An expert that saw no token."""
    nothing = moments_of(torch.empty(0, 5), 1)
    assert nothing.n == 0
    assert nothing.sums.shape == (5,)
    assert math.isnan(variance(nothing))
    assert math.isnan(signal_variance(nothing))
    something = moments_of(torch.tensor([[1.0, 2, 3, 4, 5]]), 1)
    assert float(variance(merge(nothing, something))) == 2.0
    assert moments_of(torch.empty(4, 0), 1).n == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_moments_of_inf_and_nan_are_not_finite(bad: float) -> None:
    values = torch.ones(4, 3)
    values[1, 2] = bad
    assert not math.isfinite(variance(moments_of(values, 1)))


def test_scale_equals_the_moments_of_the_product() -> None:
    values = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    for factor in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        scaled = scale(moments_of(values, 1), factor)
        assert torch.equal(numbers(scaled), numbers(moments_of(values * 0.25, 1)))


def test_pack_takes_floats_and_tensors() -> None:
    on_device = torch.tensor(2.0, dtype=torch.float64)
    for some, expected in (([1.0, on_device, 3], [1, 2, 3]), ([], []), ([on_device], [2]), ([0.5], [0.5])):
        vector = pack(some, CPU)
        assert vector.dtype == torch.float64
        assert vector.tolist() == expected


# Whole numbers and halves: their float64 sums are exact, so equality means equality.
NUMBERS = st.integers(-1000, 1000).map(lambda n: n / 2)


@given(
    rows=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    data=st.data(),
)
@settings(deadline=None)
def test_merge_of_any_split_in_any_order(rows: list[list[float]], cuts: list[int], data: st.DataObject) -> None:
    values = torch.tensor(rows)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [moments_of(values[a:b], 1) for a, b in itertools.pairwise(edges)]
    order = data.draw(st.permutations(parts))
    left = functools.reduce(merge, order)
    right = functools.reduce(lambda a, b: merge(b, a), reversed(order))
    whole = moments_of(values, 1)
    for merged in (left, right):
        assert merged.n == whole.n
        assert torch.equal(numbers(merged), numbers(whole))
    added = torch.stack([numbers(part) for part in parts]).sum(0)  # what an all_reduce does
    assert torch.equal(added, numbers(whole))


@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2), min_size=1, max_size=20),
    shift=st.floats(-1e4, 1e4, width=32),
)
@settings(deadline=None)
def test_moments_against_fractions(rows: list[list[float]], shift: float) -> None:
    values = torch.tensor(rows) + shift
    pooled, signal = exact(values, 1)
    # rounding of Σx²: n · 2^-53 of the mean square, twice
    bound = 4e-15 * float((values.double() ** 2).mean())
    assert float(variance(moments_of(values, 1))) == pytest.approx(pooled, rel=1e-9, abs=bound)
    assert float(signal_variance(moments_of(values, 1))) == pytest.approx(signal, rel=1e-9, abs=bound)


def test_merge_many_times_is_exact() -> None:
    """A recurrent cell is called once a position; each call alone is summed in float32."""
    torch.manual_seed(0)
    moments = moments_of(torch.randn(64, 64) + 3, 1)
    merged = functools.reduce(merge, [moments] * 4000)
    assert float(variance(merged)) == pytest.approx(float(variance(moments)), rel=1e-9)
    assert float(signal_variance(merged)) == pytest.approx(float(signal_variance(moments)), rel=1e-9)
