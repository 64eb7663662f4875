"""The compiled sums, if there are any; README.md beside this file says what they promise."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch  # noqa: F401 - loads the OpenMP library whose threads the compiled code looks up once, when it is imported

OFF_SWITCH = "LIGHTNING_INIT_NATIVE"
"""Environment variable, read once, at import: "0" leaves the compiled code alone, as if there had been no C compiler
at installation. Every other value leaves it on."""


def _load() -> Any:
    if os.environ.get(OFF_SWITCH) == "0":
        return None
    try:
        return importlib.import_module("lightning_init.native._sums")
    except ImportError:  # installed without a C compiler: the same numbers, slower
        return None


sums = _load()
"""The compiled module, described in ``_sums.pyi``; None without it."""
