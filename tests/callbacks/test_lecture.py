"""What the lecture says about initialisation, seen by the monitor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from tests.support.monitored_fits import fit
from tests.support.oracle import BatchModule


def first_step(initialise: Callable[[Tensor], Any], depth: int = 20, width: int = 256) -> dict[str, float]:
    """Statistics of the first step of a deep ReLU network without biases on N(0, 1) inputs."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, width, bias=False))
    for _ in range(depth):
        network.extend([nn.ReLU(), nn.Linear(width, width, bias=False)])
    for layer in network:
        if isinstance(layer, nn.Linear):
            initialise(layer.weight)
    module = BatchModule(network, [(torch.randn(256, width), torch.arange(256) % width)])
    return fit(module, ActivationVarianceMonitor(1))[0]


def linear_variances(tags: dict[str, float], depth: int = 20) -> list[float]:
    return [tags[f"activation_variance/network.{2 * i}"] for i in range(depth + 1)]


def test_lecture_zeros_learn_nothing() -> None:
    tags = first_step(nn.init.zeros_)
    assert set(linear_variances(tags)) == {0.0}
    assert tags["gradient_norm/total"] == 0.0
    assert all(tags[f"dead_units/network.{2 * i + 1}"] == 1.0 for i in range(20))


def test_lecture_standard_normal_explodes_by_the_width_in_every_layer() -> None:
    """Variance d after the first layer; E[relu(z)²] is half of it, so d/2 for every further ReLU layer."""
    variances = linear_variances(first_step(nn.init.normal_, depth=5), depth=5)
    assert variances[0] == pytest.approx(256, rel=0.05)
    for before, after in itertools.pairwise(variances):
        assert after / before == pytest.approx(128, rel=0.3)


def test_lecture_he_keeps_the_variance_and_xavier_loses_half_a_layer() -> None:
    he = linear_variances(first_step(partial(nn.init.kaiming_normal_, nonlinearity="relu")))
    xavier = linear_variances(first_step(nn.init.xavier_normal_))
    # the log variance of each layer has standard deviation √(5/256) or so: 0.14 a layer, 0.63 after twenty
    assert all(0.15 < variance / 2 < 6 for variance in he)
    assert 0.15 < xavier[-1] * 2**20 < 6
