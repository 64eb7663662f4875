"""Which statistics there are, and how they are named."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from lightning_init import LayerStats, StatName, observe
from lightning_init.monitor.statistics import DEFAULT_STATS, STATISTICS, chosen_stats
from tests.support.oracle import near_zero_threshold


def test_registry_has_the_names_users_can_write() -> None:
    assert ("default", *STATISTICS) == get_args(StatName)
    assert all(statistic.name == name for name, statistic in STATISTICS.items())
    assert DEFAULT_STATS == (
        "activation_variance",
        "signal_variance",
        "gradient_variance",
        "gradient_norm",
        "dead_units",
    )


class Scaled(nn.Module):
    """Returns its input times a parameter: what is put in is what is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_gradient_rms_is_the_root_of_the_gradients_mean_square() -> None:
    network, weights = nn.Sequential(Scaled()), torch.tensor([[3.0, -4.0], [0.0, 12.0]])
    with observe(network, stats=["gradient_rms"]) as observation:
        for row in weights:
            (network(torch.ones(2)) * row).sum().backward()
    assert observation.compute().values == {"gradient_rms": {"0": 6.5}}


def near_zero(*calls: Tensor) -> float:
    network = nn.Sequential(Scaled())
    with observe(network, stats=["near_zero"]) as observation:
        for x in calls:
            network(x)
    return observation.compute().values["near_zero"]["0"]


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 0.7, 1.0, 3.0, 1e20])
def test_near_zero_is_the_share_below_a_thousandth_of_the_rms(scale: float) -> None:
    """Exactly that of the bin edge below 1e-3 · rms, which is above 0.8e-3 · rms, however the elements are split."""
    magnitudes = torch.logspace(-6, 0.5, 2000, dtype=torch.float64)
    values = (scale * magnitudes * torch.tensor([1.0, -1.0]).repeat(1000)).float()
    rms = values.double().square().mean().sqrt().item()
    threshold = near_zero_threshold(rms)
    assert 0.8e-3 * rms <= threshold <= 1e-3 * rms
    share = near_zero(values)
    assert share == (values.double().abs() < threshold).double().mean().item()
    assert 0.4 < share < 0.5
    assert near_zero(*values.split([1, 300, 700, 999])) == share  # whose own rms differ by orders of magnitude


def test_near_zero_of_zeros_is_all_and_of_infinities_unknown() -> None:
    assert near_zero(torch.zeros(5)) == 1.0
    assert near_zero(torch.tensor([0.0, 1.0, 2.0, 0.0])) == 0.5
    for bad in (math.nan, math.inf):
        assert math.isnan(near_zero(torch.tensor([0.0, 1.0, bad])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_near_zero_of_any_floating_type(dtype: torch.dtype) -> None:
    assert near_zero(torch.tensor([1e-4, 1.0, -1.0, -1e-5], dtype=dtype)) == 0.5


def test_tags_of_layer_stats() -> None:
    stats = LayerStats({"activation_variance": {"a.b": 1.0, "c": 2.0}, "gradient_norm": {"total": 3.0}})
    assert stats.tags == {"activation_variance/a.b": 1.0, "activation_variance/c": 2.0, "gradient_norm/total": 3.0}


def test_chosen_stats_in_order() -> None:
    assert chosen_stats(None) == DEFAULT_STATS
    assert chosen_stats(["default"]) == DEFAULT_STATS
    assert chosen_stats(["gradient_norm", "default"]) == (
        "gradient_norm",
        *(s for s in DEFAULT_STATS if s != "gradient_norm"),
    )
    assert chosen_stats([]) == ()
    with pytest.raises(ValueError, match=r"'gradient_nrom'; allowed: default, .*; did you mean 'gradient_norm'\?"):
        chosen_stats(["default", "gradient_nrom"])
