"""From a module and a parameter's name to the parameter's role and fans: the registry of roles, and who reads it.

The registry starts with the entries of ``torch_roles``; ``register`` adds a user's own. A parameter without an entry
may still be a norm's, by the name of its module's class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_init.checks import check_positive, did_you_mean
from lightning_init.introspect.normalization import is_norm_by_name, norm_role
from lightning_init.introspect.role import KEEP, Role
from lightning_init.introspect.sites import modules_around
from lightning_init.introspect.torch_roles import TIME_STEPS, TORCH_ROLES, Describe, is_time_step, torch_uniform
from lightning_init.schemes.distributions import Constant
from lightning_init.schemes.fans import Fans, embedding_bag_fans

__all__ = ["Fans", "Role", "fans_of", "register", "role_of"]

RoleLike = Fans | Role | Literal["bias", "norm", "keep"] | Callable[[nn.Module], Fans | Role]

_registry: dict[type[nn.Module] | str, dict[str, Describe]] = {
    module_type: dict(described) for module_type, described in TORCH_ROLES.items()
}


def role_of(module: nn.Module, attribute: str, ancestors: Sequence[tuple[nn.Module, str]] = ()) -> Role | None:
    """What the parameter ``attribute`` is to ``module``; None if its type is not known (or it is lazy).

    The most specific registered class along the module type's bases decides, so subclasses count, FSDP's
    and parametrized ones included. A parameter without an entry may still be a norm by its shape and the
    name of its module's class.

    Args:
        module: the owner of the parameter.
        attribute: the parameter's name there.
        ancestors: the modules around ``module``, outermost first, each with the parameter's name as seen from there
            (``gate.bias``). What is registered for them under that name comes first.

    >>> role_of(nn.LSTM(3, 5), "weight_hh_l0").slices
    ('i', 'f', 'g', 'o')
    """
    parameter = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(attribute)
    if parameter is not None and is_lazy(parameter):
        return None
    for owner, name in (*ancestors, (module, attribute)):
        describe = _registered(owner, name)
        if describe is not None:
            return describe(owner, name)
        if is_time_step(owner, name):
            return TIME_STEPS
    return norm_role(module, attribute) if is_norm_by_name(module, attribute) else None


def _registered(module: nn.Module, name: str) -> Describe | None:
    """The entry for a parameter of the module, or of a module inside it; a glob does not reach across dots."""
    for cls in type(module).__mro__:
        for key in (cls, f"{cls.__module__}.{cls.__qualname__}"):
            # The latest entry wins where patterns overlap.
            for pattern, describe in reversed(_registry.get(key, {}).items()):
                if pattern.count(".") == name.count(".") and fnmatchcase(name, pattern):
                    return describe
    return None


def register(module_type: type[nn.Module] | str, attribute: str, role: RoleLike) -> None:
    """Make a module type of your own known: its parameter is then drawn like any other.

    Args:
        module_type: the class (subclasses count), or its qualified name "package.module.Class" if it need
            not be imported.
        attribute: the parameter's name in the module, or a glob such as "expert_*". Dots lead to inner modules:
            "gate.bias" is about this module's ``gate``, and comes before what is known about the gate's own type.
        role: one of

            - ``Fans(fan_in, fan_out)``: a weight with these fans, stored (out, in, …);
            - "bias": gets the scheme's bias; "norm": the scale (0 if it is named "bias") of a norm;
              "keep": is left as it is;
            - a :class:`Role`, where more is to be said;
            - a function of the module that returns ``Fans`` or a ``Role``.

    A later registration wins over an earlier one and over the types known from the start.

    Raises:
        TypeError, ValueError: one of the arguments is none of the above.

    >>> import torch
    >>> class Experts(nn.Module):
    ...     def __init__(self, experts: int, width: int) -> None:
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.empty(experts * width, width))
    >>> register(Experts, "kernel", lambda module: Fans(module.kernel.shape[1], module.kernel.shape[1]))
    >>> fans_of(Experts(4, 8), "kernel")
    Fans(fan_in=8, fan_out=8)
    """
    _check_module_type(module_type)
    if not isinstance(attribute, str) or not all(attribute.split(".")):
        raise ValueError(
            f"register(attribute) is a parameter's name as the module's own code has it, got {attribute!r}"
        )
    entries = _registry.setdefault(module_type, {})
    entries.pop(attribute, None)  # a new entry goes last, where it wins
    entries[attribute] = _describer(role)


def fans_of(module: nn.Module, parameter_name: str, *, bag_size: float = 1) -> Fans:
    """The true fan_in and fan_out of a weight: how many terms are summed forward and backward.

    Args:
        module: any module.
        parameter_name: name of one of its weights; dots lead to inner modules. A parametrized weight
            goes by its plain name.
        bag_size: number of rows in a bag of an ``nn.EmbeddingBag``.

    Returns:
        The fans per slice (gate, projection) and per group.

    Raises:
        ValueError: there is no such weight, it is not known, or it has no shape yet.

    >>> fans_of(nn.ConvTranspose2d(64, 32, 4, stride=2), "weight")
    Fans(fan_in=256.0, fan_out=512.0)
    """
    path, _, attribute = parameter_name.rpartition(".")
    try:
        owner = module.get_submodule(path)
        parameter = getattr(owner, attribute)
    except AttributeError:
        parameter = None
    if not isinstance(parameter, Tensor):
        raise ValueError(_no_such_parameter(module, parameter_name))
    if is_lazy(parameter):
        raise ValueError(f"{parameter_name!r} is lazy and has no shape yet: run one batch through the model")
    role = role_of(owner, attribute, modules_around(module, path, attribute))
    if role is None:
        name = type(owner).__name__
        raise ValueError(
            f"{name}.{attribute} is not a known parameter: "
            f"register({name}, {attribute!r}, Fans(fan_in, fan_out)) makes it known"
        )
    if role.fans is None:
        raise ValueError(f"{parameter_name!r} is a {role.kind} parameter, and only weights have fans")
    if bag_size != 1:
        return _bag_fans(owner, bag_size)
    return role.fans


def _bag_fans(module: nn.Module, bag_size: float) -> Fans:
    if not isinstance(module, nn.EmbeddingBag):
        raise ValueError(f"bag_size={bag_size!r} means something to EmbeddingBag, not {type(module).__name__}")
    check_positive("bag_size", bag_size)
    return embedding_bag_fans(module.mode, bag_size)


def _no_such_parameter(module: nn.Module, name: str) -> str:
    known = [known for known, _ in module.named_parameters()]
    message = f"{type(module).__name__} has no parameter {name!r}"
    if not known:
        return f"{message}: it has none at all"
    shown = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
    return f"{message}; it has {shown}{did_you_mean(name, known)}"


def _check_module_type(module_type: object) -> None:
    if isinstance(module_type, str):
        if "." not in module_type:
            raise ValueError(
                f"register(module_type) as text is a qualified name 'package.module.Class', got {module_type!r}"
            )
    elif not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register(module_type) is a subclass of nn.Module or its qualified name, got {module_type!r}")


def _describer(role: RoleLike) -> Describe:
    """One function for every form a role can be given in."""
    if role == "norm":
        return norm_role
    if isinstance(role, (Fans, Role, str)):
        ready = _as_role(role)
        return lambda module, attribute: ready
    if callable(role):
        describe = role
        return lambda module, attribute: _as_role(describe(module))
    raise _not_a_role(role)


def _as_role(role: object) -> Role:
    if isinstance(role, Role):
        return role
    if isinstance(role, Fans):
        check_positive("Fans(fan_in)", role.fan_in)
        if not math.isnan(role.fan_out):  # which says that there is no gradient
            check_positive("Fans(fan_out)", role.fan_out)
        # What torch draws for its own Linear and Conv.
        return Role("weight", torch_uniform(role.fan_in), role)
    if role == "bias":
        return Role("bias", Constant(0.0))
    if role == "keep":
        return KEEP
    raise _not_a_role(role)


def _not_a_role(role: object) -> TypeError:
    return TypeError(
        "a role is Fans(fan_in, fan_out), 'bias', 'norm', 'keep', a Role, or a function of the module that "
        f"returns Fans or a Role; got {role!r}"
    )
