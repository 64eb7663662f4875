"""Which scheme a parameter gets, what decided for it, and the gain."""

from __future__ import annotations

import math

from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.survey import Candidate
from lightning_init.initialization.whole_model import AUTHORS_SCALE, WholeModel, drawn_again, table_scheme
from lightning_init.introspect.role import Role
from lightning_init.schemes.distributions import Constant, Normal, Uniform
from lightning_init.schemes.named import Auto, TorchDefault, name_of, scheme_of
from lightning_init.schemes.scheme import Scheme

BESIDE_TABLE = "added to a table"
"""What decided about the gain of a weight whose output is added to the rows of a lookup table."""


def choose(candidate: Candidate, request: Request, model: WholeModel) -> tuple[Scheme, str, float]:
    """The scheme, what decided for it, and the gain.

    Raises:
        ValueError: a rule gives a scheme that needs fans to a parameter without.
    """
    role, rule = candidate.role, candidate.rule
    scheme = scheme_of(rule.scheme) if rule else request.scheme
    means_others = rule is not None and candidate.is_beside_weights and rule.pattern in model.rules_of_weights
    if rule is not None and rule.is_literal and not means_others and (role is None or role.kind != "weight"):
        return _as_named(candidate, rule, scheme)
    assert role is not None
    if role.kind == "embedding" or (candidate.is_tied_head and rule is None):
        if scheme.fills == "any parameter":  # an absolute scale means every table too
            return scheme, rule.pattern if rule else "scheme", _gain(scheme, request)
        return table_scheme(candidate, scheme, model.tied_widths)
    if role.kind == "weight":
        return _for_weight(candidate, role, request, model)
    if role.kind == "bias":
        if request.bias is None and rule is None and _weight_beside(candidate) in model.at_default:
            scheme = TorchDefault()
        return _bias(scheme, request.bias), "bias", 1.0
    return role.default, role.kind, 1.0


def _weight_beside(candidate: Candidate) -> str:
    """The name of the weight that a bias belongs to: ``bias_hh_l0``'s is ``weight_hh_l0``."""
    owner, _, attribute = candidate.site.stored_fqn.rpartition(".")
    return f"{owner}.{attribute.replace('bias', 'weight')}".lstrip(".")


def _as_named(candidate: Candidate, rule: Rule, scheme: Scheme) -> tuple[Scheme, str, float]:
    """What a rule gives to a parameter that it names outright, and that is no weight."""
    if scheme.fills == "weights":
        assert candidate.role is not None  # what is unknown is left alone unless a distribution is given
        raise ValueError(
            f"rule {rule.pattern!r} gives {name_of(scheme)!r} to {candidate.site.stored_fqn!r}, but only weights have "
            f"fans and its role is {candidate.role.kind!r}: give it Normal(std), Uniform(low, high), Constant(value) "
            "or 'keep'"
        )
    return scheme, rule.pattern, scheme.gain if rule.gain is None else rule.gain


def _for_weight(candidate: Candidate, role: Role, request: Request, model: WholeModel) -> tuple[Scheme, str, float]:
    """A weight gets what its rule says; else what fits its place in the model."""
    name, rule = candidate.site.stored_fqn, candidate.rule
    if rule is not None and (rule.is_literal or rule.gain is not None):
        scheme = scheme_of(rule.scheme)
        return scheme, rule.pattern, scheme.gain if rule.gain is None else rule.gain
    if rule is None and request.head is not None and name in model.heads:
        return request.head, "head", request.head.gain
    if rule is None and name in model.at_authors_scale:
        return drawn_again(role, candidate.authors_scale), AUTHORS_SCALE, 1.0
    if rule is None and isinstance(request.scheme, Auto) and name not in model.at_default:
        return _auto(name, request.scheme, model)
    scheme, by = (scheme_of(rule.scheme), rule.pattern) if rule else (request.scheme, "scheme")
    if rule is None and name in model.at_default:
        scheme, by = TorchDefault(), "scheme"
    gain = scheme.gain if rule else _gain(scheme, request)
    if scheme.takes_gain and model.trace.feed_of(name) == "linear":
        gain = 1.0
    elif scheme.takes_gain and request.is_gain_traced and rule is None:
        gain = _traced(name, gain, model)
    factor = model.beside_tables.get(name)
    if factor is not None and scheme.takes_gain:
        return scheme, BESIDE_TABLE, gain * factor
    if factor is not None and scheme.fills == "known parameters" and isinstance(role.default, (Normal, Uniform)):
        return role.default.scaled(factor), BESIDE_TABLE, factor
    return scheme, by, gain


def _auto(name: str, scheme: Auto, model: WholeModel) -> tuple[Scheme, str, float]:
    """What a weight in a deep chain gets: the gain of what feeds it, and its share of a sum."""
    gain = _traced(name, scheme.gain, model)
    factor = model.beside_tables.get(name)
    if factor is not None:
        return scheme, BESIDE_TABLE, gain * factor
    summands = model.trace.summands_with(name)
    return scheme, "scheme" if summands == 1 else f"one of {summands} summands", gain / math.sqrt(summands)


def _traced(name: str, otherwise: float, model: WholeModel) -> float:
    """The gain of what feeds a weight, where it was found."""
    gain = model.trace.gain_of(name)
    return otherwise if gain is None else gain


def _gain(scheme: Scheme, request: Request) -> float:
    """The gain that was asked for, else the scheme's own."""
    return scheme.gain if request.gain is None else request.gain


def _bias(scheme: Scheme, bias: float | None) -> Scheme:
    """The bias the user gave, else the scheme's own: PyTorch's for torch_default, 0 for all others."""
    if bias is not None:
        return Constant(bias)
    return scheme if scheme.fills == "known parameters" else Constant(0.0)
