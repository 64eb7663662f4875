"""From a model and a request to what will be done to each parameter; touches nothing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _OrthMaps

from lightning_init.initialization.rules import Request, Rule
from lightning_init.introspect.role import Role
from lightning_init.introspect.roles import role_of
from lightning_init.introspect.sites import ParameterSite, parameter_sites, parametrizations_of, type_name
from lightning_init.schemes.distributions import Constant, Distribution, Normal, Scheme
from lightning_init.schemes.fans import Fans
from lightning_init.schemes.named import FanScheme, TorchDefault, name_of, scheme_of
from lightning_init.schemes.structured import StructuredScheme

MODULE_TYPE_UNKNOWN = "module type unknown"


@dataclass(frozen=True)
class Assignment:
    """What will be done to one parameter.

    Attributes:
        site: where it lives; ``site.stored_fqn`` is its full name.
        module_type: class name of its owner.
        decided_by: what decided: ``scheme``, ``bias``, ``norm``, ``embedding``, ``tied head``, a rule's pattern …
        initializers: per slice what it is filled with, a distribution or a structured scheme; () where left alone.
        scheme: how the values are called, such as ``he_normal``; "" where it is left alone.
        gain: the gain that went into the values.
        role: what the parameter is to its module; None for a module type that is not known.
        reason: why it is left alone; "" where it is drawn.
        advice: the line to paste where the module type is not known.
    """

    site: ParameterSite
    module_type: str
    decided_by: str
    initializers: tuple[Distribution | StructuredScheme, ...] = ()
    scheme: str = ""
    gain: float = 1.0
    role: Role | None = None
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
    reason = _reason_to_leave(site, aliases, originals, role, rule)
    if reason:
        advice = _registration(site) if reason == MODULE_TYPE_UNKNOWN else ""
        return Assignment(site, kind, rule.pattern if rule else "", role=role, reason=reason, advice=advice)
    scheme, why, gain = _choose(site, aliases, role, rule, request)
    values, text = _values(scheme, role, gain, site), name_of(scheme) + _through(site)
    if role is not None and role.bias_values and why == "bias" and scheme == Constant(0.0) and request.bias is None:
        own = dict(zip(role.slices, role.bias_values, strict=True))
        values = tuple(map(Constant, own.values()))
        text += "".join(f", {name} {value:g}" for name, value in own.items() if value)
    return Assignment(site, kind, why, values, text, gain, role)


def _through(site: ParameterSite) -> str:
    """Which parametrizations the values go through, so that nobody expects to measure what was drawn."""
    steps = parametrizations_of(site) or ()
    return "".join(f" through {type(step).__name__.lstrip('_')}" for step in steps)


def _reason_to_leave(
    site: ParameterSite,
    aliases: list[ParameterSite],
    originals: list[ParameterSite],
    role: Role | None,
    rule: Rule | None,
) -> str:
    """Why nothing is drawn into this parameter; "" if it is drawn."""
    owner = min(aliases, key=lambda alias: alias.forward_fqn)  # by name: registration order must not change the weights
    parameter = site.parameter
    if is_lazy(parameter):
        return "uninitialised: a lazy module gets its shape from its first batch; run one before fit"
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"integer ({parameter.dtype})"
    if parameter.numel() == 0:
        return "no elements"
    if rule is not None and rule.keeps:
        return "kept by rule"
    if site is not owner:
        return f"tied to {owner.forward_fqn}"
    frozen = next((original for original in (site, *originals) if not original.parameter.requires_grad), None)
    if frozen is not None:
        return "frozen" if frozen is site else f"frozen together with {frozen.stored_fqn}"
    if originals[0] is not site:
        return f"written together with {originals[0].stored_fqn}"
    if (role is None or role.kind == "keep") and not (rule is not None and rule.is_literal and _is_complete(rule)):
        return MODULE_TYPE_UNKNOWN if role is None else f"kept: {role.why}"
    return _why_not_through(site)


def _is_complete(rule: Rule) -> bool:
    """Whether a rule says everything, so that it also serves a module type that is not known."""
    return isinstance(scheme_of(rule.scheme), Distribution)


def _registration(site: ParameterSite) -> str:
    """The line that makes a module type known."""
    return f"register({type_name(site.module)}, {site.attribute!r}, Fans(fan_in, fan_out))"


def _why_not_through(site: ParameterSite) -> str:
    """ "" if a parametrized attribute can be written, else what its parametrization lacks."""
    parametrizations = parametrizations_of(site) if site.storage == "parametrization" else None
    if parametrizations is None:
        return ""
    for step in parametrizations:
        # torch's orthogonal parametrization has a right_inverse that raises unless it keeps a base.
        is_one_way = getattr(step, "orthogonal_map", _OrthMaps.householder) != _OrthMaps.householder
        if not hasattr(step, "right_inverse") or (is_one_way and not hasattr(step, "base")):
            return f"parametrized: {type(step).__name__} has no right_inverse"
    return ""


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
        if not isinstance(scheme, (Distribution, TorchDefault)):
            assert role is not None  # what is unknown is left alone unless a distribution is given
            raise ValueError(
                f"rule {rule.pattern!r} gives {name_of(scheme)!r} to {site.stored_fqn!r}, but only weights have fans "
                f"and its role is {role.kind!r}: give it Normal(std), Uniform(low, high), Constant(value) or 'keep'"
            )
        return scheme, rule.pattern, gain
    assert role is not None
    if role.kind == "weight":
        if rule is None and _is_tied_head(aliases) and not isinstance(scheme, TorchDefault):
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
    return scheme if isinstance(scheme, TorchDefault) else Constant(0.0)


def _values(
    scheme: Scheme, role: Role | None, gain: float, site: ParameterSite
) -> tuple[Distribution | StructuredScheme, ...]:
    """What each slice is filled with."""
    if role is not None and isinstance(scheme, TorchDefault):
        return (role.default,) * len(role.slices)
    if isinstance(scheme, (Distribution, StructuredScheme)):
        return (scheme,) * (len(role.slices) if role else 1)
    if isinstance(scheme, FanScheme) and role is not None and role.fans is not None:
        return (scheme.resolve(role.fans, gain),) * len(role.slices)
    raise TypeError(f"{name_of(scheme)} of {site.stored_fqn!r} is no Distribution, FanScheme or StructuredScheme")
