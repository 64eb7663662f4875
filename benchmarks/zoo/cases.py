"""The zoo: every model there is."""

from __future__ import annotations

from benchmarks.zoo import fields, language, tables, vision
from benchmarks.zoo.case import Case

CASES: list[Case] = [*language.CASES, *vision.CASES, *fields.CASES, *tables.CASES]
