"""Where parameters live: owners, names without wrappers, and what stands between a parameter and the forward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_init.introspect.sites import (
    ParameterSite,
    parameter_sites,
    parametrizations_of,
    type_name,
    weight_norm_of,
)


def place_of(model: nn.Module, name: str) -> ParameterSite:
    (found,) = [site for site in parameter_sites(model) if site.stored_fqn == name]
    return found


def test_sites_have_every_name_of_every_parameter_in_order() -> None:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "inner": nn.Sequential(nn.Linear(4, 4)), "head": head})
    found = list(parameter_sites(model))
    assert [site.stored_fqn for site in found] == ["table.weight", "inner.0.weight", "inner.0.bias", "head.weight"]
    assert [site.forward_fqn for site in found] == [site.stored_fqn for site in found]
    assert found[0].parameter is found[3].parameter
    assert [site.module for site in found] == [table, model["inner"][0], model["inner"][0], head]
    assert {site.storage for site in found} == {"itself"}


def test_sites_of_a_model_that_is_one_layer() -> None:
    found = list(parameter_sites(nn.Linear(3, 2)))
    assert [(site.stored_fqn, site.attribute, site.ancestors) for site in found] == [
        ("weight", "weight", ()),
        ("bias", "bias", ()),
    ]


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "checkpointed": checkpoint_wrapper,
    "both": lambda model: torch.compile(checkpoint_wrapper(model), backend="eager"),  # type: ignore[return-value]
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_site_names_drop_wrappers(wrapper: str) -> None:
    """A user's own attribute may be called like the step of one wrapper, ``module``."""
    inner = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    model = nn.ModuleDict({"module": WRAPPED[wrapper](inner)})
    plain = nn.ModuleDict({"module": inner})
    for site, expected in zip(parameter_sites(model), parameter_sites(plain), strict=True):
        assert (site.stored_fqn, site.forward_fqn, site.attribute) == (
            expected.stored_fqn,
            expected.forward_fqn,
            expected.attribute,
        )
        assert site.module is expected.module is inner[0]
        assert site.parameter is expected.parameter
        assert {name for _, name in site.ancestors} == {name for _, name in expected.ancestors}


def test_ancestors_have_shorter_names_of_a_site() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), parametrizations.weight_norm(nn.Linear(3, 2)))})
    for name in ("a.1.bias", "a.1.parametrizations.weight.original1"):
        site = place_of(model, name)
        assert site.ancestors == ((model, site.forward_fqn), (model["a"], f"1.{site.attribute}"))
        assert site.forward_fqn == f"a.1.{site.attribute}"


class Twice(nn.Module):
    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_originals_belong_to_their_parametrized_weight() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    parametrize.register_parametrization(layer, "bias", Twice())
    model = nn.Sequential(layer)
    parts = {site.stored_fqn: site for site in parameter_sites(model)}
    assert {name: site.forward_fqn for name, site in parts.items()} == {
        "0.parametrizations.weight.original0": "0.weight",
        "0.parametrizations.weight.original1": "0.weight",
        "0.parametrizations.bias.original": "0.bias",
    }
    assert all(site.module is layer and site.storage == "parametrization" for site in parts.values())
    bias = parts["0.parametrizations.bias.original"]
    assert torch.equal(bias.current, 2 * bias.parameter)
    assert not bias.current.requires_grad
    steps = parametrizations_of(bias)
    assert steps is not None
    assert isinstance(steps[0], Twice)


def test_originals_of_a_parametrized_parametrization_are_found() -> None:
    """A parametrization may own layers; their weights are no originals."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, stored: Tensor) -> Tensor:
            mixed: Tensor = self.mix(stored)
            return mixed

    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Mixed())
    parts = {site.stored_fqn: site for site in parameter_sites(layer)}
    assert parts["parametrizations.weight.0.mix.weight"].storage == "itself"
    assert parts["parametrizations.weight.0.mix.weight"].forward_fqn == "parametrizations.weight.0.mix.weight"
    assert parts["parametrizations.weight.original"].forward_fqn == "weight"


def test_old_weight_norm_is_computed_by_a_hook() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    parts = {site.stored_fqn: site for site in parameter_sites(nn.Sequential(layer))}
    assert {name: (site.forward_fqn, site.storage) for name, site in parts.items()} == {
        "0.bias": ("0.bias", "itself"),
        "0.weight_g": ("0.weight", "weight_norm"),
        "0.weight_v": ("0.weight", "weight_norm"),
    }
    hook = weight_norm_of(layer, "weight")
    assert hook is not None
    assert weight_norm_of(layer, "bias") is None
    with torch.no_grad():
        layer.weight_g.mul_(3)
    expected = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(parts["0.weight_g"].current, expected)  # no forward pass was needed


def test_hook_computed_weight_is_found_by_its_original() -> None:
    pruned = nn.Linear(3, 2)
    prune.random_unstructured(pruned, "weight", 0.5)
    spectral = nn.utils.spectral_norm(nn.Linear(3, 2))
    for layer in (pruned, spectral):
        site = place_of(layer, "weight_orig")
        assert (site.forward_fqn, site.attribute, site.storage) == ("weight", "weight", "recomputed")
        assert torch.equal(site.current, site.parameter)


class OwnNames(nn.Module):
    """Endings that look like those of torch's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_g = nn.Parameter(torch.ones(2))
        self.kernel_orig = nn.Parameter(torch.ones(2))
        self.table = nn.Parameter(torch.ones(2))
        self.table_orig = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("name", ["scale_g", "kernel_orig", "table_orig"])
def test_name_endings_alone_mean_nothing(name: str) -> None:
    site = place_of(OwnNames(), name)
    assert (site.forward_fqn, site.storage) == (name, "itself")


class ParametrizedLinear(nn.Linear):
    """The user's own, though it is called what torch would call it."""


def test_type_names_are_the_users() -> None:
    assert type_name(nn.Linear(3, 2)) == "Linear"
    assert type_name(parametrizations.weight_norm(nn.Linear(3, 2))) == "Linear"
    assert type_name(OwnNames()) == "OwnNames"

    sharded = nn.Linear(3, 2)
    sharded.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})  # what fully_shard does
    assert type_name(parametrizations.weight_norm(sharded)) == "Linear"

    class ParametrizedPolicy(nn.Module):
        """The user's own name, though it begins like one that torch makes."""

    class FSDPStyle(nn.Linear):
        """Likewise, inside a function and with a base."""

    assert type_name(ParametrizedLinear(3, 2)) == "ParametrizedLinear"
    assert type_name(ParametrizedPolicy()) == "ParametrizedPolicy"
    assert type_name(FSDPStyle(3, 2)) == "FSDPStyle"
