"""Nothing absurd is written, statistics belong to their weights, rules and seeds that cannot work are said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_init import Constant, InitCallback, Normal, Rule, TruncatedNormal, Uniform, initialize, plan
from lightning_init.initialization.reasons import Reason
from tests.support.models import DigitsModule, mlp
from tests.support.trainers import make_trainer
from tests.support.weights import assert_same, weights_of


class Map(nn.Module):
    """A positive parametrization and its inverse, which is not finite below 0."""

    def __init__(self, forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.to_weight, self.to_original = forward, inverse

    def forward(self, original: Tensor) -> Tensor:
        return self.to_weight(original)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.to_original(weight)


POSITIVE = {
    "exp": Map(torch.exp, torch.log),
    "softplus": Map(nn.functional.softplus, lambda y: y.expm1().log()),
    "sigmoid": Map(torch.sigmoid, torch.logit),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_parametrization_keeps_what_it_holds(name: str) -> None:
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.01)
    parametrize.register_parametrization(layer, "weight", POSITIVE[name])
    before = weights_of(layer)
    report = initialize(layer, "he_normal")
    assert layer.weight.isfinite().all()
    entry = report["parametrizations.weight.original"]
    assert entry.left is Reason.PARAMETRIZED
    assert entry.reason == "parametrized: it cannot give what he_normal through Map draws, whose inverse is not finite"
    assert_same({"weight": weights_of(layer)["parametrizations.weight.original"]},
                {"weight": before["parametrizations.weight.original"]})  # fmt: skip
    assert report["bias"].left is None


def test_positive_parametrization_is_drawn_where_it_can_be() -> None:
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "weight", Map(torch.exp, lambda y: y.clamp_min(1e-3).log()))
    report = initialize(layer, rules=[Rule("weight", Uniform(0.1, 0.2))])
    assert report["parametrizations.weight.original"].left is None
    assert 0.1 <= layer.weight.min() < layer.weight.max() <= 0.2001


@pytest.mark.parametrize(
    ("dtype", "scheme"), [(torch.float16, Normal(1e5)), (torch.float16, Constant(1e6)), (torch.bfloat16, Normal(3e38))]
)
def test_values_that_a_dtype_cannot_hold_are_an_error(dtype: torch.dtype, scheme: Normal | Constant) -> None:
    with pytest.raises(ValueError, match=r"^'weight' was to have a std of .*cannot hold what .* draws") as error:
        initialize(nn.Linear(64, 64, dtype=dtype), scheme)
    assert "Rule('weight', 'keep')" in str(error.value)


def test_running_statistics_are_those_of_the_new_weights() -> None:
    """As a norm's own reset does; one that is left alone keeps its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    for _ in range(3):
        net(torch.randn(16, 1, 8, 8) * 3 + 20)
    initialize(net, rules=[Rule("4.*", "keep")])
    assert net[1].num_batches_tracked == 0
    assert not net[1].running_mean.any()
    assert (net[1].running_var == 1).all()
    assert net[4].num_batches_tracked == 3
    assert net[4].running_mean.any()


def test_rule_with_brackets_matches_its_own_name() -> None:
    model = nn.Module()
    model.heads = nn.ModuleDict({"cls[0]": nn.Linear(4, 2), "cls0": nn.Linear(4, 2)})
    report = initialize(model, rules=[Rule("heads.cls[0].weight", "zeros")])
    assert not model.heads["cls[0]"].weight.any()
    assert not model.heads["cls0"].weight.any()  # as a glob it means this one
    assert report["heads.cls[0].bias"].decided_by == "bias"


@pytest.mark.parametrize("first", [Rule("*", Normal(0.02)), Rule("*", "keep"), Rule("0.*", "zeros")])
def test_rule_that_never_applies_is_an_error_that_says_how(first: Rule) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    message = (
        rf"^rule '0.weight' never applies: rule '{first.pattern}' stands before it and matches the same parameters; "
        "the first rule that matches wins, so put the narrower one first$"
    )
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        plan(model, rules=[first, Rule("0.weight", "he_normal")])
    assert plan(model, rules=[Rule("0.weight", "he_normal"), first])[0].scheme == "he_normal"


def test_keep_all_but_the_head_works_in_the_order_that_applies() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    report = initialize(model, rules=[Rule("1.*", "he_normal"), Rule("*", "keep")])
    assert [entry.name for entry in report.drawn] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3)])
def test_numpy_integers_are_seeds(seed: np.integer) -> None:
    one, other = mlp(), mlp()
    assert initialize(one, seed=seed).seed == 3
    initialize(other, seed=3)
    assert_same(weights_of(one), weights_of(other))
    callback = InitCallback(seed=seed)
    make_trainer(callbacks=[callback], max_steps=1, limit_val_batches=0).fit(DigitsModule(mlp))
    assert callback.report is not None
    assert type(callback.report.seed) is int


def test_seed_variable_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "abc")
    with pytest.raises(ValueError, match=r"^the environment variable PL_GLOBAL_SEED is 'abc', and not an integer$"):
        make_trainer(callbacks=[InitCallback()], max_steps=1).fit(DigitsModule(mlp))


@pytest.mark.parametrize("given", [None, [], "model"], ids=repr)
def test_initialize_refuses_what_is_no_model(given: object) -> None:
    with pytest.raises(TypeError, match=r"^expected an nn.Module, got .* of type (NoneType|list|str)$"):
        initialize(given)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.1), (1.0, 1.0 + 2**-20), (-1e-30, 1e-30), (0.0, 1.0), (-3.0, -2.9)])
def test_uniform_never_returns_its_upper_end(low: float, high: float) -> None:
    block = torch.empty(1 << 18)
    for seed in range(8):
        Uniform(low, high).fill_(block, torch.Generator().manual_seed(seed))
        assert float(block.max()) < high
        assert float(block.min()) >= np.float32(low)


@pytest.mark.parametrize(
    ("std", "mean", "cut"), [(1.0, 0.0, 2.0), (0.02, 0.0, 2.0), (0.3, 7.0, 0.5), (1e-3, -2.0, 1.0)]
)
def test_truncated_normal_never_passes_its_bound(std: float, mean: float, cut: float) -> None:
    scheme, block = TruncatedNormal(std, mean, cut), torch.empty(1 << 18)
    for seed in range(4):
        scheme.fill_(block, torch.Generator().manual_seed(seed))
        distance = (block.double() - mean).abs().max()
        assert float(distance) <= scheme.bound
        assert float(distance) > 0.98 * scheme.bound
