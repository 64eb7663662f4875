"""From a model and a request to what will be done to each parameter; touches nothing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _OrthMaps

from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request, Rule
from lightning_init.introspect.role import Role
from lightning_init.introspect.roles import role_of
from lightning_init.introspect.sites import ParameterSite, parameter_sites, parametrizations_of, type_name
from lightning_init.schemes.distributions import Constant, Normal
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.named import name_of, scheme_of
from lightning_init.schemes.scheme import Initializer, Scheme


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

    Raises:
        ValueError: a rule matches nothing, or asks for something its parameter does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {model!r} of type {type(model).__name__}")
    found = list(parameter_sites(model))
    request.check_all_used(list(dict.fromkeys(name for site in found for name in (site.stored_fqn, site.forward_fqn))))
    by_parameter: dict[int, list[ParameterSite]] = defaultdict(list)
    by_forward_fqn: dict[str, list[ParameterSite]] = defaultdict(list)
    for site in found:
        by_parameter[id(site.parameter)].append(site)
        by_forward_fqn[site.forward_fqn].append(site)
    return [
        _assign(site, by_parameter[id(site.parameter)], by_forward_fqn[site.forward_fqn], request) for site in found
    ]


def _assign(
    site: ParameterSite, aliases: list[ParameterSite], originals: list[ParameterSite], request: Request
) -> Assignment:
    """Decide for one parameter; the reasons to leave it alone come first."""
    role = _role(site, aliases)
    rule = request.rule_for(
        *(name for other in (*aliases, *originals) for name in (other.stored_fqn, other.forward_fqn))
    )
    kind = type_name(site.module)
    why_left = _why_left(site, aliases, originals, role, rule)
    if why_left is not None:
        left, reason = why_left
        advice = _registration(site) if left is Reason.TYPE_UNKNOWN else ""
        pattern = rule.pattern if rule else ""
        return Assignment(site, kind, pattern, role=role, left=left, reason=reason, advice=advice)
    scheme, decided_by, gain = _choose(site, aliases, role, rule, request)
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
    return Assignment(site, kind, decided_by, initializers, text, gain, role)


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
    return _why_not_through(site)


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


def _role(site: ParameterSite, aliases: list[ParameterSite]) -> Role | None:
    """The parameter's role; a lookup table that is also an output layer is a weight of that layer.

    Its padding row, which only the table knows, stays one.
    """
    roles = [
        role
        for role in (role_of(alias.module, alias.attribute, alias.ancestors) for alias in aliases)
        if role is not None
    ]
    weights = [role for role in roles if role.kind == "weight"]
    role = next(iter(weights or roles), None)
    padding = next((role.padding_index for role in roles if role.padding_index is not None), None)
    return dataclasses.replace(role, padding_index=padding) if role and padding is not None else role


def _is_tied_head(aliases: list[ParameterSite]) -> bool:
    kinds = {
        role.kind
        for role in (role_of(alias.module, alias.attribute, alias.ancestors) for alias in aliases)
        if role is not None
    }
    return {"weight", "embedding"} <= kinds


def _choose(
    site: ParameterSite, aliases: list[ParameterSite], role: Role | None, rule: Rule | None, request: Request
) -> tuple[Scheme, str, float]:
    """The scheme, what decided for it, and the gain."""
    scheme = scheme_of(rule.scheme) if rule else request.scheme
    gain = rule.gain if rule else request.gain
    gain = scheme.gain if gain is None else gain
    if rule is not None and rule.is_literal and (role is None or role.kind != "weight"):
        if scheme.fills == "weights":
            assert role is not None  # what is unknown is left alone unless a distribution is given
            raise ValueError(
                f"rule {rule.pattern!r} gives {name_of(scheme)!r} to {site.stored_fqn!r}, but only weights have fans "
                f"and its role is {role.kind!r}: give it Normal(std), Uniform(low, high), Constant(value) or 'keep'"
            )
        return scheme, rule.pattern, gain
    assert role is not None
    if role.kind == "weight":
        if rule is None and _is_tied_head(aliases) and scheme.fills != "known parameters":
            assert role.fans is not None
            return Normal(role.fans.fan_in**-0.5), "tied head", 1.0
        return scheme, rule.pattern if rule else "scheme", gain
    if role.kind == "bias":
        return _bias(scheme, request.bias), "bias", 1.0
    return role.default, role.kind, 1.0


def _bias(scheme: Scheme, bias: float | None) -> Scheme:
    """The bias the user gave, else the scheme's own: PyTorch's for torch_default, 0 for all others."""
    if bias is not None:
        return Constant(bias)
    return scheme if scheme.fills == "known parameters" else Constant(0.0)
