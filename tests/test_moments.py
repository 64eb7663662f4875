"""Three float64 sums against exact fractions: any shape, any split, any dtype, any magnitude."""

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

from lightning_init import moments
from lightning_init.moments import merge, observe, pack, scale, signal_variance, unpack, variance

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
    measured = observe(values, unit_dim)
    assert measured.n == values.numel()
    assert measured.sums.shape == (values.shape[unit_dim],)
    assert measured.sums.dtype == measured.squares.dtype == torch.float64
    assert variance(measured).item() == pytest.approx(pooled, rel=1e-6)
    assert signal_variance(measured).item() == pytest.approx(signal, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("mean", "std"), [(1e4, 1.0), (-1e4, 1.0), (1.0, 1e-4), (0.0, 1e-25), (0.0, 1e18), (1e-30, 1e-34)]
)
def test_any_magnitude_and_mean(mean: float, std: float) -> None:
    """Mean/std of 1e4 costs a float64 square 1e-8; a float32 square would be gone, 0 or infinite."""
    torch.manual_seed(0)
    values = (torch.randn(64, 16, dtype=torch.float64) * std + mean).float()
    pooled, signal = exact(values, 1)
    measured = observe(values, 1)
    assert variance(measured).item() == pytest.approx(pooled, rel=2e-6, abs=0)
    assert signal_variance(measured).item() == pytest.approx(signal, rel=2e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_dtype_default_dtype_and_autocast_change_nothing(dtype: torch.dtype, default: torch.dtype) -> None:
    values = torch.arange(1, 97, dtype=torch.float64).reshape(16, 6).to(dtype)
    plain = observe(values, 1)
    assert variance(plain).item() == pytest.approx(exact(values, 1)[0], rel=1e-12)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = observe(values, 1)
            vector = pack(again)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(vector, pack(plain))
    assert vector.dtype == torch.float64


@pytest.mark.parametrize("unit_dim", [0, 1, 2, 3, -2])
def test_strides_do_not_matter(unit_dim: int) -> None:
    torch.manual_seed(0)
    dense = torch.randn(4, 6, 5, 3)
    expected = observe(dense.clone(), unit_dim)
    last = dense.to(memory_format=torch.channels_last)
    strided = torch.randn(8, 6, 5, 6)[::2, :, :, ::2].copy_(dense)
    transposed = dense.transpose(0, 2).contiguous().transpose(0, 2)
    for values in (last, strided, transposed, dense.requires_grad_()):
        torch.testing.assert_close(pack(observe(values, unit_dim)), pack(expected), rtol=1e-14, atol=1e-13)
    assert not expected.sums.requires_grad
    assert not observe(dense, unit_dim).sums.requires_grad


def test_blocks_cover_a_large_tensor_once() -> None:
    """More than one block, the last one shorter; ones count themselves."""
    ones = torch.ones(3 * moments._BLOCK // 64 + 7, 64)
    measured = observe(ones, 1)
    assert measured.n == ones.numel()
    assert torch.equal(measured.sums, torch.full((64,), len(ones), dtype=torch.float64))
    assert measured.squares.item() == ones.numel()
    assert observe(ones).squares.item() == ones.numel()
    wide = observe(torch.ones(1, 2 * moments._BLOCK), 1)  # one row is more than a block
    assert wide.squares.item() == 2 * moments._BLOCK
    image = observe(torch.ones(2, 3, 5 * moments._BLOCK // 4), 1)  # one sample is
    assert torch.equal(image.sums, torch.full((3,), 10 * moments._BLOCK / 4, dtype=torch.float64))
    assert image.squares.item() == image.n == 3 * 10 * moments._BLOCK // 4


def test_two_to_the_25_elements() -> None:
    """A float32 count would stop at 2^24; float32 sums of squares are off by 1e-5 and more."""
    torch.manual_seed(0)
    small = torch.randn(2**13, 64) + 100
    large = small.repeat(64, 1)
    assert large.numel() == 2**25
    measured = observe(large, 1)
    assert measured.n == 2**25
    assert variance(measured).item() == pytest.approx(small.double().var(correction=0).item(), rel=1e-9)
    expected = small.double().var(0, correction=0).mean().item()
    assert signal_variance(measured).item() == pytest.approx(expected, rel=1e-9)


def test_nothing_is_not_a_number() -> None:
    """An expert that saw no token."""
    nothing = observe(torch.empty(0, 5), 1)
    assert nothing.n == 0
    assert nothing.sums.shape == (5,)
    assert math.isnan(variance(nothing).item())
    assert math.isnan(signal_variance(nothing).item())
    something = observe(torch.tensor([[1.0, 2, 3, 4, 5]]), 1)
    assert variance(merge(nothing, something)).item() == 2.0
    assert observe(torch.empty(4, 0), 1).n == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    values = torch.ones(4, 3)
    values[1, 2] = bad
    assert not math.isfinite(variance(observe(values, 1)).item())


def test_scale_is_the_moments_of_the_product() -> None:
    values = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    for factor in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        scaled = scale(observe(values, 1), factor)
        assert torch.equal(pack(scaled), pack(observe(values * 0.25, 1)))


def test_pack_and_unpack_are_inverse() -> None:
    measured = observe(torch.arange(12.0).reshape(4, 3), 1)
    again = unpack(pack(measured))
    assert again.n == 12
    assert torch.equal(again.sums, measured.sums)
    assert torch.equal(again.squares, measured.squares)


# Whole numbers and halves: their float64 sums are exact, so equality means equality.
NUMBERS = st.integers(-1000, 1000).map(lambda n: n / 2)


@given(
    rows=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    data=st.data(),
)
@settings(deadline=None)
def test_split_anywhere_merge_in_any_order(rows: list[list[float]], cuts: list[int], data: st.DataObject) -> None:
    values = torch.tensor(rows)
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [observe(values[a:b], 1) for a, b in itertools.pairwise(edges)]
    order = data.draw(st.permutations(parts))
    left = functools.reduce(merge, order)
    right = functools.reduce(lambda a, b: merge(b, a), reversed(order))
    whole = observe(values, 1)
    for merged in (left, right):
        assert merged.n == whole.n
        assert torch.equal(pack(merged), pack(whole))
    added = torch.stack([pack(part) for part in parts]).sum(0)  # what an all_reduce does
    assert torch.equal(added, pack(whole))


@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2), min_size=1, max_size=20),
    shift=st.floats(-1e4, 1e4, width=32),
)
@settings(deadline=None)
def test_any_numbers_against_fractions(rows: list[list[float]], shift: float) -> None:
    values = torch.tensor(rows) + shift
    pooled, signal = exact(values, 1)
    # rounding of Σx²: n · 2^-53 of the mean square, twice
    bound = 4e-15 * float((values.double() ** 2).mean())
    assert variance(observe(values, 1)).item() == pytest.approx(pooled, rel=1e-9, abs=bound)
    assert signal_variance(observe(values, 1)).item() == pytest.approx(signal, rel=1e-9, abs=bound)


LARGE = [
    ((512, 64), 1),
    ((1000, 300), -1),
    ((5, 8, 33, 40), 1),
    ((16, 24, 30, 31), -3),
    ((40, 70, 50), 0),
    ((3, 90_000), 1),
]


@pytest.mark.parametrize(("shape", "unit_dim"), LARGE)
@pytest.mark.parametrize("last", [False, True])
def test_float32_sums_equal_float64_sums(shape: tuple[int, ...], unit_dim: int, last: bool) -> None:
    """Large tensors are summed in float32, which adds up to 2e-7 of Σx²: a dot product's rounding at random."""
    torch.manual_seed(0)
    values = torch.randn(shape) * 3 + 1
    if last:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    for dim in (unit_dim, None):
        fast, slow = moments._in_float32(values, dim), moments._in_float64(values, dim)
        assert fast is not None
        assert fast.n == slow.n
        assert fast.sums.shape == slow.sums.shape
        torch.testing.assert_close(fast.sums.double(), slow.sums, rtol=0, atol=2e-7 * slow.n / len(slow.sums) * 4)
        assert fast.squares.item() == pytest.approx(slow.squares.item(), rel=5e-7)
        assert signal_variance(observe(values, dim)).item() == pytest.approx(signal_variance(slow).item(), rel=2e-6)
    assert moments.sum_of_squares(values).item() == pytest.approx(slow.squares.item(), rel=5e-7)


@pytest.mark.parametrize("factor", [1e-24, 1e-19, 1e16, 1e19])
def test_float32_sums_leave_what_they_cannot_hold(factor: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(512, 64) * factor
    assert moments._in_float32(values, 1) is None
    expected = (values.double() ** 2).sum().item()
    assert observe(values, 1).squares.item() == pytest.approx(expected, rel=1e-12)
    assert moments.sum_of_squares(values).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_float32_sums_leave_what_is_not_finite(bad: float) -> None:
    values = torch.randn(512, 64)
    values[100, 3] = bad
    assert moments._in_float32(values, 1) is None
    assert not math.isfinite(moments.sum_of_squares(values).item())


@pytest.mark.parametrize("ratio", [0.0, 3.0, 5.0, 8.0, 1e2, 1e4])
def test_a_bias_hides_no_signal_from_float32_sums(ratio: float) -> None:
    """Units at different means: near the limit the float32 sums are as good, beyond it they are not used."""
    torch.manual_seed(0)
    values = torch.randn(2048, 64) + ratio * torch.randn(64).sign()
    assert (moments._in_float32(values, 1) is None) == (ratio > 5.6)  # 1 / (1 + ratio²) below 1/32
    expected = values.double().var(0, correction=0).mean().item()
    assert signal_variance(observe(values, 1)).item() == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 100, 200_000])
def test_sum_of_squares_is_that_of_observe(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, count).to(dtype).T.requires_grad_()
    squares = moments.sum_of_squares(values)
    assert squares.dtype == torch.float64
    assert not squares.requires_grad
    assert squares.item() == pytest.approx((values.detach().double() ** 2).sum().item(), rel=5e-7)


def test_many_merges_do_not_add_up_to_an_error() -> None:
    """A recurrent cell is called once a position; each call alone is summed in float32."""
    torch.manual_seed(0)
    call = torch.randn(64, 64) + 3
    moments = observe(call, 1)
    merged = functools.reduce(merge, [moments] * 4000)
    assert variance(merged).item() == pytest.approx(variance(moments).item(), rel=1e-9)
    assert signal_variance(merged).item() == pytest.approx(signal_variance(moments).item(), rel=1e-9)
