"""Is this module an activation? Asked of the module itself, so that other libraries' classes are found too."""

from __future__ import annotations

import copy
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["rectifier", "smooth"]
"""``rectifier``: every negative number becomes exactly 0 and positive ones stay positive (the ReLU family)."""

_PROBE = (-30.0, -5.0, -1.5, -0.3, 0.2, 0.7, 2.5)


def activation_kind(module: nn.Module) -> Kind | None:
    """What kind of activation ``module`` is; None if it is none.

    An activation is a leaf without parameters that, in eval mode, maps numbers elementwise and is not the
    identity. A copy of the module is asked, with seven numbers together and each alone: what normalises,
    pools, reshapes, needs other inputs or fails on them is no activation, and neither is dropout.
    The global random state stays as it was.
    """
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    probe = torch.tensor(_PROBE, dtype=torch.float32, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asked = copy.deepcopy(module).to("cpu").eval()
            together = asked(probe.clone())
            alone = [asked(number.reshape(1).clone()) for number in probe]
        except Exception:  # it takes something else than one tensor of any shape
            return None
    if not _same_numbers(together, alone) or torch.equal(together.float(), probe):
        return None
    negative, positive = together[probe < 0], together[probe > 0]
    return "rectifier" if bool((negative == 0).all() and (positive > 0).all()) else "smooth"


def _same_numbers(together: object, alone: list[object]) -> bool:
    """Whether one number's result does not depend on its neighbours. NaN (a logarithm's) equals NaN."""
    if not isinstance(together, Tensor) or together.shape != (len(_PROBE),) or not together.is_floating_point():
        return False
    if not all(isinstance(one, Tensor) and one.shape == (1,) for one in alone):
        return False
    return torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-6, equal_nan=True)  # type: ignore[arg-type]
