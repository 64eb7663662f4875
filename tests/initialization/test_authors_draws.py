"""Draws of an author's for norms and biases are told from training by being alike in all layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_init import initialize
from tests.support.signs import signs
from tests.support.training import fresh, trained

SEEDS = 10


def dlrm() -> nn.Sequential:
    """Weights N(0, 2/(in + out)), biases N(0, 1/out)."""
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / sum(layer.weight.shape)))
            nn.init.normal_(layer.bias, std=math.sqrt(1 / layer.out_features))
    return net


def rep_vgg() -> nn.Sequential:
    """Scales and shifts of all norms N(.1, .1²)."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 0.1, 0.1)
            nn.init.normal_(norm.bias, 0.1, 0.1)
    return net


def half_open_gates() -> nn.Sequential:
    """Half of each bias 1, the rest N(0, 1e-6²), as in gMixer."""
    net = nn.Sequential(nn.Linear(64, 32), nn.GLU(), nn.Linear(16, 10))
    nn.init.normal_(net[0].weight, std=1e-6)
    nn.init.normal_(net[0].bias, std=1e-6)
    nn.init.ones_(net[0].bias[:16].data)
    return net


FRESH: dict[str, Callable[[], nn.Module]] = {
    "biases by a formula": dlrm,
    "norms around .1": rep_vgg,
    "half-open gates": half_open_gates,
}


@pytest.mark.parametrize("kind", FRESH)
def test_draws_for_all_layers_are_no_signs_of_training(kind: str) -> None:
    for seed in range(SEEDS):
        assert signs(fresh(FRESH[kind], seed)) == [], f"seed {seed}"


@pytest.mark.parametrize("kind", FRESH)
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_the_same_models_show_their_training(kind: str, steps: int) -> None:
    assert signs(trained(fresh(FRESH[kind]), steps))


def test_trained_norms_are_not_alike() -> None:
    """Small scales that training left: a mean and a spread of its own in every layer."""

    def with_trained_norms() -> nn.Module:
        net = rep_vgg()
        for index, norm in enumerate(module for module in net if isinstance(module, nn.BatchNorm2d)):
            nn.init.normal_(norm.weight, 0.1 + 0.2 * index, 0.1)
        return net

    assert signs(fresh(with_trained_norms))


def test_half_open_gates_stay() -> None:
    net = fresh(half_open_gates)
    bias = net.get_parameter("0.bias").detach().clone()
    initialize(net, "he_normal")
    assert torch.equal(net.get_parameter("0.bias"), bias)
