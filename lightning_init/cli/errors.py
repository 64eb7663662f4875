"""jsonargparse's errors in one line: where the mistake is, what was given, what is allowed, what was probably meant.

Its reports have no structure but their text, so their sentences are searched for. Each function below knows one kind of
mistake, and returns "" for a report of another kind.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable

from lightning_init.checks import did_you_mean


def explain(message: str, known_keys: Iterable[str] = ()) -> str:
    """Reduce jsonargparse's report of a failed parse to one line.

    A report may be long: for a union of types it has one indented paragraph per type, each with paragraphs of its own,
    down to the value that is wrong.

    Args:
        message: the report.
        known_keys: all keys of the parser, such as ``trainer.max_epochs``: one of them is suggested for an unknown key.

    Returns:
        One line. A report of an unknown kind is returned whole, with spaces in place of line breaks.

    Example:
        >>> print(explain("Parser key 'when': Expected a typing.Literal['fresh', 'always']. Got value: frehs"))
        when: 'frehs' is not one of fresh, always; did you mean 'fresh'?
    """
    unknown_key = re.search(r"(?:[Uu]nrecognized arguments: -*|does not accept option ')([\w.]+)", message)
    if unknown_key:
        return _unknown_key(unknown_key[1], list(known_keys))
    line = (
        _wrong_rule(message)
        or _unknown_argument(message)
        or _unknown_class(message)
        or _wrong_class(message)
        or _wrong_value(message)
    )
    return _where(message) + line if line else " ".join(message.split())


def _where(message: str) -> str:
    """The keys of the nested parsers that lead to the wrong value, as one: ``init.rules.scheme: ``."""
    keys = re.findall(r"""[Pp]arser key ["']([\w.]+)["']""", message)
    return ".".join(keys) + ": " if keys else ""


def _unknown_key(key: str, known_keys: list[str]) -> str:
    """A key that no parser knows. If its first part is unknown (``monitr.every_n_steps``), only that is corrected."""
    first_parts = [known.partition(".")[0] for known in known_keys]
    first_part, _, rest = key.partition(".")
    if rest.partition(".")[0] in first_parts:  # trainer.init, which stands beside the trainer
        return f"unknown option '{key}'; did you mean '{rest}'?"
    near = did_you_mean(key, known_keys) if first_part in first_parts else did_you_mean(first_part, first_parts)
    return f"unknown option '{key}'{near}"


def _wrong_rule(message: str) -> str:
    """A rule that is given as a pair, or as anything else that has no names."""
    expects_rules = "rules.Rule]" in message
    given = re.search(r"(?:Given value|Got value): (?:\[)?(\[[^\[\]{}]*\])", message)
    return f"a rule is {{pattern: head.weight, scheme: zeros}}, got {given[1]}" if expects_rules and given else ""


def _unknown_argument(message: str) -> str:
    """An argument that the class it is given to does not have."""
    argument = re.search(r"Option '([\w.]+)' is not accepted", message)
    class_paths = re.findall(r"Problem with given class_path '([\w.]+)'", message)
    if not (argument and class_paths):
        return ""
    module, _, name = class_paths[-1].rpartition(".")
    allowed = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    return f"{name} has no argument '{argument[1]}', only {', '.join(allowed)}{did_you_mean(argument[1], allowed)}"


def _unknown_class(message: str) -> str:
    """An import path whose module does not have the class."""
    missing = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if not missing:
        return ""
    return f"{missing[1]} has no '{missing[2]}'{did_you_mean(missing[2], dir(importlib.import_module(missing[1])))}"


def _wrong_class(message: str) -> str:
    """An import path of a class that is not a subclass of the expected one."""
    wrong = re.search(r"Import path ?([\w.]*) does not correspond to a subclass of (\w+)", message)
    if not wrong:
        return ""
    given = re.search(r"(?:Given|Got) value: ([\w.]+)", message)
    return f"{wrong[1] or (given and given[1]) or 'the class'} is no {wrong[2]}"


def _wrong_value(message: str) -> str:
    """A value that is not among the choices, or of another type."""
    # Each paragraph ends with the value it is about, the innermost first: what is expected of it stands before that.
    innermost, found_by, rest = re.split(r"(Given value|Got value): ", f"{message}\nGiven value: ", maxsplit=1)
    value = rest.split("\n", 1)[0].strip()
    expected = innermost.rpartition("Errors:" if found_by == "Given value" else "\n")[2]
    choices = re.findall(r"Expected a typing\.Literal\[(.*?)\]", expected)
    if choices and value:
        names = re.findall(r"'([^']*)'", choices[-1])
        return f"{value!r} is not one of {', '.join(names)}{did_you_mean(value, names)}"
    if "Expected a dot import path string" in expected:
        return f"{value!r} is neither the import path of a class nor a block of arguments"
    types = sorted(re.findall(r"Expected (?:an? )?<class '(.*?)'>", expected), key="NoneType".__eq__)
    names = ["null" if name == "NoneType" else name for name in dict.fromkeys(types)]
    return f"{value!r} is not of type {' or '.join(names)}" if names and value else ""
