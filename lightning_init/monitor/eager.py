"""Compiled modules run eagerly while somebody records layers inside of them; all other compiled code stays compiled.

Code under ``torch.compile`` does not call hooks that it was not compiled with. So what is compiled around a recorded
layer, a whole module or one of its methods, is exchanged for what it was compiled from, and put back afterwards: the
same graphs run again, without graph breaks, new guards or recompilation. A compiled function that no module has as its
own stays as it is, and so does a module none of whose layers is recorded: some code is feasible only when compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_COMPILED_FROM = "_torchdynamo_orig_callable"
"""Where ``torch.compile`` keeps what a function was compiled from."""


@dataclass(eq=False)
class _Exchanged:
    """An attribute of a module that was compiled, and is not for as long as anybody holds it."""

    module: nn.Module
    name: str
    compiled: Any
    eager: Any
    is_own: bool
    holders: set[int] = field(default_factory=set)

    def put_back(self) -> None:
        """Give the module what it had, unless somebody has given it something else since."""
        if vars(self.module).get(self.name) is not self.eager:
            return
        if self.is_own:
            vars(self.module)[self.name] = self.compiled
        else:
            del vars(self.module)[self.name]


_exchanged: dict[tuple[int, str], _Exchanged] = {}


def hold_eager(holder: object, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Have the compiled ones of ``modules`` run eagerly until :func:`release_eager`, and return them.

    Args:
        holder: on whose account; several may hold the same module, and release it in any order.
        modules: those that have recorded layers inside.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled, and the compiler is slow to import
        return []
    held = []
    for module in modules:
        for name, compiled, eager, is_own in _compiled_attributes(module):
            _exchanged[id(module), name] = _Exchanged(module, name, compiled, eager, is_own)
            vars(module)[name] = eager
        of_module = [one for one in _exchanged.values() if one.module is module] if _exchanged else []
        for one in of_module:
            one.holders.add(id(holder))
        held += [module] if of_module else []
    return held


def release_eager(holder: object) -> None:
    """Have what ``holder`` held run compiled again, if nobody else holds it."""
    for key, one in list(_exchanged.items()):
        if id(holder) in one.holders:
            one.holders.discard(id(holder))
            if not one.holders:
                del _exchanged[key]
                one.put_back()


def _compiled_attributes(module: nn.Module) -> list[tuple[str, Any, Any, bool]]:
    """Name, compiled value and what it was compiled from, and whether it is the module's own or its class's."""
    found = [
        (name, value, getattr(value, _COMPILED_FROM), True)
        for name, value in vars(module).items()
        if isinstance(value, (FunctionType, MethodType)) and hasattr(value, _COMPILED_FROM)
    ]
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch."):
            break
        for name, value in vars(kind).items():
            if isinstance(value, FunctionType) and hasattr(value, _COMPILED_FROM) and name not in vars(module):
                found.append((name, value, MethodType(getattr(value, _COMPILED_FROM), module), False))
    return found
