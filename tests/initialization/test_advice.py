"""What is said about parameters that nothing is known of: lines to paste, and a warning where that is most of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_init
from lightning_init import Normal, Rule, initialize
from lightning_init.initialization.report import InitReport
from lightning_init.introspect import roles

WIDTH = 16


class Mixing(nn.Module):
    """A kernel, a bias, a scale, a mask of one element, and lists of them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, 8))
        self.taps = nn.Parameter(torch.randn(WIDTH, 8, 3))
        self.out_bias = nn.Parameter(torch.zeros(WIDTH))
        self.gamma = nn.Parameter(torch.ones(WIDTH))
        self.dummy = nn.Parameter(torch.ones(1))
        self.listed = nn.ParameterList([torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)])
        self.named = nn.ParameterDict({"scale": torch.ones(WIDTH)})


class Linear(nn.Module):
    """Somebody's own, beside torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "_registry", {key: dict(value) for key, value in roles._registry.items()})


def drawn(model: nn.Module, **options: Any) -> InitReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return initialize(model, "he_normal", seed=1, **options)


def pasted(line: str) -> Any:
    return eval(line, {**{name: getattr(lightning_init, name) for name in lightning_init.__all__}, "Mixing": Mixing})


ADVICE = {
    "kernel": "register(Mixing, 'kernel', lambda m: Fans(m.kernel.shape[1], m.kernel.shape[0]))",
    "taps": "register(Mixing, 'taps', lambda m: Fans(m.taps[0].numel(), m.taps[:, 0].numel()))",
    "out_bias": "register(Mixing, 'out_bias', 'bias')",
    "gamma": "register(Mixing, 'gamma', 'norm')",
    "dummy": "",
    "listed.0": "register(Mixing, 'listed.0', lambda m: Fans(m.listed[0].shape[1], m.listed[0].shape[0]))",
    "named.scale": "register(Mixing, 'named.scale', 'norm')",
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_that_is_pasted_draws_one_parameter(name: str) -> None:
    report = drawn(Mixing())
    assert report[name].advice == ADVICE[name]
    if ADVICE[name]:
        pasted(report[name].advice)
        report = drawn(Mixing())
        assert [entry.name for entry in report.drawn] == [name]
        report.check()
    if name == "taps":
        assert report["taps"].fans == (24.0, 48.0)


def test_advice_names_the_module_of_a_class_that_is_not_the_only_one_of_its_name() -> None:
    model = nn.Sequential(Linear(), nn.Linear(WIDTH, WIDTH))
    report = drawn(model)
    assert report["0.weight"].module_type == f"{__name__}.Linear"
    assert report["1.weight"].module_type == "torch.nn.modules.linear.Linear"
    line = report["0.weight"].advice
    assert line.startswith(f"register('{__name__}.Linear', 'weight', lambda m: ")
    pasted(line)
    assert len(drawn(model).drawn) == 3


def test_advice_for_a_class_that_shadows_one_of_torch_has_its_module() -> None:
    assert drawn(Linear())["weight"].advice.startswith(f"register('{__name__}.Linear', ")


def test_advice_for_a_list_that_is_the_model_is_a_rule() -> None:
    model = nn.ParameterList([torch.randn(4, 4)])
    assert drawn(model)["0"].advice == "Rule('0', Normal(std))"
    assert drawn(model, rules=[Rule("0", Normal(0.1))])["0"].measured_std == pytest.approx(0.1, rel=0.7)


def test_advice_for_a_name_that_no_code_can_write_is_a_rule() -> None:
    model = Mixing()
    model.named["a b"] = nn.Parameter(torch.randn(4, 4))
    assert drawn(model)["named.a b"].advice == "Rule('named.a b', Normal(std))"


def test_model_that_is_mostly_unknown_is_warned_about() -> None:
    model = nn.Sequential(Mixing(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"only 5 % of the weights are of a known type and drawn(.|\n)*Mixing"):
        initialize(model, "he_normal", seed=1)


def test_model_that_is_mostly_known_is_not_warned_about() -> None:
    initialize(nn.Sequential(Mixing(), nn.Linear(64, 64)), "he_normal", seed=1)  # warnings are errors
