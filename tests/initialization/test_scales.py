"""Which scales an author chose, and which are habits or formulas that a scheme replaces."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_init import Normal, Rule, initialize
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.whole_model import AUTHORS_SCALE
from tests.support.training import fresh

Draw = Callable[[nn.Linear], object]


def mlp(draw: Draw | None = None, *, width: int = 96, last: Draw | None = None) -> nn.Sequential:
    """Four layers whose weights an author drew."""
    sizes = [(48, width), (width, width), (width, width), (width, 10)]
    layers = [layer for i, o in sizes for layer in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*layers[:-1])
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in linear:
        if draw is not None:
            draw(layer)
    if last is not None:
        last(linear[-1])
    return net


def normal(std: float) -> Draw:
    return lambda layer: nn.init.normal_(layer.weight, std=std)


def by_fan(gain: float) -> Draw:
    return lambda layer: nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))


def stds(net: nn.Module) -> list[float]:
    return [float(p.detach().std()) for name, p in net.named_parameters() if name.endswith("weight")]


HE = [math.sqrt(2 / fan) for fan in (48, 96, 96, 96)]
TORCH = [1 / math.sqrt(3 * fan) for fan in (48, 96, 96, 96)]
HABITS: dict[str, Draw | None] = {
    "torch's default": None,
    "standard normal": normal(1.0),
    "one number for all": normal(0.02),
    "another number for all": normal(0.013),
}
FORMULAS: dict[str, Draw] = {
    "LeCun": by_fan(1.0),
    "He": by_fan(math.sqrt(2)),
    "Xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
}


@pytest.mark.parametrize("name", [*HABITS, *FORMULAS])
def test_a_scheme_replaces_habits_and_formulas(name: str) -> None:
    net = fresh(lambda: mlp({**HABITS, **FORMULAS}[name]))
    initialize(net, "he_normal")
    assert stds(net) == pytest.approx(HE, rel=0.15)


@pytest.mark.parametrize("name", HABITS)
def test_torch_default_replaces_habits(name: str) -> None:
    net = fresh(lambda: mlp(HABITS[name]))
    initialize(net, "torch_default")
    assert stds(net) == pytest.approx(TORCH, rel=0.15)


@pytest.mark.parametrize("name", FORMULAS)
def test_torch_default_leaves_formulas_their_scale(name: str) -> None:
    """Whoever followed a formula knew PyTorch's default."""
    net = fresh(lambda: mlp(FORMULAS[name]))
    before = stds(net)
    drawn = initialize(net, "torch_default", seed=1)
    assert stds(net) == pytest.approx(before, rel=0.15)
    assert drawn["2.weight"].decided_by == AUTHORS_SCALE
    assert [drawn[name].left for name in ("0.weight", "2.weight", "6.weight")] == [None] * 3


@pytest.mark.parametrize("scheme", ["he_normal", "torch_default"])
def test_small_weights_do_not_depend_on_the_authors_random_numbers(scheme: str) -> None:
    """Chance must not look like a purpose: the same seed gives the same weights, whatever was there before."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(13, 7), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))

    expected = [p.detach().clone() for p in initialized(build, scheme, 0).parameters()]
    for author in range(1, 60):
        for one, other in zip(initialized(build, scheme, author).parameters(), expected, strict=True):
            assert torch.equal(one, other), f"author's seed {author}"


def initialized(build: Callable[[], nn.Module], scheme: str, author: int) -> nn.Module:
    model = fresh(build, author)
    initialize(model, scheme, seed=1)
    return model


@pytest.mark.parametrize("draw", [None, by_fan(1.0)])
@pytest.mark.parametrize("scheme", ["he_normal", "torch_default"])
def test_an_unusual_layer_among_usual_ones_stays(draw: Draw | None, scheme: str) -> None:
    """As the queries of T5, which no one divides afterwards, or an output layer of N(0, 0.01²)."""
    net = fresh(lambda: mlp(draw, last=normal(0.01)))
    before = net.get_parameter("6.weight").detach().clone()
    entry = initialize(net, scheme)["6.weight"]
    assert entry.left is Reason.SET_BY_AUTHOR
    assert torch.equal(net.get_parameter("6.weight"), before)


def test_an_unusual_layer_is_drawn_by_a_rule() -> None:
    net = fresh(lambda: mlp(last=normal(0.01)))
    initialize(net, "he_normal", rules=[Rule("6.weight", Normal(0.3))])
    assert stds(net)[-1] == pytest.approx(0.3, rel=0.15)


def test_input_weights_of_a_narrow_lstm_are_drawn() -> None:
    """PyTorch draws them by the number of hidden units: far from 1/√fan_in, and nobody's purpose."""
    model = fresh(lambda: nn.Sequential(nn.LSTM(2, 512, num_layers=2)))
    report = initialize(model, "lecun_normal")
    assert report["0.weight_ih_l0"].left is None


class Siren(nn.Module):
    """sin(30·Wx) twice, and an output layer by the same formula."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 3)])
        nn.init.uniform_(self.layers[0].weight, -1 / 2, 1 / 2)
        for layer in list(self.layers)[1:]:
            nn.init.uniform_(layer.weight, -math.sqrt(6 / width) / 30, math.sqrt(6 / width) / 30)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = torch.sin(30 * layer(x))
        output: Tensor = self.layers[-1](x)
        return output


@pytest.mark.parametrize("scheme", ["he_normal", "torch_default", "orthogonal"])
def test_siren_keeps_its_scales(scheme: str) -> None:
    model = fresh(Siren)
    before = [stds(model), weights(model)]
    report = initialize(model, scheme, batch=torch.rand(16, 2))
    assert stds(model)[1:] == pytest.approx(before[0][1:], rel=0.3)  # 128 numbers cannot tell ±1/2 from PyTorch's ±1/√2
    assert report["layers.1.weight"].decided_by == AUTHORS_SCALE
    assert all(not torch.equal(old, new) for old, new in zip(before[1], weights(model), strict=True))


def test_siren_gets_its_own_scheme() -> None:
    model = fresh(Siren)
    report = initialize(model, "siren", batch=torch.rand(16, 2))
    assert report["layers.1.weight"].scheme == "siren"


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")]


class Language(nn.Module):
    """A table, N branches added to it, an output layer that reads the table."""

    def __init__(self, std: float, branches: int = 4, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        nn.init.normal_(self.table.weight, std=std)
        self.readers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(branches))
        self.writers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(branches))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for reader, writer in zip(self.readers, self.writers, strict=True):
            x = x + writer(torch.relu(reader(self.norm(x))))
        return nn.functional.linear(self.norm(x), self.table.weight)


@pytest.mark.parametrize("std", [0.02, 0.125])
@pytest.mark.parametrize(("scheme", "gain"), [("he_normal", math.sqrt(2)), ("torch_default", 1 / math.sqrt(3))])
def test_what_is_added_to_a_table_gets_its_scale(std: float, scheme: str, gain: float) -> None:
    """All of it together as large as the rows: std·gain/√fan_in/√N."""
    model = fresh(lambda: Language(std))
    tokens = torch.arange(50).view(5, 10)
    report = initialize(model, scheme, batch=tokens)
    for index in range(4):
        entry = report[f"writers.{index}.weight"]
        assert entry.target_std == pytest.approx(std * gain / math.sqrt(128) / 2, rel=1e-6)
        assert entry.decided_by == "added to a table"
    assert "added to the rows of a lookup table" in "\n".join(report.notes)
    report = initialize(
        fresh(lambda: Language(std)), scheme, rules=[Rule("writers.0.weight", "lecun_normal")], batch=tokens
    )
    assert report["writers.0.weight"].target_std == pytest.approx(1 / math.sqrt(128), rel=1e-6)


def test_what_is_added_to_a_large_table_gets_the_scheme() -> None:
    model = fresh(lambda: Language(1.0))
    for table in (model.table,):
        nn.init.normal_(table.weight, std=0.9)
    report = initialize(model, "he_normal", batch=torch.arange(50).view(5, 10))
    assert report["writers.0.weight"].target_std == pytest.approx(math.sqrt(2 / 128), rel=1e-6)
