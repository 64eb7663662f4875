"""What frozen parameters say about those that are trained beside them: a copy of a trained one was trained as well.

Wrappers for fine-tuning keep the original layer, frozen, and train a copy of it. A frozen body beside a new head says
nothing about the head. Where the frozen tensor was not trained it is a teacher or a target: the copy is drawn, and the
tensor is named, for it no longer is what it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_init.distributed.shards import local_shard_of
from lightning_init.initialization.evidence import evidence_of
from lightning_init.initialization.plan import Assignment
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.survey import Candidate
from lightning_init.initialization.training_signs import signs_of_training
from lightning_init.sandbox import has_memory


def frozen_twins(candidates: Iterable[Candidate]) -> dict[str, str]:
    """By name, the trained parameters that hold what a frozen one holds, with its name; not constants."""
    frozen: dict[torch.Size, list[Candidate]] = {}
    trained: list[Candidate] = []
    for one in candidates:
        if one.why_left is not None and one.why_left[0] is Reason.FROZEN and _can_be_read(one.site.parameter):
            frozen.setdefault(one.site.parameter.shape, []).append(one)
        elif one.why_left is None and not one.is_empty and _can_be_read(one.site.parameter):
            trained.append(one)
    twins = {}
    for one in trained:
        for other in frozen.get(one.site.parameter.shape, ()):
            if _are_equal(one.site.parameter, other.site.parameter):
                twins[one.site.stored_fqn] = other.site.stored_fqn
                break
    return twins


def were_trained(candidates: Iterable[Candidate], model: nn.Module) -> bool:
    """Whether the frozen parameters show signs of training."""
    frozen = [
        _readable(one)
        for one in candidates
        if one.why_left is not None and one.why_left[0] is Reason.FROZEN and _can_be_read(one.site.parameter)
    ]
    return bool(signs_of_training(frozen, model))


def keep_twins(plan: Sequence[Assignment], twins: Mapping[str, str]) -> list[Assignment]:
    """The plan, without the parameters that are copies of trained ones.

    Args:
        plan: of the model.
        twins: of :func:`frozen_twins`.
    """
    return [
        replace(
            one,
            initializers=(),
            scheme="",
            left=Reason.TRAINED,
            reason=f"trained: it equals {twins[one.name]}, which is frozen",
        )
        if one.is_drawn and one.name in twins
        else one
        for one in plan
    ]


def notes_on_twins(plan: Iterable[Assignment], twins: Mapping[str, str]) -> list[str]:
    """The frozen tensors that are no longer what they were made from."""
    return [
        f"{twins[one.name]} is frozen and keeps the old values of {one.name}"
        for one in plan
        if one.is_drawn and one.name in twins
    ]


def _can_be_read(parameter: Tensor) -> bool:
    return parameter.layout is torch.strided and not parameter.is_meta and has_memory(parameter)


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two parameters hold the same numbers here, and not only one number."""
    mine, other = local_shard_of(first), local_shard_of(second)
    if mine.local.shape != other.local.shape or mine.local.device != other.local.device or mine.local.numel() < 2:
        return False
    is_constant = bool((mine.local == mine.local.flatten()[0]).all())
    return not is_constant and bool(torch.equal(mine.local, other.local))


def _readable(frozen: Candidate) -> Candidate:
    """A frozen parameter as if it were to be drawn, with what it holds."""
    shard = local_shard_of(frozen.site.parameter)
    slices = len(frozen.role.slices) if frozen.role else 1
    evidence = evidence_of(shard, slices, is_table=frozen.is_table, version=1)
    return replace(frozen, why_left=None, shard=shard, evidence=evidence)
