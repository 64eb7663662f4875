"""A finding: one thing that is wrong with a model, with its evidence and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A symptom at a layer.

    Attributes:
        symptom: what is wrong, in one word, such as ``trained_weights``.
        layer: name of the layer, wrappers removed; "" for the whole model.
        message: one sentence with the evidence.
        advice: one sentence that can be done.
        step: logged step at which it was first seen; 0 before training.
        last_step: logged step at which it was last seen.
        rank: the rank that it is about; None if it is about all of them.
        value: the number that is wrong, where there is one.
        limit: what the number was held against.
        severity: an "error" spoils the run; a "warning" need not.
    """

    symptom: str
    layer: str
    message: str = ""
    advice: str = ""
    step: int = 0
    last_step: int = 0
    rank: int | None = None
    value: float | None = None
    limit: float | None = None
    severity: Literal["warning", "error"] = "error"
