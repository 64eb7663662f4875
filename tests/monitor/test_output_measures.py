"""What is measured on request."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_init.introspect.activations import activation_of
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.histograms import BINS, EDGES, EXTREMES, histograms_of
from lightning_init.monitor.measures import largest, saturated


def layer_of(module: nn.Module) -> Layer:
    return Layer("a", module, activation_of(module), tuple(module.parameters()))


@pytest.mark.parametrize(
    ("module", "beyond", "within"),
    [
        (nn.Tanh(), [-2.4, 2.4, 50.0], [-2.2, 0.0, 2.2]),  # |tanh| > .98
        (nn.Sigmoid(), [-4.7, 4.7], [-4.5, 4.5]),
        (nn.Hardtanh(-2.0, 2.0), [-3.0, 1.97], [-1.9, 1.9]),
        (nn.Hardsigmoid(), [-3.0, 3.0], [-2.0, 2.0]),
    ],
    ids=repr,
)
def test_saturation_is_the_share_near_either_end(module: nn.Module, beyond: list[float], within: list[float]) -> None:
    counted = saturated(layer_of(module), module(torch.tensor(beyond + within)))
    assert counted is not None
    assert counted.tolist() == [len(beyond)]
    assert counted.dtype == torch.float64
    half = saturated(layer_of(module), module(torch.tensor(beyond)).bfloat16())
    assert half is not None


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.ELU(), nn.Softplus(), nn.LogSigmoid(), nn.Linear(2, 2)], ids=repr
)
def test_saturation_needs_two_ends(module: nn.Module) -> None:
    assert saturated(layer_of(module), torch.ones(3)) is None


def test_saturation_of_a_sine_is_absent() -> None:
    class Sine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    assert saturated(layer_of(Sine()), torch.ones(3)) is None


def test_histogram_bins_are_powers_of_two_of_either_sign() -> None:
    assert len(EDGES) == 63
    assert list(EDGES) == sorted(EDGES)
    layer = layer_of(nn.Identity())
    values = torch.tensor([-1e9, -1.0, -1e-9, 0.0, 1e-9, 1.0, 1.1, 1e9, math.nan, math.inf, -math.inf])
    bins = BINS.measure(layer, values)
    assert isinstance(bins, torch.Tensor)
    assert bins.shape == (BINS.width,) == (68,)
    counts = bins[:64]
    assert counts.sum() == 8
    one = EDGES.index(1.0)
    assert counts[one] == 1  # (.5, 1]
    assert counts[one + 1] == 1
    assert counts[EDGES.index(0.0)] == 2  # (-2^-20, 0] has -1e-9 and 0
    assert counts[-1] == 1
    assert bins[66:].tolist() == [1, 2]  # NaN, infinite
    torch.manual_seed(0)
    many = torch.randn(1000)
    expected = [
        ((many > low) & (many <= high)).sum() for low, high in zip((-math.inf, *EDGES), (*EDGES, math.inf), strict=True)
    ]
    bins = BINS.measure(layer, many.reshape(10, 100))
    assert isinstance(bins, torch.Tensor)
    assert bins[:64].tolist() == expected
    assert bins[64:].tolist() == pytest.approx(
        [float(many.sum()), float(many.square().sum()), 0, 0], rel=1e-5, abs=1e-5
    )


def test_histogram_of_what_is_not_finite_is_of_the_rest() -> None:
    layer = layer_of(nn.Identity())
    rows = [[1.0, math.nan, 5000.0], [math.nan], []]
    measured = [[m.measure(layer, torch.tensor(row)) for m in (BINS, EXTREMES)] for row in rows]
    bins, extremes = (torch.stack([row[i] for row in measured]).numpy() for i in range(2))
    first, second, third = histograms_of(bins, extremes)
    assert first is not None
    assert (first.n, first.least, first.most, first.nan, first.sum) == (2, 1.0, 5000.0, 1, 5001.0)
    assert second is not None
    assert (second.n, second.nan) == (0, 1)
    assert third is None


def test_activation_max_is_the_largest_magnitude() -> None:
    layer = layer_of(nn.Identity())
    assert largest(layer, torch.tensor([[1.0, -3.0], [2.0, 0.0]])).item() == 3.0
    assert math.isnan(largest(layer, torch.tensor([1.0, math.nan])).item())
    assert largest(layer, torch.empty(0, 2)).item() == 0.0
