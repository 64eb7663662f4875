"""From a model and a request to what will be done to each parameter; touches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_init.initialization.advice import class_names, registration
from lightning_init.initialization.evidence import Evidence
from lightning_init.initialization.intent import purposes_of
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request
from lightning_init.initialization.survey import Candidate, held_by, survey, with_empty_memory_marked
from lightning_init.introspect.role import Role
from lightning_init.introspect.sites import (
    ParameterSite,
    module_class,
    parametrizations_of,
)
from lightning_init.introspect.trace import Trace
from lightning_init.schemes.distributions import Constant, Normal
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.named import SCHEMES, name_of, scheme_of
from lightning_init.schemes.scheme import Initializer, Scheme

_NO_TRACE = Trace()


@dataclass(frozen=True)
class Assignment:
    """What will be done to one parameter.

    Attributes:
        site: where it lives; ``site.stored_fqn`` is its full name.
        module_type: class name of its owner.
        decided_by: what decided: ``scheme``, ``bias``, ``norm``, ``embedding``, ``tied head``, a rule's pattern …
        initializers: what each slice is filled with, a distribution or a structured scheme; () where left alone.
        scheme: what the initializers are called, such as ``he_normal``; "" where it is left alone.
        gain: the gain that went into the initializers.
        role: what the parameter is to its module; None for a module type that is not known.
        left: the kind of reason for which it is left alone; None where it is drawn.
        reason: the same in words, with the names it speaks of; "" where it is drawn.
        advice: the line to paste where the module type is not known.
    """

    site: ParameterSite
    module_type: str
    decided_by: str
    initializers: tuple[Initializer, ...] = ()
    scheme: str = ""
    gain: float = 1.0
    role: Role | None = None
    left: Reason | None = None
    reason: str = ""
    advice: str = ""

    @property
    def name(self) -> str:
        """The parameter's full name, wrappers removed."""
        return self.site.stored_fqn

    @property
    def fans(self) -> Fans | None:
        """Fans per slice, where the parameter has any."""
        return self.role.fans if self.role else None

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the equal chunks along dimension 0 that are drawn independently."""
        return self.role.slices if self.role else ("",)

    @property
    def is_drawn(self) -> bool:
        """Whether new values are written."""
        return bool(self.initializers)


def make_plan(model: nn.Module, request: Request) -> list[Assignment]:
    """One assignment for every parameter name of the model, in order of registration.

    Only what this process holds is read; where ranks hold shards they have to agree on it first, which
    :func:`~lightning_init.initialization.initialize.carry_out` does between the two halves.

    Raises:
        ValueError: a rule matches nothing, or asks for something its parameter does not have.
    """
    return decide(with_empty_memory_marked(survey(model, request)), request)


def decide(
    candidates: Sequence[Candidate], request: Request, *, was_trained: bool = False, trace: Trace = _NO_TRACE
) -> list[Assignment]:
    """What will be done to each parameter, from what all of them are and hold.

    Args:
        candidates: of :func:`~lightning_init.initialization.survey.survey`.
        request: the scheme and the rules.
        was_trained: the model shows signs of training: only constants still say what its author meant.
        trace: what feeds the weights, as far as that is known.
    """
    purposes = purposes_of(map(held_by, candidates), constants_only=was_trained)
    names = class_names(candidate.site for candidate in candidates)
    heads = heads_among(candidates, trace)
    if request.head is not None and not heads:
        raise ValueError(_no_heads(request.head, trace))
    model = _Model(_widths_of_tied_tables(candidates), _speak_of_weights(candidates), trace, heads, names)
    return [
        _assign(candidate, request, purposes.get(candidate.site.forward_fqn, ""), model) for candidate in candidates
    ]


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
        f"head={_as_code(head)} found no output layer to draw{why}: only one batch through the model shows which they "
        f"are. Name them instead: Rule('head.weight', {_as_code(head)})"
    )


class _Model(NamedTuple):
    """What a decision about one parameter needs to know of all of them.

    Attributes:
        tied_widths: see :func:`_widths_of_tied_tables`.
        rules_of_weights: patterns, see :func:`_speak_of_weights`.
        trace: what feeds the weights.
        heads: names of the weights that give the model's outputs, and are no lookup tables.
        class_names: what to call the classes of its modules.
    """

    tied_widths: set[int]
    rules_of_weights: set[str]
    trace: Trace
    heads: frozenset[str]
    class_names: Mapping[type, str]


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


def _widths_of_tied_tables(candidates: Iterable[Candidate]) -> set[int]:
    """Row lengths of the tables that are output layers too and hold the module's own draw, N(0, 1).

    They get 1/√width, and so does every other such table of that width: what is added to each other needs one scale.
    """
    return {
        candidate.site.parameter.shape[-1]
        for candidate in candidates
        if candidate.why_left is None and candidate.is_tied_head and candidate.authors_scale == 1.0
    }


def _assign(candidate: Candidate, request: Request, purpose: str, model: _Model) -> Assignment:
    """Decide for one parameter; the reasons to leave it alone come first."""
    site, role, rule = candidate.site, candidate.role, candidate.rule
    kind, pattern = model.class_names[module_class(site.module)], rule.pattern if rule else ""
    if candidate.why_left is not None:
        left, reason = candidate.why_left
        advice = registration(site, model.class_names) if left is Reason.TYPE_UNKNOWN else ""
        return Assignment(site, kind, pattern, role=role, left=left, reason=reason, advice=advice)
    scheme, decided_by, gain = _choose(candidate, request, model)
    initializer = scheme.resolve(role, gain)
    if not isinstance(initializer, Initializer):
        raise TypeError(
            f"{name_of(scheme)} gives {initializer!r} for {site.stored_fqn!r}, which is no Distribution and no "
            "StructuredScheme"
        )
    initializers = (initializer,) * (len(role.slices) if role else 1)
    text = name_of(scheme) + _through(site)
    starts_at_zero = decided_by == "bias" and scheme == Constant(0.0) and request.bias is None
    if role is not None and role.bias_values and starts_at_zero:  # but for the forget gate of an LSTM
        own = dict(zip(role.slices, role.bias_values, strict=True))
        initializers = tuple(map(Constant, own.values()))
        text += "".join(f", {name} {value:g}" for name, value in own.items() if value)
    is_named = decided_by == "head" or (rule is not None and rule.is_literal and decided_by == rule.pattern)
    if (
        purpose
        and not is_named
        and not _is_what_it_holds(initializers, candidate.evidence)
        and not _is_asked_for(candidate, request)
    ):
        reason, advice = f"set by its author: {purpose}", f"Rule({site.stored_fqn!r}, {_as_code(scheme)})"
        left = Reason.SET_BY_AUTHOR
        return Assignment(site, kind, pattern, role=role, left=left, reason=reason, advice=advice)
    return Assignment(site, kind, decided_by, initializers, text, gain, role)


def _as_code(scheme: Scheme) -> str:
    """A scheme as one writes it in Python."""
    name = name_of(scheme)
    return repr(name) if name in SCHEMES else name


def _is_what_it_holds(initializers: Sequence[Initializer], evidence: Evidence | None) -> bool:
    """Whether drawing would not change a constant."""
    values = tuple(one.value if isinstance(one, Constant) else None for one in initializers)
    return evidence is not None and evidence.constants == values


def _is_asked_for(candidate: Candidate, request: Request) -> bool:
    """Whether the user gave a value for all biases, and this one holds no prior."""
    is_bias = candidate.role is not None and candidate.role.kind == "bias"
    return is_bias and request.bias is not None and candidate.evidence is not None and not candidate.evidence.squares


def _through(site: ParameterSite) -> str:
    """Which parametrizations the values go through, so that nobody expects to measure what was drawn."""
    steps = parametrizations_of(site) or ()
    return "".join(f" through {type(step).__name__.lstrip('_')}" for step in steps)


def _choose(candidate: Candidate, request: Request, model: _Model) -> tuple[Scheme, str, float]:
    """The scheme, what decided for it, and the gain."""
    site, role, rule = candidate.site, candidate.role, candidate.rule
    scheme = scheme_of(rule.scheme) if rule else request.scheme
    gain = rule.gain if rule else request.gain
    gain = scheme.gain if gain is None else gain
    by = rule.pattern if rule else "scheme"
    means_others = rule is not None and candidate.is_beside_weights and rule.pattern in model.rules_of_weights
    if rule is not None and rule.is_literal and not means_others and (role is None or role.kind != "weight"):
        if scheme.fills == "weights":
            assert role is not None  # what is unknown is left alone unless a distribution is given
            raise ValueError(
                f"rule {rule.pattern!r} gives {name_of(scheme)!r} to {site.stored_fqn!r}, but only weights have fans "
                f"and its role is {role.kind!r}: give it Normal(std), Uniform(low, high), Constant(value) or 'keep'"
            )
        return scheme, rule.pattern, gain
    assert role is not None
    if role.kind == "embedding" or (candidate.is_tied_head and rule is None):
        if scheme.fills == "any parameter":  # an absolute scale means every table too
            return scheme, by, gain
        return _table(candidate, scheme, model.tied_widths)
    if role.kind == "weight":
        if request.head is not None and rule is None and site.stored_fqn in model.heads:
            return request.head, "head", request.head.gain
        asks_for_gain = rule is not None and (rule.is_literal or rule.gain is not None)
        if scheme.takes_gain and not asks_for_gain and model.trace.feed_of(site.stored_fqn) == "linear":
            return scheme, by, 1.0
        return scheme, by, gain
    if role.kind == "bias":
        return _bias(scheme, request.bias), "bias", 1.0
    return role.default, role.kind, 1.0


def _table(candidate: Candidate, scheme: Scheme, tied_widths: set[int]) -> tuple[Scheme, str, float]:
    """A lookup table is drawn at its author's scale; at torch's own, N(0, 1), it is made to fit an output layer."""
    assert candidate.table is not None
    width, scale = candidate.site.parameter.shape[-1], candidate.authors_scale
    if scale == 1.0 and width in tied_widths:
        if candidate.is_tied_head and scheme.fills == "known parameters":
            return scheme, "scheme", 1.0  # as the module of the output layer draws it
        return Normal(width**-0.5), "tied head" if candidate.is_tied_head else "added to a tied head", 1.0
    if scale == candidate.table.default.target_std:
        return candidate.table.default, "embedding", 1.0
    return Normal(scale), "author's scale", 1.0


def _bias(scheme: Scheme, bias: float | None) -> Scheme:
    """The bias the user gave, else the scheme's own: PyTorch's for torch_default, 0 for all others."""
    if bias is not None:
        return Constant(bias)
    return scheme if scheme.fills == "known parameters" else Constant(0.0)
