"""What a module that nobody knows would draw itself: its own ``reset_parameters``, watched on a copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_init.introspect.operations import Operation, Value, recorded_operations, storage_of
from lightning_init.introspect.role import Role
from lightning_init.sandbox import sandbox
from lightning_init.schemes.distributions import Constant, Distribution, Normal, Uniform


def role_by_own_reset(module: nn.Module, attribute: str) -> Role | None:
    """The role of a parameter that the module's ``reset_parameters`` fills with one plain draw, or with a constant.

    >>> class Gate(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bias = nn.Parameter(torch.empty(3))
    ...     def reset_parameters(self):
    ...         nn.init.uniform_(self.bias, -0.5, 0.5)
    >>> role_by_own_reset(Gate(), "bias").default
    Uniform(low=-0.5, high=0.5)

    Returns:
        None where there is no such method, where it fails, or where it does anything else.
    """
    if not callable(getattr(module, "reset_parameters", None)) or next(module.children(), None) is not None:
        return None
    try:
        with sandbox(module, zeros=True) as copied, torch.no_grad():
            filled = getattr(copied, attribute)
            with recorded_operations(copied) as operations:
                copied.reset_parameters()  # type: ignore[operator]
            writes = [one for one in operations if _writes_to(one, filled)]
            draw = _draw(writes[-1], filled) if writes else None
    except Exception:  # any code may stand there
        return None
    return Role("other", draw) if draw is not None else None


def _writes_to(operation: Operation, tensor: Tensor) -> bool:
    """Whether an operation works in place on a tensor, or on a part of it."""
    first = operation.arguments[0] if operation.arguments else None
    return operation.name.endswith("_") and isinstance(first, Value) and storage_of(first.tensor) == storage_of(tensor)


def _draw(write: Operation, tensor: Tensor) -> Distribution | None:
    """What one operation fills a whole tensor with, if that is a distribution."""
    target, *numbers = write.arguments
    options = [float(number) for number in numbers if isinstance(number, (int, float))]
    if target.tensor.numel() != tensor.numel() or len(options) != len(numbers):
        return None
    if write.name == "uniform_":
        low, high = [*options, *(0.0, 1.0)[len(options) :]]
        return Uniform(low, high)
    if write.name == "normal_":
        mean, std = [*options, *(0.0, 1.0)[len(options) :]]
        return Normal(std, mean)
    if write.name == "zero_" or (write.name == "fill_" and options):
        return Constant(options[0] if options else 0.0)
    return None
