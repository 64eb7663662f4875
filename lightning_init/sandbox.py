"""Asking a module what it does, on a copy: nothing of the module, of the user's hooks or of random states changes."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run somebody's code without a trace outside: random states of torch, Python and NumPy, and no warnings."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def copy_of(module: nn.Module, *, zeros: bool = False) -> nn.Module:
    """A copy on the CPU, in evaluation mode and without hooks, that shares nothing with ``module``.

    Hooks are not copied either: they are the user's, and a method among them leads to the whole model.

    Args:
        module: any module. What it holds is copied in depth, so that a forward pass that appends to a list, counts
            its calls or writes to a buffer does it to the copy.
        zeros: zeros for all of its tensors, whatever and wherever they are: shards, on meta, or large.

    What cannot be copied, such as a process group or a lock, the copy lacks.
    """
    instead: dict[int, object] = {}
    if zeros:
        for tensor in (*module.parameters(), *module.buffers()):
            instead[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    copied = _copied(module, instead).eval()
    return copied if zeros else copied.to("cpu")  # FSDP2's modules refuse ``to`` without the state they lack here


def _copied(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    """The module's state in depth, under no hooks; its children's likewise.

    By hand, and not by ``copy.deepcopy(module)``, which calls constructors that FSDP2 and users override. What cannot
    be copied (process groups, locks, files) is left out instead of shared: a forward pass that needs it raises.
    """
    known = memo.get(id(module))
    if isinstance(known, nn.Module):
        return known
    if isinstance(module, torch.jit.ScriptModule):  # its state is not in Python
        return copy.deepcopy(module, memo)
    copied = object.__new__(type(module))
    memo[id(module)] = copied
    for name, value in module.__dict__.items():
        if str(name).endswith("_hooks"):
            copied.__dict__[name] = OrderedDict()
        elif name == "_modules":
            children = value.items()
            copied.__dict__[name] = {key: None if child is None else _copied(child, memo) for key, child in children}
        else:
            with suppress(Exception):
                copied.__dict__[name] = copy.deepcopy(value, memo)
    return copied


def is_elementwise(function: Callable[[Tensor], object], numbers: Tensor, *, rtol: float = 1e-5) -> bool:
    """Whether each number's result is its own: the same alone as among the others.

    Args:
        function: what is asked; gets copies, because activations may work in place.
        numbers: what it is asked with. Shape: [at least 2]
        rtol: relative difference that is rounding. NaN (a logarithm's) equals NaN.

    >>> is_elementwise(torch.relu, torch.tensor([-1.0, 2.0])), is_elementwise(nn.Softmax(0), torch.tensor([-1.0, 2.0]))
    (True, False)
    """
    together, alone = function(numbers.clone()), []
    if not isinstance(together, Tensor) or together.shape != numbers.shape or not together.is_floating_point():
        return False
    for number in numbers:
        result = function(number.reshape(1).clone())
        if not isinstance(result, Tensor) or result.shape != (1,):
            return False
        alone.append(result)
    return torch.allclose(together, torch.cat(alone), rtol=rtol, atol=1e-6, equal_nan=True)
