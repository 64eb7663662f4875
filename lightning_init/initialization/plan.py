"""From a model and a request to what will be done to each parameter; touches nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _OrthMaps

from lightning_init.distributed.shards import LocalShard, local_shard_of
from lightning_init.initialization.evidence import Evidence, authors_evidence, evidence_of
from lightning_init.initialization.intent import Held, purposes_of, scale_of_table, uninitialised_among
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request, Rule
from lightning_init.introspect.own_code import computes_as_its_type, fitted_role
from lightning_init.introspect.role import Role
from lightning_init.introspect.roles import role_of
from lightning_init.introspect.sites import (
    ParameterSite,
    parameter_sites,
    parametrizations_of,
    recomputing_hook_of,
    type_name,
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


@dataclass(frozen=True)
class Candidate:
    """One parameter, with all that a decision about it needs.

    Attributes:
        site: where it lives.
        aliases: every site of the same parameter, itself included.
        originals: every site of the same attribute of the forward pass, itself included.
        roles: what it is to the module of each alias, where that is known.
        role: what it is to its module; None where that is not known.
        rule: of the user's, if one speaks of it.
        why_left: the reason for which it cannot be drawn, whatever it holds, as a kind and in words.
        shard: which of its elements are held here, where it can be drawn.
        evidence: what it holds; None where that does not matter, or where there is nothing to read.
        is_empty: nobody has written to its memory yet.
    """

    site: ParameterSite
    aliases: list[ParameterSite]
    originals: list[ParameterSite]
    roles: tuple[Role, ...]
    role: Role | None
    rule: Rule | None
    why_left: tuple[Reason, str] | None
    shard: LocalShard | None = None
    evidence: Evidence | None = None
    is_empty: bool = False

    @property
    def is_table(self) -> bool:
        """Whether it is a lookup table, an output layer too or not."""
        return self.table is not None

    @property
    def table(self) -> Role | None:
        """Its role as a lookup table."""
        return next((role for role in self.roles if role.kind == "embedding"), None)

    @property
    def is_tied_head(self) -> bool:
        """Whether it is a lookup table and the weight of an output layer."""
        return self.is_table and any(role.kind == "weight" for role in self.roles)

    @property
    def authors_scale(self) -> float:
        """The std of a lookup table, as its author left it."""
        assert self.table is not None
        return scale_of_table(self.table, self.evidence, self.site.parameter.shape[-1])

    @property
    def is_named_by_rule(self) -> bool:
        """Whether a rule names the parameter outright, so that what its author meant does not count.

        Of a norm or a bias only without a glob, or where the glob matches nothing else: see :func:`_speak_of_weights`.
        """
        return self.rule is not None and self.rule.is_literal and not (self.rule.is_glob and self.is_beside_weights)

    @property
    def is_beside_weights(self) -> bool:
        """Whether it is what stands beside a weight in a module: a bias, a norm's scale, or the like."""
        return self.role is not None and self.role.kind in ("bias", "norm", "other")


WhySettled: TypeAlias = Callable[[ParameterSite], str]
"""Why a parameter has its weights already, in words; "" if it has not."""


def nothing_is_settled(site: ParameterSite) -> str:
    """Every parameter may be drawn."""
    return ""


def make_plan(model: nn.Module, request: Request) -> list[Assignment]:
    """One assignment for every parameter name of the model, in order of registration.

    Only what this process holds is read; where ranks hold shards they have to agree on it first, which
    :func:`~lightning_init.initialization.initialize.carry_out` does between the two halves.

    Raises:
        ValueError: a rule matches nothing, or asks for something its parameter does not have.
    """
    return decide(with_empty_memory_marked(survey(model, request)), request)


def survey(
    model: nn.Module, request: Request, *, is_uninitialised: bool = False, why_settled: WhySettled = nothing_is_settled
) -> list[Candidate]:
    """The first half of a plan: every parameter, what speaks about it, and what it holds here.

    Args:
        model: any module.
        request: whose rules leave parameters alone, or name them outright.
        is_uninitialised: the memory holds nothing, so it is not read.
        why_settled: says of a parameter, in words, why it has its weights already; "" if it has not.
    """
    check_model(model)
    found = list(parameter_sites(model))
    by_memory: dict[tuple[int, int], list[ParameterSite]] = defaultdict(list)
    by_forward_fqn: dict[str, list[ParameterSite]] = defaultdict(list)
    for site in found:
        by_memory[_memory_of(site.parameter)].append(site)
        by_forward_fqn[site.forward_fqn].append(site)
    relatives = [(by_memory[_memory_of(site.parameter)], by_forward_fqn[site.forward_fqn]) for site in found]
    request.check_all_used([_names(aliases, originals) for aliases, originals in relatives])
    return [
        _candidate(site, aliases, originals, request, is_uninitialised, why_settled)
        for site, (aliases, originals) in zip(found, relatives, strict=True)
    ]


def check_model(model: object) -> None:
    """Raise TypeError unless this is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {model!r} of type {type(model).__name__}")


def _memory_of(parameter: Tensor) -> tuple[int, int]:
    """What two parameters have in common if they are one: ``decoder.weight.data = encoder.weight.data.t()``."""
    is_plain = not isinstance(parameter, DTensor) and not is_lazy(parameter) and parameter.layout is torch.strided
    address = parameter.data_ptr() if is_plain and not parameter.is_meta else 0
    return (address, parameter.numel()) if address else (id(parameter), 0)


def _names(aliases: Iterable[ParameterSite], originals: Iterable[ParameterSite]) -> list[str]:
    """Every name of a parameter that a rule may go by."""
    return [name for other in (*aliases, *originals) for name in (other.stored_fqn, other.forward_fqn)]


def _candidate(
    site: ParameterSite,
    aliases: list[ParameterSite],
    originals: list[ParameterSite],
    request: Request,
    is_uninitialised: bool,
    why_settled: WhySettled,
) -> Candidate:
    """Ask everything about one parameter."""
    asked = (role_of(alias.module, alias.attribute, alias.ancestors) for alias in aliases)
    roles = tuple(role for role in asked if role is not None)
    role = _main_role(site, roles)
    rule = request.rule_for(*_names(aliases, originals))
    settled = next(filter(None, map(why_settled, aliases)), "")
    why_left = (Reason.SETTLED, settled) if settled else _why_left(site, aliases, originals, role, rule)
    candidate = Candidate(site, aliases, originals, roles, role, rule, why_left)
    if candidate.why_left is not None:
        return candidate
    shard = local_shard_of(site.parameter)
    evidence = None
    if role is not None and not is_uninitialised and not candidate.is_named_by_rule and not site.is_computed:
        evidence = authors_evidence(site.module, site.attribute, shard.full_shape) or evidence_of(
            shard, len(role.slices), is_table=candidate.is_table, version=site.parameter._version
        )
    return replace(candidate, shard=shard, evidence=evidence, is_empty=is_uninitialised)


def decide(
    candidates: Sequence[Candidate], request: Request, *, was_trained: bool = False, trace: Trace = _NO_TRACE
) -> list[Assignment]:
    """The second half of a plan: what will be done to each parameter, from what all of them are and hold.

    Args:
        candidates: of :func:`survey`.
        request: the scheme and the rules.
        was_trained: the model shows signs of training: only constants still say what its author meant.
        trace: what feeds the weights, as far as that is known.
    """
    purposes = purposes_of(map(_held, candidates), constants_only=was_trained)
    heads = heads_among(candidates, trace)
    if request.head is not None and not heads:
        raise ValueError(_no_heads(request.head, trace))
    model = _Model(_widths_of_tied_tables(candidates), _speak_of_weights(candidates), trace, heads)
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


def is_doubtful(candidates: Iterable[Candidate]) -> bool:
    """Whether something is taken for its author's purpose that training would leave too."""
    held = [_held(candidate) for candidate in candidates]
    return purposes_of(held) != purposes_of(held, constants_only=True)


class _Model(NamedTuple):
    """What a decision about one parameter needs to know of all of them.

    Attributes:
        tied_widths: see :func:`_widths_of_tied_tables`.
        rules_of_weights: patterns, see :func:`_speak_of_weights`.
        trace: what feeds the weights.
        heads: names of the weights that give the model's outputs, and are no lookup tables.
    """

    tied_widths: set[int]
    rules_of_weights: set[str]
    trace: Trace
    heads: frozenset[str]


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


def _held(candidate: Candidate) -> Held:
    module = candidate.site.module
    has_reset = hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")  # attention's is private
    return Held(candidate.site.forward_fqn, candidate.role, candidate.evidence, candidate.is_table, has_reset)


def with_empty_memory_marked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates again, without what was read in memory that nobody has written to."""
    by_module: dict[int, list[Held]] = defaultdict(list)
    for candidate in candidates:
        if candidate.evidence is not None:
            by_module[id(candidate.site.module)].append(_held(candidate))
    empty = uninitialised_among(by_module.values())
    return [replace(one, evidence=None, is_empty=True) if one.site.forward_fqn in empty else one for one in candidates]


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
    kind, pattern = type_name(site.module), rule.pattern if rule else ""
    if candidate.why_left is not None:
        left, reason = candidate.why_left
        advice = _registration(site) if left is Reason.TYPE_UNKNOWN else ""
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


def _why_left(
    site: ParameterSite,
    aliases: list[ParameterSite],
    originals: list[ParameterSite],
    role: Role | None,
    rule: Rule | None,
) -> tuple[Reason, str] | None:
    """Why nothing is drawn into this parameter, as a kind and in words; None if it is drawn."""
    parameter = site.parameter
    if is_lazy(parameter):
        return (
            Reason.UNINITIALISED,
            "uninitialised: a lazy module gets its shape from its first batch; run one before fit",
        )
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return Reason.INTEGER, f"integer ({parameter.dtype})"
    if parameter.numel() == 0:
        return Reason.NO_ELEMENTS, "no elements"
    if rule is not None and rule.keeps:
        return Reason.RULE_KEEPS, "kept by rule"
    decided_elsewhere = _why_left_to_another(site, aliases, originals)
    if decided_elsewhere is not None:
        return decided_elsewhere
    if not (rule is not None and rule.is_literal and scheme_of(rule.scheme).fills == "any parameter"):
        if role is None:
            return Reason.TYPE_UNKNOWN, "module type unknown"
        if role.kind == "keep":
            return Reason.ROLE_KEEPS, f"kept: {role.why}"
        own_code = _why_own_code(site, role)
        if own_code:
            return Reason.OWN_CODE, own_code
    return _why_not_through(site)


def _why_own_code(site: ParameterSite, role: Role) -> str:
    """What tells that the parameter is not what its module's type says; "" if it is."""
    if site.storage == "recomputed" and recomputing_hook_of(site.module, site.attribute) is None:
        return f"a hook computes {site.attribute.removesuffix('_orig')} from it, in a way of its own"
    if site.is_computed or role.kind not in ("weight", "embedding"):
        return ""
    if fitted_role(role, site.module, site.attribute, site.parameter.shape) is None:
        return f"its shape {tuple(site.parameter.shape)} is not that of a {type_name(site.module)}"
    if not computes_as_its_type(site.module):
        return f"forward of {type_name(site.module)} makes something else of it than its base class"
    return ""


def _why_left_to_another(
    site: ParameterSite, aliases: list[ParameterSite], originals: list[ParameterSite]
) -> tuple[Reason, str] | None:
    """Whether another name of this parameter, or another original of the same attribute, decides about it."""
    owner = min(aliases, key=lambda alias: alias.forward_fqn)  # by name: registration order must not change the weights
    if site is not owner:
        return Reason.TIED, f"tied to {owner.forward_fqn}"
    frozen = next((original for original in (site, *originals) if not original.parameter.requires_grad), None)
    if frozen is site:
        return Reason.FROZEN, "frozen"
    if frozen is not None:
        return Reason.FROZEN_TOGETHER, f"frozen together with {frozen.stored_fqn}"
    if originals[0] is not site:
        return Reason.WRITTEN_TOGETHER, f"written together with {originals[0].stored_fqn}"
    return None


def _registration(site: ParameterSite) -> str:
    """The line that makes a module type known."""
    return f"register({type_name(site.module)}, {site.attribute!r}, Fans(fan_in, fan_out))"


def _why_not_through(site: ParameterSite) -> tuple[Reason, str] | None:
    """What a parametrization lacks to be written through; None if it can be, or if there is none."""
    parametrizations = parametrizations_of(site) if site.storage == "parametrization" else None
    for step in parametrizations or ():
        # torch's orthogonal parametrization has a right_inverse that raises unless it keeps a base.
        is_one_way = getattr(step, "orthogonal_map", _OrthMaps.householder) != _OrthMaps.householder
        if not hasattr(step, "right_inverse") or (is_one_way and not hasattr(step, "base")):
            return Reason.PARAMETRIZED, f"parametrized: {type(step).__name__} has no right_inverse"
    return None


def _main_role(site: ParameterSite, roles: Sequence[Role]) -> Role | None:
    """The role that decides: a lookup table that is also an output layer is a weight of that layer.

    Its padding row, which only the table knows, stays one.
    """
    weights = [role for role in roles if role.kind == "weight"]
    role = next(iter(weights or roles), None)
    if role is not None and role.kind == "weight" and not site.is_computed:
        role = fitted_role(role, site.module, site.attribute, site.parameter.shape) or role
    padding = next((role.padding_index for role in roles if role.padding_index is not None), None)
    return replace(role, padding_index=padding) if role and padding is not None else role


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
