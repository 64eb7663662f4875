"""The zoo: every model there is."""

from __future__ import annotations

from benchmarks.zoo import language
from benchmarks.zoo.case import Case

CASES: list[Case] = [*language.CASES]
