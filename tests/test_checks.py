"""Errors at the door: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from lightning_init.checks import check_choice, check_finite, check_integer, check_positive, did_you_mean, nearest_names


def test_check_choice_names_the_allowed_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^when is 'frech'; allowed: fresh, always; did you mean 'fresh'\?$"):
        check_choice("when", "frech", ["fresh", "always"])


def test_check_choice_of_a_far_name_has_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"^when is 'x'; allowed: fresh, always$"):
        check_choice("when", "x", ["fresh", "always"])


@pytest.mark.parametrize("given", [None, 3, ["fresh"], True])
def test_check_choice_refuses_what_is_no_name(given: object) -> None:
    with pytest.raises(ValueError, match="allowed: fresh, always"):
        check_choice("when", given, (name for name in ["fresh", "always"]))


def test_check_choice_passes_an_allowed_name() -> None:
    check_choice("when", "always", iter(["fresh", "always"]))


def test_did_you_mean_finds_the_nearest_name() -> None:
    assert did_you_mean("xavier_norm", ["he_normal", "xavier_normal", "xavier_uniform"]) == (
        "; did you mean 'xavier_normal'?"
    )
    assert did_you_mean("relu", []) == ""
    assert did_you_mean("green", (name for name in ["red", "blue"])) == ""  # one half in common


def test_nearest_names_come_in_order_of_their_distance() -> None:
    names = ["head.bias", "encoder.weight", "head.weight", "norm.scale"]
    assert nearest_names("heads.weight", iter(names), at_most=3) == ["head.weight", "encoder.weight"]
    assert nearest_names("heads.weight", names, at_most=1) == ["head.weight"]
    assert nearest_names("heads.weight", [], at_most=3) == []
    assert set(nearest_names("x", names, at_most=9, however_far=True)) == set(names)


@pytest.mark.parametrize("value", [0, 0.0, -1e-300, -math.inf, math.inf, math.nan])
def test_check_positive_refuses_what_is_not_positive(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^std must be a finite number above 0, got {value!r}$"):
        check_positive("std", value)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_check_finite_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^bias must be a finite number, got {value!r}$"):
        check_finite("bias", value)


@pytest.mark.parametrize("value", ["0.02", None, True, 1j, torch.tensor(1.0)], ids=repr)
@pytest.mark.parametrize("check", [check_positive, check_finite])
def test_check_positive_and_finite_refuse_what_is_no_number(check: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^std must be a number, got .* of type {type(value).__name__}$"):
        check("std", value)


@pytest.mark.parametrize("value", [5e-324, 1, 1e308, Fraction(1, 3)])
def test_check_positive_and_finite_pass_every_kind_of_number(value: float) -> None:
    check_positive("std", value)
    check_finite("bias", -value)


@pytest.mark.parametrize("value", [1.0, True, "1", None, torch.tensor(1)], ids=repr)
def test_check_integer_refuses_what_is_none(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^seed must be an integer, got .* of type {type(value).__name__}$"):
        check_integer("seed", value)


@pytest.mark.parametrize("value", [0, -1, 2**70])
def test_check_integer_passes_any_integer(value: int) -> None:
    check_integer("seed", value)
