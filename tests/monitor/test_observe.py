"""Plain PyTorch gets the same numbers as a Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor, observe
from tests.support.faults import MOMENTS_OF, broken
from tests.support.models import digits, mlp
from tests.support.oracle import BatchModule, MemoryLogger, assert_tags_close, cross_entropy, expected_tags
from tests.support.trainers import make_trainer

PIXELS, CLASSES = (t[:32] for t in digits())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(16, 2)


def test_observe_gives_the_monitors_numbers() -> None:
    model, memory = network(), MemoryLogger()
    monitor = ActivationVarianceMonitor(1, stats=["default", "kurtosis", "weight_norm"])
    module = BatchModule(copy.deepcopy(model), [(PIXELS, CLASSES)])
    make_trainer(max_epochs=1, logger=memory, callbacks=[monitor]).fit(module)
    with observe(model, stats=["default", "kurtosis", "weight_norm"]) as watching:
        cross_entropy(model, (PIXELS, CLASSES)).backward()
    named = {
        tag.replace("/", "/network.").replace("network.total", "total"): v for tag, v in watching.compute().tags.items()
    }
    assert named == monitor.latest


def test_observe_records_the_passes_of_its_block() -> None:
    model = network()
    slow = copy.deepcopy(model).double()
    cross_entropy(model, (PIXELS * 9, CLASSES))
    with observe(model) as watching:
        for half in (slice(0, 20), slice(20, 32)):
            (cross_entropy(model, (PIXELS[half], CLASSES[half])) / 2).backward()
    model(PIXELS * 9)
    batches = [(PIXELS[half].double(), CLASSES[half]) for half in (slice(0, 20), slice(20, 32))]
    expected = expected_tags(slow, [batches], accumulation=2, prefix="", rectifiers=["1", "3"])
    assert_tags_close(watching.compute().tags, expected)
    assert watching.compute() is watching.compute()
    assert not any(module._forward_hooks for module in model.modules())
    with watching:
        model(PIXELS * 2)
    again = watching.compute()
    assert again.values["gradient_variance"] == {}
    assert again.values["activation_variance"]["0"] != expected["activation_variance/0"]


def test_observe_of_a_compiled_model() -> None:
    model = torch.compile(network(), backend="eager")
    model(PIXELS)
    with observe(model, layers=["?"]) as watching:
        model(PIXELS).sum().backward()
    assert list(watching.compute().values["gradient_variance"]) == ["0", "1", "2", "3", "4"]


def test_observe_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"'6' matches no layer"):
        observe(network(), layers=["6"])
    with pytest.raises(ValueError, match=r"observe sees no optimizer step, which \['update_ratio'\] would need"):
        observe(network(), stats=["default", "update_ratio"])


def test_observe_errors_are_raised_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the block his own; in measuring, told by compute."""
    model = network()
    with pytest.raises(ZeroDivisionError), observe(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())

    monkeypatch.setattr(MOMENTS_OF.target, broken)
    with observe(model) as watching:
        model(PIXELS)
    with pytest.raises(RuntimeError, match="observation has failed: rank 0: hook on layer '0': RuntimeError: bad luck"):
        watching.compute()


def test_observe_of_a_model_without_layers() -> None:
    model = nn.ReLU()
    with observe(model) as watching:
        model(torch.ones(3, 2, requires_grad=True)).sum().backward()
    assert watching.compute().tags == {}


def pinn(net: nn.Module, x: Tensor) -> Tensor:
    """A loss with a derivative by the input, as physics-informed networks have it."""
    u = net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (du.square().sum(1) - u[:, 0]).square().mean()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def gradient_by_output(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    """Variance of d loss / d output of layer 0, in float64."""
    slow, kept = copy.deepcopy(net).double(), []
    slow[0].register_forward_hook(lambda module, args, output: kept.append(output))
    value = loss(slow)
    gradients = torch.autograd.grad(value, kept)
    return float(torch.cat([gradient.flatten() for gradient in gradients]).var(correction=0))


def test_observe_with_derivatives_by_the_input() -> None:
    net, x = small(), torch.randn(16, 2, requires_grad=True)
    with observe(net) as watching:
        pinn(net, x).backward()
    true = gradient_by_output(net, lambda slow: pinn(slow, x.detach().double().requires_grad_()))
    assert watching.compute().values["gradient_variance"]["0"] == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_gradients_of_several_passes_through_one_output_are_that_of_the_sum(kept: bool) -> None:
    net, x = small(), torch.randn(16, 2)
    with observe(net) as watching:
        hidden = net[1](net[0](x))
        one, other = net[2](hidden).square().mean(), -net[2](hidden).mean()
        one.backward(retain_graph=True)
        other.backward(retain_graph=kept)
        if kept:
            (one + other).backward()

    def loss(slow: nn.Module) -> Tensor:
        out = slow(x.double())
        return (1 + kept) * (out.square().mean() - out.mean())

    found = watching.compute().values["gradient_variance"]["0"]
    assert found == pytest.approx(gradient_by_output(net, loss), rel=1e-5)


def test_two_calls_are_two_outputs() -> None:
    """Gradients of different outputs are pooled, not added, also where graphs are kept."""
    net, x = small(), torch.randn(16, 2)
    with observe(net) as watching:
        (net(x).square().mean() + net(2 * x).mean()).backward(retain_graph=True)
    true = gradient_by_output(net, lambda slow: slow(x.double()).square().mean() + slow(2 * x.double()).mean())
    assert watching.compute().values["gradient_variance"]["0"] == pytest.approx(true, rel=1e-5)


def test_compute_within_a_block_tells_of_all_of_it_so_far() -> None:
    net, x = small(), torch.randn(16, 2)
    with observe(net) as watching:
        net(x)
        first = watching.compute().values["activation_variance"]["0"]
        net(100 * x)
        both = watching.compute()
    alone, whole = net[0](x).detach(), torch.cat([net[0](x), net[0](100 * x)]).detach().double()
    assert first == pytest.approx(float(alone.var(correction=0)), rel=1e-5)
    assert both.values["activation_variance"]["0"] == pytest.approx(float(whole.var(correction=0)), rel=1e-5)
    assert watching.compute() == both


def test_norms_of_gradients_from_before_the_block_are_not_the_blocks() -> None:
    net, x = small(), torch.randn(16, 2)
    net(x).mean().backward()
    with observe(net) as watching, torch.no_grad():
        net(x)
    assert watching.compute().values["gradient_norm"] == {}
    with observe(net) as watching:
        net[2](net[0](x).detach()).mean().backward()
    assert set(watching.compute().values["gradient_norm"]) == {"2", "total"}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_norms_of_a_whole_step_are_those_before_zero_grad(set_to_none: bool) -> None:
    net, x = small(), torch.randn(16, 2)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with observe(net) as watching:
        net(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    twin(x).mean().backward()
    true = torch.cat([p.grad.double().flatten() for p in twin.parameters() if p.grad is not None]).norm()
    assert watching.compute().values["gradient_norm"]["total"] == pytest.approx(float(true), rel=1e-5)


def test_vectorized_jacobians_are_not_read() -> None:
    net, x = small(), torch.randn(16, 2)
    with observe(net) as watching:
        torch.autograd.functional.jacobian(lambda z: net(z).sum(0), x, vectorize=True)
    assert watching.compute().values["gradient_variance"] == {}


def test_observe_entered_again_keeps_up_with_its_model() -> None:
    net, x = small(), torch.randn(16, 2)
    watching = observe(net, layers=["0", "2"])
    with watching:
        net(x)
    assert list(watching.compute().values["activation_variance"]) == ["0", "2"]
    net[2] = nn.Sequential(nn.Linear(8, 3))
    with watching:
        net(x).sum().backward()
    stats = watching.compute()
    assert list(stats.values["activation_variance"]) == ["0"]
    net[2] = nn.Linear(8, 1)
    with watching:
        net(x).sum().backward()
    stats = watching.compute()
    assert list(stats.values["activation_variance"]) == ["0", "2"]
    assert list(stats.values["gradient_norm"]) == ["0", "2", "total"]


def test_observe_of_one_layer() -> None:
    layer = nn.Linear(2, 3)
    with observe(layer) as watching:
        layer(torch.randn(5, 2)).square().mean().backward()
    assert set(watching.compute().values["gradient_norm"]) == {"Linear", "total"}
