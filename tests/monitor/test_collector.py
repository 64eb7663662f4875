"""What the hooks record, in every way a module can be called, and what they leave behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_init.introspect.layers import find_layers
from lightning_init.monitor.collector import ActivationCollector
from lightning_init.monitor.moments import signal_variance, variance
from lightning_init.monitor.record import LayerRecord
from lightning_init.monitor.statistics import DEFAULT_STATS
from tests.support.modules import Checkpointed
from tests.support.oracle import Watched
from tests.support.recording import Loss, by_layer, fail, squared


def records_of(
    network: nn.Module, *inputs: Tensor, loss: Loss = squared, factor: float = 1.0
) -> dict[str, LayerRecord]:
    """Forward and backward under a collector, in the order a Trainer does it."""
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    collector.attach()
    value = sum(loss(network, x) for x in inputs)
    collector.gradient_factor = factor
    value.backward()
    collector.detach()
    return by_layer(collector.drain())


def assert_equals_oracle(network: nn.Module, *inputs: Tensor, loss: Loss = squared) -> dict[str, LayerRecord]:
    """Compare with outputs and gradients kept whole in a float64 copy."""
    slow = copy.deepcopy(network).double()
    records = records_of(network, *inputs, loss=loss)
    watched = Watched(slow, records)
    sum(loss(slow, x.double()) for x in inputs).backward()
    for name, record in records.items():
        outputs = torch.cat([output.flatten() for output in watched.outputs[name]])
        gradients = torch.cat([gradient.flatten() for gradient in watched.gradients[name]])
        merged = [float(variance(m)) for m in record.outputs.values()]
        if len(merged) == 1:
            assert merged[0] == pytest.approx(outputs.var(correction=0).item(), rel=1e-5), name
        assert sum(m.n for m in record.outputs.values()) == outputs.numel(), name
        assert record.gradients is not None, name
        assert record.gradients.n == gradients.numel(), name
        assert float(variance(record.gradients)) == pytest.approx(gradients.var(correction=0).item(), rel=1e-5), name
    return records


class InPlaceResidual(nn.Module):
    """``out += x`` and an in-place ReLU behind a Linear, whose output is a view for three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.a(x))
        out = self.b(out)
        out += x
        return out * 1.5


@pytest.mark.parametrize("shape", [(8, 6), (4, 5, 6)])
def test_collector_with_in_place_operations(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    records = assert_equals_oracle(InPlaceResidual(), torch.randn(shape))
    assert list(records) == ["a", "act", "b"]


class Calls(nn.Module):
    """One Linear called three times, and so is the ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.last = nn.Linear(6, 6), nn.Linear(6, 4), nn.ReLU(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.a(x))
        return self.last(self.b(x) + 1)


def test_collector_of_modules_called_several_times() -> None:
    torch.manual_seed(0)
    records = assert_equals_oracle(Calls(), torch.randn(8, 6), torch.randn(3, 6))
    assert {units: m.n for units, m in records["act"].outputs.items()} == {6: 3 * 11 * 6}
    assert {units: m.n for units, m in records["last"].outputs.items()} == {4: 11 * 4}
    assert records["a"].outputs[6].n == 3 * 11 * 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_collector_with_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    twice = nn.Linear(6, 6)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    network = Checkpointed(twice, [block], twice, reentrant=reentrant)
    plain = copy.deepcopy(network)
    plain.recompute = False
    x = torch.randn(8, 6)
    with_it, without = records_of(network, x), records_of(plain, x)
    assert_equals_oracle(plain, x)
    assert list(with_it) == list(without)
    for name, record in without.items():
        assert with_it[name].outputs.keys() == record.outputs.keys()
        for units, m in record.outputs.items():
            assert with_it[name].outputs[units].n == m.n
            assert with_it[name].outputs[units].squares == m.squares
        assert with_it[name].gradients is not None
        assert record.gradients is not None
        assert with_it[name].gradients.n == record.gradients.n
        torch.testing.assert_close(with_it[name].gradients.squares, record.gradients.squares, rtol=1e-6, atol=0)


def penalized(network: nn.Module, x: Tensor) -> Tensor:
    """A gradient penalty: torch.autograd.grad runs through the network before the loss does."""
    x = x.clone().requires_grad_()
    value = network(x).square().mean()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    return value + gradient.square().sum()


def test_collector_records_the_announced_backward_only() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    records = records_of(network, torch.randn(8, 6), loss=penalized)
    assert records["0"].gradients is not None
    assert records["0"].gradients.n == 8 * 6

    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    collector.attach()
    squared(network, torch.randn(8, 6)).backward()  # nobody announced it
    assert list(collector.unannounced) == ["2", "1", "0"]
    assert all(record.gradients is None for record in collector.drain().values())
    collector.detach()


def test_collector_records_only_when_it_should() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    counts = False
    collector.attach(lambda: counts)
    network(torch.randn(8, 6))
    assert collector.drain() == {}
    counts = True
    network(torch.randn(8, 6))
    assert list(by_layer(collector.drain())) == ["0", "1"]
    collector.detach()
    network(torch.randn(8, 6))
    assert collector.drain() == {}


def test_collector_scales_gradients_or_leaves_them_out() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(8, 6)
    one, quarter = records_of(network, x)["0"].gradients, records_of(network, x, factor=0.25)["0"].gradients
    assert one is not None
    assert quarter is not None
    assert float(variance(quarter)) == pytest.approx(float(variance(one)) / 16, rel=1e-12)
    collector = ActivationCollector(find_layers(network), ["activation_variance"], on_fault=fail)
    collector.attach()
    collector.gradient_factor = 1.0
    squared(network, x).backward()
    assert by_layer(collector.drain())["0"].gradients is None
    collector.detach()


class Branches(nn.Module):
    """An owner that hands on its child's tensor, and one that changes it in place first."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 6)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x.add_(1) if self.change else x


@pytest.mark.parametrize("change", [False, True])
def test_collector_of_an_owner_that_returns_its_childs_tensor(change: bool) -> None:
    records = records_of(nn.Sequential(Branches(change), nn.Linear(6, 1)), torch.randn(8, 6))
    assert list(records) == (["0.inner", "0", "1"] if change else ["0.inner", "1"])


def test_units_of_an_activation_are_those_of_its_predecessor() -> None:
    """Images as high and wide as they are deep: only the predecessor knows the channels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0), nn.Tanh())
    x = torch.randn(2, 3, 4, 4) * torch.tensor([1.0, 2, 3, 4])
    records = records_of(network, x)
    with torch.no_grad():
        relu = network[:3](x).double()
    for units_of, values in (("2", relu), ("4", relu.tanh())):
        measured = float(signal_variance(records[units_of].outputs[4]))
        assert measured == pytest.approx(values.var((0, 2, 3), correction=0).mean().item(), rel=1e-5)
        assert measured != pytest.approx(values.var((0, 1, 2), correction=0).mean().item(), rel=1e-2)


class Choosy(nn.Module):
    """Outputs of every kind: no tokens for an expert, a scalar, integers only, None."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.gate = nn.Linear(6, 6), nn.Linear(6, 1)
        self.scalar, self.index, self.nothing = Returns(), Returns(), Returns()

    def forward(self, x: Tensor) -> Tensor:
        self.expert(x[:0])
        self.scalar(x.sum())
        self.index(torch.arange(3))
        self.nothing(None)
        return self.gate(x)


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Any) -> Any:
        return x


def test_collector_of_unusual_outputs() -> None:
    records = records_of(Choosy(), torch.randn(8, 6))
    assert records["expert"].outputs[6].n == 0
    assert records["scalar"].outputs[1].n == 1
    assert set(records) == {"expert", "scalar", "gate"}


def test_collector_of_a_view_of_a_view() -> None:
    """The second layer's output shares its base with the first's, but not its gradient."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), Reshape()

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x)
            return self.second(a) + 3 * a.flatten(1)

    class Reshape(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(30))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    torch.manual_seed(0)
    assert_equals_oracle(Split(), torch.randn(4, 5, 6))


class Prompt(nn.Module):
    """Hands out its very parameter, which outlives every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(8))

    def forward(self) -> Tensor:
        return self.tokens


def test_collector_leaves_no_hook_on_a_parameter_that_was_an_output() -> None:
    network = nn.Sequential(Prompt(), nn.Linear(8, 2))
    records = records_of(network, torch.randn(4, 8), loss=lambda net, x: net[1](x + net[0]()).square().mean())
    assert records["0"].gradients is not None
    assert not network[0].tokens._backward_hooks
