"""What the user asked for (a scheme, its gain, the bias, rules ahead of it), checked when it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lightning_init.checks import check_choice, check_finite, check_positive, nearest_names
from lightning_init.initialization.calibration import Calibration
from lightning_init.schemes.gains import gain_of
from lightning_init.schemes.named import SCHEMES, Auto, name_of, scheme_of
from lightning_init.schemes.scheme import Scheme


@dataclass(frozen=True)
class Rule:
    """A scheme for the parameters whose full name matches a pattern; the first rule that matches wins.

    A pattern that ends in a parameter's name (``head.weight``, ``*.bias``) is literal: the parameters that it matches
    get the scheme. A pattern that ends in ``.*`` (``encoder.*``), or is ``*``, is about modules: their weights get the
    scheme, their biases and normalisations what they would get without the rule. So is a glob that matches weights and
    others (``*.weight`` also matches the scale of a norm): it speaks of the weights.

    Args:
        pattern: glob on the parameter's full name without wrappers such as ``_orig_mod.``; ``*`` also matches dots.
        scheme: a name of :data:`SCHEMES`, a scheme object, or ``"keep"``, which leaves the parameter as it is.
        gain: in place of the scheme's own; only for schemes that have a gain.

    Raises:
        ValueError: an empty pattern, an unknown scheme, a gain that is not above 0, or a gain for a scheme without.
        TypeError: an argument of the wrong type.

    >>> Rule("head.weight", "zeros").matches("head.weight")
    True
    """

    pattern: str
    scheme: str | Scheme
    gain: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            given = f"{self.pattern!r} of type {type(self.pattern).__name__}"
            raise TypeError(f"Rule(pattern) is a glob on parameter names such as 'encoder.*', got {given}")
        if not self.pattern:
            raise ValueError("Rule(pattern) is empty; it is a glob on parameter names such as 'encoder.*'")
        if isinstance(self.scheme, str):
            check_choice("Rule(scheme)", self.scheme, ["keep", *SCHEMES])
        if self.scheme == "keep":
            if self.gain is not None:
                raise ValueError(f"Rule({self.pattern!r}, 'keep') draws nothing: it cannot have a gain")
            return
        scheme = scheme_of(self.scheme)
        if self.gain is not None:
            check_positive("Rule(gain)", self.gain)
            check_takes_gain(scheme, "Rule(gain)")

    @property
    def keeps(self) -> bool:
        """Whether the rule leaves its parameters alone."""
        return self.scheme == "keep"

    @property
    def is_literal(self) -> bool:
        """Whether the last part of the pattern is a parameter's name, not ``*``."""
        return self.pattern.rpartition(".")[2] != "*"

    @property
    def is_glob(self) -> bool:
        """Whether the pattern may match more than one parameter."""
        return any(character in self.pattern for character in "*?[")

    def matches(self, *names: str) -> bool:
        """Whether the pattern is, or as a glob matches, one of a parameter's names."""
        return any(name == self.pattern or fnmatchcase(name, self.pattern) for name in names)


AUTO = "auto"
"""In place of an activation's name: that of what feeds each weight."""


@dataclass(frozen=True)
class Request:
    """All arguments of one initialisation, checked.

    Attributes:
        scheme: for every weight that no rule matches.
        rules: the first that matches a parameter decides.
        gain: in place of the scheme's own; None: its own.
        bias: the value of every bias; None: the scheme's own choice.
        head: for the weights that give the model's outputs; None: as for all others.
        is_strict: parameters of module types that are not known are an error.
        is_gain_traced: the gain of each weight is that of what feeds it, where a trace has found it.
        calibration: what weights are scaled to on real data, once drawn; None: they are not.
        text: the scheme in words for the report, such as ``he_normal for gelu``.
    """

    scheme: Scheme
    rules: tuple[Rule, ...] = ()
    gain: float | None = None
    bias: float | None = None
    head: Scheme | None = None
    is_strict: bool = False
    is_gain_traced: bool = False
    calibration: Calibration | None = None
    text: str = field(default="", compare=False)

    @classmethod
    def of(
        cls,
        scheme: str | Scheme,
        rules: Iterable[Rule] | None = None,
        activation: str | None = None,
        bias: float | None = None,
        head: str | Scheme | None = None,
        strict: bool = False,
        calibrate: bool | Calibration = False,
    ) -> Request:
        """Check a user's arguments and turn them into a request.

        Args:
            scheme: a name of :data:`SCHEMES` or a scheme object.
            rules: as in :class:`Request`.
            activation: what the gain is made for, such as ``gelu``; "auto": for what feeds each weight, as a trace
                shows it; None: the scheme's own gain.
            bias: as in :class:`Request`.
            head: a name of :data:`SCHEMES` or a scheme object.
            strict: as ``is_strict`` in :class:`Request`.
            calibrate: as ``calibration`` in :class:`Request`; True: to the variance that fits the depth.

        Raises:
            ValueError: an unknown scheme or activation, an activation for a scheme without a gain, a bias that is not
                finite.
            TypeError: an argument of the wrong type, such as one Rule where a list of them is meant.
        """
        chosen = scheme_of(scheme)
        gain = None
        if activation is not None:
            check_takes_gain(chosen, "activation")
            gain = None if activation == AUTO else gain_of(activation)
        if bias is not None:
            check_finite("bias", bias)
        is_traced = activation == AUTO or isinstance(chosen, Auto)
        text = name_of(chosen) + (
            " for what feeds each weight" if activation == AUTO else f" for {activation}" * bool(activation)
        )
        heads = None if head is None else scheme_of(head)
        calibration = calibrate if isinstance(calibrate, Calibration) else Calibration() if calibrate else None
        text += ", calibrated" if calibration else ""
        return cls(chosen, _checked(rules), gain, bias, heads, strict, is_traced, calibration, text)

    @property
    def asks_for_trace(self) -> bool:
        """Whether the weights depend on what feeds them and on what they lead to: not those of absolute values."""
        schemes = [self.scheme, *(scheme_of(rule.scheme) for rule in self.rules if not rule.keeps)]
        return self.head is not None or any(scheme.fills != "any parameter" for scheme in schemes)

    def rule_for(self, *names: str) -> Rule | None:
        """The first rule that matches one of a parameter's names."""
        return next((rule for rule in self.rules if rule.matches(*names)), None)

    def check_all_used(self, parameters: Sequence[Sequence[str]]) -> None:
        """Raise ValueError if a rule matches no parameter, or none that an earlier rule leaves to it.

        Args:
            parameters: the names of each, as stored and as read, and those it is tied to.
        """
        names = list(dict.fromkeys(name for of_one in parameters for name in of_one))
        winners = {id(self.rule_for(*of_one)) for of_one in parameters}
        for rule in self.rules:
            if not any(rule.matches(name) for name in names):
                near = nearest_names(rule.pattern, names, at_most=3, however_far=True)
                raise ValueError(
                    f"rule {rule.pattern!r} matches none of the model's {len(names)} parameters; "
                    f"nearest names: {', '.join(near) or 'none'}"
                )
            if id(rule) not in winners:
                of_one = next(of_one for of_one in parameters if rule.matches(*of_one))
                first = self.rule_for(*of_one)
                assert first is not None
                raise ValueError(
                    f"rule {rule.pattern!r} never applies: rule {first.pattern!r} stands before it and matches the "
                    "same parameters; the first rule that matches wins, so put the narrower one first"
                )


def check_takes_gain(scheme: Scheme, what: str) -> None:
    """Raise ValueError, listing the schemes with a gain, if ``scheme`` has none.

    Args:
        scheme: what a gain was given to.
        what: the argument that gave it, for the message: ``Rule(gain)`` or ``activation``.
    """
    if not scheme.takes_gain:
        able = [name for name, known in SCHEMES.items() if known.takes_gain]
        raise ValueError(
            f"{what} has no meaning for scheme {name_of(scheme)!r}; schemes with a gain: {', '.join(able)}"
        )


def _checked(rules: Iterable[Rule] | None) -> tuple[Rule, ...]:
    if rules is None:
        return ()
    if not isinstance(rules, Iterable):
        raise _no_rule(rules)
    given = tuple(rules)
    for rule in given:
        if not isinstance(rule, Rule):
            raise _no_rule(rule)
    return given


def _no_rule(given: object) -> TypeError:
    return TypeError(f"rules is a list of Rule(pattern, scheme), got {given!r} of type {type(given).__name__}")
