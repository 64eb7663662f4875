"""What a decision about one parameter needs to know of the whole model: its tables, its outputs, its rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lightning_init.initialization.advice import class_names
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request
from lightning_init.initialization.scales import differs_from_default, habitual, has_unusual_gain
from lightning_init.initialization.survey import Candidate, held_by
from lightning_init.introspect.role import Role
from lightning_init.introspect.trace import Trace
from lightning_init.schemes.distributions import Distribution, Normal
from lightning_init.schemes.named import SCHEMES, Auto, name_of, scheme_of
from lightning_init.schemes.scheme import Scheme
from lightning_init.schemes.variance_scaling import Siren

AUTHORS_SCALE = "author's scale"
"""What decided about a parameter that is drawn again at the scale it had."""

DEEP = 6
"""Weights in a chain without normalisation from which on their gains matter: there PyTorch's own draw, whose gain is
1/√3, leaves a thousandth of the standard deviation behind ReLUs."""

SMALL_TABLE = 0.5
"""Std below which what is added to a lookup table, at a scheme's scale of about 1, would drown it."""


class WholeModel(NamedTuple):
    """What is known of all parameters together.

    Attributes:
        tied_widths: see :func:`_widths_of_tied_tables`.
        rules_of_weights: patterns, see :func:`_speak_of_weights`.
        trace: what feeds the weights.
        heads: names of the weights that give the model's outputs, and are no lookup tables.
        class_names: what to call the classes of its modules.
        at_authors_scale: names, see :func:`_at_authors_scale`.
        beside_tables: factors by name, see :func:`_beside_tables`.
        at_default: names, see :func:`_at_default`.
    """

    tied_widths: set[int]
    rules_of_weights: set[str]
    trace: Trace
    heads: frozenset[str]
    class_names: Mapping[type, str]
    at_authors_scale: frozenset[str]
    beside_tables: Mapping[str, float]
    at_default: frozenset[str]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], request: Request, trace: Trace) -> WholeModel:
        """Look at all candidates.

        Raises:
            ValueError: the request asks for a head, and no output layer is known.
        """
        heads = heads_among(candidates, trace)
        if request.head is not None and not heads:
            raise ValueError(_no_heads(request.head, trace))
        tied_widths = _widths_of_tied_tables(candidates, trace)
        return cls(
            tied_widths,
            _speak_of_weights(candidates),
            trace,
            heads,
            class_names(candidate.site for candidate in candidates),
            _at_authors_scale(candidates, request, trace),
            _beside_tables(candidates, request, trace, tied_widths),
            _at_default(candidates, request, trace),
        )


def as_code(scheme: Scheme) -> str:
    """A scheme as one writes it in Python."""
    name = name_of(scheme)
    return repr(name) if name in SCHEMES else name


def heads_among(candidates: Iterable[Candidate], trace: Trace) -> frozenset[str]:
    """Names of the weights that give the model's outputs, without lookup tables and what is not drawn anyway."""
    outputs = set(trace.heads)
    return frozenset(
        one.site.stored_fqn
        for one in candidates
        if one.site.stored_fqn in outputs and one.why_left is None and not one.is_table
        if one.role is not None and one.role.kind == "weight"
    )


def _no_heads(head: Scheme, trace: Trace) -> str:
    why = f" ({trace.why_not})" if trace.why_not else ""
    return (
        f"head={as_code(head)} found no output layer to draw{why}: only one batch through the model shows which they "
        f"are. Name them instead: Rule('head.weight', {as_code(head)})"
    )


def _speak_of_weights(candidates: Iterable[Candidate]) -> set[str]:
    """The globs that match a weight or a lookup table: they do not mean the biases and norms beside it."""
    return {
        candidate.rule.pattern
        for candidate in candidates
        if candidate.rule is not None
        and candidate.rule.is_glob
        and candidate.role is not None
        and candidate.role.kind in ("weight", "embedding")
    }


def _widths_of_tied_tables(candidates: Iterable[Candidate], trace: Trace) -> set[int]:
    """Row lengths of the tables that are output layers too and hold the module's own draw, N(0, 1).

    They get 1/√width, and so does every other such table of that width: what is added to each other needs one scale.
    Not where the model itself makes smaller what the output layer reads or gives, as T5 does.
    """
    return {
        candidate.site.parameter.shape[-1]
        for candidate in candidates
        if candidate.why_left is None and candidate.is_tied_head and candidate.authors_scale == 1.0
        if not trace.is_reduced(candidate.site.stored_fqn)
    }


def _at_authors_scale(candidates: Sequence[Candidate], request: Request, trace: Trace) -> frozenset[str]:
    """Names of the weights that are drawn at the scale their author gave them, unless a rule speaks of them.

    - What a constant enlarges before something nonlinear reads it, as in sin(30·Wx): no formula knows of the constant.
    - An output layer outside of the usual gains: nothing behind it needs a variance.
    - For ``torch_default``, whatever was not left at PyTorch's default, nor given one number for layers of all sizes;
      for ``auto``, also what was.
    """
    if request.scheme.fills == "any parameter":
        return frozenset()
    held = list(map(held_by, candidates))
    is_auto = isinstance(request.scheme, Auto)
    habits = frozenset() if is_auto else habitual(held)
    is_default_asked = is_auto or request.scheme.fills == "known parameters"
    heads = set(trace.heads)
    names = []
    for candidate, one in zip(candidates, held, strict=True):
        name = candidate.site.stored_fqn
        if one.role is None or one.role.kind != "weight" or one.is_table:
            continue
        is_chosen = differs_from_default(one.role, one.evidence) and one.name not in habits
        is_unusual_head = name in heads and is_chosen and has_unusual_gain(one)
        is_enlarged = trace.is_enlarged(name) and not isinstance(request.scheme, Siren)
        if is_enlarged or is_unusual_head or (is_default_asked and is_chosen):
            names.append(name)
    return frozenset(names)


def _at_default(candidates: Iterable[Candidate], request: Request, trace: Trace) -> frozenset[str]:
    """Names of the weights that ``auto`` draws as their module does, because nothing would be gained.

    A gain that is right for one layer matters where layers follow each other: in a chain of :data:`DEEP` and more that
    no normalisation interrupts, PyTorch's own draw lets the signal die. Elsewhere it is what a model was tried with.
    """
    if not isinstance(request.scheme, Auto) or not trace.is_of_call or not trace.uses:
        return frozenset()
    names = (one.site.stored_fqn for one in candidates if one.role is not None and one.role.kind == "weight")
    heads = set(trace.heads)
    return frozenset(
        name for name in names if name in heads or trace.is_normalized(name) or trace.depth_of(name) < DEEP
    )


def _beside_tables(
    candidates: Iterable[Candidate], request: Request, trace: Trace, tied_widths: set[int]
) -> dict[str, float]:
    """The weights whose outputs are added to the rows of small lookup tables, with a factor on their std.

    A table keeps its scale, and would drown in outputs of variance 1. So each of the N outputs that are added to it
    gets its scale, divided by √N: all of them together are as large as the rows.
    """
    if request.scheme.fills == "any parameter":
        return {}
    tables = [
        one for one in candidates if one.is_table and (one.why_left is None or one.why_left[0] is not Reason.TIED)
    ]
    stds = {one.site.stored_fqn: _std_oftable_scheme(one, request, tied_widths) for one in tables}
    factors = {}
    for one in candidates:
        name = one.site.stored_fqn
        scales = [stds[table] * factor for table, factor in trace.tables_beside(name).items() if table in stds]
        if scales and max(scales) < SMALL_TABLE and not one.is_table:
            factors[name] = max(scales) / math.sqrt(trace.summands_with(name))
    return factors


def _std_oftable_scheme(candidate: Candidate, request: Request, tied_widths: set[int]) -> float:
    """The std that a lookup table will have; 1 where it cannot be told."""
    rule = candidate.rule
    scheme = scheme_of(rule.scheme) if rule and not rule.keeps else request.scheme
    if scheme.fills != "any parameter":
        scheme, _, _ = table_scheme(candidate, scheme, tied_widths)
    initializer = scheme.resolve(candidate.role, 1.0)
    return initializer.target_std if isinstance(initializer, Distribution) else 1.0


def table_scheme(candidate: Candidate, scheme: Scheme, tied_widths: set[int]) -> tuple[Scheme, str, float]:
    """A lookup table is drawn at its author's scale; at torch's own, N(0, 1), it is made to fit an output layer."""
    assert candidate.table is not None
    width, scale = candidate.site.parameter.shape[-1], candidate.authors_scale
    if scale == 1.0 and width in tied_widths:
        if candidate.is_tied_head and scheme.fills == "known parameters":
            return scheme, "scheme", 1.0  # as the module of the output layer draws it
        return Normal(width**-0.5), "tied head" if candidate.is_tied_head else "added to a tied head", 1.0
    again = drawn_again(candidate.table, scale)
    return again, "embedding" if again is candidate.table.default else AUTHORS_SCALE, 1.0


def drawn_again(role: Role, scale: float) -> Distribution:
    """What an author drew: the module's own distribution, or a normal one of another scale."""
    return role.default if scale == role.default.target_std else Normal(scale)
