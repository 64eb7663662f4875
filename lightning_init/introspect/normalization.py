"""Normalisation layers: which modules are one, what their scale starts with, how many batches they have had."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

from lightning_init.introspect.role import Role
from lightning_init.sandbox import sandbox
from lightning_init.schemes.distributions import Constant

# LlamaRMSNorm, T5LayerNorm, LayerNorm2d, RMSNormGated; not NormalizedLinear or Normalizer.
_NORM_NAME = re.compile(r"Norm(?![a-z])")


_SHIFTS, _SCALES = ("bias", "beta", "b", "shift"), ("weight", "gamma", "g", "scale")
"""What authors of norms call their two vectors."""


def norm_role(module: nn.Module, attribute: str) -> Role:
    """A norm's bias starts at 0, its scale at 1, or at 0 where the module multiplies by 1 + scale."""
    if attribute in _SHIFTS:
        return Role("norm", Constant(0.0), starts_at_zero=True)
    return Role("norm", Constant(0.0 if _scales_by_one_plus(module, attribute) else 1.0))


def is_norm_by_name(module: nn.Module, attribute: str) -> bool:
    """Whether this is the scale or the shift, one number per unit, of a class that calls itself a norm."""
    parameter = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(attribute)
    return (
        attribute in (*_SCALES, *_SHIFTS)
        and parameter is not None
        and (parameter.ndim == 1 or (parameter.ndim > 1 and attribute != "weight"))
        and parameter.numel() == max(parameter.shape)
        and any(_NORM_NAME.search(cls.__name__) for cls in type(module).__mro__)
    )


def batches_tracked(module: nn.Module) -> int:
    """How many batches a batch norm has had in training mode; 0 for any other module, and on the meta device.

    >>> batches_tracked(nn.BatchNorm1d(3)), batches_tracked(nn.Linear(3, 3))
    (0, 0)
    """
    count = dict(module.named_buffers(recurse=False)).get("num_batches_tracked")
    return 0 if count is None or count.is_meta else int(count)


def _scales_by_one_plus(module: nn.Module, attribute: str) -> bool:
    """Whether the output is not 0 where the scale is: Gemma's norm multiplies by 1 + scale.

    ``forward`` of a copy tells, not the scale's present value: memory that ``to_empty`` hands out for a parameter on
    the meta device is often all zeros. Torch's own norms, and modules with children, are taken for ordinary ones.
    """
    forward = type(module).forward
    scale = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(attribute)
    if scale is None or forward.__module__.startswith("torch.nn.") or next(module.children(), None) is not None:
        return False
    rows = torch.linspace(-1.0, 2.0, 2 * scale.numel(), device="cpu").view(2, -1)  # [batch, units]
    for example in (rows, rows[:, :, None, None].expand(-1, -1, 2, 2)):  # channels last, channels first
        output = _forward_with_zeros(module, example)
        if output is not None:
            return bool(output.abs().max() > 0)
    return False


def _forward_with_zeros(module: nn.Module, example: Tensor) -> Tensor | None:
    """What ``forward`` returns if all tensors of the module are zero; None if it raises.

    If ``forward`` requires more arguments than one, such as a gate, the example is given for each of them.
    """
    try:
        with sandbox(module, zeros=True) as copied, torch.no_grad():
            required = [
                parameter
                for parameter in inspect.signature(copied.forward).parameters.values()
                if parameter.default is parameter.empty
                and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            ]
            output = copied.forward(*[example] * len(required))
    except Exception:  # any code may stand here, and without an answer the scale is an ordinary one
        return None
    return output if isinstance(output, Tensor) else None
