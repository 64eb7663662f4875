"""Every named scheme has the variance its paper says, in every kind of layer, and the right shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_init import (
    SCHEMES,
    Constant,
    Distribution,
    Fans,
    FanScheme,
    Normal,
    Scheme,
    SchemeName,
    Siren,
    SmallInit,
    TruncatedNormal,
    Uniform,
    VarianceScaling,
    fans_of,
    initialize,
)
from lightning_init.schemes.named import name_of, scheme_of

Std = Callable[[float, float], float]
"""From fan_in and fan_out to the standard deviation around 0."""

UNIFORM, NORMAL = 1.8, 3.0
TRUNCATED = stats.truncnorm(-2, 2).stats(moments="k") + 3


def glorot(fan_in: float, fan_out: float) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


def he(fan_in: float, fan_out: float) -> float:
    return math.sqrt(2 / fan_in)


def lecun(fan_in: float, fan_out: float) -> float:
    return math.sqrt(1 / fan_in)


def one(fan_in: float, fan_out: float) -> float:
    return 1.0


# The std of each name, written down from the papers, and the kurtosis of its shape; None: of no elementwise shape.
PAPERS: Mapping[str, tuple[Std, float | None]] = {
    "zeros": (lambda fan_in, fan_out: 0.0, None),
    "ones": (one, None),
    "standard_normal": (one, NORMAL),
    "standard_normal_truncated": (one, TRUNCATED),
    "truncated_normal": (one, TRUNCATED),
    "xavier_normal": (glorot, NORMAL),
    "xavier_uniform": (glorot, UNIFORM),
    "xavier_normal_truncated": (glorot, TRUNCATED),
    "glorot_normal": (glorot, NORMAL),
    "glorot_uniform": (glorot, UNIFORM),
    "glorot_normal_truncated": (glorot, TRUNCATED),
    "he_normal": (he, NORMAL),
    "he_uniform": (he, UNIFORM),
    "he_normal_truncated": (he, TRUNCATED),
    "kaiming_normal": (he, NORMAL),
    "kaiming_uniform": (he, UNIFORM),
    "kaiming_normal_truncated": (he, TRUNCATED),
    "lecun_normal": (lecun, NORMAL),
    "lecun_uniform": (lecun, UNIFORM),
    "lecun_normal_truncated": (lecun, TRUNCATED),
    "siren": (lambda fan_in, fan_out: math.sqrt(2 / fan_in) / 30, UNIFORM),
    "siren_first": (lambda fan_in, fan_out: 1 / fan_in / math.sqrt(3), UNIFORM),
    "small_init": (lambda fan_in, fan_out: math.sqrt(2 / (5 * fan_in)), NORMAL),
}
STRUCTURED = {"orthogonal", "delta_orthogonal", "identity", "dirac", "sparse", "zero_init"}

# A layer, its weight, the fan_in and fan_out of one slice counted by hand, and the number of slices.
LAYERS: Mapping[str, tuple[Callable[[], nn.Module], str, float, float]] = {
    "Linear": (lambda: nn.Linear(300, 200), "weight", 300, 200),
    "Conv1d": (lambda: nn.Conv1d(32, 64, 5), "weight", 32 * 5, 64 * 5),
    "Conv2d": (lambda: nn.Conv2d(32, 48, 3), "weight", 32 * 9, 48 * 9),
    "Conv3d": (lambda: nn.Conv3d(8, 24, 3), "weight", 8 * 27, 24 * 27),
    "Conv2d strided": (lambda: nn.Conv2d(32, 48, 4, stride=2), "weight", 32 * 16, 48 * 4),
    "Conv2d grouped": (lambda: nn.Conv2d(64, 96, 3, groups=4), "weight", 16 * 9, 24 * 9),
    "Conv2d depthwise": (lambda: nn.Conv2d(512, 512, 3, groups=512), "weight", 9, 9),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(32, 48, 3), "weight", 32 * 9, 48 * 9),
    "ConvTranspose2d strided": (lambda: nn.ConvTranspose2d(32, 48, 4, stride=2), "weight", 32 * 4, 48 * 16),
    "ConvTranspose2d grouped": (
        lambda: nn.ConvTranspose2d(64, 96, 4, stride=2, groups=4),
        "weight",
        16 * 4,
        24 * 16,
    ),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(96, 4), "in_proj_weight", 96, 96),
    "LSTM input": (lambda: nn.LSTM(70, 90), "weight_ih_l0", 70, 90),
    "LSTM state": (lambda: nn.LSTM(70, 90), "weight_hh_l0", 90, 90),
    "GRU input": (lambda: nn.GRU(70, 90), "weight_ih_l0", 70, 90),
    "GRU state": (lambda: nn.GRU(70, 90), "weight_hh_l0", 90, 90),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def drawn(name: str, layer: str) -> Tensor:
    make, weight, *_ = LAYERS[layer]
    module = make()
    initialize(module, name, seed=3)
    return module.get_parameter(weight).detach().double()


def test_scheme_names_are_all_in_a_table() -> None:
    assert set(PAPERS) | STRUCTURED | {"torch_default", "auto"} == set(SCHEMES)


def test_scheme_name_literal_has_the_names_of_the_mapping_in_order() -> None:
    assert list(get_args(SchemeName)) == list(SCHEMES)


@layers
def test_fans_of_the_table_are_the_modules(layer: str) -> None:
    make, weight, fan_in, fan_out = LAYERS[layer]
    assert fans_of(make(), weight) == Fans(fan_in, fan_out)


@layers
@pytest.mark.parametrize("name", [name for name, (_, kurtosis) in PAPERS.items() if kurtosis])
def test_schemes_have_their_variance_in_every_layer(name: str, layer: str) -> None:
    """The std measured on n elements has a relative standard error of √((kurtosis - 1) / 4n): five of them."""
    formula, kurtosis = PAPERS[name]
    _, _, fan_in, fan_out = LAYERS[layer]
    weight = drawn(name, layer)
    assert kurtosis is not None
    error = math.sqrt((kurtosis - 1) / (4 * weight.numel()))
    assert error < 0.02  # enough elements that √2 for 1, or fan_out for fan_in, would be seen
    std = formula(fan_in, fan_out)
    assert weight.square().mean().sqrt().item() == pytest.approx(std, rel=5 * error)
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


@layers
def test_zeros_and_ones(layer: str) -> None:
    assert (drawn("zeros", layer) == 0).all()
    assert (drawn("ones", layer) == 1).all()


@layers
@pytest.mark.parametrize("name", ["he_normal", "xavier_uniform", "lecun_normal_truncated"])
def test_schemes_have_their_form_of_distribution(name: str, layer: str) -> None:
    formula, kurtosis = PAPERS[name]
    _, _, fan_in, fan_out = LAYERS[layer]
    values = (drawn(name, layer) / formula(fan_in, fan_out)).flatten().numpy()
    width = 1 / stats.truncnorm(-2, 2).std()
    shape = {
        NORMAL: stats.norm(),
        UNIFORM: stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
        TRUNCATED: stats.truncnorm(-2, 2, 0, width),
    }[kurtosis]
    assert stats.kstest(values, shape.cdf).pvalue > 1e-6  # one seed: the p-value is fixed


@pytest.mark.parametrize(
    "names",
    [
        *[(f"he_{form}", f"kaiming_{form}") for form in ("normal", "uniform", "normal_truncated")],
        *[(f"xavier_{form}", f"glorot_{form}") for form in ("normal", "uniform", "normal_truncated")],
        ("truncated_normal", "standard_normal_truncated"),
        ("identity", "dirac"),
    ],
)
def test_aliases_are_one_scheme_and_draw_the_same(names: tuple[str, str]) -> None:
    first, second = names
    assert SCHEMES[first] == SCHEMES[second]
    assert torch.equal(drawn(first, "Conv2d"), drawn(second, "Conv2d"))


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 100), ("fan_out", 400), ("fan_avg", 250), ("fan_geo_avg", 200)])
@pytest.mark.parametrize("shape", ["normal", "uniform", "truncated_normal"])
def test_variance_scaling_is_scale_over_fan(mode: str, fan: float, shape: str) -> None:
    scheme = VarianceScaling(3.0, mode, shape)
    distribution = scheme.distribution_of(Fans(100, 400), scheme.gain)
    kind = {"normal": Normal, "uniform": Uniform, "truncated_normal": TruncatedNormal}[shape]
    assert type(distribution) is kind
    assert distribution.target_mean == 0
    assert distribution.target_std == pytest.approx(math.sqrt(3 / fan), rel=1e-12)


def test_variance_scaling_refuses_fans_that_are_no_number() -> None:
    """A lookup table's input has no gradient, so no fan_out."""
    table = Fans(1.0, math.nan)
    assert VarianceScaling().distribution_of(table, 1.0) == Normal(1.0)
    message = (
        r"^mode 'fan_avg' needs a fan_out, which a lookup table does not have: use mode 'fan_in' or Normal\(std\)$"
    )
    with pytest.raises(ValueError, match=message):
        VarianceScaling(mode="fan_avg").distribution_of(table, 1.0)


def test_small_init_of_a_given_width_is_the_same_for_all_layers() -> None:
    small = SmallInit(dim=64)
    assert (
        small.distribution_of(Fans(64, 256), 1.0)
        == small.distribution_of(Fans(256, 64), 1.0)
        == Normal(math.sqrt(2 / 320))
    )


def siren_net(depth: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), *[nn.Linear(width, width) for _ in range(depth - 1)])


def test_siren_keeps_the_signal_through_five_layers() -> None:
    """Inputs from U(-1, 1), sin(30·(Wx + b)) after the first layer: the std before each sine is 0.99 … 0.89."""
    torch.manual_seed(0)
    net = siren_net(5, 512)
    initialize(net[0], "siren_first", seed=1)
    for number, layer in enumerate(net[1:]):
        initialize(layer, "siren", seed=2 + number)
    x = torch.rand(4096, 2) * 2 - 1
    stds = []
    with torch.no_grad():
        for layer in net:
            before_sine = 30 * layer(x)
            stds.append(before_sine.std().item())
            x = torch.sin(before_sine)
    assert stds[0] == pytest.approx(30 * math.sqrt(2 * (1 / 3) * (1 / 12)), rel=0.1)  # 2 inputs, var 1/3, weights 1/12
    # A sine of a wide phase has variance 1/2, and 512 · 1/2 · 2/512 = 1; the second sine's is a little less.
    assert stds[1] == pytest.approx(0.99, abs=0.05)
    assert stds[1] > stds[2] > 0.85
    assert stds[4] == pytest.approx(0.89, abs=0.05)


def test_scheme_of_a_users_formula() -> None:
    class HalfFanIn(FanScheme):
        def distribution_of(self, fans: Fans, gain: float) -> Distribution:
            return Constant(0.5 / fans.fan_in)

    layer = nn.Linear(8, 4)
    report = initialize(layer, HalfFanIn())
    assert torch.equal(layer.weight, torch.full((4, 8), 1 / 16))
    assert report["weight"].target_std == 0


def test_name_of_inverts_scheme_of() -> None:
    for name, scheme in SCHEMES.items():
        assert scheme_of(name) is scheme
        assert scheme_of(name_of(scheme)) == scheme
    assert scheme_of(Normal(0.02)) == Normal(0.02)
    assert name_of(Normal(0.02)) == "Normal(std=0.02, mean=0.0)"
    assert name_of(SCHEMES["glorot_normal"]) == "xavier_normal"


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("he_norml", "he_normal"), ("HE_NORMAL", None), ("xavier", "xavier_normal"), ("orthogonl", "orthogonal")],
)
def test_unknown_scheme_error_names_the_nearest(given: str, nearest: str | None) -> None:
    end = rf"; did you mean '{nearest}'\?$" if nearest else ""
    with pytest.raises(ValueError, match=rf"^scheme is '{given}'; allowed: zeros, ones, .*, torch_default, auto{end}"):
        scheme_of(given)


@pytest.mark.parametrize("given", [None, 3, Normal, ["he_normal"]], ids=repr)
def test_scheme_of_refuses_what_is_no_scheme(given: object) -> None:
    with pytest.raises(
        TypeError, match=r"^a scheme is a name or a Scheme object, got .* of type (NoneType|int|ABCMeta|list)$"
    ):
        scheme_of(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VarianceScaling(0), r"VarianceScaling\(scale\) must be a finite number above 0, got 0"),
        (
            lambda: VarianceScaling(1, "fan_inn"),
            r"VarianceScaling\(mode\) is 'fan_inn'; allowed: fan_in, fan_out, fan_avg, fan_geo_avg; "
            r"did you mean 'fan_in'\?",
        ),
        (
            lambda: VarianceScaling(1, "fan_in", "gaussian"),
            r"VarianceScaling\(distribution\) is 'gaussian'; allowed: normal, uniform, truncated_normal",
        ),
        (lambda: SmallInit(0), r"SmallInit\(dim\) must be a finite number above 0, got 0"),
        (lambda: Siren(-30.0), r"Siren\(omega\) must be a finite number above 0, got -30.0"),
    ],
)
def test_scheme_arguments_are_checked(make: Callable[[], Scheme], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_schemes_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        SCHEMES["he_normal"].scale = 3.0
    with pytest.raises(TypeError):
        SCHEMES["mine"] = Normal()
