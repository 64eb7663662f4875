"""The straight line from a model and a scheme to new weights and their report: plan, guard, draw, write, compare."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_init.checks import check_integer
from lightning_init.findings import Finding
from lightning_init.initialization.draw import DrawTask, Expected, Measured, make_tasks
from lightning_init.initialization.evidence import remember_author
from lightning_init.initialization.guard import (
    Trained,
    keep_trained,
    refuse_meta,
    refuse_trained,
    refuse_uninitialised,
)
from lightning_init.initialization.plan import (
    Assignment,
    Candidate,
    decide,
    survey,
    with_empty_memory_marked,
)
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.report import SIGMAS, Entry, InitReport
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.seeds import agreed_seed
from lightning_init.initialization.training_signs import is_as_reset, signs_of_training
from lightning_init.initialization.verify import agree, gather_or_raise
from lightning_init.initialization.write import summon_fsdp1_parameters, write_all
from lightning_init.schemes.scheme import Scheme

ABSURD = 2
"""How many times :meth:`InitReport.check`'s tolerance a measured std may be off before it is an error by itself."""

_Result = TypeVar("_Result")
_NOTHING: list[Measured] = []
_NO_CANDIDATES: list[Candidate] = []

ROUNDING = 1e-4
"""Relative difference of a std that storing values in 16 bits explains."""


def initialize(
    model: nn.Module,
    scheme: str | Scheme = "he_normal",
    *,
    rules: Iterable[Rule] = (),
    activation: str | None = None,
    bias: float | None = None,
    seed: int | None = None,
) -> InitReport:
    """Draw new weights for a model, in place: the same seed gives the same weights on any number of devices.

    Weights of known module types get the scheme; biases the scheme's own (0; 1 for the LSTM's forget gate;
    PyTorch's for ``torch_default``); norms 1 and 0; embeddings N(0, 1). What is not known stays, and the report
    says so. The global random state is neither used nor changed. Where ``torch.distributed`` runs, every rank
    has to call this with the same arguments.

    Args:
        model: any module; its parameters may be DTensors (FSDP2, tensor parallel) or FSDP1's.
        scheme: a name of ``SCHEMES`` or a scheme object.
        rules: ahead of the scheme, the first that matches wins.
        activation: name of the nonlinearity that feeds the layers; its gain replaces the scheme's own.
        bias: one value for every bias in place of the scheme's own.
        seed: any integer; None: that of ``seed_everything``, else of ``torch.manual_seed``, else one drawn at random.

    Returns:
        What was done to every parameter, with target and measured standard deviation.

    Raises:
        ValueError: an unknown name, a rule that matches nothing, a parameter on the meta device.
        TypeError: an argument of the wrong type.
        RuntimeError: ranks disagree; names the first parameter that differs.

    >>> layer = nn.Linear(512, 256)
    >>> report = initialize(layer, "he_normal", seed=1)
    >>> abs(layer.weight.std().item() / (2 / 512) ** 0.5 - 1) < 0.02
    True
    """
    request = Request.of(scheme, rules, activation, bias)
    return carry_out(model, request, agreed_seed() if seed is None else seed)


def plan(
    model: nn.Module,
    scheme: str | Scheme = "he_normal",
    *,
    rules: Iterable[Rule] = (),
    activation: str | None = None,
    bias: float | None = None,
) -> list[Assignment]:
    """What :func:`initialize` would do to each parameter; touches nothing. Arguments and errors as there.

    >>> [(assignment.name, assignment.scheme) for assignment in plan(nn.Linear(2, 3))]
    [('weight', 'he_normal'), ('bias', 'zeros')]
    """
    request = Request.of(scheme, rules, activation, bias)
    return _decided(model, with_empty_memory_marked(survey(model, request)), request)


def carry_out(
    model: nn.Module, request: Request, seed: int, *, trained: Trained = "overwrite", from_meta: bool = False
) -> InitReport:
    """Plan, guard, draw and write, compare between ranks, report.

    Args:
        model: as for :func:`initialize`.
        request: scheme, rules, gain and bias.
        seed: any integer.
        trained: what to do where weights show signs of training.
        from_meta: the model was on the meta device; nothing is read from its memory, and none of it may stay as it is.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`initialize`, on all ranks before any has written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {model!r} of type {type(model).__name__}")
    check_integer("seed", seed)
    seed = int(seed)
    with summon_fsdp1_parameters(model):
        look = functools.partial(survey, model, request, is_uninitialised=from_meta)
        candidates, failure = _attempt(look, _NO_CANDIDATES)
        candidates = _agreed(candidates, failure)
        prepare = functools.partial(_prepare, model, candidates, request, seed, trained, from_meta)
        prepared, failure = _attempt(prepare, _Prepared([], [], []))
        signs = list(chain(*gather_or_raise(prepared.signs, failure)))
        if trained == "refuse":
            refuse_trained(signs)
        if signs and trained == "keep":
            prepared = _without_trained(prepared, candidates, signs)
        measured, failure = _attempt(functools.partial(write_all, prepared.tasks), _NOTHING)
        totals = agree([task.assignment.name for task in prepared.tasks], measured, failure)
        _remember_authors(candidates)
        drawn = {
            task.assignment.name: (task.expected(), total) for task, total in zip(prepared.tasks, totals, strict=True)
        }
        entries = tuple(_entry(assignment, *drawn.get(assignment.name, (None, None))) for assignment in prepared.plan)
    report = InitReport(request.text, seed, entries)
    _refuse_absurd(report)
    return report


def _refuse_absurd(report: InitReport) -> None:
    """Raise ValueError if what was written is not finite, or far from what was asked for: never train from that."""
    for entry in report.drawn:
        if entry.measured_std is None or entry.target_std is None:
            continue
        if not abs(entry.measured_std - entry.target_std) <= ABSURD * entry.tolerance:
            raise ValueError(
                f"{entry.name!r} was to have a std of {entry.target_std:.4g} and has {entry.measured_std:.4g} in "
                f"{entry.dtype}: its dtype or its module cannot hold what {entry.scheme} draws. Leave it alone: "
                f"Rule({entry.name!r}, 'keep')"
            )


def _agreed(candidates: Sequence[Candidate], failure: Exception | None) -> list[Candidate]:
    """The candidates with what all ranks hold of them: the sum over shards, and else what rank 0 holds."""
    mine = [(one.evidence, one.shard.local.numel() if one.shard else 0) for one in candidates]
    ranks = gather_or_raise(mine, failure)
    if len(ranks) == 1 or any(len(theirs) != len(mine) for theirs in ranks):  # other models: said after drawing
        return with_empty_memory_marked(candidates)
    agreed = []
    for one, theirs in zip(candidates, zip(*ranks, strict=True), strict=True):
        evidence = theirs[0][0]
        if one.shard is not None and one.shard.is_sharded:
            parts = [part for part, _ in theirs if part is not None]
            evidence = functools.reduce(operator.add, parts) if parts else None
            copies = sum(held for _, held in theirs) / max(1, one.shard.full_shape.numel())
            evidence = evidence.divided_by(copies) if evidence and copies else evidence
        agreed.append(dataclasses.replace(one, evidence=evidence))
    return with_empty_memory_marked(agreed)


class _Prepared(NamedTuple):
    """What is known before anything is written."""

    plan: list[Assignment]
    tasks: list[DrawTask]
    signs: list[Finding]


def _prepare(
    model: nn.Module, candidates: Sequence[Candidate], request: Request, seed: int, trained: Trained, from_meta: bool
) -> _Prepared:
    """The plan, refused where it could not be carried out; its tasks; and signs of training among their parameters."""
    signs = [] if trained == "overwrite" or from_meta else signs_of_training(candidates, model)
    assignments = _decided(model, candidates, request)
    refuse_meta(assignments)
    if from_meta:
        refuse_uninitialised(assignments)
    return _Prepared(assignments, make_tasks(assignments, seed), signs)


def _decided(model: nn.Module, candidates: Sequence[Candidate], request: Request) -> list[Assignment]:
    """The plan; what training may have made of a parameter is not taken for its author's purpose."""
    assignments = decide(candidates, request)
    is_meant = any(one.left is Reason.SET_BY_AUTHOR for one in assignments)
    if is_meant and signs_of_training(candidates, model):
        return decide(candidates, request, was_trained=True)
    return assignments


def _without_trained(prepared: _Prepared, candidates: Iterable[Candidate], signs: Sequence[Finding]) -> _Prepared:
    """The plan without what was trained, and its tasks."""
    fresh = {one.site.forward_fqn.rpartition(".")[0] for one in candidates if is_as_reset(one)}
    plan = keep_trained(prepared.plan, signs, fresh)
    drawn = {assignment.name for assignment in plan if assignment.is_drawn}
    return _Prepared(plan, [task for task in prepared.tasks if task.assignment.name in drawn], prepared.signs)


def _remember_authors(candidates: Iterable[Candidate]) -> None:
    for candidate in candidates:
        if candidate.evidence is not None and candidate.shard is not None:
            site = candidate.site
            remember_author(site.module, site.attribute, candidate.shard.full_shape, candidate.evidence)


def _attempt(step: Callable[[], _Result], otherwise: _Result) -> tuple[_Result, Exception | None]:
    """The result of a step, or what it raised: the other ranks are told first, so that none waits for one that left."""
    try:
        return step(), None
    except Exception as error:
        return otherwise, error


def _entry(assignment: Assignment, expected: Expected | None, measured: Measured | None) -> Entry:
    """The report's line on one parameter."""
    parameter = assignment.site.parameter
    entry = Entry(
        name=assignment.name,
        module_type=assignment.module_type,
        shape=() if is_lazy(parameter) else tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        decided_by=assignment.decided_by,
        fans=assignment.fans,
        left=assignment.left,
        reason=assignment.reason,
        advice=assignment.advice,
    )
    if expected is None or measured is None:
        return entry
    if measured.is_refused:
        reason = f"parametrized: it cannot give what {assignment.scheme} draws, whose inverse is not finite"
        return dataclasses.replace(entry, left=Reason.PARAMETRIZED, reason=reason)
    tolerance = (SIGMAS * expected.sampling + ROUNDING) * expected.std + expected.rounding
    return dataclasses.replace(
        entry,
        scheme=assignment.scheme,
        gain=assignment.gain if assignment.fans else None,
        target_std=expected.std,
        measured_std=measured.std,
        tolerance=math.inf if measured.is_transformed else tolerance,
    )
