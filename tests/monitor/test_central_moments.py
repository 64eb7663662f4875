"""Central moments against exact fractions: merged in any way, far from zero."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_init.monitor.moments import _BLOCK, CentralMoments, central_moments_of, merge_central, shifted_to


def exact(values: Tensor) -> list[float]:
    """Mean and Σ(x - mean)ᵏ for k = 2, 3, 4."""
    numbers = [Fraction(x) for x in values.flatten().tolist()]
    mean = sum(numbers) / len(numbers)
    return [float(mean), *(float(sum((x - mean) ** k for x in numbers)) for k in (2, 3, 4))]


def close(central: CentralMoments, values: Tensor) -> None:
    mean, m2, m3, m4 = exact(values)
    assert central.n.item() == values.numel()
    assert central.mean.item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert central.m2.item() == pytest.approx(m2, rel=1e-9, abs=1e-9)
    assert central.m3.item() == pytest.approx(m3, rel=1e-7, abs=1e-7 * (1 + m2**1.5))
    assert central.m4.item() == pytest.approx(m4, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_central_moments_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    """At mean/std = 1e4 a raw fourth power in float64 has nothing left of the kurtosis."""
    torch.manual_seed(0)
    values = (torch.randn(40, 5) + mean).to(dtype)
    central = central_moments_of(values)
    close(central, values)


def test_central_moments_of_blocks_are_merged() -> None:
    values = torch.linspace(-1, 3, 2 * _BLOCK + 77)
    central = central_moments_of(values)
    centred = values.double() - values.double().mean()
    assert central.m4.item() == pytest.approx((centred**4).sum().item(), rel=1e-9)
    assert central.m3.item() == pytest.approx((centred**3).sum().item(), abs=1e-6)


def test_central_moments_shifted_to_any_centre() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    powers = shifted_to(central_moments_of(values), torch.tensor(3.0, dtype=torch.float64))
    assert [power.item() for power in powers] == pytest.approx([((values - 3) ** k).sum().item() for k in (2, 3, 4)])


def test_central_moments_of_nothing_merge_to_the_same() -> None:
    nothing, something = central_moments_of(torch.empty(0, 3)), central_moments_of(torch.tensor([1.0, 5.0]))
    for merged in (merge_central(nothing, something), merge_central(something, nothing)):
        assert torch.equal(torch.stack(merged), torch.stack(something))
    assert merge_central(nothing, nothing).n == 0


@given(
    numbers=st.lists(st.integers(-1000, 1000).map(lambda n: n / 4), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=3),
    data=st.data(),
)
@settings(deadline=None)
def test_central_moments_split_anywhere_merge_in_any_order(
    numbers: list[float], cuts: list[int], data: st.DataObject
) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    edges = [0, *sorted(min(cut, len(numbers)) for cut in cuts), len(numbers)]
    parts = [central_moments_of(values[a:b]) for a, b in itertools.pairwise(edges)]
    close(functools.reduce(merge_central, data.draw(st.permutations(parts))), values)
