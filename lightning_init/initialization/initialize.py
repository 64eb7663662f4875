"""The straight line from a model and a scheme to new weights and their report: plan, guard, draw, write, compare."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_init.checks import check_integer
from lightning_init.findings import Finding
from lightning_init.initialization.draw import DrawTask, Expected, Measured, make_tasks
from lightning_init.initialization.guard import refuse_meta, refuse_trained, refuse_uninitialised
from lightning_init.initialization.plan import Assignment, make_plan
from lightning_init.initialization.report import SIGMAS, Entry, InitReport
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.training_signs import signs_of_training
from lightning_init.initialization.verify import agree, gather_or_raise
from lightning_init.initialization.write import summon_fsdp1_parameters, write_all
from lightning_init.schemes.scheme import Scheme

_Result = TypeVar("_Result")
_NOTHING: list[Measured] = []

ROUNDING = 1e-4
"""Relative difference of a std that storing values in 16 bits explains."""


def initialize(
    model: nn.Module,
    scheme: str | Scheme = "he_normal",
    *,
    rules: Iterable[Rule] = (),
    activation: str | None = None,
    bias: float | None = None,
    seed: int = 0,
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
        seed: any integer.

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
    return carry_out(model, Request.of(scheme, rules, activation, bias), seed)


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
    return make_plan(model, Request.of(scheme, rules, activation, bias))


def carry_out(
    model: nn.Module, request: Request, seed: int, *, keep_trained: bool = False, from_meta: bool = False
) -> InitReport:
    """Plan, guard, draw and write, compare between ranks, report.

    Args:
        model: as for :func:`initialize`.
        request: scheme, rules, gain and bias.
        seed: any integer.
        keep_trained: refuse a model that shows signs of training.
        from_meta: the model was on the meta device; refuse to leave its uninitialised memory as it is.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`initialize`, on all ranks before any has written.
    """
    check_integer("seed", seed)
    prepare = functools.partial(_prepare, model, request, seed, keep_trained, from_meta)
    with summon_fsdp1_parameters(model):
        prepared, failure = _attempt(prepare, _Prepared([], [], []))
        refuse_trained(chain(*gather_or_raise(prepared.signs, failure)))
        measured, failure = _attempt(functools.partial(write_all, prepared.tasks), _NOTHING)
        totals = agree([task.assignment.name for task in prepared.tasks], measured, failure)
        drawn = {
            task.assignment.name: (task.expected(), total) for task, total in zip(prepared.tasks, totals, strict=True)
        }
        entries = tuple(_entry(assignment, *drawn.get(assignment.name, (None, None))) for assignment in prepared.plan)
    return InitReport(request.text, seed, entries)


class _Prepared(NamedTuple):
    """What is known before anything is written."""

    plan: list[Assignment]
    tasks: list[DrawTask]
    signs: list[Finding]


def _prepare(model: nn.Module, request: Request, seed: int, keep_trained: bool, from_meta: bool) -> _Prepared:
    """The plan, refused where it could not be carried out; its tasks; and signs of training among their parameters."""
    assignments = make_plan(model, request)
    refuse_meta(assignments)
    if from_meta:
        refuse_uninitialised(assignments)
    tasks = make_tasks(assignments, seed)
    return _Prepared(assignments, tasks, signs_of_training(tasks, model) if keep_trained else [])


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
    tolerance = (SIGMAS * expected.sampling + ROUNDING) * expected.std + expected.rounding
    return dataclasses.replace(
        entry,
        scheme=assignment.scheme,
        gain=assignment.gain if assignment.fans else None,
        target_std=expected.std,
        measured_std=measured.std,
        tolerance=math.inf if measured.is_transformed else tolerance,
    )
