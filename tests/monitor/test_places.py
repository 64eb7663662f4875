"""Activations among a model's own code: whose units they have, and one line for each place they are called at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_init import LayerStats, observe


class Net(nn.Module):
    """Layers ``a`` and ``b`` with a third of their units dead behind the ReLU, and ``code`` that calls them."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor], *, image: bool) -> None:
        super().__init__()
        make: Callable[[], Any] = (lambda: nn.Conv2d(6, 6, 1)) if image else (lambda: nn.Linear(6, 6))
        self.a, self.b, self.act, self.code = make(), make(), nn.ReLU(), code
        self.gate = nn.Conv2d(6, 1, 1) if image else nn.Linear(6, 1)
        with torch.no_grad():
            for layer, dead in ((self.a, 2), (self.b, 3)):
                layer.weight[:dead], layer.bias[:dead] = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def stats_of(network: nn.Module, x: Tensor, layers: list[str] | None = None, *, grad: bool = True) -> LayerStats:
    with observe(network, layers=layers) as observation, torch.set_grad_enabled(grad):
        network(x)
    return observation.compute()


IMAGE, SEQUENCE = torch.randn(5, 6, 6, 7), torch.randn(5, 6, 6)
"""Where a dimension of positions is as large as the units', so that sizes do not tell."""

CODE: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor]] = {
    "gate": (lambda net, x: net.act(net.a(x) * net.gate(x).sigmoid()), IMAGE),
    "gate of a sequence": (lambda net, x: net.act(net.a(x) * net.gate(x).sigmoid()), SEQUENCE),
    "keyword": (lambda net, x: net.act(input=net.a(x)), IMAGE),
    "channels last": (lambda net, x: net.act(net.a(x).permute(0, 2, 3, 1).contiguous()), IMAGE),
    "transposed": (lambda net, x: net.act(net.a(x).transpose(1, 2)), SEQUENCE),
    "squeezed and excited": (
        lambda net, x: net.act(net.a(x) * net.a(x).mean((2, 3), keepdim=True).sigmoid()),
        IMAGE,
    ),
    "another layer in between": (lambda net, x: [y := net.a(x), net.b(x), net.act(y * 2)][-1], IMAGE),
}


@pytest.mark.parametrize("name", CODE)
def test_dead_units_behind_code_of_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    code, x = CODE[name]
    stats = stats_of(Net(code, image=x is IMAGE), x)
    assert stats.values["dead_units"] == {"act": pytest.approx(2 / 6)}


@pytest.mark.parametrize("layers", [None, ["act"]])
def test_units_do_not_depend_on_what_else_is_watched(layers: list[str] | None) -> None:
    """An activation alone, without the layers around it, has the same places and units."""
    torch.manual_seed(0)
    network = Net(lambda net, x: net.act(net.b(net.act(net.a(x))) + 0), image=True)
    dead = stats_of(network, IMAGE, layers).values["dead_units"]
    assert dead == {"act": pytest.approx(2 / 6), "act:2": pytest.approx(3 / 6)}


def test_units_that_nothing_tells_are_not_guessed() -> None:
    """Without a graph, a product could be anything; the variance of all elements is still known."""
    code, x = CODE["gate"]
    stats = stats_of(Net(code, image=True), x, grad=False)
    assert "act" in stats.values["activation_variance"]
    assert "act" not in stats.values["signal_variance"]
    assert stats.values["dead_units"] == {}


def test_a_place_is_behind_one_layer_however_often_it_is_called() -> None:
    """A loop is one line; two layers are two, in the order of their first calls."""
    torch.manual_seed(0)

    def loop(net: Net, x: Tensor) -> Tensor:
        for _ in range(3):
            x = net.act(net.a(x))
        return net.act(net.b(x) + x)

    values = stats_of(Net(loop, image=False), SEQUENCE).values
    assert list(values["activation_variance"]) == ["a", "act", "b", "act:2"]
    assert values["dead_units"]["act"] == pytest.approx(2 / 6)


def test_calls_without_a_graph_do_not_drown_those_with_one() -> None:
    """Two hundred moves of a rollout, and then one batch that is learned from."""
    torch.manual_seed(0)

    def rollout(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            far = 100 * x
            for _ in range(200):
                net.act(net.a(far))
        return net.act(net.a(x))

    network = Net(rollout, image=False)
    seen = stats_of(network, SEQUENCE)
    network.code = lambda net, x: net.act(net.a(x))
    assert seen == stats_of(network, SEQUENCE)


def test_calls_without_a_graph_count_where_there_are_no_others() -> None:
    network = Net(lambda net, x: net.act(net.a(x)), image=False)
    with_graph, without = (stats_of(network, SEQUENCE, grad=grad).values for grad in (True, False))
    assert with_graph["activation_variance"] == without["activation_variance"]


class Pair(nn.Module):
    """A mask and a loss beside what counts."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        self.order, self.scale = order, nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = x * self.scale
        outputs = {"mask": torch.ones(len(x), 1), "loss": h.square().mean(), "h": h}
        return {name: outputs[name] for name in self.order}


@pytest.mark.parametrize("order", [("mask", "loss", "h"), ("loss", "h", "mask"), ("h", "loss")])
def test_of_several_outputs_the_signal_counts(order: tuple[str, ...]) -> None:
    network, x = nn.Sequential(Pair(*order)), torch.randn(50, 6)
    (variance,) = stats_of(network, x).values["activation_variance"].values()
    assert variance == pytest.approx(4 * float(x.var(correction=0)))


def test_a_layer_called_total_is_not_the_total() -> None:
    network = nn.ModuleDict({"total": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    with observe(network) as observation:
        network["other"](network["total"](torch.ones(2, 3))).sum().backward()
    norms = observation.compute().values["gradient_norm"]
    assert list(norms) == ["total:layer", "other", "total"]
    assert norms["total"] == pytest.approx((norms["total:layer"] ** 2 + norms["other"] ** 2) ** 0.5)
