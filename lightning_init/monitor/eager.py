"""Run compiled code eagerly for a moment: hooks that come after compilation fire only there."""

from __future__ import annotations

import sys
from typing import Any

import torch


class EagerMoment:
    """Between ``start`` and ``stop`` everything under ``torch.compile`` runs as written.

    What was compiled stays compiled: outside, the same graphs run, without breaks, guards or recompilation.
    """

    def __init__(self) -> None:
        self._stance: Any = None

    def start(self) -> None:
        """From here on eagerly. Nothing happens in a process that has not loaded the compiler."""
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def stop(self) -> None:
        """Back to what it was."""
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)
