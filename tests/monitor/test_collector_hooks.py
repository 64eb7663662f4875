"""What the hooks leave behind: nothing in memory, in a saved model, or in a failing pass."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_init.introspect.layers import find_layers
from lightning_init.monitor.collector import ActivationCollector, in_backward_pass
from lightning_init.monitor.statistics import DEFAULT_STATS
from tests.support.faults import MOMENTS_OF, broken
from tests.support.recording import fail, squared


def test_activations_are_freed() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    kept: list[weakref.ref[Tensor]] = []
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    collector.attach()
    handle = network[1].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    squared(network, torch.randn(8, 6))  # the graph, and everything that belongs to it, is gone with the result
    gc.collect()
    assert kept[0]() is None
    handle.remove()
    collector.detach()


def test_hook_that_fails_is_reported_and_the_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[tuple[str, str]] = []
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    collector = ActivationCollector(
        find_layers(network), DEFAULT_STATS, on_fault=lambda name, error: faults.append((name, str(error)))
    )
    collector.attach()

    monkeypatch.setattr(MOMENTS_OF.target, broken)
    network(torch.randn(8, 6))
    assert faults == [("0", "bad luck"), ("1", "bad luck")]
    collector.detach()


def test_hooks_are_not_copied_or_pickled_with_a_model() -> None:
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    collector.attach()
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(buffer, weights_only=False)]
    x = torch.randn(8, 6)
    for twin in twins:
        assert torch.equal(twin(x), network[1](network[0](x)))
        collector.drain()
        twin(x).sum().backward()
        assert collector.drain() == {}
    collector.detach()
    assert not any(module._forward_hooks for module in network.modules())


def test_in_backward_pass_is_true_in_one_only() -> None:
    inside: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: inside.append(in_backward_pass()))
    assert not in_backward_pass()
    y.sum().backward()
    assert inside == [True]
    assert not in_backward_pass()


class Parts(nn.Module):
    """Returns two outputs of one node, the second first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (x * self.weight).unbind(1)
        return second, first


@pytest.mark.parametrize(("part", "reached"), [(0, True), (1, False)])
def test_output_among_others_of_its_node(part: int, reached: bool) -> None:
    """Its own gradient is taken; where none reaches it, as little is said as of a layer the loss does not need."""
    torch.manual_seed(0)
    network = nn.Sequential(Parts())
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    collector.attach()
    chosen = network(torch.randn(4, 2, 6))[part]
    collector.gradient_factor = 1.0
    chosen.square().sum().backward()
    (record,) = collector.drain().values()
    collector.detach()
    assert (record.gradients is not None) == reached
    assert not collector.partial_layers
    if record.gradients is not None:
        assert record.gradients.squares == pytest.approx((2 * chosen).square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (2, 4, 6)])
def test_hook_of_the_user_changes_the_recorded_gradient(shape: tuple[int, ...]) -> None:
    """What flows into the layer is measured, whoever came first."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6))
    found = []
    for factor in (1.0, 10.0):
        collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
        collector.attach()
        output = network(torch.ones(*shape))
        output.register_hook(lambda gradient, factor=factor: gradient * factor)
        collector.gradient_factor = 1.0
        output.square().sum().backward()
        (record,) = collector.drain().values()
        assert record.gradients is not None
        found.append(record.gradients.squares)
        collector.detach()
    assert found[1] == pytest.approx(100 * found[0], rel=1e-6)


def test_in_place_operation_on_a_checkpoints_input_fails_as_without_hooks() -> None:
    """A hook on that tensor would end the process."""
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    collector.attach()
    output = checkpoint(network[1], network[0](torch.randn(4, 6)).view(-1, 6), use_reentrant=True)
    with pytest.raises(RuntimeError, match="in-place operation"):
        output.sum().backward()
    collector.detach()
