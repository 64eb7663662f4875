"""What must not happen to a model's weights: a plan that would do it is refused before anything is written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from lightning_init.findings import Finding
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.reasons import Reason

MAX_SHOWN = 5
"""Findings in an error's text."""

Trained = Literal["refuse", "keep", "overwrite"]
"""What to do where weights show signs of training."""


def refuse_trained(signs: Iterable[Finding]) -> None:
    """Raise ValueError if there are signs of training, naming the layers and what can be done.

    Args:
        signs: from all ranks.
    """
    different = list(dict.fromkeys(signs))
    if not different:
        return
    shown = "\n".join(f"  {sign.message}" for sign in different[:MAX_SHOWN])
    more = f"\n  … and {len(different) - MAX_SHOWN} more" if len(different) > MAX_SHOWN else ""
    raise ValueError(
        f"the model shows signs of training, and new weights would destroy them:\n{shown}{more}\n"
        f"To keep what was trained and draw the rest, such as a new head: trained='keep'. To keep by name: "
        f"rules=[{_keep_rules(different)}], or Rule('*', 'keep') for everything. "
        "To draw new weights all the same: trained='overwrite'."
    )


def _keep_rules(signs: Sequence[Finding]) -> str:
    """Rules to paste, one for each of the model's own attributes with a sign of training anywhere inside.

    Not narrower: the layers beside the ones that show it were trained with them.
    """
    patterns = dict.fromkeys(_attribute_of(sign.layer) + ".*" if sign.layer else "*" for sign in signs)
    return ", ".join(f"Rule({pattern!r}, 'keep')" for pattern in patterns)


def keep_trained(plan: Sequence[Assignment], signs: Iterable[Finding], fresh: Container[str]) -> list[Assignment]:
    """The plan, without the layers that were trained.

    A layer was trained if it shows a sign, or if its neighbours under the same attribute of the model do and nothing
    shows that it was not: a convolution without a bias shows nothing, the norm behind it does.

    Args:
        plan: of the model.
        signs: from all ranks.
        fresh: names of the layers that still hold what their module's own reset drew, such as a new head.
    """
    signed = {sign.layer for sign in signs}
    attributes = {_attribute_of(layer) for layer in signed}
    kept = []
    for assignment in plan:
        layer = assignment.site.forward_fqn.rpartition(".")[0]
        is_beside = _attribute_of(layer) in attributes and layer not in fresh
        if assignment.is_drawn and (layer in signed or is_beside):
            why = "signs of training" if layer in signed else "its neighbours show signs of training"
            assignment = replace(
                assignment, initializers=(), scheme="", left=Reason.TRAINED, reason=f"trained: {why}, kept"
            )
        kept.append(assignment)
    return kept


def _attribute_of(layer: str) -> str:
    """The attribute of the model that a layer lies in."""
    return layer.partition(".")[0]


def refuse_meta(assignments: Iterable[Assignment]) -> None:
    """Raise ValueError if a parameter has no memory to write to."""
    on_meta = [assignment.name for assignment in assignments if assignment.site.parameter.is_meta]
    if on_meta:
        raise ValueError(
            f"{len(on_meta)} parameters are on the meta device and hold no memory (the first: {on_meta[0]!r}): "
            "call model.to_empty(device=...) first, then initialise"
        )


def refuse_uninitialised(assignments: Iterable[Assignment]) -> None:
    """Raise ValueError if a parameter that holds uninitialised memory would be left alone, and so be trained.

    Args:
        assignments: of a model that was on the meta device, so that its memory never held a value.
    """
    for assignment in assignments:
        is_unknown = assignment.left is Reason.TYPE_UNKNOWN
        if is_unknown and not hasattr(assignment.site.module, "reset_parameters"):
            raise ValueError(
                f"{assignment.name!r} comes from the meta device and holds uninitialised memory: its module type is "
                f"not known and has no reset_parameters. Make it known: lightning_init.{assignment.advice}, "
                f"or give it a rule: Rule({assignment.name!r}, Normal(std))"
            )
