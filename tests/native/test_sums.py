"""The compiled sums against float64 copies: every way memory can lie, every number float32 can hold, any threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_init.monitor import moments
from lightning_init.monitor.moments import Moments, moments_of, signal_variance, variance
from lightning_init.native import _sums

WORST = 7e-6
"""A block loses 1e-6 of Σd² where every rounding goes one way, and keeps its sums only if a quarter of that is spread;
the other terms of the same size, each smaller, add up to less than three quarters more."""


@pytest.fixture(params=[1, 2, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def compiled(values: Tensor, unit_dim: int | None) -> Moments:
    found = moments._in_one_pass(values, unit_dim)
    assert found is not None
    return found


def check(values: Tensor, unit_dim: int | None, relative: float) -> None:
    """Σx² and both variances are right, and every unit's sum beside Σ|x|; float64 itself loses up to 3e-14 of mean²."""
    found, exact = compiled(values, unit_dim), values.double()
    units = exact.movedim(unit_dim, 0).flatten(1) if unit_dim is not None else exact.reshape(1, -1)
    square = exact.square().mean().item()
    assert found.n == values.numel()
    assert found.squares == pytest.approx(square * found.n, rel=relative, abs=0)
    for measured, expected in (
        (variance(found), exact.var(correction=0)),
        (signal_variance(found), units.var(1, correction=0).mean()),
    ):
        assert float(measured) == pytest.approx(expected.item(), rel=relative, abs=3e-14 * square)
    sums = torch.as_tensor(found.sums, dtype=torch.float64).reshape(-1)
    torch.testing.assert_close(
        sums, units.sum(1), rtol=0, atol=max(relative, 1e-6) * math.sqrt(square) * units.shape[1]
    )


SHAPES = [
    ((256, 512), 1),  # rows of units: blocks of 32 rows, vectors of 8 units
    ((1000, 300), -1),
    ((33, 7), 1),
    ((31, 70), 1),
    ((4099, 5), 1),
    ((3, 90_000), 1),
    ((90_000, 1), 1),
    ((5, 8, 33, 40), 1),  # runs of one unit: blocks of 1024, vectors of 32
    ((16, 24, 7, 7), -3),
    ((16, 24, 2, 2), -3),
    ((40, 70, 50), 0),
    ((2, 3, 200_000), 1),
    ((1, 1), 1),
]


@pytest.mark.slow
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("shape", "unit_dim"), SHAPES)
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0, -1e4])
def test_native_sums_of_any_shape_and_mean(shape: tuple[int, ...], unit_dim: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) + mean
    for dim in (unit_dim, None):
        check(values, dim, 2e-7)
        check(values.relu(), dim, 2e-7)


@pytest.mark.parametrize("unit_dim", [0, 1, 2, 3, None])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_native_sums_read_dense_memory_in_order(order: tuple[int, ...], unit_dim: int | None) -> None:
    """A transposed tensor costs no copy; its units are found where they lie."""
    generator = torch.Generator().manual_seed(0)
    inverse = sorted(range(4), key=order.__getitem__)
    values = torch.randn([(6, 10, 9, 8)[dim] for dim in order], generator=generator).permute(inverse)
    assert values.shape == (6, 10, 9, 8)
    check(values, unit_dim, 2e-7)


def test_native_sums_of_dimensions_of_size_one() -> None:
    values = torch.arange(12.0).as_strided((3, 1, 4), (4, 1000, 1)).transpose(0, 2)
    for dim in (0, 1, 2):
        check(values, dim, 1e-12)


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(40.0).reshape(4, 10)[:, ::2],
        torch.arange(40.0).reshape(4, 10)[:, :6],
        torch.ones(5, 1).expand(5, 4),
        torch.empty(0, 3),
        torch._efficientzerotensor((4, 3)),
        torch._efficientzerotensor((5, 3))[1:],
        torch.arange(4.0).reshape(2, 2).double(),
        torch.ones(4, 3, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(4, 3)),
        torch._neg_view(torch.arange(12.0).reshape(4, 3)),
        torch.ones(4, 3, device="meta"),
    ],
    ids=[
        "steps",
        "gaps",
        "overlaps",
        "nothing",
        "no memory",
        "a part of none",
        "float64",
        "bfloat16",
        "a subclass",
        "negated",
        "meta",
    ],
)
def test_native_sums_leave_tensors_without_readable_memory(values: Tensor) -> None:
    assert moments._in_one_pass(values, 1) is None
    if not values.is_meta:
        assert moments_of(values, 1).squares == values.detach().double().square().sum().item()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("exponent", [-140, -70, -60, -50, 0, 45, 50, 60, 120])
@pytest.mark.parametrize(("shape", "unit_dim"), [((256, 40), 1), ((4, 6, 2000), 1)])
def test_native_sums_at_any_magnitude(shape: tuple[int, ...], unit_dim: int, exponent: int) -> None:
    """Squares leave float32 at 2^-75 and 2^64. Below 2^-126 the numbers themselves lose digits, for both paths."""
    generator = torch.Generator().manual_seed(0)
    check(torch.randn(shape, generator=generator) * 2.0**exponent, unit_dim, 2e-7)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("size", [0.7, 1 / 3, 1 / 300, 1.1])
@pytest.mark.parametrize(("shape", "unit_dim"), [((2048, 256), 1), ((16, 32, 1024), 1)])
def test_native_sums_of_equal_magnitudes(size: float, shape: tuple[int, ...], unit_dim: int) -> None:
    """The gradient of a mean absolute error: a dot product in float32 is off by up to 2e-4 here."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    for dim in (unit_dim, None):
        check(signs * size, dim, WORST)
        check(signs.clamp_min(0) * size, dim, WORST)


@pytest.mark.parametrize(("shape", "unit_dim"), [((256, 64), 1), ((2, 3, 4096), 1)])
@pytest.mark.parametrize("place", [0, 1, 77])
@pytest.mark.parametrize("size", [1e3, 1e8])
def test_native_sums_beside_an_outlier(shape: tuple[int, ...], unit_dim: int, place: int, size: float) -> None:
    """As a block's first number, it is near the centre that distances are taken from."""
    for rest in (torch.zeros(shape), torch.randn(shape, generator=torch.Generator().manual_seed(0))):
        rest.view(-1)[place] = size
        for dim in (unit_dim, None):
            check(rest, dim, WORST)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("shape", "unit_dim"), [((256, 64), 1), ((2, 3, 4096), 1)])
def test_native_sums_of_inf_and_nan_per_unit(bad: float, shape: tuple[int, ...], unit_dim: int) -> None:
    values = torch.ones(shape)
    values.view(-1)[100] = bad
    found = compiled(values, unit_dim)
    assert not math.isfinite(found.squares)
    assert isinstance(found.sums, Tensor)
    assert found.sums.isfinite().sum() == len(found.sums) - 1


def test_native_sums_of_a_unit_are_zero_only_if_it_is_dead() -> None:
    values = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).relu()
    values[:, ::2] = 0
    values[0, 2], values[33, 4], values[-1, 6] = 1e-38, 0.1, 1e-20
    for by_unit in (values, values.T.contiguous().T):
        sums = compiled(by_unit, 1).sums
        assert isinstance(sums, Tensor)
        assert torch.equal(sums == 0, (values == 0).all(0))


@given(
    rows=st.integers(1, 70),
    units=st.integers(1, 40),
    inner=st.sampled_from([1, 2, 31, 32, 33, 1025]),
    mean=st.floats(-1e3, 1e3, width=32),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_native_sums_of_any_sizes(rows: int, units: int, inner: int, mean: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, units, inner, generator=generator) + mean
    check(values, 1, 1e-6)
    check(values, None, 1e-6)


def test_native_sums_of_equal_blocks() -> None:
    """2²² elements far from zero, every row the same: naive addition would round each block the same way."""
    row = torch.randn(1024, generator=torch.Generator().manual_seed(0)) - 1e4
    for values, dim in ((row.repeat(4096, 1), 1), (row.repeat(4096), None)):
        expected = values.view(4096, -1).double()[:1].var(correction=0).item()
        assert float(variance(compiled(values, dim))) == pytest.approx(expected, rel=3e-6)


def test_native_sums_reuse_memory_only_if_it_fits() -> None:
    values = torch.ones(4, 3)
    own = torch.empty(3, dtype=torch.float64)
    assert moments_of(values, 1, own).sums is own
    for other in (torch.zeros(2, dtype=torch.float64), torch.zeros(3), own.to("meta"), 1.0):
        found = moments_of(values, 1, other).sums
        assert found is not other
        assert torch.equal(torch.as_tensor(found), torch.full((3,), 4.0, dtype=torch.float64))
    scalar = moments_of(torch.tensor(2.0), 0)
    assert torch.equal(torch.as_tensor(scalar.sums), torch.tensor([2.0], dtype=torch.float64))


def test_native_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="takes 2 arguments, 1 given"):
        _sums.whole(0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _sums.whole("address", 3)
