"""Why a parameter is left alone."""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Why a parameter is left alone. The value is what the report's groups are called."""

    UNINITIALISED = "uninitialised"
    """A lazy module's parameter that has no shape yet."""
    SETTLED = "settled"
    """An earlier fit started from it, or a checkpoint restored it."""
    INTEGER = "integer"
    SPARSE = "sparse"
    """Only some of its elements have a place in memory."""
    NO_ELEMENTS = "no elements"
    RULE_KEEPS = "kept by rule"
    """A rule of the user's says "keep"."""
    TIED = "tied"
    """It is another parameter under a second name."""
    FROZEN = "frozen"
    """It does not require a gradient."""
    FROZEN_TOGETHER = "frozen together"
    """Another original of the same parametrized attribute is frozen."""
    WRITTEN_TOGETHER = "written together"
    """Another original of the same parametrized attribute is written, and this one with it."""
    TYPE_UNKNOWN = "type unknown"
    """Nothing says what the parameter is to its module."""
    ROLE_KEEPS = "kept"
    """Its role says "keep"."""
    SET_BY_AUTHOR = "set by its author"
    """It holds what no reset and no draw around zero leaves: a constant, a structure, a scale of its own."""
    TRAINED = "trained"
    """It shows signs of training, or its neighbours do, and trained="keep" was given."""
    OWN_CODE = "read by code of its own"
    """Its module's forward makes something else of it than the module's type would, or its shape is another."""
    PARAMETRIZED = "parametrized"
    """Its parametrization has no way back from a value to what is stored."""
