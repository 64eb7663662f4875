"""Copies of weights that others made before new ones are drawn: slow weights, anchors, averages.

An optimizer such as Lookahead, a penalty such as L2-SP and a callback that averages weights copy the parameters when
they are made. Drawn weights would be pulled back to what the model held before, and no error would say so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_init.introspect.sites import ParameterSite
from lightning_init.sandbox import has_memory

MAX_OBJECTS = 100_000
"""How many objects are looked into, at most: a data set may hang on a callback."""

MAX_ITEMS = 10_000
"""Longer containers hold data."""

COMPUTED = 0.9
"""A tensor of a parameter's shape that correlates with it this much was computed from it."""

_NO_HOLDERS = {*vars(nn.Module()), "_trainer", "_fabric"}
"""Attributes of modules and callbacks that are not looked into: what every module has, and the way to the Trainer."""


class Copied(NamedTuple):
    """What a tensor that is no parameter of the model was made from.

    Attributes:
        name: full name of the parameter whose values it holds.
        is_exact: all numbers are equal; else the tensor was computed from the parameter.
    """

    name: str
    is_exact: bool


class Copies(NamedTuple):
    """Tensors that may be copies of parameters.

    Attributes:
        tensors: all that have a parameter's shape, by the way to them, such as ``Lookahead.slow[0][0]``.
        sources: what is known of some of them, by the same ways.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, Copied]


def find_copies(model: nn.Module, sites: Iterable[ParameterSite], holders: Mapping[str, object]) -> Copies:
    """The copies of a model's parameters that the model itself and others keep.

    A constant, such as a bias of zeros, equals too many tensors: it counts only where its name says so.

    Args:
        model: whose modules may keep buffers and attributes.
        sites: its parameters.
        holders: others that may have copied parameters, by what they are called.
    """
    by_shape: dict[torch.Size, list[ParameterSite]] = {}
    for site in sites:
        if _is_comparable(site.parameter) and site.parameter.numel() > 1:
            by_shape.setdefault(site.parameter.shape, []).append(site)
    own = {id(parameter) for parameter in model.parameters()}
    roots = list(model.named_modules())
    tensors = {
        path: tensor
        for path, tensor in _tensors([*holders.items(), *roots], {id(module) for _, module in roots})
        if id(tensor) not in own and _is_comparable(tensor) and tensor.shape in by_shape
    }
    sources = {path: _source(path, tensor, by_shape[tensor.shape]) for path, tensor in tensors.items()}
    return Copies(tensors, {path: source for path, source in sources.items() if source is not None})


def merge_sources(ranks: Iterable[Mapping[str, Copied]]) -> dict[str, Copied]:
    """What all ranks know: a copy from before DDP sent rank 0's weights around is recognised there only."""
    merged: dict[str, Copied] = {}
    for sources in ranks:
        for path, source in sources.items():
            if path not in merged or not merged[path].is_exact:
                merged[path] = source
    return merged


@torch.no_grad()
def refresh(copies: Copies, drawn: Mapping[str, Tensor]) -> list[str]:
    """Give the exact copies of drawn parameters the new values, and say so of each, and of what was computed.

    Args:
        copies: of :func:`find_copies`, before drawing.
        drawn: the parameters that have new values, by name.
    """
    refreshed: dict[str, list[str]] = {}
    computed = []
    for path, (name, is_exact) in copies.sources.items():
        if name not in drawn or path not in copies.tensors:
            continue
        if is_exact:
            copies.tensors[path].copy_(drawn[name])
            refreshed.setdefault(re.split(r"[.\[]", path, maxsplit=1)[0], []).append(name)
        else:
            computed.append(f"{path} was computed from the old values of {name}: compute it again")
    return [f"{holder} held {_copies_of(names)}" for holder, names in refreshed.items()] + computed


def _copies_of(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"a copy of {names[0]}: it has the new values too"
    return f"copies of {names[0]} and {len(names) - 1} more: they have the new values too"


def _is_comparable(tensor: Tensor) -> bool:
    is_known = isinstance(tensor, nn.Parameter) or type(tensor) in (Tensor, nn.Buffer, DTensor)
    if not is_known or is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
        return False
    if tensor.layout is not torch.strided or not tensor.is_floating_point() or not tensor.numel():
        return False
    return isinstance(tensor, DTensor) or has_memory(tensor)


def _source(path: str, tensor: Tensor, sites: Sequence[ParameterSite]) -> Copied | None:
    """The parameter that a tensor is a copy of; a view of it is none."""
    mine = _local(tensor)
    for site in sites:
        theirs = _local(site.parameter)
        is_alike = isinstance(tensor, DTensor) == isinstance(site.parameter, DTensor) and mine.shape == theirs.shape
        if not is_alike or not mine.numel() or mine.data_ptr() == theirs.data_ptr():
            continue
        theirs = theirs.to(mine.device, mine.dtype)
        is_constant = bool((theirs == theirs.flatten()[0]).all())
        if is_constant and not f".{path}".endswith(f".{site.stored_fqn}"):
            continue
        if torch.equal(mine, theirs):
            return Copied(site.stored_fqn, True)
        if not is_constant and mine.numel() >= 16 and _correlation(mine, theirs) > COMPUTED:
            return Copied(site.stored_fqn, False)
    return None


def _local(tensor: Tensor) -> Tensor:
    """What is held here, without its history."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _correlation(first: Tensor, second: Tensor) -> float:
    pair = [one.flatten()[:4096].double().cpu() for one in (first, second)]
    pair = [one - one.mean() for one in pair]
    scale = float(pair[0].norm() * pair[1].norm())
    return abs(float(pair[0] @ pair[1])) / scale if scale else 0.0


def _tensors(roots: Iterable[tuple[str, object]], not_entered: Container[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that these objects lead to, once, nearest first, with the way to it.

    Args:
        roots: names and objects.
        not_entered: what is a root of its own, and not to be found through others.
    """
    queue = [(path, value, True) for path, value in roots]
    seen: set[int] = set()
    while queue and len(seen) < MAX_OBJECTS:
        entered, queue = queue, []
        for path, value, is_root in entered:
            if id(value) in seen or (id(value) in not_entered and not is_root):
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                yield path, value
            else:
                queue += [(name, member, False) for name, member in _members(path, value)]


def _members(path: str, value: object) -> Iterable[tuple[str, object]]:
    """What is directly inside of a plain container, a module, an optimizer or a user's object."""
    if isinstance(value, nn.Module):
        return _members_of_module(path, value)
    if isinstance(value, dict):
        keys = (f".{key}" if isinstance(key, str) else f"[{index}]" for index, key in enumerate(value))
        return [(path + key, member) for key, (_, member) in zip(keys, _few(value), strict=False)]
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{index}]", member) for index, member in _few(dict(enumerate(value)))]
    if _may_keep_copies(value):
        return [(f"{path}.{name}", member) for name, member in vars(value).items() if name not in _NO_HOLDERS]
    return ()


def _few(entries: dict[Any, object]) -> Iterable[tuple[Any, object]]:
    return list(entries.items()) if len(entries) <= MAX_ITEMS else ()


def _members_of_module(path: str, module: nn.Module) -> Iterator[tuple[str, object]]:
    """Attributes, buffers, parameters and submodules, under the names that a user writes."""
    prefix = f"{path}." if path else ""
    of_torch = chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False), module.named_children()
    )
    own = ((name, member) for name, member in list(vars(module).items()) if name not in _NO_HOLDERS)
    for name, member in chain(of_torch, own):
        yield prefix + name, member


def _may_keep_copies(value: object) -> bool:
    """Whether an object with attributes is an optimizer or a user's own: no logger, no class, no part of torch."""
    if isinstance(value, Optimizer):
        return True
    library = type(value).__module__.partition(".")[0]
    is_library = library in ("torch", "builtins") or library in sys.stdlib_module_names
    return hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value) and not is_library
