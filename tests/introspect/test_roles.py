from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_init import Constant, Fans, Normal, Role, Rule, fans_of, plan, register
from lightning_init.introspect import roles
from lightning_init.introspect.roles import role_of


class Experts(nn.Module):
    """A user's own module: one stack of matrices."""

    def __init__(self, experts: int = 4, inside: int = 6, outside: int = 8) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(experts, outside, inside))
        self.offset = nn.Parameter(torch.zeros(outside))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "_registry", {key: dict(entries) for key, entries in roles._registry.items()})


def test_unknown_module_has_no_role_until_registered() -> None:
    module = Experts()
    assert role_of(module, "kernel") is None
    register(Experts, "kernel", Fans(6, 8))
    role = role_of(module, "kernel")
    assert role is not None
    assert (role.kind, role.fans) == ("weight", Fans(6, 8))
    # torch_default draws it like a Linear, with variance 1/(3·fan_in)
    assert role.default.target_std == pytest.approx((3 * 6) ** -0.5)
    assert role_of(module, "offset") is None


def test_register_takes_every_form_of_a_role() -> None:
    def kind_of(attribute: str) -> str:
        role = role_of(Experts(), attribute)
        assert role is not None
        return role.kind

    register(Experts, "kernel", lambda module: Fans(module.kernel.shape[2], module.kernel.shape[1]))
    assert fans_of(Experts(inside=10), "kernel") == Fans(10, 8)
    ready = Role("other", Normal(0.3))
    register(Experts, "kernel", lambda module: ready)
    assert role_of(Experts(), "kernel") is ready
    register(Experts, "kernel", ready)
    assert role_of(Experts(), "kernel") is ready
    register(Experts, "offset", "bias")
    assert kind_of("offset") == "bias"
    register(Experts, "offset", "norm")
    assert kind_of("offset") == "norm"
    norm = role_of(Experts(), "offset")
    assert norm is not None
    assert norm.default == Constant(1.0)
    register(Experts, "offset", "keep")
    assert kind_of("offset") == "keep"


def test_register_by_qualified_name_without_import() -> None:
    register(f"{__name__}.Experts", "kernel", Fans(6, 8))
    assert fans_of(Experts(), "kernel") == Fans(6, 8)


def test_register_latest_wins_and_globs_work() -> None:
    register(Experts, "*", "keep")
    register(Experts, "kern*", Fans(1, 2))
    assert fans_of(Experts(), "kernel") == Fans(1, 2)
    register(Experts, "*", "bias")
    role = role_of(Experts(), "kernel")
    assert role is not None
    assert role.kind == "bias"


def test_register_overrules_known_modules() -> None:
    register(nn.Linear, "weight", Fans(1, 1))
    assert fans_of(nn.Linear(3, 4), "weight") == Fans(1, 1)
    bias = role_of(nn.Linear(3, 4), "bias")
    assert bias is not None
    assert bias.kind == "bias"


def test_register_applies_to_subclasses_most_specific_first() -> None:
    class Mine(nn.Linear):
        pass

    class Special(Mine):
        pass

    assert fans_of(Mine(3, 4), "weight") == Fans(3, 4)
    register(Mine, "weight", Fans(30, 40))
    assert fans_of(Special(3, 4), "weight") == Fans(30, 40)
    assert fans_of(nn.Linear(3, 4), "weight") == Fans(3, 4)


def test_parametrized_modules_keep_their_roles() -> None:
    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        module = parametrize(nn.Linear(3, 4))
        assert fans_of(module, "weight") == Fans(3, 4)
        assert role_of(module, "weight") == role_of(nn.Linear(3, 4), "weight")


def test_lazy_parameters_have_no_role_before_their_shape_is_known() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    assert role_of(module[0], "weight") is role_of(module[0], "bias") is None
    assert role_of(module[1], "weight") is None
    with pytest.raises(ValueError, match=r"'0\.weight' is lazy and has no shape yet: run one batch"):
        fans_of(module, "0.weight")
    module(torch.zeros(2, 3))
    assert fans_of(module, "0.weight") == Fans(3, 4)
    norm = role_of(module[1], "weight")
    assert norm is not None
    assert norm.default == Constant(1.0)


def test_roles_on_meta_and_in_other_dtypes_are_the_same() -> None:
    for device, dtype in (("meta", torch.float32), ("cpu", torch.bfloat16)):
        module = nn.LSTM(3, 4, proj_size=2, device=device, dtype=dtype)
        for name, _ in module.named_parameters():
            assert role_of(module, name) == role_of(nn.LSTM(3, 4, proj_size=2), name)


def test_fans_of_follows_dots() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Conv1d(4, 5, 2)))
    assert fans_of(model, "1.0.weight") == Fans(8, 10)


def test_fans_of_an_embedding_bag() -> None:
    bag = nn.EmbeddingBag(9, 4, mode="mean")
    assert fans_of(bag, "weight").fan_in == 1
    assert fans_of(bag, "weight", bag_size=8).fan_in == 1 / 8
    with pytest.raises(ValueError, match="bag_size must be a finite number above 0, got 0"):
        fans_of(bag, "weight", bag_size=0)
    with pytest.raises(ValueError, match="bag_size=8 means something to EmbeddingBag, not Linear"):
        fans_of(nn.Linear(3, 4), "weight", bag_size=8)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Linear(3, 4), "wieght", r"Linear has no parameter 'wieght'; it has weight, bias; did you mean 'weight'\?"),
        (
            nn.Sequential(nn.Linear(3, 4)),
            "1.weight",
            r"no parameter '1.weight'; it has 0.weight, 0.bias; did you mean '0.weight'\?",
        ),
        (nn.Linear(3, 4, bias=False), "bias", "no parameter 'bias'; it has weight$"),
        (nn.Linear(3, 4), "in_features", "no parameter 'in_features'; it has weight, bias"),
        (nn.ReLU(), "weight", "ReLU has no parameter 'weight': it has none at all"),
        (nn.Linear(3, 4), "bias", "'bias' is a bias parameter, and only weights have fans"),
        (
            Experts(),
            "kernel",
            r"Experts.kernel is not a known parameter: register\(Experts, 'kernel', Fans\(fan_in, fan_out\)\)",
        ),
    ],
)
def test_fans_that_do_not_exist_raise_with_the_reason(module: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fans_of(module, name)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.other = nn.Linear(3, 4)


def test_register_for_parameters_of_inner_modules() -> None:
    """Dots lead inside, wrappers or not; a glob reaches no further than it says."""
    register(Gated, "gate.bias", "keep")
    register(Gated, "gate.weight", Fans(6, 4))
    model = nn.Sequential(Gated(), nn.Linear(3, 4))
    for built in (model, torch.compile(model, backend="eager")):
        plans = {assignment.name: assignment for assignment in plan(built)}
        assert plans["0.gate.bias"].reason == "kept: registered so"
        assert plans["0.gate.weight"].fans == fans_of(built, "0.gate.weight") == (6, 4)
        assert plans["0.other.bias"].scheme == plans["1.bias"].scheme == "zeros"
        assert plans["0.other.weight"].fans == plans["1.weight"].fans == (3, 4)
    register(nn.Sequential, "*.gate.bias", "bias")  # the outermost knows best
    assert {assignment.name: assignment for assignment in plan(model)}["0.gate.bias"].scheme == "zeros"
    register(Gated, "*", "keep")
    assert {assignment.name: assignment for assignment in plan(model)}["0.other.bias"].scheme == "zeros"


def test_register_keep_yields_to_a_rule_for_everything() -> None:
    register(Gated, "gate.bias", "keep")
    (assignment,) = [
        assignment for assignment in plan(Gated(), rules=[Rule("gate.bias", "ones")]) if assignment.name == "gate.bias"
    ]
    assert (assignment.decided_by, assignment.scheme) == ("gate.bias", "ones")
    (assignment,) = [
        assignment for assignment in plan(Gated(), rules=[Rule("gate.*", "ones")]) if assignment.name == "gate.bias"
    ]
    assert assignment.reason == "kept: registered so"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((int, "a", "keep"), TypeError, "a subclass of nn.Module or its qualified name, got <class 'int'>"),
        ((Experts(), "a", "keep"), TypeError, "a subclass of nn.Module or its qualified name, got Experts"),
        (("Experts", "a", "keep"), ValueError, "'package.module.Class', got 'Experts'"),
        ((Experts, "", "keep"), ValueError, "a parameter's name as the module's own code has it, got ''"),
        ((Experts, "a..b", "keep"), ValueError, "a parameter's name as the module's own code has it, got 'a..b'"),
        ((Experts, "a", (3, 4)), TypeError, r"a role is Fans\(fan_in, fan_out\), 'bias', .*; got \(3, 4\)"),
        ((Experts, "a", Fans(0, 4)), ValueError, r"Fans\(fan_in\) must be a finite number above 0, got 0"),
        ((Experts, "a", Fans(3, -4)), ValueError, r"Fans\(fan_out\) must be a finite number above 0, got -4"),
        ((Experts, "a", "weight"), TypeError, "a role is .*; got 'weight'"),
    ],
)
def test_register_refuses_errors_at_once(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register(*arguments)


def test_table_of_rows_has_a_fan_in_only() -> None:
    register(Experts, "kernel", Fans(1, math.nan))
    assert fans_of(Experts(), "kernel").fan_in == 1


def test_register_function_without_role_is_named_when_called() -> None:
    register(Experts, "kernel", lambda module: 3)  # type: ignore[return-value]
    with pytest.raises(TypeError, match=r"a role is .*; got 3"):
        role_of(Experts(), "kernel")
