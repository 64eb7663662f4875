"""What the monitor has seen of a model, so that nothing is missing without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_init.checks import listed

MOST_NAMES = 20
"""How many layers are named in one line."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which of a model's layers have been measured so far, on which ranks, and why others have not.

    Attributes:
        expected: the layers that are watched.
        seen: those of which at least one rank has recorded an output.
        not_called: those that no rank has heard of: never called, or called by a compiled function.
        left_out: by layer, what failed when it was measured.
        returned_by_child: those that hand on what a layer inside of them has returned, which is measured there.
        partial: those whose outputs are terms of a sum over ranks.
        missing_on: by rank, the layers that other ranks have recorded and this one has not.
        disabled_reason: why all ranks have stopped; None while they go on.
    """

    expected: tuple[str, ...]
    seen: tuple[str, ...]
    not_called: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    returned_by_child: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    missing_on: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    disabled_reason: str | None = None

    def __str__(self) -> str:
        """One line.

        >>> print(Coverage(("a", "b", "c"), ("a", "b"), not_called=("c",)))
        2 of 3 layers seen; not called: c
        """
        parts = [f"{len(self.seen)} of {len(self.expected)} layers seen"]
        for what, names in (
            ("not called", self.not_called),
            ("left out", tuple(self.left_out)),
            ("handed on from a layer inside", self.returned_by_child),
            ("partial sums", self.partial),
            *((f"not on rank {rank}", names) for rank, names in self.missing_on.items()),
        ):
            if names:
                parts.append(f"{what}: {listed(names, MOST_NAMES)}")
        if self.disabled_reason:
            parts.append(f"switched off: {self.disabled_reason}")
        return "; ".join(parts)
