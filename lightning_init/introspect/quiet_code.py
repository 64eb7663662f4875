"""Whether a module can be called only to find out what it does: nobody hears of it, and copying it costs nothing.

A layer may print, count, write to a file, or hold a network of a gigabyte in a list. So code that is not PyTorch's own
is read before it is called: it may use PyTorch, arithmetic, and functions for which the same holds.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_MOST_ELEMENTS = 1 << 16
"""Elements of a module's tensors: what holds more is a memory bank, too large to be copied."""

_HARMLESS_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        *("abs", "bool", "dict", "divmod", "enumerate", "float", "getattr", "hasattr", "int", "isinstance", "len"),
        *("list", "max", "min", "pow", "range", "reversed", "round", "slice", "str", "sum", "super", "tuple", "zip"),
        *("AssertionError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError", "True", "False", "None"),
    )
    if hasattr(builtins, name)
)

_LIBRARIES = ("torch", "math")
_NOT_QUIET = ("torch.distributed", "torch.utils", "torch.multiprocessing")
OF_ALL_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, its hooks, its mode."""


def is_quiet(module: nn.Module) -> bool:
    """Whether ``forward`` of a copy of ``module`` may be called: without side effects, and without much to copy.

    >>> class Shout(nn.Module):
    ...     def forward(self, x):
    ...         print(x)
    >>> is_quiet(nn.ReLU()), is_quiet(Shout())
    (True, False)
    """
    buffers = list(module.buffers())
    if any(map(is_lazy, buffers)) or sum(buffer.numel() for buffer in buffers) > _MOST_ELEMENTS:
        return False
    if type(module).__module__.startswith("torch."):
        return True
    attributes = [value for name, value in vars(module).items() if name not in OF_ALL_MODULES]
    if not all(map(_is_small, attributes)):
        return False
    forward = getattr(module.forward, "__func__", module.forward)
    return _Reading(module).is_harmless(forward)


def is_simple(value: object) -> bool:
    """Whether a value is a number, a name or the like, by which two modules of a type can be told apart."""
    return isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))


def _is_small(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= _MOST_ELEMENTS
    if isinstance(value, (tuple, list)):
        return len(value) <= _MOST_ELEMENTS and all(map(_is_small, value))
    if isinstance(value, functools.partial):
        return all(map(_is_small, (value.func, value.args, list(value.keywords.values()))))
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)  # a method of its own; what it does is read
    return is_simple(value) or isinstance(
        value, (types.FunctionType, types.BuiltinFunctionType, torch.jit.ScriptFunction)
    )


class _Reading:
    """Reads code, each function once.

    Args:
        module: what ``self`` stands for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.read: set[int] = set()

    def is_harmless(self, value: object) -> bool:
        """Whether code that uses this value has no side effects by it."""
        if is_simple(value) or isinstance(value, (Tensor, torch.jit.ScriptFunction)):
            return True
        if isinstance(value, tuple):
            return all(map(self.is_harmless, value))
        if isinstance(value, functools.partial):
            return all(map(self.is_harmless, (value.func, value.args, *value.keywords.values())))
        if isinstance(value, nn.Module):
            return value is self.module or is_quiet(value)
        if isinstance(value, types.ModuleType):
            return _is_of_libraries(value.__name__)
        if isinstance(value, types.MethodType):
            return value.__self__ is self.module and self.is_harmless(value.__func__)
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            return self.is_harmless(value.forward)
        if isinstance(value, type) and issubclass(value, nn.Module) and isinstance(self.module, value):
            return True  # an argument of super(), whose methods are found below by their names
        if isinstance(value, types.FunctionType) and not _is_of_libraries(value.__module__ or ""):
            return self._is_function_harmless(value)
        return _is_builtin_harmless(value)

    def _is_function_harmless(self, function: types.FunctionType) -> bool:
        if id(function) in self.read:
            return True
        self.read.add(id(function))
        cells = [cell.cell_contents for cell in function.__closure__ or () if _has_contents(cell)]
        return all(self.is_harmless(value) or value is self.module for value in cells) and self._is_code_harmless(
            function.__code__, function.__globals__
        )

    def _is_code_harmless(self, code: types.CodeType, names: dict[str, Any]) -> bool:
        for instruction in dis.get_instructions(code):
            operation, name = instruction.opname, instruction.argval
            if operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                return False
            if operation == "IMPORT_NAME" and not _is_of_libraries(name):
                return False
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = names.get(name, getattr(builtins, name, _UNKNOWN))
                if not self.is_harmless(value):
                    return False
            if operation in ("LOAD_ATTR", "LOAD_METHOD") and not self._is_attribute_harmless(name):
                return False
        return all(self._is_code_harmless(one, names) for one in code.co_consts if isinstance(one, types.CodeType))

    def _is_attribute_harmless(self, name: str) -> bool:
        """Whether the name, if it is one of the module's attributes, is that of something harmless.

        It may be the attribute of something else, such as a tensor: then it is one of PyTorch's.
        """
        if name in vars(self.module):
            value = vars(self.module)[name]
            return name in OF_ALL_MODULES or isinstance(value, list) or self.is_harmless(value)  # a copy has its own
        found = getattr(type(self.module), name, None)
        if found is None or found is getattr(nn.Module, name, None):
            return name not in ("tofile", "write", "share_memory_")
        if isinstance(found, property):
            return found.fget is None or self.is_harmless(found.fget)
        return self.is_harmless(found)


_UNKNOWN: Any = object()


def _is_of_libraries(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES and not name.startswith(_NOT_QUIET)


def _is_builtin_harmless(value: Any) -> bool:
    try:
        if value in _HARMLESS_BUILTINS:
            return True
    except TypeError:  # not hashable
        return False
    owner = getattr(value, "__module__", None) or type(getattr(value, "__self__", None)).__module__
    return callable(value) and (_is_of_libraries(str(owner)) or value in vars(math).values())


def _has_contents(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable without a value yet
        return False
