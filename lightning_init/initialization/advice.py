"""The line to paste for a parameter that nothing is known of: it makes its module type known, and nothing else."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from lightning_init.introspect.sites import ParameterSite, module_class

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


def class_names(sites: Iterable[ParameterSite]) -> Mapping[type, str]:
    """What to call the classes of modules: by their own name, and with their module where two have the same.

    >>> from lightning_init.introspect.sites import parameter_sites
    >>> list(class_names(parameter_sites(nn.Linear(2, 3))).values())
    ['Linear']
    """
    classes: dict[str, list[type]] = defaultdict(list)
    for site in sites:
        cls = module_class(site.module)
        if cls not in classes[cls.__name__]:
            classes[cls.__name__].append(cls)
    return {
        cls: name if len(alike) == 1 else f"{cls.__module__}.{cls.__qualname__}"
        for name, alike in classes.items()
        for cls in alike
    }


def registration(site: ParameterSite, names: Mapping[type, str]) -> str:
    """The call of ``register`` for this parameter; "" where there is nothing to register.

    A parameter in a list or a dictionary is one of the module around it. A vector called a bias gets the scheme's bias,
    any other vector is taken for a scale; the fans of a matrix are those of PyTorch's order (out, in, …).

    Args:
        site: where the parameter lives.
        names: of all modules' classes.
    """
    owner, attribute = site.module, site.attribute
    if isinstance(owner, _CONTAINERS) and site.ancestors:
        owner, attribute = site.ancestors[-1]
    if site.parameter.numel() < 2:
        return ""
    can_be_written = all(part.isidentifier() or part.isdigit() for part in attribute.split("."))  # as m.listed[0]
    if type(owner) in _CONTAINERS or not can_be_written:
        return f"Rule({site.stored_fqn!r}, Normal(std))"
    return f"register({_reference(owner, names)}, {attribute!r}, {_role(attribute, site.parameter.ndim)})"


def _reference(owner: nn.Module, names: Mapping[type, str]) -> str:
    """The class as a name where that can only be this one, else as text, which needs no import."""
    cls = module_class(owner)
    is_unique = names.get(cls, cls.__name__) == cls.__name__ and getattr(nn, cls.__name__, cls) is cls
    is_reachable = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    return cls.__name__ if is_unique and is_reachable else repr(f"{cls.__module__}.{cls.__qualname__}")


def _role(attribute: str, num_dims: int) -> str:
    """The third argument of ``register``."""
    name = attribute.rpartition(".")[2]
    if num_dims < 2:
        return "'bias'" if "bias" in name or name in ("b", "beta", "shift") else "'norm'"
    tensor = "m" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in attribute.split("."))
    if num_dims == 2:
        return f"lambda m: Fans({tensor}.shape[1], {tensor}.shape[0])"
    return f"lambda m: Fans({tensor}[0].numel(), {tensor}[:, 0].numel())"


def mostly_unknown(unknown: Mapping[str, int], drawn: int) -> str:
    """A sentence on how little is known of a model, if that is less than half of its weights; else "".

    Args:
        unknown: elements of the weights that nothing is known of, by class.
        drawn: elements of those that are drawn.
    """
    total = sum(unknown.values())
    if total <= drawn:
        return ""
    share = math.floor(100 * drawn / (drawn + total))
    largest = sorted(unknown, key=unknown.__getitem__, reverse=True)
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    return (
        f"only {share} % of the weights are of a known type and drawn; the rest keeps what its author gave it, in "
        f"{', '.join(largest[:3])}{more}: see the lines with register(...) in the report"
    )
