"""Asking a module what it does, on a copy: nothing of the module, of the user's hooks or of random states changes."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    Raises:
        Exception: whatever copying raises, where the module's state cannot be copied.
    """
    instead: dict[int, object] = {}
    if zeros:
        for tensor in (*module.parameters(), *module.buffers()):
            instead[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.deepcopy(_without_hooks(module), instead).to("cpu").eval()


def _without_hooks(module: nn.Module) -> nn.Module:
    """The module's own state under no hooks, its children's likewise."""
    bare = object.__new__(type(module))
    bare.__dict__.update({k: OrderedDict() if k.endswith("_hooks") else v for k, v in module.__dict__.items()})
    bare.__dict__["_modules"] = {
        name: None if child is None else _without_hooks(child) for name, child in module._modules.items()
    }
    return bare


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
