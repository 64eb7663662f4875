"""What the author of a model meant by the values its parameters hold: left alone, or drawn again at their scale.

A value is the author's purpose where the module type's own reset could not have left it:

- a constant other than the reset's: a zeroed last layer, a zero-γ, a prior in a bias, a temperature of 20;
- a structure: identity, grid, sinusoids, repeated kernels, an orthogonal matrix; or a mean that is not 0;
- a scale that neither a usual formula nor the model's other weights have: a policy's last layer, Fourier features.

A lookup table keeps the scale it has. Everything else is a random draw around zero, and is drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning_init.initialization.evidence import Evidence, Held
from lightning_init.initialization.scales import scales_of_their_own
from lightning_init.introspect.role import Role
from lightning_init.schemes.distributions import Constant, Distribution, Uniform


def purposes_of(held: Iterable[Held], *, constants_only: bool = False) -> dict[str, str]:
    """By name, what the author set on purpose, in a few words; without the parameters that are to be drawn.

    Args:
        held: all parameters of a model: what is unusual shows beside the others.
        constants_only: the model was trained, which leaves structure and scales that nobody meant.

    >>> from lightning_init.schemes.fans import Fans
    >>> zero = Evidence((0.0,), (0.0,), 4, 0.0, 0.0, has_structure=True)
    >>> purposes_of([Held("gate.weight", Role("weight", Uniform(-1, 1), Fans(2, 2)), zero)])
    {'gate.weight': 'constant 0'}
    """
    parameters = [one for one in held if one.role is not None and one.evidence is not None]
    own_scales = scales_of_their_own(parameters)
    owners_as_drawn = {_owner(one) for one in parameters if _is_weight_of_its_module(one)}
    purposes = {}
    for one in parameters:
        if one.role is None or one.evidence is None or (constants_only and one.evidence.constants is None):
            continue
        purpose = _purpose(one.role, one.evidence)
        if not purpose and one.name in own_scales:
            purpose = f"a scale of its own, {own_scales[one.name]:.1g} times the usual one"
        if not purpose and _is_prior(one, owners_as_drawn):
            purpose = "not what its module drew, beside a weight that is"
        if purpose:
            purposes[one.name] = purpose
    return purposes


def _purpose(role: Role, evidence: Evidence) -> str:
    """What tells that a value was set on purpose; "" if a reset, or a draw around zero, can have left it."""
    if not evidence.is_finite or role.kind == "keep":
        return ""
    constants = evidence.constants
    if constants is not None:
        left_by_reset = isinstance(role.default, Constant) and set(constants) == {role.default.value}
        is_one_number = evidence.count == 1 and not isinstance(role.default, Constant)
        return "" if left_by_reset or is_one_number else f"constant {' and '.join(_distinct(constants))}"
    if role.kind in ("norm", "other"):
        return ""
    if role.kind == "bias" and _is_within(evidence, role.default):
        return ""
    if evidence.has_structure or evidence.columns_are_orthogonal:
        return "structured values"
    if evidence.mean_is_off:
        return f"values around {evidence.total / evidence.count:.3g}"
    return ""


def _owner(one: Held) -> str:
    return one.name.rpartition(".")[0]


def _is_weight_of_its_module(one: Held) -> bool:
    """Whether a weight still is what its module's own reset drew."""
    if one.role is None or one.evidence is None or one.role.kind != "weight" or not one.evidence.is_finite:
        return False
    return _is_within(one.evidence, one.role.default) and one.evidence.rms > 0.8 * one.role.default.target_std


def _is_prior(one: Held, owners_as_drawn: set[str]) -> bool:
    """Whether a bias was changed by an author who left the weight beside it: a prior for each of its units."""
    if one.role is None or one.evidence is None or one.role.kind != "bias" or not isinstance(one.role.default, Uniform):
        return False
    is_changed = one.evidence.is_finite and not _is_within(one.evidence, one.role.default)
    return is_changed and _owner(one) in owners_as_drawn


def _is_within(evidence: Evidence, default: Distribution) -> bool:
    """Whether all values are from the interval that the module draws from."""
    if not isinstance(default, Uniform):
        return False
    slack = 1 + 2**-8  # rounding to bfloat16
    return default.low * slack <= min(evidence.ends) and max(evidence.ends) <= default.high * slack


def _distinct(numbers: Iterable[float]) -> list[str]:
    return list(dict.fromkeys(f"{number:g}" for number in numbers))


def uninitialised_among(modules: Iterable[list[Held]]) -> set[str]:
    """Names of parameters whose memory holds no values yet: allocated, and never written to.

    Only of modules that write to them when they are made. A deep copy has not been written to either, so nothing is
    said of a model some of whose unwritten modules hold what a draw leaves. Absurd numbers need no such caution.

    Args:
        modules: the parameters of each.
    """
    unwritten = [
        one
        for held in modules
        if all(one.has_reset and one.evidence is not None and not one.evidence.is_written for one in held)
        for one in held
    ]
    are_copies = any(map(_looks_drawn, unwritten))
    return {one.name for one in unwritten if _is_absurd(one) or not are_copies}


def _looks_drawn(one: Held) -> bool:
    """Whether a parameter holds random numbers of the size that its module, or an author, would draw."""
    if one.role is None or one.evidence is None or _is_absurd(one):
        return False
    own = one.role.default.target_std
    return one.evidence.constants is None and own / 30 < one.evidence.rms < 2 * own


def _is_absurd(one: Held) -> bool:
    """Whether no author leaves such numbers: not finite, above 10⁶, or below what float32 can normally hold."""
    if one.evidence is None:
        return False
    largest = max(map(abs, one.evidence.ends), default=0.0)
    return not one.evidence.is_finite or largest > 1e6 or 0 < largest < 1e-37
