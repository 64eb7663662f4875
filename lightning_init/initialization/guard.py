"""What must not happen to a model's weights: a plan that would do it is refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_init.findings import Finding
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.reasons import Reason

MAX_SHOWN = 5
"""Findings in an error's text."""


def refuse_trained(signs: Iterable[Finding]) -> None:
    """Raise ValueError if there are signs of training, naming the first and the rules that would keep the weights.

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
        f"To keep these weights: rules=[{_keep_rules(different)}], or Rule('*', 'keep') if all others are "
        "trained too. To initialise all the same: when='always'."
    )


def _keep_rules(signs: Sequence[Finding]) -> str:
    """Rules to paste, one for each of the model's own attributes with a sign of training anywhere inside.

    Not narrower: the layers beside the ones that show it were trained with them.
    """
    patterns = dict.fromkeys(sign.layer.partition(".")[0] + ".*" if sign.layer else "*" for sign in signs)
    return ", ".join(f"Rule({pattern!r}, 'keep')" for pattern in patterns)


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
