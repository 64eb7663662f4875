"""Is this module an activation? Asked of a copy of the module, so that other libraries' classes are found too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_init.introspect.quiet_code import OF_ALL_MODULES, is_quiet, is_simple
from lightning_init.sandbox import is_elementwise, sandbox

_PROBE = (-30.0, -5.0, -1.5, -0.3, 0.2, 0.7, 2.5)
"""Both sides of 0, far enough to the left that a GELU is 0 in float32 and near enough that a SiLU is not."""

_FAR = (-1e4, -1e3, 1e3, 1e4)
"""Where what saturates has settled."""


@dataclass(frozen=True, slots=True)
class ActivationTraits:
    """What an activation does to numbers.

    Attributes:
        rectifies: every negative number becomes exactly 0 and positive ones stay positive (the ReLU family).
        low: the smaller of the two values that it settles at far from 0 (-1 for tanh); -inf if it does not settle
            at both ends.
        high: the larger of them; inf likewise.
    """

    rectifies: bool
    low: float = -math.inf
    high: float = math.inf

    @property
    def saturates(self) -> bool:
        """Whether both ends are flat: sigmoid, tanh and their like."""
        return not self.rectifies and math.isfinite(self.high - self.low)


_found: dict[Any, ActivationTraits | None] = {}
"""What was found out about modules of PyTorch's that have nothing but numbers, by their type and these numbers."""


def activation_of(module: nn.Module) -> ActivationTraits | None:
    """What kind of activation ``module`` is; None if it is none.

    An activation is a leaf without parameters that, in eval mode, maps numbers elementwise and is not the
    identity. A copy of the module is called with seven numbers together and with each of them alone: what
    normalises, pools, reshapes, needs other inputs or fails on them is no activation, and neither is dropout. A module
    that somebody would notice being called, or that is large, is not asked (:func:`is_quiet`), and is none.

    >>> activation_of(nn.Tanh()), activation_of(nn.Dropout())
    (ActivationTraits(rectifies=False, low=-1.0, high=1.0), None)
    """
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    key = _what_it_depends_on(module)
    if key is None:
        return traits_of(module) if is_quiet(module) else None
    if key not in _found:
        _found[key] = traits_of(module)
    return _found[key]


def _what_it_depends_on(module: nn.Module) -> Any:
    """Of a module of PyTorch's without tensors, its type and its numbers; None if there may be more."""
    if not type(module).__module__.startswith("torch.nn.") or next(module.buffers(), None) is not None:
        return None
    own = {name: value for name, value in vars(module).items() if name not in OF_ALL_MODULES}
    return (type(module), *own.items()) if all(map(is_simple, own.values())) else None


def traits_of(module: nn.Module) -> ActivationTraits | None:
    """What a copy of ``module`` says when it is called; None if it is no activation."""
    probe, far = (torch.tensor(numbers, dtype=torch.float32, device="cpu") for numbers in (_PROBE, _FAR))
    try:
        with sandbox(module) as copied, torch.no_grad():
            if not is_elementwise(copied.forward, probe, rtol=1e-4):  # float32, vectorised or not
                return None
            results, ends = copied.forward(probe.clone()), copied.forward(far)
    except Exception:  # it cannot be copied, or takes something else than one tensor of any shape
        return None
    if torch.equal(results.float(), probe):
        return None
    negative, positive = results[probe < 0], results[probe > 0]
    return ActivationTraits(bool((negative == 0).all() and (positive > 0).all()), *_limits(ends.tolist()))


def _limits(ends: list[float]) -> tuple[float, float]:
    """The smaller and the larger value at ±1e4, if those at ±1e3 are within 1 % of their distance; else infinities."""
    low, lower, higher, high = ends
    settled = max(abs(low - lower), abs(high - higher)) <= abs(high - low) / 100
    return (min(low, high), max(low, high)) if settled and high != low else (-math.inf, math.inf)
