"""Where each parameter of a model lives: its owner, its name there, and what stands between it and the forward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_init.introspect.names import clean_name

Storage: TypeAlias = Literal["itself", "parametrization", "weight_norm", "recomputed"]


@dataclass(frozen=True)
class ParameterSite:
    """One registered parameter and the attribute of its owner that the forward pass reads.

    They differ where something computes the attribute: ``0.parametrizations.weight.original0`` is registered,
    ``0.weight`` is read.

    Attributes:
        stored_fqn: the registered parameter's full name, wrappers removed.
        forward_fqn: the full name of what the forward pass reads; the random stream is keyed by it.
        module: the owner of that attribute.
        attribute: its name there (``weight``).
        parameter: the registered parameter.
        ancestors: the modules around the owner, outermost first, each with the attribute's name as seen from there.
        storage: ``itself``; ``parametrization`` (written through the right inverse); ``weight_norm`` (the older one,
            by hooks); ``recomputed`` (pruning and the older spectral_norm: the forward pass recomputes it from here).
    """

    stored_fqn: str
    forward_fqn: str
    module: nn.Module
    attribute: str
    parameter: Tensor
    ancestors: tuple[tuple[nn.Module, str], ...] = ()
    storage: Storage = "itself"

    @property
    def is_computed(self) -> bool:
        """Whether the attribute has to be written through the inverse of a computation."""
        return self.storage in ("parametrization", "weight_norm")

    @property
    def current(self) -> Tensor:
        """What the forward pass reads now; for a parametrized attribute it is computed.

        In evaluation mode: while training, reading a spectral norm's weight changes the norm's vectors.
        """
        if self.storage == "parametrization":
            with _in_eval_mode(parametrizations_of(self) or ()):
                return torch.Tensor.detach(getattr(self.module, self.attribute))
        hook = weight_norm_of(self.module, self.attribute) if self.storage == "weight_norm" else None
        computed: Tensor = hook.compute_weight(self.module) if hook else self.parameter
        return computed.detach()


def parameter_sites(model: nn.Module) -> Iterator[ParameterSite]:
    """Every registered parameter of the model under every name it has, in order of registration."""
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner_path, _, attribute = path.rpartition(".")
        owner = model.get_submodule(owner_path)
        name = clean_name(model, path)
        if isinstance(owner, ParametrizationList):
            yield _parametrized(model, owner_path, name, parameter)
        else:
            target, storage = _behind(owner, attribute)
            ancestors = modules_around(model, owner_path, target)
            yield ParameterSite(name, _sibling(name, target), owner, target, parameter, ancestors, storage)


def _parametrized(model: nn.Module, list_path: str, name: str, parameter: Tensor) -> ParameterSite:
    """``X.parametrizations.weight.original0`` belongs to ``X.weight``."""
    ancestors, _, attribute = list_path.rpartition(".")
    owner_path = ancestors.removesuffix("parametrizations").removesuffix(".")
    target = clean_name(model, f"{owner_path}.{attribute}" if owner_path else attribute)
    around = modules_around(model, owner_path, attribute)
    return ParameterSite(name, target, model.get_submodule(owner_path), attribute, parameter, around, "parametrization")


def modules_around(model: nn.Module, owner_path: str, attribute: str) -> tuple[tuple[nn.Module, str], ...]:
    """The modules on the way to an owner, outermost first, each with the attribute's name as seen from there.

    For ``owner_path="encoder.0"`` and ``attribute="weight"``: the model with ``encoder.0.weight`` and its ``encoder``
    with ``0.weight``; the owner itself is left out.
    """
    steps = owner_path.split(".") if owner_path else []
    found = []
    module = model
    for i, step in enumerate(steps):
        found.append((module, clean_name(module, ".".join([*steps[i:], attribute]))))
        module = module.get_submodule(step)
    return tuple(found)


def _behind(owner: nn.Module, attribute: str) -> tuple[str, Storage]:
    """The attribute that the forward pass reads, and how it comes from the registered one.

    Pre-forward hooks compute ``weight`` from ``weight_g`` and ``weight_v`` (the older weight_norm) or ``weight_orig``
    (pruning, the older spectral_norm). The name's ending alone means nothing: users have such names too.
    """
    stem, _, ending = attribute.rpartition("_")
    if ending in ("g", "v") and weight_norm_of(owner, stem) is not None:
        return stem, "weight_norm"
    if ending == "orig" and stem not in dict(owner.named_parameters(recurse=False)) and hasattr(owner, stem):
        return stem, "recomputed"
    return attribute, "itself"


def weight_norm_of(module: nn.Module, attribute: str) -> WeightNorm | None:
    """The hook of ``torch.nn.utils.weight_norm`` that computes this attribute, if there is one."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, WeightNorm) and hook.name == attribute), None)


def recomputing_hook_of(module: nn.Module, attribute: str) -> SpectralNorm | BasePruningMethod | None:
    """The hook of pruning or of the older spectral_norm that computes this attribute, if there is one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == attribute:
            return hook
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attribute:
            return hook
    return None


def parametrizations_of(site: ParameterSite) -> ParametrizationList | None:
    """The parametrizations of a site's attribute, if it has any."""
    if not is_parametrized(site.module, site.attribute):
        return None
    found = getattr(site.module.parametrizations, site.attribute)
    return found if isinstance(found, ParametrizationList) else None


@contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch modules, but not what they contain, to evaluation mode and back."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _sibling(name: str, attribute: str) -> str:
    owner, dot, _ = name.rpartition(".")
    return f"{owner}{dot}{attribute}"


def type_name(module: nn.Module) -> str:
    """The name of :func:`module_class`."""
    return module_class(module).__name__


def module_class(module: nn.Module) -> type[nn.Module]:
    """The user's class, without the classes that FSDP2 and ``parametrize`` derive from it on the fly."""
    return next(kind for kind in type(module).__mro__ if kind is not FSDPModule and not _is_derived(kind))


def _is_derived(kind: type) -> bool:
    """Whether a class was made at run time and named after its base: FSDPLinear, ParametrizedLinear.

    Such a class is no attribute of the module it claims to come from.
    """
    names = {base.__name__ for base in kind.__bases__}
    is_named_so = any(kind.__name__ == prefix + name for prefix in ("FSDP", "Parametrized") for name in names)
    return is_named_so and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is not kind
