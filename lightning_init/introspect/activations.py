"""Is this module an activation? Asked of the module itself, so that other libraries' classes are found too."""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_PROBE = (-30.0, -5.0, -1.5, -0.3, 0.2, 0.7, 2.5)
_FAR = (-1e4, -1e3, 1e3, 1e4)
_MOST_STATE = 1 << 16
"""Elements of an activation's buffers: what holds more is a memory bank, too large to be copied."""


@dataclass(frozen=True, slots=True)
class ActivationTraits:
    """What an activation does to numbers.

    Attributes:
        rectifies: every negative number becomes exactly 0 and positive ones stay positive (the ReLU family).
        low: where it ends up far to the left; -inf if it goes on, or does not settle.
        high: the same to the right.
    """

    rectifies: bool
    low: float = -math.inf
    high: float = math.inf

    @property
    def saturates(self) -> bool:
        """Whether both ends are flat: sigmoid, tanh and their like."""
        return not self.rectifies and math.isfinite(self.high - self.low)


def activation_of(module: nn.Module) -> ActivationTraits | None:
    """What kind of activation ``module`` is; None if it is none.

    An activation is a leaf without parameters that, in eval mode, maps numbers elementwise and is not the
    identity. A copy of the module is asked, with seven numbers together and each alone: what normalises,
    pools, reshapes, needs other inputs or fails on them is no activation, and neither is dropout.
    The module's hooks do not see the question, and the global random states stay as they were.
    """
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    if sum(buffer.numel() for buffer in module.buffers()) > _MOST_STATE:
        return None
    probe, far = (torch.tensor(numbers, dtype=torch.float32, device="cpu") for numbers in (_PROBE, _FAR))
    with _random_states_kept(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asked = copy.deepcopy(_without_hooks(module)).to("cpu").eval().forward
            together = asked(probe.clone())
            alone = [asked(number.reshape(1).clone()) for number in probe]
            ends = asked(far)
        except Exception:  # it takes something else than one tensor of any shape
            return None
    if not _same_numbers(together, alone) or torch.equal(together.float(), probe):
        return None
    negative, positive = together[probe < 0], together[probe > 0]
    return ActivationTraits(bool((negative == 0).all() and (positive > 0).all()), *_limits(ends.tolist()))


def _without_hooks(module: nn.Module) -> nn.Module:
    """The module's own state under no hooks: they are the user's, and a method among them leads to the whole model."""
    bare = object.__new__(type(module))
    bare.__dict__.update({k: OrderedDict() if k.endswith("_hooks") else v for k, v in module.__dict__.items()})
    return bare


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Those of torch, Python and NumPy: an augmentation among the modules may draw from any."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def _same_numbers(together: object, alone: list[object]) -> bool:
    """Whether one number's result does not depend on its neighbours. NaN (a logarithm's) equals NaN."""
    if not isinstance(together, Tensor) or together.shape != (len(_PROBE),) or not together.is_floating_point():
        return False
    if not all(isinstance(one, Tensor) and one.shape == (1,) for one in alone):
        return False
    return torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-6, equal_nan=True)  # type: ignore[arg-type]


def _limits(ends: list[float]) -> tuple[float, float]:
    """Values at both ends, if those at ±1e3 are the same within a hundredth of the range; else infinities."""
    low, lower, higher, high = ends
    settled = max(abs(low - lower), abs(high - higher)) <= abs(high - low) / 100
    return (min(low, high), max(low, high)) if settled and high != low else (-math.inf, math.inf)
