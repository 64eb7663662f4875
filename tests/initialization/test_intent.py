"""What the author of a model set on purpose stays, tables keep their scale, and everything else is drawn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from lightning_init import Normal, Rule, Uniform, initialize, plan
from lightning_init.initialization.evidence import Evidence
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.scales import scale_of_table
from lightning_init.introspect.role import Role
from tests.support.weights import assert_same, weights_of


def with_values(module: nn.Module, **values: Tensor | float) -> nn.Module:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(torch.as_tensor(value))
    return module


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    nn.init.uniform_(net[4].weight, -3e-4, 3e-4)
    return net


def fourier_features() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 64, bias=False), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    nn.init.normal_(net[0].weight, std=20.0)
    return net


def detector() -> nn.Module:
    head = nn.Linear(32, 27)
    with torch.no_grad():
        head.bias.view(3, -1)[:, 4] += math.log(8 / 80**2)
        head.bias.view(3, -1)[:, 5:] += math.log(0.6 / 3)
    return head


def rotation() -> nn.Module:
    layer = nn.Conv1d(8, 8, 1, bias=False)
    matrix = torch.linalg.qr(torch.randn(8, 8, generator=seeded()))[0]
    matrix[:, 0] *= torch.det(matrix).sign()
    return with_values(layer, weight=matrix[..., None])


PURPOSES: Mapping[str, tuple[Callable[[], nn.Module], str, str]] = {
    "zeroed last layer": (lambda: with_values(nn.Linear(8, 4), weight=0.0), "weight", "constant 0"),
    "zero-γ": (lambda: with_values(nn.BatchNorm2d(8), weight=0.0), "weight", "constant 0"),
    "small norm scale": (lambda: with_values(nn.LayerNorm(8), weight=0.1), "weight", "constant 0.1"),
    "focal prior": (lambda: with_values(nn.Conv2d(8, 9, 3), bias=-4.6), "bias", "constant -4.6"),
    "identity": (lambda: with_values(nn.Linear(16, 16), weight=torch.eye(16)), "weight", "structured values"),
    "identity transform": (
        lambda: with_values(nn.Linear(32, 6), weight=0.0, bias=torch.tensor([1.0, 0, 0, 0, 1, 0])),
        "bias",
        "structured values",
    ),
    "prior per anchor": (detector, "bias", "not what its module drew, beside a weight that is"),
    "determinant +1": (rotation, "weight", "structured values"),
    "positive weights": (
        lambda: with_values(nn.Linear(64, 64), weight=torch.randn(64, 64, generator=seeded()) * 0.1 - 4),
        "weight",
        "values around -4",
    ),
    "policy's last layer": (policy, "4.weight", "a scale of its own"),
    "Fourier features": (fourier_features, "0.weight", "a scale of its own"),
}


@pytest.mark.parametrize("name", PURPOSES)
@pytest.mark.parametrize("scheme", ["he_normal", "torch_default", "orthogonal"])
def test_purpose_of_the_author_stays(name: str, scheme: str) -> None:
    build, parameter, purpose = PURPOSES[name]
    torch.manual_seed(0)
    model = build()
    before = model.get_parameter(parameter).detach().clone()
    report = initialize(model, scheme)
    assert torch.equal(model.get_parameter(parameter), before)
    entry = report[parameter]
    assert entry.left is Reason.SET_BY_AUTHOR
    assert entry.reason.startswith(f"set by its author: {purpose}")
    assert "its author set" in str(report)
    others = [other for other in report.entries if other.name != parameter and "weight" in other.name]
    assert all(other.left is None for other in others if name != "identity transform")


@pytest.mark.parametrize("name", PURPOSES)
def test_purpose_is_drawn_over_by_the_rule_that_the_report_names(name: str) -> None:
    build, parameter, _ = PURPOSES[name]
    torch.manual_seed(0)
    model = build()
    advice = next(assignment.advice for assignment in plan(model) if assignment.name == parameter)
    rule = eval(advice, {"Rule": Rule, "Normal": Normal, "Uniform": Uniform})
    if model.get_parameter(parameter).ndim < 2:
        rule = Rule(parameter, Normal(0.5))  # biases and norms have no fans
    report = initialize(model, rules=[rule])
    assert report[parameter].left is None
    assert model.get_parameter(parameter).std() > 0


DRAWN: Mapping[str, Callable[[], nn.Module]] = {
    "torch's default": lambda: nn.Linear(64, 64),
    "normal": lambda: with_values(nn.Linear(64, 64), weight=torch.randn(64, 64, generator=seeded()) * 0.02, bias=0.0),
    "uniform, biases too": lambda: with_values(
        nn.Linear(64, 64),
        weight=torch.rand(64, 64, generator=seeded()) - 0.5,
        bias=torch.rand(64, generator=seeded(1)) - 0.5,
    ),
    "bfloat16": lambda: nn.Linear(64, 64, dtype=torch.bfloat16),
    "one element": lambda: nn.Linear(1, 1),
    "GPT-2's scaled writers": lambda: nn.Sequential(
        *(
            with_values(nn.Linear(32, 32), weight=torch.randn(32, 32, generator=seeded(i)) * s)
            for i, s in enumerate([0.02, 0.02, 0.006])
        )
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_around_zero_are_drawn_again(name: str) -> None:
    torch.manual_seed(0)
    model = DRAWN[name]()
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    report = initialize(model, "he_normal", seed=1)
    assert report.left_alone == ()
    assert all(not torch.equal(weight, before[name]) for name, weight in weights_of(model).items() if "weight" in name)


def test_zero_biases_are_drawn_as_zeros_and_stay_under_torch_default() -> None:
    layer = with_values(nn.Linear(8, 4), bias=0.0)
    assert initialize(copy.deepcopy(layer))["bias"].scheme == "zeros"
    assert initialize(copy.deepcopy(layer), "torch_default")["bias"].left is Reason.SET_BY_AUTHOR
    assert initialize(layer, bias=0.5)["bias"].scheme == "Constant(value=0.5)"
    assert (layer.bias == 0.5).all()


def test_initialize_again_remembers_the_author_and_not_its_own_draw() -> None:
    """Zeros of ours are no purpose, and a table's scale is the author's at every draw."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.normal_(model[0].weight, std=0.02)
    nn.init.zeros_(model[2].weight)
    twin = copy.deepcopy(model)
    for scheme in ("zeros", "identity", "orthogonal", "he_normal"):
        report = initialize(model, scheme)
    assert initialize(twin, "he_normal").entries == report.entries
    assert_same(weights_of(model), weights_of(twin))
    assert report["2.weight"].left is Reason.SET_BY_AUTHOR
    assert report["0.weight"].decided_by == "author's scale"


def test_plan_knows_purposes_and_changes_nothing() -> None:
    model = policy()
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    left = {assignment.name: assignment.left for assignment in plan(model)}
    assert left["4.weight"] is Reason.SET_BY_AUTHOR
    assert_same(weights_of(model), before)


# Lookup tables


def language_model(std: float | None, *, tied: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(500, 64, padding_idx=0),
            "positions": nn.Embedding(40, 64),
            "types": nn.Embedding(30, 32),
        }
    )
    model["head"] = nn.Linear(64, 500, bias=False)
    if tied:
        model["head"].weight = model["tokens"].weight
    for module in model.values():
        if std is not None:
            nn.init.normal_(module.weight, std=std)
    return model


@pytest.mark.parametrize("std", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["he_normal", "torch_default", "orthogonal"])
def test_tables_keep_their_authors_scale(std: float, tied: bool, scheme: str) -> None:
    model = language_model(std, tied=tied)
    before = model["positions"].weight.detach().clone()
    report = initialize(model, scheme, seed=3)
    for name in ("tokens", "positions", "types"):
        entry = report["head.weight" if tied and name == "tokens" else f"{name}.weight"]
        assert entry.target_std == std
        assert entry.decided_by == "author's scale"
    assert not torch.equal(model["positions"].weight, before)


def test_tables_at_torchs_own_scale_keep_it() -> None:
    report = initialize(language_model(None, tied=False))
    assert {report[f"{name}.weight"].target_std for name in ("tokens", "positions", "types")} == {1.0}


def test_tables_that_are_added_to_a_tied_head_get_its_scale() -> None:
    """At torch's own N(0, 1) an output layer needs 1/√d, and what is added to the tokens needs the same."""
    report = initialize(language_model(None, tied=True))
    assert report["head.weight"].decided_by == "tied head"
    assert report["head.weight"].target_std == 64**-0.5
    assert report["positions.weight"].target_std == 64**-0.5
    assert report["types.weight"].target_std == 1.0  # of another width


@pytest.mark.parametrize("scheme", [Normal(0.01), Uniform(-0.3, 0.3), "standard_normal", "zeros"])
def test_absolute_schemes_reach_tables(scheme: Normal | Uniform | str) -> None:
    report = initialize(language_model(0.02, tied=True), scheme)
    expected = plan(nn.Linear(2, 2), scheme)[0].initializers[0].target_std
    assert {report[f"{name}.weight"].target_std for name in ("head", "positions", "types")} == {expected}


def test_rule_for_a_module_with_an_absolute_scheme_reaches_its_table() -> None:
    report = initialize(language_model(None, tied=False), rules=[Rule("tokens.*", Normal(0.02))])
    assert report["tokens.weight"].target_std == 0.02
    assert report["positions.weight"].target_std == 1.0


def test_padding_row_does_not_count_for_the_scale_and_is_zero_again() -> None:
    table = nn.Embedding(40, 200, padding_idx=1)
    nn.init.normal_(table.weight, std=0.02)
    with torch.no_grad():
        table.weight[1] = 0.0
    assert initialize(table)["weight"].target_std == 0.02
    assert not table.weight[1].any()


@pytest.mark.parametrize("std", [1.0, 0.02, 0.0625, 0.125, 0.0883883, 0.006])
@pytest.mark.parametrize("seed", range(8))
def test_scale_of_a_table_is_the_number_that_was_meant(std: float, seed: int) -> None:
    """The measured one differs from draw to draw; it is within a percent of what is read, however it was drawn."""
    values = torch.empty(1000, 64, dtype=torch.float64).normal_(std=std, generator=seeded(seed))
    evidence = Evidence((-1.0,), (1.0,), values.numel(), 0.0, float(values.square().sum()), False)
    read = scale_of_table(Role("embedding", Normal()), evidence, 64)
    if std != 0.0883883:
        assert read == std
    assert read == pytest.approx(std, rel=0.015)


def test_scale_of_a_table_without_evidence_is_the_modules_own() -> None:
    assert scale_of_table(Role("embedding", Normal(0.5)), None, 64) == 0.5


# Memory that nobody has written to


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))


def filled_by_the_allocator(model: nn.Module, junk: str) -> nn.Module:
    """What ``torch.empty`` may hand out, without an operation that PyTorch counts as writing."""
    for parameter in model.parameters():
        assert parameter._version == 0
        memory = parameter.detach().numpy()  # shares memory with the parameter
        memory[...] = {"zeros": 0.0, "NaN": math.nan, "huge": 1e30, "denormal": 1e-42}.get(junk, 0.0)
        if junk == "old weights":
            memory[...] = torch.randn(parameter.shape, generator=seeded()).numpy() * 3
    return model


@pytest.mark.parametrize("junk", ["zeros", "NaN", "huge", "denormal", "old weights"])
def test_memory_that_was_never_written_to_is_drawn(junk: str) -> None:
    with torch.device("meta"):
        model = network()
    model = filled_by_the_allocator(model.to_empty(device="cpu"), junk)
    assert initialize(model, seed=3).left_alone == ()
    expected = network()
    initialize(expected, seed=3)
    assert_same(weights_of(model), weights_of(expected))


def test_deep_copies_are_not_taken_for_empty_memory() -> None:
    model = network()
    nn.init.zeros_(model[3].weight)
    model = copy.deepcopy(model)
    assert model[3].weight._version == 0
    report = initialize(model)
    assert report["3.weight"].left is Reason.SET_BY_AUTHOR


def test_parameters_of_users_modules_are_not_taken_for_empty_memory() -> None:
    class L2Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 20.0))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(x) * self.weight

    module = L2Norm()
    assert initialize(module)["weight"].reason == "set by its author: constant 20"
    assert (module.weight == 20).all()
