"""The scale that an author chose for a weight: whether it is one of its own, and which number was meant by it.

A scale says nothing where a module's own reset left it, or where one number was given to layers of every size, as
N(0, 0.02) is in transformers: that is a habit, and a scheme is asked for to replace it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from lightning_init.initialization.evidence import SIGMAS, Evidence, Held
from lightning_init.introspect.role import Role
from lightning_init.schemes.fans import Fans

FAR_SCALE = 10
"""A weight whose std·√fan is that many times smaller or larger than the model's median has a scale of its own."""

LOWEST_GAIN, HIGHEST_GAIN = 0.5, 2.0
"""Of std·√fan, with any of the usual fans: PyTorch's own is 1/√3, the gain that is made for tanh 5/3."""

USUAL_GAINS = (1.0, math.sqrt(2))
"""LeCun's and Xavier's; He's."""

HABITS = (1.0, 2.0, 5.0, 10.0)
"""First digits of the numbers that are given to all layers alike: .01, .02, .05, .1."""

DIFFERENT_FANS = 1.5
"""Ratio of the fans of two layers from which on a formula would have given them different scales."""

MOST_CHANCE = 0.2
"""Weights so small that chance moves their scale by more do not show a habit."""

MOST_ROUNDING = 0.02
"""Relative difference of a measured scale from the number it is read as, at most, where it is rounded."""


def scales_of_their_own(held: Sequence[Held]) -> dict[str, float]:
    """The weights with a scale that no usual formula gives, and that the model's other weights do not share.

    Where the others have a usual gain, one outside of :data:`LOWEST_GAIN` … :data:`HIGHEST_GAIN` is one of its own;
    where all are small, as GPT-2's are, only one that is :data:`FAR_SCALE` times smaller or larger still.

    Args:
        held: all parameters of a model.

    Returns:
        By name, how many times the model's usual scale it is.
    """
    weights = list(_random_weights(held))
    gains = [evidence.rms * math.sqrt(fans.fan_in) for _, _, evidence, fans in weights]
    if len(gains) < 3:
        return {}
    usual = statistics.median(gains)
    are_usual = LOWEST_GAIN <= usual <= HIGHEST_GAIN
    habits = habitual(held) if are_usual else frozenset()
    own = {}
    for (one, role, evidence, _), gain in zip(weights, gains, strict=True):
        ratio = gain / usual
        is_far = not 1 / FAR_SCALE < ratio < FAR_SCALE
        is_unusual = are_usual and one.name not in habits and has_unusual_gain(one)
        if (is_far or is_unusual) and not _is_default(role, evidence):
            own[one.name] = ratio
    return own


def has_unusual_gain(one: Held) -> bool:
    """Whether std·√fan is beyond the usual gains for every fan that a formula may go by, more than chance explains."""
    role, evidence = one.role, one.evidence
    if role is None or role.fans is None or evidence is None or not _is_random(evidence):
        return False
    gains = [evidence.rms * math.sqrt(fan) for fan in _usual_fans(role.fans, role.groups)]
    error = _chance(evidence)
    return all(gain * (1 + error) < LOWEST_GAIN for gain in gains) or all(
        gain * (1 - error) > HIGHEST_GAIN for gain in gains
    )


def habitual(held: Iterable[Held]) -> frozenset[str]:
    """Names of the weights that were given one number whatever their fans, as no formula does; not of small ones."""
    groups: list[list[tuple[Held, Role, Evidence, Fans]]] = []
    large = [weight for weight in _random_weights(held) if _chance(weight[2]) < MOST_CHANCE]
    for weight in sorted(large, key=lambda weight: weight[2].rms):
        if groups and _are_alike(groups[-1][-1][2], weight[2]):
            groups[-1].append(weight)
        else:
            groups.append([weight])
    return frozenset(one.name for group in groups if _is_habit(group, len(groups)) for one, *_ in group)


def _is_habit(group: Sequence[tuple[Held, Role, Evidence, Fans]], groups: int) -> bool:
    """Whether weights that are equally wide were given a number, and not each what a formula says."""
    fan_ins = [fans.fan_in for *_, fans in group]
    if max(fan_ins) / min(fan_ins) >= DIFFERENT_FANS:
        return True
    by_formula = all(
        any(
            _is_near(evidence, gain / math.sqrt(fan))
            for gain in USUAL_GAINS
            for fan in (fans.fan_in, fans.fan_out, (fans.fan_in + fans.fan_out) / 2)
        )
        for _, _, evidence, fans in group
    )
    count = sum(evidence.count for _, _, evidence, _ in group)
    rms = math.sqrt(sum(evidence.squares for _, _, evidence, _ in group) / count)
    unit = 10 ** math.floor(math.log10(rms))
    is_number = any(abs(rms / (digit * unit) - 1) < SIGMAS / math.sqrt(2 * count) for digit in HABITS)
    shapes = {fans for *_, fans in group}
    return is_number and not by_formula and (len(shapes) > 1 or groups == 1)


def differs_from_default(role: Role, evidence: Evidence | None) -> bool:
    """Whether a weight's scale is not what its module draws, beyond chance."""
    return evidence is not None and _is_random(evidence) and not _is_default(role, evidence)


def meant_scale(own: float, evidence: Evidence | None, usual: Iterable[float]) -> float:
    """The std that was meant by a measured one, as a number that every draw with it would give.

    A measured std differs from the one that was meant by chance, and in its last digits by the order of summation. So
    the first of these is taken that lies within five standard errors: the module's own; the usual ones; the nearest of
    1/√(a power of two) and numbers of one digit. Else it is rounded to as few digits as change it by less than 2 %.

    Args:
        own: what the module itself draws.
        evidence: what the parameter holds; None: the module's own scale.
        usual: others that are likely.
    """
    if evidence is None or not evidence.is_finite or not evidence.count or not evidence.rms:
        return own
    measured, error = evidence.rms, _chance(evidence)
    round_numbers = [*(1 / math.sqrt(2**power) for power in range(30)), float(f"{measured:.1g}")]
    nearest = min(round_numbers, key=lambda std: abs(math.log(measured / std)))
    for std in (own, *usual, nearest):  # not the nearest of them, which would be another one for another draw
        if std and abs(measured / std - 1) <= error:
            return std
    rounded = [float(f"{measured:.{digits}g}") for digits in range(2, 5)]
    return next((std for std in rounded if abs(measured / std - 1) <= min(error, MOST_ROUNDING)), rounded[-1])


def scale_of_table(role: Role, evidence: Evidence | None, width: int) -> float:
    """The std at which a lookup table is drawn again: its author's.

    Args:
        role: whose default is what the module itself draws.
        evidence: what the table holds; None: the module's own scale.
        width: length of one row.
    """
    return meant_scale(role.default.target_std, evidence, [1 / math.sqrt(width)])


def scale_of_weight(role: Role, evidence: Evidence | None) -> float:
    """The std at which a weight is drawn again: its author's."""
    fans = role.fans
    usual = [gain / math.sqrt(fan) for gain in USUAL_GAINS for fan in (fans or ()) if fan and math.isfinite(fan)]
    return meant_scale(role.default.target_std, evidence, usual)


def _random_weights(held: Iterable[Held]) -> Iterator[tuple[Held, Role, Evidence, Fans]]:
    """The weights that hold a random draw; without lookup tables."""
    for one in held:
        role, evidence = one.role, one.evidence
        if role is None or role.fans is None or role.kind != "weight" or one.is_table or evidence is None:
            continue
        if _is_random(evidence):
            yield one, role, evidence, role.fans


def _is_random(evidence: Evidence) -> bool:
    return evidence.is_finite and evidence.constants is None and evidence.count > 0 and evidence.rms > 0


def _is_default(role: Role, evidence: Evidence) -> bool:
    """Whether the scale is the one that the module itself draws at."""
    return _is_near(evidence, role.default.target_std)


def _is_near(evidence: Evidence, std: float) -> bool:
    """Whether a measured std is this one, within what chance explains."""
    return std > 0 and abs(evidence.rms / std - 1) <= _chance(evidence)


def _are_alike(first: Evidence, second: Evidence) -> bool:
    """Whether two scales are one, within chance."""
    return abs(math.log(first.rms / second.rms)) <= math.hypot(_chance(first), _chance(second))


def _chance(evidence: Evidence) -> float:
    """Relative difference of a measured std that chance explains."""
    return SIGMAS / math.sqrt(2 * evidence.count)


def _usual_fans(fans: Fans, groups: int) -> list[float]:
    """What formulas divide by; PyTorch's take all output channels of a grouped convolution for its fan_out."""
    usual = [fans.fan_in, fans.fan_out, (fans.fan_in + fans.fan_out) / 2, fans.fan_out * groups]
    return [fan for fan in usual if math.isfinite(fan) and fan > 0]
