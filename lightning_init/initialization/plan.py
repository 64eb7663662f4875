"""From a model and a request to what will be done to each parameter; touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_init.checks import listed
from lightning_init.initialization.advice import registration
from lightning_init.initialization.choice import choose
from lightning_init.initialization.evidence import Evidence
from lightning_init.initialization.intent import purposes_of
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request
from lightning_init.initialization.survey import Candidate, held_by, survey, with_empty_memory_marked
from lightning_init.initialization.whole_model import WholeModel, as_code
from lightning_init.introspect.role import Role
from lightning_init.introspect.sites import (
    ParameterSite,
    module_class,
    parametrizations_of,
)
from lightning_init.introspect.trace import Trace
from lightning_init.schemes.distributions import Constant
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.named import name_of
from lightning_init.schemes.scheme import Initializer

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
    model = WholeModel.of(candidates, request, trace)
    plan = [
        _assign(candidate, request, purposes.get(candidate.site.forward_fqn, ""), model) for candidate in candidates
    ]
    unknown = [one for one in plan if one.left is Reason.TYPE_UNKNOWN]
    if request.is_strict and unknown:
        raise ValueError(
            f"strict: {len(unknown)} parameters are of module types that are not known: "
            f"{listed([one.name for one in unknown])}. Make them known: "
            f"{'; '.join(dict.fromkeys(one.advice for one in unknown))}; or leave them alone: Rule(name, 'keep')"
        )
    return plan


def _assign(candidate: Candidate, request: Request, purpose: str, model: WholeModel) -> Assignment:
    """Decide for one parameter; the reasons to leave it alone come first."""
    site, role, rule = candidate.site, candidate.role, candidate.rule
    kind, pattern = model.class_names[module_class(site.module)], rule.pattern if rule else ""
    if candidate.why_left is not None:
        left, reason = candidate.why_left
        advice = registration(site, model.class_names) if left is Reason.TYPE_UNKNOWN else ""
        return Assignment(site, kind, pattern, role=role, left=left, reason=reason, advice=advice)
    scheme, decided_by, gain = choose(candidate, request, model)
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
        reason, advice = f"set by its author: {purpose}", f"Rule({site.stored_fqn!r}, {as_code(scheme)})"
        left = Reason.SET_BY_AUTHOR
        return Assignment(site, kind, pattern, role=role, left=left, reason=reason, advice=advice)
    return Assignment(site, kind, decided_by, initializers, text, gain, role)


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
