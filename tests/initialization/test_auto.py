"""Scheme auto: gains where they matter, PyTorch's or the author's own draw everywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_init import InitCallback, Rule, gain_of, initialize

WIDTH = 64
ROWS = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(0))


def plain(depth: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers = [one for _ in range(depth - 1) for one in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@pytest.mark.parametrize(("activation", "name"), [(nn.ReLU, "relu"), (nn.GELU, "gelu"), (nn.Tanh, "tanh")])
def test_deep_plain_nets_get_the_gain_of_what_feeds_each_weight(activation: Any, name: str) -> None:
    model = plain(20, activation)
    report = initialize(model, "auto", seed=0, batch=ROWS)
    report.check()
    assert report["0.weight"].gain == 1.0  # fed by the input
    for index in range(2, 38, 2):
        assert report[f"{index}.weight"].gain == pytest.approx(gain_of(name), rel=3e-3)
        assert model[index].weight.std().item() == pytest.approx(gain_of(name) / math.sqrt(WIDTH), rel=0.05)
        assert not model[index].bias.any()
    assert report["38.weight"].scheme == "torch_default"  # an output layer
    assert float(model[:38](ROWS).detach().square().mean()) > 0.05


@pytest.mark.parametrize(
    "model",
    [plain(4, nn.ReLU), nn.Sequential(*(m for _ in range(10) for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))))],
    ids=["shallow", "normalized"],
)
def test_where_gains_do_not_matter_each_module_draws_as_it_does(model: nn.Sequential) -> None:
    report = initialize(model, "auto", seed=0, batch=ROWS)
    for entry in report.drawn:
        if entry.name.endswith("weight") and entry.fans:
            assert entry.scheme == "torch_default", entry.name
            assert entry.target_std == pytest.approx(1 / math.sqrt(3 * WIDTH))
    assert all(layer.bias.any() for layer in model if isinstance(layer, nn.Linear))
    assert not any(note.startswith("fed by") for note in report.notes)  # there is no gain to speak of


class Blocks(nn.Module):
    """A long chain in front of blocks whose outputs are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = plain(8, nn.ReLU)[:-1]
        self.blocks = nn.ModuleList(plain(7, nn.ReLU)[:-2] for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_what_is_added_up_shares_the_variance() -> None:
    report = initialize(Blocks(), "auto", seed=0, batch=ROWS)
    for index in range(3):
        writer = report[f"blocks.{index}.10.weight"]
        assert "summands" in writer.decided_by
        summands = int(writer.decided_by.split()[2])
        assert summands >= 3
        assert writer.gain == pytest.approx(math.sqrt(2 / summands), rel=3e-3)


def test_what_an_author_drew_is_drawn_again_at_his_scale() -> None:
    model = plain(12, nn.ReLU)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    before = model[2].weight.detach().clone()
    report = initialize(model, "auto", seed=0, batch=ROWS)
    assert report["2.weight"].decided_by == "author's scale"
    assert report["2.weight"].target_std == pytest.approx(0.02)
    assert not torch.equal(model[2].weight, before)


def test_without_a_batch_it_is_he_normal_and_says_so() -> None:
    model, twin = plain(12, nn.ReLU), plain(12, nn.ReLU)
    report = initialize(model, "auto", seed=0)
    initialize(twin, "he_normal", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert any("was not found" in note for note in report.notes)


def test_rules_stand_before_it() -> None:
    report = initialize(plain(12, nn.ReLU), "auto", rules=[Rule("4.weight", "zeros")], seed=0, batch=ROWS)
    assert report["4.weight"].scheme == "zeros"


def test_it_is_the_callbacks_default() -> None:
    assert InitCallback()._request == InitCallback("auto")._request
