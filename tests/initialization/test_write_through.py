"""Weights that are computed from other parameters: written through the inverse, measured as they come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_init import InitReport, initialize, plan


class Halved(nn.Module):
    """Another module's weight is twice what is stored."""

    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def halved(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def old_weight_norm(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer, dim=dim)


EXACT: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "old weight_norm": old_weight_norm,
    "old weight_norm over all": lambda layer: old_weight_norm(layer, None),
    "halved": halved,
    "halved twice": lambda layer: halved(halved(layer)),
    "half of weight_norm": lambda layer: halved(parametrizations.weight_norm(layer)),
}


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(40, 30), lambda: nn.Conv2d(8, 6, 3, groups=2)], ids=["Linear", "Conv2d"]
)
@pytest.mark.parametrize("wrap", EXACT)
@pytest.mark.parametrize("scheme", ["he_normal", "orthogonal"])
def test_parametrized_weight_is_what_was_asked_for(wrap: str, make: Callable[[], nn.Module], scheme: str) -> None:
    layer, reference = EXACT[wrap](make()), make()
    report = initialize(layer, scheme, seed=3)
    initialize(reference, scheme, seed=3)
    torch.testing.assert_close(layer.weight, reference.weight)
    layer(torch.ones(1, 40) if isinstance(layer, nn.Linear) else torch.ones(1, 8, 5, 5))
    torch.testing.assert_close(layer.weight, reference.weight)  # also what a forward pass recomputes
    report.check()
    (entry,) = [entry for entry in report.drawn if entry.target_std]
    assert entry.measured_std == pytest.approx(reference.weight.square().mean().sqrt().item(), rel=1e-5)
    assert math.isfinite(entry.tolerance)


def measured_weight(layer: nn.Module) -> tuple[InitReport, Tensor, Tensor]:
    """The report, the weight that was asked for, and what a forward pass in eval mode uses."""
    report = initialize(layer, "he_normal", seed=3)
    reference = nn.Linear(40, 30)
    initialize(reference, "he_normal", seed=3)
    layer(torch.ones(1, 40))  # the older spectral_norm iterates in training mode only
    layer.eval()
    layer(torch.ones(1, 40))
    return report, reference.weight.detach(), layer.weight.detach()


def test_spectral_norm_is_measured_as_it_comes_out() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(40, 30), n_power_iterations=20)
    report, asked, used = measured_weight(layer)
    assert torch.equal(layer.parametrizations.weight.original, asked)
    assert torch.linalg.matrix_norm(used, 2) == pytest.approx(1.0, rel=0.05)
    entry = report["parametrizations.weight.original"]
    assert entry.measured_std == pytest.approx(used.std().item(), rel=0.05)
    assert entry.measured_std < 0.8 * entry.target_std  # a different number, said openly
    assert entry.tolerance == math.inf
    report.check()


def test_old_spectral_norm_and_pruning_write_their_original() -> None:
    spectral = nn.utils.spectral_norm(nn.Linear(40, 30), n_power_iterations=20)
    _, asked, used = measured_weight(spectral)
    assert torch.equal(spectral.weight_orig, asked)
    torch.testing.assert_close(used, asked / torch.linalg.matrix_norm(asked, 2), rtol=0.05, atol=1e-3)

    pruned = nn.Linear(40, 30)
    prune.random_unstructured(pruned, "weight", 0.5)
    report, asked, used = measured_weight(pruned)
    assert torch.equal(pruned.weight_orig, asked)
    assert torch.equal(used, asked * pruned.weight_mask)
    assert report["weight_orig"].measured_std == pytest.approx(asked.square().mean().sqrt().item(), rel=1e-5)


def test_orthogonal_parametrization_stays_orthogonal_and_is_measured() -> None:
    layer = parametrizations.orthogonal(nn.Linear(40, 30))
    report, _, used = measured_weight(layer)
    torch.testing.assert_close(used @ used.T, torch.eye(30), rtol=0, atol=1e-5)
    entry = report["parametrizations.weight.original"]
    assert entry.measured_std == pytest.approx(used.square().mean().sqrt().item(), rel=1e-4)
    assert entry.tolerance == math.inf
    again = parametrizations.orthogonal(nn.Linear(40, 30))
    initialize(again, "orthogonal", seed=3)
    reference = nn.Linear(40, 30)
    initialize(reference, "orthogonal", seed=3)
    torch.testing.assert_close(again.weight, reference.weight, rtol=0, atol=1e-5)


def test_weight_norm_of_a_table_with_a_padding_row() -> None:
    layer = parametrizations.weight_norm(nn.Embedding(5, 8, padding_idx=0), dim=0)
    initialize(layer)
    assert (layer.weight[0] == 0).all()
    assert layer.weight.count_nonzero() == 4 * 8
    across = parametrizations.weight_norm(nn.Embedding(5, 8, padding_idx=0), dim=1)
    initialize(across)
    assert across.weight[1:].count_nonzero() == 4 * 8


class OneWay(nn.Module):
    """Cannot be undone."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.abs()


def test_parametrization_without_right_inverse_is_left_alone_and_named() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", OneWay())
    before = layer.weight.clone()
    report = initialize(layer)
    assert torch.equal(layer.weight, before)
    assert report["parametrizations.weight.original"].reason == "parametrized: OneWay has no right_inverse"


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
def test_orthogonal_map_that_cannot_be_assigned_is_left_alone(orthogonal_map: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=orthogonal_map, use_trivialization=False)
    before = layer.weight.clone()
    report = initialize(layer)
    assert torch.equal(layer.weight, before)
    assert "right_inverse" in report["parametrizations.weight.original"].reason
    assert report["bias"].reason == ""


def test_plan_computes_no_parametrization() -> None:
    """Spectral_norm takes a step of its power iteration whenever the weight is read while training."""
    layer = parametrizations.spectral_norm(nn.Linear(40, 30))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    plan(nn.ModuleDict({"inner": nn.Sequential(layer)}))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
