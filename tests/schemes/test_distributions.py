"""Every distribution is what it says: shape, moments and bounds, against scipy and by measurement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_init import Constant, Distribution, Normal, TruncatedNormal, Uniform
from lightning_init.schemes.distributions import truncated_std

COUNT = 1 << 16

CASES = {
    "normal": (Normal(), stats.norm()),
    "normal 0.02": (Normal(0.02), stats.norm(0, 0.02)),
    "normal shifted": (Normal(0.5, mean=-3.0), stats.norm(-3, 0.5)),
    "uniform": (Uniform(0.0, 1.0), stats.uniform()),
    "uniform lopsided": (Uniform(-0.1, 0.3), stats.uniform(-0.1, 0.4)),
    "truncated": (TruncatedNormal(), stats.truncnorm(-2, 2, 0, 1 / 0.87962566103423978)),
    "truncated 0.02": (TruncatedNormal(0.02), stats.truncnorm(-2, 2, 0, 0.02 / 0.87962566103423978)),
    "truncated at 3": (TruncatedNormal(2.0, cut=3.0), stats.truncnorm(-3, 3, 0, 2 / 0.98657839)),
    "truncated at 1/2": (
        TruncatedNormal(1.0, mean=7.0, cut=0.5),
        stats.truncnorm(-0.5, 0.5, 7, 1 / stats.truncnorm(-0.5, 0.5).std()),
    ),
}
cases = pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)


def drawn(distribution: Distribution, count: int = COUNT, seed: int = 0) -> Tensor:
    block = torch.full((count,), math.nan)
    distribution.fill_(block, torch.Generator().manual_seed(seed))
    return block


@cases
def test_distribution_moments_are_those_of_scipy(ours: Distribution, theirs: stats.rv_frozen) -> None:
    assert ours.target_mean == pytest.approx(theirs.mean(), abs=1e-12)
    assert ours.target_std == pytest.approx(theirs.std(), rel=1e-7)
    assert ours.kurtosis == pytest.approx(theirs.stats(moments="k") + 3, rel=1e-7)


@cases
def test_distribution_draws_have_its_moments(ours: Distribution, theirs: stats.rv_frozen) -> None:
    values = drawn(ours).double()
    # A mean of n values has the standard error std/√n, a std √((kurtosis - 1) / 4n) of itself: five of each.
    assert values.mean().item() == pytest.approx(ours.target_mean, abs=5 * ours.target_std / math.sqrt(COUNT))
    spread = (values - ours.target_mean).square().mean().sqrt().item()
    assert spread == pytest.approx(ours.target_std, rel=5 * math.sqrt((ours.kurtosis - 1) / (4 * COUNT)))


@cases
def test_distribution_draws_have_its_form(ours: Distribution, theirs: stats.rv_frozen) -> None:
    # One seed, so the p-value is fixed; below 1e-6 it would be no draw from this distribution.
    assert stats.kstest(drawn(ours).double().numpy(), theirs.cdf).pvalue > 1e-6


def test_distribution_of_another_form_fails_the_comparison() -> None:
    """The same std is not enough: the test above tells normal, uniform and truncated from each other."""
    shapes = [stats.norm(), stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)), CASES["truncated"][1]]
    draws = [Normal(), Uniform(-math.sqrt(3), math.sqrt(3)), TruncatedNormal()]
    for i, draw in enumerate(draws):
        for j, shape in enumerate(shapes):
            if i != j:
                assert stats.kstest(drawn(draw).double().numpy(), shape.cdf).pvalue < 1e-6


@pytest.mark.parametrize("distribution", [Normal(0.3), Uniform(-1, 2), TruncatedNormal(5.0), TruncatedNormal(cut=1.0)])
def test_sampling_error_is_that_of_many_samples(distribution: Distribution) -> None:
    count, repeats = 256, 2000
    values = drawn(distribution, count * repeats).double().view(repeats, count)
    spreads = (values - distribution.target_mean).square().mean(1).sqrt() / distribution.target_std
    # The std of 2000 measurements has a relative error of 1/√4000 itself; √ makes it smaller by up to 1/n more.
    assert spreads.std().item() == pytest.approx(distribution.sampling_error(count), rel=5 / math.sqrt(4000))


@pytest.mark.parametrize("cut", [0.5, 1.0, 2.0, 3.0])
def test_truncated_normal_stays_within_the_cut(cut: float) -> None:
    distribution = TruncatedNormal(0.02, cut=cut)
    largest = drawn(distribution).abs().max().item()
    # The density at the bound is not 0, so one of 65536 draws comes within a thousandth of it.
    assert 0.999 * distribution.bound < largest <= distribution.bound * (1 + 2**-23)


def test_truncation_by_torch_is_absolute() -> None:
    theirs = torch.nn.init.trunc_normal_(torch.empty(1 << 20), std=0.02, generator=torch.Generator().manual_seed(0))
    assert theirs.abs().max().item() > 4.5 * 0.02
    assert TruncatedNormal(0.02).bound == pytest.approx(0.02 * 2 / 0.87962566103423978, rel=1e-15)


@pytest.mark.parametrize(("cut", "std"), [(2.0, 0.87962566103423978), (3.0, 0.98657839)])
def test_truncation_constants(cut: float, std: float) -> None:
    assert truncated_std(cut) == pytest.approx(std, rel=1e-8)


@pytest.mark.parametrize("cut", [0.1, 0.7, 1.5, 2.5, 6.0, 40.0])
def test_truncated_std_is_scipys(cut: float) -> None:
    assert truncated_std(cut) == pytest.approx(stats.truncnorm(-cut, cut).std(), rel=1e-9)


def test_truncated_normal_does_not_clip() -> None:
    """Clipped values would pile up at the bound; of those drawn again almost all lie inside."""
    values = drawn(TruncatedNormal()).double()
    at_bound = (values.abs() > 0.9999 * TruncatedNormal().bound).double().mean().item()
    assert at_bound < 1e-4  # P(|z| in the last 1e-4 of the interval) = 2·2e-4·φ(2)/0.954 = 2e-5; clipped: 0.046


@pytest.mark.parametrize("kind", [lambda s, m: Normal(s, m), lambda s, m: TruncatedNormal(s, m)])
def test_stream_does_not_depend_on_std_and_mean(kind: type[Normal]) -> None:
    standard = drawn(kind(1.0, 0.0)).numpy()
    scaled = standard * np.float32(0.25) + np.float32(1.5)
    assert np.array_equal(drawn(kind(0.25, 1.5)).numpy(), scaled)


def test_scale_and_shift_are_rounded_one_after_the_other() -> None:
    """As NumPy does it: a fused multiply-add rounds once, on some processors only."""
    unit = drawn(Uniform(0.0, 1.0)).numpy()
    bounds = Uniform(-0.1, 0.2)
    expected = unit * np.float32(0.2 - -0.1) + np.float32(-0.1)
    assert np.array_equal(drawn(bounds).numpy(), expected)


def test_constant_fills() -> None:
    assert torch.equal(drawn(Constant(-2.5), 7), torch.full((7,), -2.5))
    constant = Constant(3.0)
    assert (constant.target_mean, constant.target_std, constant.kurtosis) == (3.0, 0.0, 0.0)
    assert constant.sampling_error(10) == 0.0


@pytest.mark.parametrize("distribution", [Normal(), Uniform(0, 1), TruncatedNormal(), Constant(1.0)])
def test_distribution_fills_no_elements(distribution: Distribution) -> None:
    assert drawn(distribution, 0).shape == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normal(0.0), r"Normal\(std\) must be a finite number above 0, got 0.0"),
        (lambda: Normal(-1), r"Normal\(std\) must be a finite number above 0, got -1"),
        (lambda: Normal(math.inf), r"Normal\(std\) must be a finite number above 0, got inf"),
        (lambda: Normal(mean=math.nan), r"Normal\(mean\) must be a finite number, got nan"),
        (lambda: TruncatedNormal(0), r"TruncatedNormal\(std\) must be a finite number above 0, got 0"),
        (lambda: TruncatedNormal(mean=math.inf), r"TruncatedNormal\(mean\) must be a finite number, got inf"),
        (lambda: TruncatedNormal(cut=-2.0), r"TruncatedNormal\(cut\) must be a finite number above 0, got -2.0"),
        (lambda: Uniform(1.0, 1.0), r"Uniform\(low, high\) needs low < high, got low=1.0, high=1.0"),
        (lambda: Uniform(-math.inf, 1.0), r"Uniform\(low\) must be a finite number, got -inf"),
        (lambda: Uniform(0, math.nan), r"Uniform\(high\) must be a finite number, got nan"),
        (lambda: Constant(math.nan), r"Constant\(value\) must be a finite number, got nan"),
    ],
)
def test_distribution_arguments_are_checked(make: type[Distribution], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
