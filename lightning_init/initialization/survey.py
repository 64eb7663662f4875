"""What a plan is made from: every parameter, what speaks about it, and what it holds; touches nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _OrthMaps

from lightning_init.distributed.shards import LocalShard, local_shard_of
from lightning_init.initialization.evidence import Evidence, Held, authors_evidence, evidence_of
from lightning_init.initialization.intent import purposes_of, uninitialised_among
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.scales import scale_of_table, scale_of_weight
from lightning_init.introspect.own_code import computes_as_its_type, fitted_role
from lightning_init.introspect.own_reset import role_by_own_reset
from lightning_init.introspect.role import Role
from lightning_init.introspect.roles import role_of
from lightning_init.introspect.sites import (
    ParameterSite,
    parameter_sites,
    parametrizations_of,
    recomputing_hook_of,
    type_name,
)
from lightning_init.schemes.named import scheme_of


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
        """The std of a lookup table or a weight, as its author left it."""
        if self.table is not None:
            return scale_of_table(self.table, self.evidence, self.site.parameter.shape[-1])
        assert self.role is not None
        return scale_of_weight(self.role, self.evidence)

    @property
    def is_named_by_rule(self) -> bool:
        """Whether a rule names the parameter outright, so that what its author meant does not count.

        Of a norm or a bias only without a glob, or where the glob matches nothing else: see the plan.
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


def survey(
    model: nn.Module, request: Request, *, is_uninitialised: bool = False, why_settled: WhySettled = nothing_is_settled
) -> list[Candidate]:
    """Every parameter of a model, what speaks about it, and what it holds here.

    Args:
        model: any module.
        request: whose rules leave parameters alone, or name them outright.
        is_uninitialised: the memory holds nothing, so it is not read.
        why_settled: says of a parameter, in words, why it has its weights already; "" if it has not.
    """
    check_model(model)
    found = list(parameter_sites(model))
    for site in found:
        if not is_lazy(site.parameter) and site.parameter.is_inference():
            raise ValueError(
                f"{site.stored_fqn!r} was made in inference mode, so nothing can train it: make the model outside of "
                "torch.inference_mode()"
            )
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


def is_doubtful(candidates: Iterable[Candidate]) -> bool:
    """Whether something is taken for its author's purpose that training would leave too."""
    held = [held_by(candidate) for candidate in candidates]
    return purposes_of(held) != purposes_of(held, constants_only=True)


def with_empty_memory_marked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates again, without what was read in memory that nobody has written to."""
    by_module: dict[int, list[Held]] = defaultdict(list)
    for candidate in candidates:
        if candidate.evidence is not None:
            by_module[id(candidate.site.module)].append(held_by(candidate))
    empty = uninitialised_among(by_module.values())
    return [replace(one, evidence=None, is_empty=True) if one.site.forward_fqn in empty else one for one in candidates]


def held_by(candidate: Candidate) -> Held:
    """What a parameter holds, as it is asked for its author's purpose."""
    module = candidate.site.module
    has_reset = hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")  # attention's is private
    return Held(candidate.site.forward_fqn, candidate.role, candidate.evidence, candidate.is_table, has_reset)


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
    if role is None and request.scheme.fills == "known parameters":  # it asks for what modules draw themselves
        role = role_by_own_reset(site.module, site.attribute)
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


def _why_left(
    site: ParameterSite,
    aliases: list[ParameterSite],
    originals: list[ParameterSite],
    role: Role | None,
    rule: Rule | None,
) -> tuple[Reason, str] | None:
    """Why nothing is drawn into this parameter, as a kind and in words; None if it is drawn."""
    no_numbers = _why_no_numbers(site.parameter)
    if no_numbers is not None:
        return no_numbers
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


def _why_no_numbers(parameter: Tensor) -> tuple[Reason, str] | None:
    """Why there is nothing to draw into; None if there is."""
    if is_lazy(parameter):
        return (
            Reason.UNINITIALISED,
            "uninitialised: a lazy module gets its shape from its first batch; run one before fit",
        )
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return Reason.INTEGER, f"integer ({parameter.dtype})"
    if parameter.layout is not torch.strided:
        return Reason.SPARSE, f"sparse ({parameter.layout})"
    return (Reason.NO_ELEMENTS, "no elements") if parameter.numel() == 0 else None


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


def _why_not_through(site: ParameterSite) -> tuple[Reason, str] | None:
    """What a parametrization lacks to be written through; None if it can be, or if there is none."""
    parametrizations = parametrizations_of(site) if site.storage == "parametrization" else None
    for step in parametrizations or ():
        # torch's orthogonal parametrization has a right_inverse that raises unless it keeps a base.
        is_one_way = getattr(step, "orthogonal_map", _OrthMaps.householder) != _OrthMaps.householder
        if not hasattr(step, "right_inverse") or (is_one_way and not hasattr(step, "base")):
            return Reason.PARAMETRIZED, f"parametrized: {type(step).__name__} has no right_inverse"
    return None
