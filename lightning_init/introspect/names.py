"""The user's own names for modules and parameters, whatever wraps them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WRAPPER_ATTRIBUTES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Where torch.compile, FSDP1 and activation checkpointing keep what they wrap. No user calls an attribute so."""

_FABRIC_ATTRIBUTES = {"_forward_module", "_original_module"}


def clean_name(model: nn.Module, path: str) -> str:
    """The attribute path a user would write, without the steps that wrappers add.

    Wrappers are ``torch.compile``, FSDP1, activation checkpointing, DistributedDataParallel and Lightning Fabric's.

    >>> clean_name(nn.Sequential(), "net._orig_mod.0.weight")
    'net.0.weight'
    """
    module: nn.Module | None = model
    kept = []
    for step in path.split("."):
        # Only there: ``module`` may be a user's own attribute anywhere else.
        is_wrapper = step == "module" and isinstance(module, (DistributedDataParallel, DataParallel))
        is_wrapper |= step in _FABRIC_ATTRIBUTES and type(module).__name__ == "_FabricModule"  # imports no Lightning
        if not (is_wrapper or step in _WRAPPER_ATTRIBUTES):
            kept.append(step)
        # Submodules only: reading a parametrized weight would compute it, and spectral_norm changes its state then.
        children = module._modules if module is not None else {}
        module = children[step] if step in children else None  # noqa: SIM401 - a traced module's have no ``get``
    return ".".join(kept)
