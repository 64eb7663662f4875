"""Checks of arguments, whose errors say what was given, what is allowed and what was probably meant."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable

NEAR = 0.6
"""How much of two names has to be equal for one to be offered for the other: 2·common/(sum of their lengths), where
``common`` is the number of characters that both have in the same order. At 0.5, "red" would be offered for "green"."""


def check_choice(what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest match, unless ``given`` is one of the ``allowed`` names."""
    names = list(allowed)
    if given not in names:
        raise ValueError(f"{what} is {given!r}; allowed: {', '.join(names)}{did_you_mean(str(given), names)}")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``; did you mean 'relu'?`` for the nearest known name, "" if even that is not near: the end of an error message.

    >>> did_you_mean("rellu", ["relu", "tanh"])
    "; did you mean 'relu'?"
    """
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=NEAR)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest_names(given: str, known: Iterable[str], count: int) -> list[str]:
    """The ``count`` known names that resemble the given one most, the nearest first; all of them if there are fewer.

    There is no limit to their distance, because ``given`` may be a pattern: ``encodr.*`` is not near to any whole name.

    >>> nearest_names("heads.weight", ["norm.bias", "embedding.weight", "head.weight"], 2)
    ['head.weight', 'embedding.weight']
    """
    return difflib.get_close_matches(given, list(known), n=count, cutoff=0.0)


def check_positive(what: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number above zero."""
    if not (_is_finite(what, value) and value > 0):
        raise ValueError(f"{what} must be a finite number above 0, got {value!r}")


def check_finite(what: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number."""
    if not _is_finite(what, value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")


def check_integer(what: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an integer; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}")


def check_list(what: str, value: object) -> None:
    """Raise TypeError if ``value`` is one string where a list of them is meant."""
    if isinstance(value, str):
        raise TypeError(f"{what} must be a list of names, got {value!r}; write [{value!r}]")


def _is_finite(what: str, value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{what} must be a number, got {value!r} of type {type(value).__name__}")
    return math.isfinite(value)
