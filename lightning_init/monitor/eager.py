"""Compiled code runs eagerly for as long as somebody records; afterwards it runs as before, whoever stops first.

PyTorch has one stance for the whole process, and each change of it remembers what was before. Changes that end in
another order than they began would bring old ones back, so those who record are counted, and the first and the last
change the stance.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

_holders: weakref.WeakSet[Any] = weakref.WeakSet()
"""Those who record now."""

_ours: Any = None
"""The change that was made for them."""


def hold_eager(holder: object) -> None:
    """Have compiled code run eagerly until :func:`release_eager`.

    Code under ``torch.compile`` would not call hooks that it was not compiled with. What was compiled stays compiled:
    afterwards the same graphs run again, without graph breaks, new guards or recompilation.
    """
    global _ours
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled, and the compiler is slow to import
        return
    if not _holders:
        restore_stance()
        _ours = torch.compiler.set_stance("force_eager")
    _holders.add(holder)


def release_eager(holder: object) -> None:
    """Have compiled code run as before, if nobody else records."""
    if holder in _holders:
        _holders.discard(holder)
        if not _holders:
            restore_stance()


def restore_stance() -> None:
    """Take back the change that was made, unless somebody else has changed the stance since and still does.

    A stance that a user took while it was made and gave up later brings it back: so this is asked again at the end.
    """
    if _ours is None or _holders:
        return
    asked = torch.compiler.set_stance("force_eager")
    now = asked.prev
    asked.__exit__(None, None, None)
    if now is _ours.stance:
        _ours.__exit__(None, None, None)
