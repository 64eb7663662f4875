"""Lightning is published under two names, and every one of its classes exists twice: users have either.

@in_both_namespaces
def test_something(namespace: Namespace) -> None:
    module = module_class(Digits, namespace)(mlp)
    make_trainer(namespace, callbacks=[lightning(namespace).callbacks.ModelCheckpoint()]).fit(module)
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Final, Literal

import pytest

Namespace = Literal["lightning.pytorch", "pytorch_lightning"]
LIGHTNING: Final = "lightning.pytorch"
"""Where the tests do not say another."""
PYTORCH_LIGHTNING: Final = "pytorch_lightning"

NAMESPACES: list[Namespace] = [LIGHTNING, PYTORCH_LIGHTNING]

in_both_namespaces = pytest.mark.parametrize("namespace", NAMESPACES)


def lightning(namespace: Namespace) -> Any:
    """The namespace as a module, imported when it is first asked for."""
    return importlib.import_module(namespace)


@cache
def module_class(behaviour: type, namespace: Namespace) -> Any:
    """A LightningModule of this namespace that does what a class without a base does; it pickles if that does."""

    def by_name(module: Any) -> tuple[Any, ...]:
        return _empty_module, (behaviour, namespace), vars(module)

    return type(behaviour.__name__, (behaviour, lightning(namespace).LightningModule), {"__reduce__": by_name})


def _empty_module(behaviour: type, namespace: Namespace) -> Any:
    made = module_class(behaviour, namespace)
    return made.__new__(made)
