"""Squared gradient norms in float64: per layer, in total, at any magnitude."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_init.introspect.layers import find_layers
from lightning_init.monitor.moments import pack
from lightning_init.monitor.parameter_norms import ParameterNorms, whole_gradients
from tests.support.models import conv_net, mlp

CPU = torch.device("cpu")


def with_gradients(network: nn.Module, *shape: int) -> nn.Module:
    torch.manual_seed(0)
    network(torch.randn(8, *shape)).square().mean().backward()
    return network


BLOCKS = 2e-7
"""What sums over blocks in float32 lose of a norm."""


def norms_of(network: nn.Module, parameters: list[nn.Parameter] | None = None) -> dict[str, float]:
    norms = ParameterNorms(find_layers(network), ["gradient_norm"])
    norms.before_step(whole_gradients(network.parameters() if parameters is None else parameters))
    return norms.read(vector(norms).numpy())["gradient"]


def vector(norms: ParameterNorms) -> Tensor:
    return pack(norms.packed(), CPU)


@pytest.mark.parametrize("build", [mlp, conv_net])
def test_gradient_norm_of_layers_and_total(build: type) -> None:
    torch.manual_seed(0)
    network = with_gradients(build(), 64)
    measured = norms_of(network)
    assert measured.pop("total") == pytest.approx(
        torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]).item(), rel=1e-6
    )
    modules = dict(network.named_modules())
    for name, norm in measured.items():
        own = torch.cat([p.grad.double().flatten() for p in modules[name].parameters() if p.grad is not None])
        assert norm == pytest.approx(own.norm().item(), rel=BLOCKS)
    assert len(measured) == sum(1 for m in modules.values() if list(m.parameters(recurse=False)))


@pytest.mark.parametrize("magnitude", [1e-22, 1e-30, 1.0, 1e18])
def test_gradient_norm_at_any_magnitude(magnitude: float) -> None:
    """In float32 the squares are 62 % wrong at 1e-22, gone at 1e-30 and infinite from 1e19."""
    network = with_gradients(mlp(), 64)
    exact = torch.cat([p.grad.double().flatten() for p in network.parameters() if p.grad is not None]).norm()
    for parameter in network.parameters():
        assert parameter.grad is not None
        parameter.grad = (parameter.grad.double() * magnitude / exact).float()
    rounded = torch.cat([p.grad.double().flatten() for p in network.parameters() if p.grad is not None]).norm()
    assert norms_of(network)["total"] == pytest.approx(rounded.item(), rel=BLOCKS)


def test_gradient_norm_of_tied_parameters_is_in_both_layers_and_once_in_total() -> None:
    network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    network[2].weight = network[0].weight
    measured = norms_of(with_gradients(network, 6))
    assert network[0].weight.grad is not None
    norm = network[0].weight.grad.double().norm().item()
    assert measured == {name: pytest.approx(norm, rel=BLOCKS) for name in ("total", "0", "2")}


def test_gradient_norm_of_stepped_parameters_only() -> None:
    """Another optimizer's gradients are stale; frozen parameters have none; the model's own are in total only."""
    network = with_gradients(mlp(depth=1), 64)
    only_first = norms_of(network, list(network[0].parameters()))
    assert set(only_first) == {"total", "0"}
    assert only_first["total"] == pytest.approx(only_first["0"], rel=1e-15)
    network[0].requires_grad_(False)
    network.zero_grad()
    assert set(norms_of(with_gradients(network, 64))) == {"total", "2"}
    network.scale = nn.Parameter(torch.ones(3))
    network.scale.grad = torch.full((3,), 2.0)
    measured = norms_of(network)
    assert set(measured) == {"total", "2"}
    assert measured["total"] ** 2 == pytest.approx(measured["2"] ** 2 + 12, rel=BLOCKS)


def test_gradient_norm_of_the_last_measurement_only() -> None:
    network = with_gradients(mlp(depth=1), 64)
    norms = ParameterNorms(find_layers(network), ["gradient_norm"])
    norms.before_step(whole_gradients(network.parameters()))
    once = vector(norms)
    norms.before_step(whole_gradients(network.parameters()))
    assert torch.equal(vector(norms), once)
    squares = norms.size // 2
    for factor in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        norms.before_step(whole_gradients(network.parameters()), factor)
        torch.testing.assert_close(vector(norms)[:squares], once[:squares] / 4, rtol=1e-12, atol=0)
    norms.clear()
    assert not vector(norms).any()
    assert len(norms.packed()) == norms.size


def test_gradient_norm_of_a_model_without_gradients() -> None:
    assert norms_of(nn.Sequential(nn.ReLU())) == {}
    assert norms_of(mlp()) == {}


def test_update_ratio_with_optimizers_that_take_turns() -> None:
    """Each step's parameters have their places; what two optimizers step adds up; a second look replaces the first."""
    network = with_gradients(mlp(depth=1), 64)
    gradients = whole_gradients(network.parameters())
    first = {p: g for p, g in gradients.items() if p in set(network[0].parameters())}
    second = {p: g for p, g in gradients.items() if p not in first}
    norms = ParameterNorms(find_layers(network), ["gradient_norm"])
    packed = []
    for parts in ([first], [second], [first, second], [gradients], [second, first, second]):
        for part in parts:
            norms.before_step(part)
        packed.append(vector(norms))
        norms.clear()
    torch.testing.assert_close(packed[2], packed[0] + packed[1], rtol=1e-15, atol=0)
    torch.testing.assert_close(packed[3], packed[2], rtol=1e-15, atol=0)
    torch.testing.assert_close(packed[4], packed[2], rtol=1e-15, atol=0)
    assert packed[0].count_nonzero() == packed[1].count_nonzero() == 4  # weight and bias, sums and counts


def test_update_ratio_of_parameters_without_layer() -> None:
    """``total`` is over the same parameters above and below the line, however few layers were chosen."""
    network = with_gradients(mlp(), 64)
    every = ParameterNorms(find_layers(network), ["update_ratio"])
    last = ParameterNorms(find_layers(network)[-1:], ["update_ratio"])
    for norms in (every, last):
        norms.before_step(whole_gradients(network.parameters()))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.5
    for norms in (every, last):
        norms.after_step({})
    read = [norms.read(vector(norms).numpy()) for norms in (every, last)]
    for kind in ("weight", "update"):
        assert read[1][kind]["total"] == pytest.approx(read[0][kind]["total"], rel=1e-12)
    assert read[1]["update"]["total"] / read[1]["weight"]["total"] == pytest.approx(0.5, rel=1e-6)
