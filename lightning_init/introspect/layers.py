"""Which modules are layers, in what order, under what names, and which parameters are theirs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_init.checks import did_you_mean, listed
from lightning_init.introspect.activations import ActivationTraits, activation_of
from lightning_init.introspect.names import clean_name

_ONE_LAYER = (nn.MultiheadAttention, nn.RNNBase)
"""Modules that never call what is inside them (attention reads its ``out_proj.weight``): each is one layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A module whose output is measured.

    Attributes:
        name: the user's attribute path, without wrappers.
        module: the module itself.
        activation: what it does to numbers; None for a module with parameters.
        parameters: its own, and those of inner modules that are no layers themselves (``out_proj``, parametrizations).
        within: the modules around it, wrappers among them, from the model on.
        is_compiled: some part of the model is under ``torch.compile``.
    """

    name: str
    module: nn.Module
    activation: ActivationTraits | None
    parameters: tuple[nn.Parameter, ...]
    within: tuple[nn.Module, ...] = ()
    is_compiled: bool = False


def find_layers(model: nn.Module) -> list[Layer]:
    """Every layer of ``model``, in registration order.

    A layer is a module that owns parameters directly, or an activation module. Multi-head attention and recurrent
    networks are one layer each; ``parametrizations`` belong to their module. The model itself is a layer, named after
    its class, if it owns all parameters that there are: ``nn.Linear(4, 2)`` alone.
    """
    layers: list[Layer] = []
    compiled = _is_compiled(model)
    by_path: dict[str, tuple[nn.Module, ...]] = {}
    inside: set[nn.Module] = set()  # these belong to a layer and are none themselves
    root, above_root = model, ()  # type: tuple[nn.Module, tuple[nn.Module, ...]]
    of_root: tuple[nn.Parameter, ...] = ()
    for path, module in model.named_modules():
        name, above = clean_name(model, path) if path else "", by_path.get(path.rpartition(".")[0], ())
        by_path[path] = (*above, module)
        if module in inside:
            continue
        belonging = _modules_belonging_to(module)
        inside.update(belonging)
        own = tuple(dict.fromkeys(p for owner in (module, *belonging) for p in owner.parameters(recurse=False)))
        if not name:
            root, of_root, above_root = module, own, above  # the last of them is what all wrappers wrap
        elif own:
            layers.append(Layer(name, module, None, own, above, compiled))
        elif activation := activation_of(module):
            layers.append(Layer(name, module, activation, (), above, compiled))
    if of_root and not any(layer.parameters for layer in layers):
        layers.insert(0, Layer(type(root).__name__, root, None, of_root, above_root, compiled))
    return layers


def select_layers(layers: Sequence[Layer], patterns: Sequence[str] | None, *, missing_ok: bool = False) -> list[Layer]:
    """The layers whose name matches a glob of ``patterns`` (``["encoder.*", "head"]``), in their order.

    Args:
        layers: those to choose from.
        patterns: globs on full names; None selects all layers.
        missing_ok: a pattern may match no layer.

    Raises:
        ValueError: a pattern matches no layer, and may not.
    """
    if patterns is None:
        return list(layers)
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not missing_ok and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(_no_match(pattern, names))
    return [layer for layer in layers if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]


class Parts:
    """The modules and parameters that a model has now, to be compared with those that it has later.

    A head that is replaced, a weight that is assigned or gets a parametrization, a layer that is appended: all of them
    make layers that were found before wrong.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = _parts_of(model)

    def are_those_of(self, model: nn.Module) -> bool:
        """Whether ``model`` still has these. Takes less than a microsecond for each module."""
        now = _parts_of(model)
        return len(now) == len(self._parts) and all(map(_is_same_part, self._parts, now))


def _parts_of(model: nn.Module) -> list[object]:
    parts: list[object] = []
    for module in model.modules():
        parts.append(module)
        parts += module._parameters.values()
    return parts


def _is_same_part(before: object, now: object) -> bool:
    # what FSDP2 gathers from shards stands in the shards' place for as long as it is told to keep it
    return before is now or (isinstance(before, DTensor) and isinstance(now, nn.Parameter))


def _is_compiled(model: nn.Module) -> bool:
    """Whether a module inside was given to ``torch.compile``, or compiled in place."""
    dynamo = sys.modules.get("torch._dynamo")  # else nothing can have been compiled, and it is slow to import
    return dynamo is not None and any(
        isinstance(module, dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _modules_belonging_to(module: nn.Module) -> list[nn.Module]:
    """The modules inside that are no layers themselves: all of an attention's, and those of parametrizations."""
    if isinstance(module, _ONE_LAYER):
        return list(module.modules())[1:]
    parametrizations = getattr(module, "parametrizations", None)
    return list(parametrizations.modules()) if isinstance(parametrizations, nn.ModuleDict) else []


def _no_match(pattern: str, names: list[str]) -> str:
    shown = listed(names, 20)
    return (
        f"layers: {pattern!r} matches no layer (*, ? and [] work as in file names). "
        f"This model's layers are: {shown or 'none'}{did_you_mean(pattern, names)}"
    )
