"""What a user asks for is checked when it is said, with texts that say what to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lightning_init import SCHEMES, Normal, Orthogonal, Rule, VarianceScaling, gain_of
from lightning_init.initialization.rules import Request, check_takes_gain

WITH_GAIN = (
    "xavier_normal, xavier_uniform, xavier_normal_truncated, glorot_normal, glorot_uniform, glorot_normal_truncated, "
    "he_normal, he_uniform, he_normal_truncated, kaiming_normal, kaiming_uniform, kaiming_normal_truncated, "
    "lecun_normal, lecun_uniform, lecun_normal_truncated, orthogonal, delta_orthogonal, sparse"
)


@pytest.mark.parametrize(
    ("pattern", "matched", "not_matched"),
    [
        ("head.weight", ["head.weight"], ["head.bias", "a.head.weight", "Head.weight"]),
        ("*.weight", ["head.weight", "a.b.weight"], ["weight", "head.weight_hh"]),
        ("encoder.*", ["encoder.0.weight", "encoder.bias"], ["decoder.0.weight", "encoder"]),
        ("layers.?.weight", ["layers.1.weight"], ["layers.10.weight"]),
        ("layers.[12].*", ["layers.1.weight", "layers.2.bias"], ["layers.3.weight"]),
        ("*", ["weight", "a.b.c"], []),
    ],
)
def test_patterns_are_globs_on_the_whole_name(pattern: str, matched: list[str], not_matched: list[str]) -> None:
    rule = Rule(pattern, "zeros")
    assert all(rule.matches(name) for name in matched)
    assert not any(rule.matches(name) for name in not_matched)


def test_patterns_match_any_name_of_a_parameter() -> None:
    assert Rule("table.weight", "zeros").matches("head.weight", "table.weight")
    assert not Rule("table.weight", "zeros").matches()


@pytest.mark.parametrize(
    ("pattern", "is_literal"),
    [
        ("head.weight", True),
        ("*.bias", True),
        ("weight", True),
        ("encoder.*weight", True),
        ("encoder.*", False),
        ("*", False),
        ("a.b.*", False),
    ],
)
def test_patterns_that_end_in_a_star_are_about_modules(pattern: str, is_literal: bool) -> None:
    assert Rule(pattern, "zeros").is_literal == is_literal


def test_rules_first_match_wins() -> None:
    rules = [Rule("a.weight", "zeros"), Rule("*.weight", "ones"), Rule("*", "keep")]
    request = Request.of("he_normal", rules)
    assert request.rule_for("a.weight") is rules[0]
    assert request.rule_for("b.weight") is rules[1]
    assert request.rule_for("b.bias") is rules[2]
    assert Request.of("he_normal").rule_for("a.weight") is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Rule("", "zeros"),
            ValueError,
            "Rule(pattern) is empty; it is a glob on parameter names such as 'encoder.*'",
        ),
        (
            lambda: Rule(3, "zeros"),
            TypeError,
            "Rule(pattern) is a glob on parameter names such as 'encoder.*', got 3 of type int",
        ),
        (
            lambda: Rule("a", "keeep"),
            ValueError,
            f"Rule(scheme) is 'keeep'; allowed: keep, {', '.join(SCHEMES)}; did you mean 'keep'?",
        ),
        (lambda: Rule("a", 3), TypeError, "a scheme is a name or a Scheme object, got 3 of type int"),
        (lambda: Rule("a", None), TypeError, "a scheme is a name or a Scheme object, got None of type NoneType"),
        (lambda: Rule("a", "keep", 2.0), ValueError, "Rule('a', 'keep') draws nothing: it cannot have a gain"),
        (lambda: Rule("a", "he_normal", 0), ValueError, "Rule(gain) must be a finite number above 0, got 0"),
        (lambda: Rule("a", "he_normal", math.nan), ValueError, "Rule(gain) must be a finite number above 0, got nan"),
        (lambda: Rule("a", "he_normal", "2"), TypeError, "Rule(gain) must be a number, got '2' of type str"),
        (
            lambda: Rule("a", "zeros", 2.0),
            ValueError,
            f"Rule(gain) has no meaning for scheme 'zeros'; schemes with a gain: {WITH_GAIN}",
        ),
        (
            lambda: Rule("a", Normal(0.02), 2.0),
            ValueError,
            f"Rule(gain) has no meaning for scheme 'Normal(std=0.02, mean=0.0)'; schemes with a gain: {WITH_GAIN}",
        ),
        (
            lambda: Request.of("torch_default", activation="relu"),
            ValueError,
            f"activation has no meaning for scheme 'torch_default'; schemes with a gain: {WITH_GAIN}",
        ),
        (lambda: Request.of("he_normal", bias=math.inf), ValueError, "bias must be a finite number, got inf"),
        (lambda: Request.of("he_normal", bias="0"), TypeError, "bias must be a number, got '0' of type str"),
        (
            lambda: Request.of("he_normal", ["head.*"]),
            TypeError,
            "rules is a list of Rule(pattern, scheme), got 'head.*' of type str",
        ),
        (
            lambda: Request.of("he_normal", Rule("a", "keep")),
            TypeError,
            "rules is a list of Rule(pattern, scheme), got Rule(pattern='a', scheme='keep', gain=None) of type Rule",
        ),
        (
            lambda: Request.of("he_normal", {"a": "keep"}),
            TypeError,
            "rules is a list of Rule(pattern, scheme), got 'a' of type str",
        ),
    ],
)
def test_rules_with_errors_are_refused_when_made(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message


def test_unknown_activation_error_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'geluu'.*did you mean 'gelu'\?"):
        Request.of("he_normal", activation="geluu")


def test_rule_that_matches_nothing_names_the_nearest() -> None:
    names = ["encoder.0.weight", "encoder.0.bias", "head.weight", "head.bias", "embedding.weight"]
    request = Request.of("he_normal", [Rule("encoder.*", "zeros"), Rule("heads.weight", "keep")])
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        request.check_all_used([[name] for name in names])
    assert str(caught.value) == (
        "rule 'heads.weight' matches none of the model's 5 parameters; "
        "nearest names: head.weight, encoder.0.weight, embedding.weight"
    )
    request.check_all_used([[name] for name in (*names, "heads.weight")])


def test_rule_for_a_model_without_parameters() -> None:
    request = Request.of("he_normal", [Rule("a", "zeros")])
    with pytest.raises(ValueError, match=r"^rule 'a' matches none of the model's 0 parameters; nearest names: none$"):
        request.check_all_used([])


def test_rule_after_one_that_matches_all_never_applies() -> None:
    narrow, wide = Rule("a", "keep"), Rule("*", "zeros")
    Request.of("he_normal", [narrow, wide]).check_all_used([["a"], ["b"]])
    with pytest.raises(ValueError, match=r"^rule 'a' never applies: rule '\*' stands before it"):
        Request.of("he_normal", [wide, narrow]).check_all_used([["a"], ["b"]])


def test_request_in_words() -> None:
    assert Request.of("kaiming_normal").text == "he_normal"
    assert Request.of("he_normal", activation="gelu").text == "he_normal for gelu"
    assert Request.of(Normal(0.5)).text == "Normal(std=0.5, mean=0.0)"


def test_rules_may_come_from_any_iterable() -> None:
    rules = (Rule("a", "keep"), Rule("b", "keep"))
    assert Request.of("zeros", iter(rules)).rules == rules
    assert Request.of("zeros", None).rules == ()


def test_activation_becomes_the_gain() -> None:
    assert Request.of("he_normal", activation="tanh").gain == gain_of("tanh")
    assert Request.of("he_normal").gain is None


@pytest.mark.parametrize("scheme", [VarianceScaling(), Orthogonal(), SCHEMES["sparse"]])
def test_schemes_with_a_gain(scheme: VarianceScaling) -> None:
    check_takes_gain(scheme, "gain")
    assert Rule("a", scheme, 2.0).gain == 2.0


def test_rule_keeps_only_by_its_scheme() -> None:
    assert Rule("a", "keep").keeps
    assert not Rule("a", "zeros").keeps
