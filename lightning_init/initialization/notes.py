"""What a report says below its table about gains: which weights got another one, and which may need another."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lightning_init.checks import listed
from lightning_init.initialization.choice import BESIDE_TABLE
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.rules import AUTO
from lightning_init.introspect.trace import Trace
from lightning_init.schemes.distributions import Distribution
from lightning_init.schemes.named import SCHEMES

_PACKED = re.compile(r"(qkv|query_key_value|c_attn|in_proj)(_proj|_linear)?$", re.IGNORECASE)
"""What authors call one layer that computes query, key and value."""

_PARTS = (("real", "imag"), ("re", "im"), ("r", "i"))
"""How names of the two layers of a complex one end."""


def notes_on_gains(
    trace: Trace, plan: Sequence[Assignment], heads: Container[str], *, is_gain_traced: bool = False
) -> list[str]:
    """Which weights got another gain than the scheme's for their place in the model, and which give its outputs."""
    drawn = _drawn_weights(plan)
    without = [
        one.name
        for one in drawn
        if one.decided_by != "head" and one.gain == 1.0 and trace.feed_of(one.name) == "linear"
    ]
    beside = [one.name for one in drawn if one.decided_by == BESIDE_TABLE]
    likely = [one.name for one in drawn if one.name in heads and one.decided_by != "head"]
    notes = [f"nothing nonlinear feeds them, so their gain is 1: {listed(without)}"] if without else []
    notes += [f"output layers, which head='zeros' would start at 0: {listed(likely)}"] if likely and without else []
    notes += [f"added to the rows of a lookup table, so they get its scale: {listed(beside)}"] if beside else []
    if is_gain_traced:
        notes += _traced_gains(trace, drawn)
    return notes + ([f"what feeds the weights could not be seen: {trace.why_not}"] if trace.why_not else [])


def _traced_gains(trace: Trace, drawn: Iterable[Assignment]) -> list[str]:
    """What was found to feed the weights that have a gain, and where nothing was."""
    by_function: dict[tuple[str, float], list[str]] = {}
    unknown = []
    for one in drawn:
        if one.scheme not in SCHEMES or not (SCHEMES[one.scheme].takes_gain or one.scheme == AUTO):
            continue
        functions, gain = trace.functions_of(one.name), trace.gain_of(one.name)
        if gain is None:
            unknown.append(one.name)
        elif functions:
            by_function.setdefault((" ".join(functions), gain), []).append(one.name)
    notes = [f"fed by {what}, whose gain is {gain:.4g}: {listed(names)}" for (what, gain), names in by_function.items()]
    if unknown:
        notes.append(f"what feeds them was not found, so the gain is the scheme's own: {listed(unknown)}")
    return notes


def note_on_calibration(factors: Mapping[str, float], trace: Trace) -> str:
    """How far weights were scaled on real data, or why none was."""
    if not factors:
        return f"calibrated nothing: {trace.why_not or 'no layer is left that the scheme decides on'}"
    least, most = min(factors.values()), max(factors.values())
    return f"calibrated on one batch, by factors of {least:.3g} to {most:.3g}: {listed(list(factors))}"


def notes_on_parts(plan: Sequence[Assignment]) -> list[str]:
    """Weights that look like several in one, or like one in two, so that the formula's fans may be others."""
    drawn = _drawn_weights(plan)
    return [*_packed(drawn), *_complex_pairs(drawn)]


def _drawn_weights(plan: Iterable[Assignment]) -> list[Assignment]:
    return [one for one in plan if one.is_drawn and one.role is not None and one.role.kind == "weight"]


def _packed(drawn: Iterable[Assignment]) -> Iterator[str]:
    """Packed query, key and value whose scheme counts the outputs of all three."""
    for one in drawn:
        role, shape = one.role, one.site.parameter.shape
        layer = one.name.rpartition(".")[0].rpartition(".")[2]
        if role is None or role.fans is None or len(role.slices) > 1 or one.scheme not in SCHEMES:
            continue
        if not _PACKED.search(layer) or len(shape) != 2 or max(shape) != 3 * min(shape):
            continue
        of_each = role.fans._replace(fan_out=role.fans.fan_out / 3)
        right, drawn_from = SCHEMES[one.scheme].resolve(replace(role, fans=of_each), one.gain), one.initializers[0]
        if isinstance(right, Distribution) and isinstance(drawn_from, Distribution):
            ratio = right.target_std / drawn_from.target_std
            if SCHEMES[one.scheme].takes_gain and ratio != 1:
                yield (
                    f"{one.name} looks like query, key and value in one, and its fan_out counts all three; for each: "
                    f"Rule({one.name!r}, {one.scheme!r}, gain={one.gain * ratio:.4g})"
                )


def _complex_pairs(drawn: Iterable[Assignment]) -> Iterator[str]:
    """Two layers that look like the real and the imaginary part of one: their outputs are added up."""
    by_name = {one.name: one for one in drawn}
    for name, one in by_name.items():
        path, _, attribute = name.rpartition(".")
        for real, imaginary in _PARTS:
            stem = re.fullmatch(rf"(.*?[._]|){real}", path)
            other = by_name.get(f"{stem[1]}{imaginary}.{attribute}") if stem else None
            if other is not None and other.site.parameter.shape == one.site.parameter.shape:
                yield (
                    f"{name} and {other.name} look like the two parts of a complex weight: outputs that add up what "
                    f"both give have twice the variance; draw each with its gain divided by √2"
                )
