"""Which parameters have their weights already: a fit started from them, or a checkpoint restored them.

That is known of the parameters, not of a LightningModule or a callback: libraries put the same network into a new
module, and copy the callbacks, at every fit. A new head is not known, whatever it is attached to.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, MutableMapping
from typing import Final, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_init.initialization.write import summon_fsdp1_parameters
from lightning_init.introspect.sites import ParameterSite, parameter_sites

RESTORED: Final = "restored from a checkpoint"
STARTED: Final = "an earlier fit started from it"


class _Settled(NamedTuple):
    """What is known of one parameter.

    Attributes:
        by: the arguments of the callback whose fit started from it; RESTORED where a checkpoint was the last to write.
        shape: of the parameter then; None if it had none yet.
    """

    by: object
    shape: torch.Size | None


_settled: MutableMapping[nn.Module, dict[str, _Settled]] = weakref.WeakKeyDictionary()
"""For each module, by the attribute that its forward pass reads."""


def settle(model: nn.Module, arguments: object) -> None:
    """Remember that a fit starts from the weights that the model has now.

    Args:
        model: all of it.
        arguments: of the callback: with others, new weights are wanted.
    """
    with summon_fsdp1_parameters(model):
        for site in parameter_sites(model):
            _remember(site, arguments)


def settle_restored(model: nn.Module, names: Container[str] | None) -> None:
    """Remember that parameters came from a checkpoint.

    Args:
        model: all of it.
        names: those in the checkpoint's ``state_dict``; None: all of the model's.
    """
    paths = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    are_all = names is None or not any(path in names for path in paths)  # the module's own names: it has them all
    for site, path in zip(parameter_sites(model), paths, strict=True):
        if are_all or (names is not None and path in names):
            _remember(site, RESTORED)


def why_settled(site: ParameterSite, arguments: object) -> str:
    """Why a parameter keeps its weights at a fit with these arguments, in words; "" if it does not."""
    return why_restored(site) or (STARTED if _settled_by(site) == arguments else "")


def why_restored(site: ParameterSite) -> str:
    """:data:`RESTORED` if no fit has gone on from what a checkpoint gave to a parameter; else ""."""
    return RESTORED if _settled_by(site) is RESTORED else ""


def _remember(site: ParameterSite, by: object) -> None:
    _settled.setdefault(site.module, {})[site.attribute] = _Settled(by, _shape(site))


def _settled_by(site: ParameterSite) -> object:
    """What settled a parameter; None if nothing did, or if it was replaced by one of another shape."""
    by, then = _settled.get(site.module, {}).get(site.attribute, (None, None))
    now = _shape(site)
    return by if then is None or now is None or then == now else None


def _shape(site: ParameterSite) -> torch.Size | None:
    """Of a parameter as it is registered; None where it is one of several that make the weight, or has none."""
    return site.parameter.shape if site.storage in ("itself", "recomputed") and not is_lazy(site.parameter) else None
