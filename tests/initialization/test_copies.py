"""Copies of weights that others made before new ones are drawn."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_init import Rule, initialize
from lightning_init.initialization.initialize import carry_out
from lightning_init.initialization.report import InitReport
from lightning_init.initialization.rules import Request


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def drawn_with(model: nn.Module, **holders: object) -> InitReport:
    return carry_out(model, Request.of("he_normal"), seed=1, holders=holders)


def copied(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "keep", [list, tuple, lambda tensors: {"slow": [tensors]}, lambda tensors: SlowWeights(tensors)]
)
def test_copies_in_an_optimizer_are_refreshed(keep: type) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.slow = keep(slow := copied(model))
    report = drawn_with(model, optimizer=optimizer)
    assert all(torch.equal(one, parameter) for one, parameter in zip(slow, model.parameters(), strict=True))
    assert report.notes == ("optimizer held copies of 0.weight and 3 more: they have the new values too",)


class SlowWeights:
    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


def test_copies_in_optimizer_state_are_refreshed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter]["anchor"] = parameter.detach().clone()
    drawn_with(model, optimizer=optimizer)
    assert all(torch.equal(optimizer.state[parameter]["anchor"], parameter) for parameter in model.parameters())


def test_average_is_refreshed_with_its_constants() -> None:
    """A zero equals many; that of an average is told by its name."""
    model = network()
    nn.init.zeros_(model[2].weight)
    average = AveragedModel(model)
    report = carry_out(
        model, Request.of("he_normal", [Rule("2.weight", "he_normal")]), 1, holders={"average": SlowWeights([average])}
    )
    assert all(map(torch.equal, average.module.parameters(), model.parameters()))
    assert float(average.module[2].weight.detach().std()) > 0
    assert report.notes == ("average held copies of 0.weight and 3 more: they have the new values too",)


def test_anchor_in_the_model_itself_is_refreshed() -> None:
    """Plain attributes, and buffers, of any of its modules."""
    model = network()
    model[0].anchor = {"weight": model[0].weight.detach().clone()}
    model.register_buffer("shadow", model[2].weight.detach().clone())
    report = initialize(model, "he_normal", seed=1)
    assert torch.equal(model[0].anchor["weight"], model[0].weight)
    assert torch.equal(model.shadow, model[2].weight)
    assert report.notes == (
        "shadow held a copy of 2.weight: it has the new values too",
        "0 held a copy of 0.weight: it has the new values too",
    )


def test_what_was_computed_from_weights_is_named() -> None:
    model = network()
    model.register_buffer("halved", model[0].weight.detach() / 2)
    before = model.halved.clone()
    report = initialize(model, "he_normal", seed=1)
    assert torch.equal(model.halved, before)
    assert report.notes == ("halved was computed from the old values of 0.weight: compute it again",)
    assert "halved was computed" in str(report)
    assert "- halved was computed" in report.to_markdown()


def test_others_are_neither_changed_nor_named() -> None:
    """Random numbers, data, views, gradients, and copies of what is not drawn."""
    model = network()
    model[0].weight.requires_grad_(False)
    others = SimpleNamespace(
        random=torch.randn(16, 8),
        frozen=model[0].weight.detach().clone(),
        view=model[2].weight.data,
        zeros=torch.zeros(16),
    )
    before = {name: value.clone() for name, value in vars(others).items() if name != "view"}
    report = drawn_with(model, holder=SlowWeights([others.random, others.frozen, others.view, others.zeros]))
    assert report.notes == ()
    assert all(torch.equal(getattr(others, name), value) for name, value in before.items())


def test_copy_in_half_precision_is_refreshed() -> None:
    model = network().bfloat16()
    master = [parameter.detach().float() for parameter in model.parameters()]
    drawn_with(model, holder=SlowWeights(master))
    assert all(torch.equal(one, parameter.float()) for one, parameter in zip(master, model.parameters(), strict=True))


def test_registered_copies_are_drawn_by_their_own_names() -> None:
    model = nn.ModuleDict({"online": network(), "target": None})
    model["target"] = copy.deepcopy(model["online"])
    report = initialize(model, "he_normal", seed=1)
    assert report.notes == ()
    assert not torch.equal(model["online"][0].weight, model["target"][0].weight)
