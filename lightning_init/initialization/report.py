"""What was done to every parameter, with the proof: target and measured standard deviation side by side."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lightning_init.checks import listed
from lightning_init.initialization.reasons import Reason
from lightning_init.schemes.fans import Fans

LINES = 10
"""Rows of the table on the console; the whole one goes to the logger."""

SHOWN = 4
"""Notes below the table, and names in one of them."""


@dataclass(frozen=True)
class Entry:
    """What was done to one parameter.

    Attributes:
        name: the parameter's full name, wrappers removed.
        module_type: class name of its owner.
        shape: of the whole parameter, whatever part of it is held here.
        dtype: such as ``float32``.
        decided_by: what decided: ``scheme``, ``bias``, ``norm``, ``embedding``, ``tied head``, a rule's pattern …
        scheme: name of the scheme; "" where the parameter was left alone.
        fans: per slice (gate, projection, group).
        gain: the gain that went into the target.
        target_std: √E[(x - mean)²] asked for; None where left alone.
        measured_std: the same of the values that were written.
        tolerance: largest difference between the two that sampling (5 standard errors) and rounding explain;
            infinite where a parametrization turns the values into others, as spectral_norm does.
        left: the kind of reason for which the parameter was left alone; None where it was drawn.
        reason: the same in words; "" where it was drawn.
        advice: the line to paste that would have it drawn, where its module type is not known.
    """

    name: str
    module_type: str
    shape: tuple[int, ...]
    dtype: str
    decided_by: str
    scheme: str = ""
    fans: Fans | None = None
    gain: float | None = None
    target_std: float | None = None
    measured_std: float | None = None
    tolerance: float = 0.0
    left: Reason | None = None
    reason: str = ""
    advice: str = ""

    @property
    def rule(self) -> str:
        """The former name of ``decided_by``."""
        return self.decided_by

    @property
    def is_off(self) -> bool:
        """Whether the measured std differs from the target by more than sampling explains."""
        if self.target_std is None or self.measured_std is None:
            return False
        return not abs(self.measured_std - self.target_std) <= self.tolerance  # NaN is off


@dataclass(frozen=True)
class InitReport:
    """Every parameter of a model exactly once: what was drawn and measured, or why it was left alone.

    ``print`` it for ten lines grouped by module type and rule; ``to_dict``, ``to_json`` and ``to_markdown``
    give the whole table.

    Attributes:
        scheme: what was asked for, in words.
        seed: from which everything was drawn.
        entries: one for each parameter name, in order of registration.
        notes: what is to be known of others than parameters, such as copies that were made of them.
    """

    scheme: str
    seed: int
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def drawn(self) -> tuple[Entry, ...]:
        """The parameters that got new values."""
        return tuple(entry for entry in self.entries if entry.left is None)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        """The parameters that kept theirs, each with its reason."""
        return tuple(entry for entry in self.entries if entry.left is not None)

    def __getitem__(self, name: str) -> Entry:
        """The entry of a parameter, by its full name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def check(self) -> None:
        """Raise ValueError naming each parameter whose measured std is off by more than sampling explains."""
        off = [entry for entry in self.drawn if entry.is_off]
        if off:
            lines = [f"  {e.name}: measured {e.measured_std:.6g}, target {e.target_std:.6g}" for e in off]
            raise ValueError("\n".join(["measured and target std differ beyond sampling error:", *lines]))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain dictionaries, lists, strings and finite numbers."""
        return {
            "scheme": self.scheme,
            "seed": self.seed,
            "entries": [_plain(entry) for entry in self.entries],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """The whole report as one Markdown table."""
        header = (
            "| parameter | module | shape | decided by | scheme | fan_in | fan_out | gain | target std | measured std |"
        )
        lines = [f"**{self.title}**", "", header, "|---" * 10 + "|"]
        lines += [_markdown_row(entry) for entry in self.entries]
        notes = [f"- {note}" for note in self._all_notes()]
        return "\n".join([*lines, "", *notes] if notes else lines)

    @property
    def title(self) -> str:
        """One line: how many parameters were drawn, with which scheme and seed."""
        return f"{self.scheme}, seed {self.seed}: {len(self.drawn)} of {len(self.entries)} parameters drawn"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Ten lines at most, grouped by module type, rule and scheme."""
        groups = _grouped(self.entries)
        table = Table(title=self.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        table.collapse_padding = True  # 80 columns are few
        table.add_column("module")
        table.add_column("drawn from")
        for column in ("count", "gain", "target std", "measured std"):
            table.add_column(column, justify="right", no_wrap=True)
        rows = [_group_row(group) for group in groups]
        if len(rows) > LINES:
            count = sum(map(len, groups[LINES - 1 :]))
            rows[LINES - 1 :] = [(f"… {len(rows) - LINES + 1} more groups", "", str(count), "", "", "")]
        for row in rows:
            # As Text, so that a pattern's [abc] is no markup; unwrapped, so that ten groups are ten lines.
            table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
        yield table
        for note in _few(self._all_notes()):
            yield Text(note)
        for what, is_meant in (("is unknown", False), ("its author set", True)):
            advice = sorted(
                {e.advice for e in self.entries if e.advice and (e.left is Reason.SET_BY_AUTHOR) == is_meant}
            )
            if advice:
                yield Text(f"To draw what {what}: " + "; ".join(advice[:3]) + (" …" if len(advice) > 3 else ""))

    def _all_notes(self) -> list[str]:
        """What is not to be missed, each in one line."""
        lazy = [entry.name for entry in self.entries if entry.left is Reason.UNINITIALISED]
        first = [f"not drawn, for they have no shape before the first batch: {listed(lazy)}"] if lazy else []
        return [*first, *self.notes]

    def __str__(self) -> str:
        """The console's table as plain text."""
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _few(lines: Sequence[str]) -> list[str]:
    more = [f"… and {len(lines) - SHOWN} more such lines"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry without tuples; what is not finite (an embedding's fan_out) is None."""
    plain = dataclasses.asdict(entry) | {"shape": list(entry.shape)}
    plain |= {name: _finite(plain[name]) for name in ("tolerance", "measured_std")}
    plain["fans"] = {name: _finite(fan) for name, fan in entry.fans._asdict().items()} if entry.fans else None
    return plain


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _grouped(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries of one module type, rule, scheme and reason together; those left alone first, so they are seen."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        key = (entry.module_type, entry.decided_by, entry.scheme, entry.gain, entry.left)
        groups.setdefault(key, []).append(entry)
    return sorted(groups.values(), key=lambda group: (group[0].left is None, -len(group)))


def _group_row(group: Sequence[Entry]) -> tuple[str, ...]:
    first = group[0]
    what = first.scheme if first.left is None else f"left: {first.left.value}"
    if first.decided_by not in ("", "scheme"):
        what += f" ({first.decided_by})"
    gain = "" if first.gain is None else f"{first.gain:.3g}"
    targets = [entry.target_std for entry in group if entry.target_std is not None]
    measured = [entry.measured_std for entry in group if entry.measured_std is not None]
    return first.module_type, what, str(len(group)), gain, _span(targets), _span(measured)


def _span(values: Sequence[float]) -> str:
    """One number, or the smallest and the largest."""
    if not values:
        return ""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}…{high}"


def _markdown_row(entry: Entry) -> str:
    fans = tuple(f"{fan:g}" for fan in entry.fans) if entry.fans else ("", "")
    stds = tuple("" if std is None else f"{std:.6g}" for std in (entry.target_std, entry.measured_std))
    shape = "×".join(map(str, entry.shape))
    what = entry.scheme or f"left alone: {entry.reason}"
    gain = "" if entry.gain is None else f"{entry.gain:.6g}"
    return (
        "| "
        + " | ".join([f"`{entry.name}`", entry.module_type, shape, f"`{entry.decided_by}`", what, *fans, gain, *stds])
        + " |"
    )
