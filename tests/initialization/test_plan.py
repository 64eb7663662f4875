"""From a model to what is done with each parameter: who decides, what is left alone and why; nothing is touched."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_init import (
    SCHEMES,
    Assignment,
    Constant,
    Initializer,
    Normal,
    Rule,
    Scheme,
    Uniform,
    initialize,
    register,
)
from lightning_init.initialization.plan import make_plan
from lightning_init.initialization.rules import Request
from lightning_init.schemes.scheme import ParameterRole
from tests.support.models import AllKinds, RowTransformer, mlp
from tests.support.modules import Unknown


def planned(
    model: nn.Module, scheme: str | Scheme = "he_normal", *rules: Rule, **options: object
) -> dict[str, Assignment]:
    steps = make_plan(model, Request.of(scheme, rules, **options))
    assert len({assignment.name for assignment in steps}) == len(steps)
    return {assignment.name: assignment for assignment in steps}


def test_assignments_are_one_per_parameter_in_order_of_registration() -> None:
    model = AllKinds()
    assert list(planned(model)) == [name for name, _ in model.named_parameters()]


def test_role_defaults_are_assigned() -> None:
    steps = planned(RowTransformer())
    decided = {name: (assignment.decided_by, assignment.scheme) for name, assignment in steps.items()}
    assert decided["rows.weight"] == ("scheme", "he_normal")
    assert decided["rows.bias"] == ("bias", "zeros")
    assert decided["positions.weight"] == ("embedding", "standard_normal")
    assert decided["encoder.layers.0.norm1.weight"] == ("norm", "ones")
    assert decided["encoder.layers.0.norm1.bias"] == ("norm", "zeros")
    assert decided["encoder.layers.1.self_attn.in_proj_weight"] == ("scheme", "he_normal")
    assert len(steps["encoder.layers.1.self_attn.in_proj_weight"].initializers) == 3
    assert all(assignment.is_drawn for assignment in steps.values())


def test_rules_first_match_wins_and_literal_patterns_reach_every_parameter() -> None:
    steps = planned(
        RowTransformer(),
        "he_normal",
        Rule("encoder.layers.0.*", "keep"),
        Rule("*.norm?.weight", Constant(0.5)),
        Rule("positions.weight", Normal(0.02)),
        Rule("*.bias", Uniform(-1, 1)),
        Rule("*.linear2.weight", "orthogonal", gain=0.5),
    )
    assert all(
        assignment.reason == "kept by rule"
        for name, assignment in steps.items()
        if name.startswith("encoder.layers.0.")
    )
    assert steps["encoder.layers.1.norm1.weight"].initializers == (Constant(0.5),)
    assert steps["encoder.layers.1.norm1.bias"].initializers == (Uniform(-1, 1),)
    assert steps["positions.weight"].initializers == (Normal(0.02),)
    assert steps["head.bias"].decided_by == "*.bias"
    assert (steps["encoder.layers.1.linear2.weight"].gain, steps["rows.weight"].gain) == (0.5, 2**0.5)


@pytest.mark.parametrize("pattern", ["encoder.*", "*"])
def test_rule_for_modules_leaves_biases_and_norms_at_their_defaults(pattern: str) -> None:
    steps = planned(RowTransformer(), "he_normal", Rule(pattern, "xavier_uniform"))
    assert steps["encoder.layers.0.linear1.weight"].scheme == "xavier_uniform"
    assert steps["encoder.layers.0.linear1.weight"].decided_by == pattern
    assert steps["encoder.layers.0.linear1.bias"].scheme == "zeros"
    assert steps["encoder.layers.0.norm1.weight"].scheme == "ones"
    assert steps["positions.weight"].scheme == "standard_normal"
    assert steps["head.weight"].scheme == ("xavier_uniform" if pattern == "*" else "he_normal")


def test_torch_default_by_a_module_rule_includes_biases() -> None:
    steps = planned(RowTransformer(), "he_normal", Rule("head.*", "torch_default"))
    assert steps["head.bias"].initializers == (Uniform(-0.25, 0.25),)
    assert steps["rows.bias"].initializers == (Constant(0.0),)


@pytest.mark.parametrize("name", ["positions.weight", "head.bias", "encoder.layers.0.norm1.weight"])
def test_fans_are_needed_for_weights_only(name: str) -> None:
    kind = {"positions.weight": "embedding", "head.bias": "bias"}.get(name, "norm")
    for scheme in ("xavier_normal", "orthogonal"):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
            planned(RowTransformer(), "he_normal", Rule(name, scheme))
        assert str(caught.value) == (
            f"rule '{name}' gives '{scheme}' to '{name}', but only weights have fans and its role is '{kind}': "
            "give it Normal(std), Uniform(low, high), Constant(value) or 'keep'"
        )


def test_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^rule 'encodr\.\*' matches none of the model's 29 parameters; nearest names"
    ):
        planned(RowTransformer(), "he_normal", Rule("encodr.*", "zeros"))


def test_bias_argument_applies_to_all_biases() -> None:
    model = nn.ModuleList([nn.Linear(2, 3), nn.LSTM(2, 3), nn.LayerNorm(3)])
    steps = planned(model, "he_normal", bias=0.25)
    assert {steps[name].initializers for name in ("0.bias", "1.bias_hh_l0")} == {
        (Constant(0.25),),
        (Constant(0.25),) * 4,
    }
    assert steps["1.bias_ih_l0"].initializers == (Constant(0.25),) * 4
    assert steps["2.bias"].initializers == (Constant(0.0),)  # a norm's
    assert planned(model, "torch_default", bias=0.25)["0.bias"].initializers == (Constant(0.25),)


@pytest.mark.parametrize(
    "model", [nn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.LSTMCell(3, 4)], ids=["LSTM", "Cell"]
)
def test_forget_gate_is_open_in_one_of_two_biases(model: nn.Module) -> None:
    initialize(model)
    forget = torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 8)
    for name, bias in model.named_parameters():
        if name.startswith("bias"):
            assert torch.equal(bias, forget if "ih" in name else torch.zeros(16)), name
    assert {assignment.scheme for name, assignment in planned(model).items() if "bias_ih" in name} == {"zeros, f 1"}


def test_bias_of_zero_applies_to_the_forget_gate() -> None:
    model = nn.LSTM(3, 4)
    initialize(model, bias=0.0)
    assert not model.bias_ih_l0.any()
    initialize(model, rules=[Rule("bias_ih_l0", "ones")])
    assert (model.bias_ih_l0 == 1).all()


def frozen() -> nn.Module:
    return nn.Linear(2, 3).requires_grad_(False)


class Kept(Unknown):
    """Registered below."""


register(Kept, "A_log", "keep")


def frozen_length() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(2, 3, bias=False))
    layer.parametrizations.weight.original0.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (
            lambda: nn.LazyLinear(3),
            "weight",
            "uninitialised: a lazy module gets its shape from its first batch; run one before fit",
        ),
        (lambda: Unknown(torch.int8), "A_log", "integer (torch.int8)"),
        (frozen, "weight", "frozen"),
        (frozen_length, "parametrizations.weight.original0", "frozen"),
        (frozen_length, "parametrizations.weight.original1", "frozen together with parametrizations.weight.original0"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(2, 3)),
            "parametrizations.weight.original1",
            "written together with parametrizations.weight.original0",
        ),
        (Kept, "A_log", "kept: registered so"),
        (Unknown, "A_log", "module type unknown"),
    ],
)
def test_reason_of_what_is_left_alone(make: Callable[[], nn.Module], name: str, reason: str) -> None:
    assignment = planned(make())[name]
    assert not assignment.is_drawn
    assert assignment.reason == reason
    assert (assignment.initializers, assignment.scheme) == ((), "")


def test_unknown_type_error_has_a_line_to_paste_and_a_literal_rule_applies() -> None:
    assignment = planned(Unknown())["A_log"]
    assert assignment.advice == "register(Unknown, 'A_log', lambda m: Fans(m.A_log.shape[1], m.A_log.shape[0]))"
    assert planned(Unknown(), "he_normal", Rule("A_log", Normal(0.1)))["A_log"].initializers == (Normal(0.1),)
    for rule in (Rule("*", Normal(0.1)), Rule("A_log", "xavier_normal"), Rule("A_log", "torch_default")):
        assert planned(Unknown(), "he_normal", rule)["A_log"].reason == "module type unknown"


def test_keep_of_one_original_keeps_the_parametrized_weight() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 3, bias=False))
    for part in ("original0", "original1"):
        steps = planned(layer, "he_normal", Rule(f"*.{part}", "keep"))
        assert {assignment.reason for assignment in steps.values()} == {"kept by rule"}
    by_plain_name = planned(layer, "he_normal", Rule("weight", "orthogonal"))
    assert by_plain_name["parametrizations.weight.original0"].scheme == "orthogonal through WeightNorm"


class Tied(nn.Module):
    """``b_table`` and ``a_head`` share a weight."""

    def __init__(self, head_first: bool, dim: int = 16) -> None:
        super().__init__()
        table, head = nn.Embedding(50, dim), nn.Linear(dim, 50)
        head.weight = table.weight
        parts = {"a_head": head, "b_table": table}
        for name in parts if head_first else reversed(parts):
            self.add_module(name, parts[name])


@pytest.mark.parametrize("head_first", [True, False])
def test_tied_weights_are_drawn_once_whatever_the_order(head_first: bool) -> None:
    steps = planned(Tied(head_first))
    assert steps["b_table.weight"].reason == "tied to a_head.weight"
    assert (steps["a_head.weight"].decided_by, steps["a_head.weight"].initializers) == (
        "tied head",
        (Normal(16**-0.5),),
    )
    assert steps["a_head.weight"].gain == 1.0
    assert steps["a_head.weight"].role == planned(Tied(not head_first))["a_head.weight"].role
    model, other = Tied(head_first), Tied(not head_first)
    initialize(model, seed=1)
    initialize(other, seed=1)
    assert torch.equal(model.a_head.weight, other.a_head.weight)
    assert model.a_head.weight is model.b_table.weight


@pytest.mark.parametrize("named", ["a_head.weight", "b_table.weight"])
def test_tied_weights_obey_a_rule_on_either_name(named: str) -> None:
    steps = planned(Tied(True), "he_normal", Rule(named, "lecun_normal"))
    assert (steps["a_head.weight"].decided_by, steps["a_head.weight"].initializers) == (named, (Normal(16**-0.5),))
    kept = planned(Tied(True), "zeros", Rule(named, "keep"))
    assert {kept[name].reason for name in ("a_head.weight", "b_table.weight")} == {"kept by rule"}


def test_tied_weights_with_torch_default_are_drawn_as_the_head() -> None:
    assert planned(Tied(True), "torch_default")["a_head.weight"].initializers == (Uniform(-0.25, 0.25),)


def test_shared_module_is_drawn_once() -> None:
    layer = nn.Linear(3, 3)
    steps = planned(nn.ModuleDict({"b": layer, "a": nn.Sequential(layer)}))
    assert steps["b.weight"].reason == "tied to a.0.weight"
    assert steps["b.bias"].reason == "tied to a.0.bias"
    assert steps["a.0.weight"].is_drawn


def test_cloned_layers_get_different_weights() -> None:
    model = RowTransformer()
    first, second = (layer.linear1.weight for layer in model.encoder.layers)
    assert torch.equal(first, second)
    initialize(model)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "torch_default"])
def test_initializers_are_known_before_drawing(scheme: str) -> None:
    for assignment in planned(mlp(), scheme).values():
        assert len(assignment.initializers) == len(assignment.slices)
        if assignment.role and assignment.role.kind == "bias":
            assert assignment.initializers == (Constant(0.0),)


def test_activation_sets_the_gain_of_weights() -> None:
    steps = planned(mlp(), "lecun_normal", activation="relu")
    assert steps["0.weight"].gain == pytest.approx(2**0.5, rel=1e-6)
    assert isinstance(steps["0.weight"].initializers[0], Normal)
    assert steps["0.weight"].initializers[0].std == pytest.approx((2 / 64) ** 0.5, rel=1e-6)


def test_scheme_of_unknown_type_is_refused() -> None:
    class Abstract(Scheme):
        pass

    class Odd(Scheme):
        def __repr__(self) -> str:
            return "Odd()"

        def resolve(self, role: ParameterRole | None, gain: float) -> Initializer:
            return None  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"Abstract.*resolve"):
        planned(mlp(), Abstract())  # type: ignore[abstract]
    message = r"^Odd\(\) gives None for '0.weight', which is no Distribution and no StructuredScheme$"
    with pytest.raises(TypeError, match=message):
        planned(mlp(), Odd())


@pytest.mark.parametrize("given", [None, [], "model"], ids=repr)
def test_plan_refuses_what_is_no_model(given: object) -> None:
    with pytest.raises(TypeError, match=r"^expected an nn.Module, got .* of type (NoneType|list|str)$"):
        make_plan(given, Request.of("zeros"))


def test_plan_changes_nothing() -> None:
    model = nn.Sequential(AllKinds(), parametrizations.spectral_norm(nn.Linear(3, 4)), Unknown())

    def state() -> list[object]:
        values = [f"{name} {value.tolist()}" for name, value in model.state_dict().items()]
        versions = [parameter._version for parameter in model.parameters()]
        generators = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
        return [values, versions, generators, torch.get_num_threads(), model.training]

    before = state()
    for scheme in ("he_normal", "orthogonal", "torch_default"):
        planned(model, scheme, Rule("0.lstm.*", "keep"))
    assert state() == before
