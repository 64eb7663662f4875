"""Errors that say what was given, what is allowed and what was probably meant."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence


def check_choice(what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest match, unless ``given`` is one of the ``allowed`` names."""
    names = list(allowed)
    if given not in names:
        raise ValueError(f"{what} is {given!r}; allowed: {', '.join(names)}{did_you_mean(str(given), names)}")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``; did you mean 'relu'?`` for the nearest known name, "" where none is near.

    >>> did_you_mean("rellu", ["relu", "tanh"])
    "; did you mean 'relu'?"
    """
    near = nearest_names(given, known, at_most=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest_names(given: str, known: Iterable[str], *, at_most: int, however_far: bool = False) -> list[str]:
    """The known names most like ``given``, the nearest first.

    Args:
        given: what was asked for.
        known: what there is.
        at_most: how many names.
        however_far: also names that have nothing in common with it; else only such as have most letters in common.

    >>> nearest_names("net.1.wieght", ["net.0.bias", "net.1.weight", "net.1.bias"], at_most=2)
    ['net.1.weight', 'net.1.bias']
    """
    # 2·common/(sum of both lengths) has to be 0.6, difflib's own default: at 0.5, "red" would be offered for "green".
    return difflib.get_close_matches(given, list(known), n=at_most, cutoff=0.0 if however_far else 0.6)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first of many names, and how many there are beyond.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_positive(what: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number above zero."""
    if not (_is_finite(what, value) and value > 0):
        raise ValueError(f"{what} must be a finite number above 0, got {value!r}")


def check_finite(what: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number."""
    if not _is_finite(what, value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")


def check_integer(what: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an integer, NumPy's included; True and False are none."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}")


def check_list(what: str, value: object) -> None:
    """Raise TypeError if ``value`` is one string where a list of them is meant."""
    if isinstance(value, str):
        raise TypeError(f"{what} must be a list of names, got {value!r}; write [{value!r}]")


def _is_finite(what: str, value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{what} must be a number, got {value!r} of type {type(value).__name__}")
    return math.isfinite(value)
