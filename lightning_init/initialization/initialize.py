"""The straight line from a model and a scheme to new weights and their report: plan, guard, draw, write, compare."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_init.checks import check_integer
from lightning_init.distributed.ranks import is_first_rank
from lightning_init.findings import Finding
from lightning_init.initialization.advice import mostly_unknown
from lightning_init.initialization.calibration import Calibration
from lightning_init.initialization.copies import Copies, find_copies, merge_sources, refresh
from lightning_init.initialization.draw import DrawTask, Expected, Measured, make_tasks
from lightning_init.initialization.evidence import SIGMAS, remember_author
from lightning_init.initialization.frozen import frozen_twins, keep_twins, notes_on_twins, were_trained
from lightning_init.initialization.guard import (
    Trained,
    keep_trained,
    refuse_meta,
    refuse_trained,
    refuse_uninitialised,
)
from lightning_init.initialization.notes import note_on_calibration, notes_on_gains, notes_on_parts
from lightning_init.initialization.one_pass import agreed_factors, measured_factors, scale_weights, targets
from lightning_init.initialization.plan import Assignment, decide
from lightning_init.initialization.reasons import Reason
from lightning_init.initialization.report import Entry, InitReport
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.seeds import agreed_seed
from lightning_init.initialization.survey import (
    Candidate,
    WhySettled,
    check_model,
    is_doubtful,
    nothing_is_settled,
    survey,
    with_empty_memory_marked,
)
from lightning_init.initialization.training_signs import is_as_reset, signs_of_training
from lightning_init.initialization.verify import agree, gather_or_raise
from lightning_init.initialization.whole_model import heads_among
from lightning_init.initialization.write import summon_fsdp1_parameters, write_all
from lightning_init.introspect.module_order import trace_of_order
from lightning_init.introspect.probe import Look, call_with
from lightning_init.introspect.trace import Trace
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
    head: str | Scheme | None = None,
    strict: bool = False,
    seed: int | None = None,
    batch: object = None,
    calibrate: bool | Calibration = False,
) -> InitReport:
    """Draw new weights for a model, in place: the same seed gives the same weights on any number of devices.

    Weights of known module types get the scheme; biases the scheme's own (0; 1 for the LSTM's forget gate;
    PyTorch's for ``torch_default``); norms 1 and 0; lookup tables the scale their author gave them. What is not known,
    and what its author set on purpose, stays, and the report says so. The global random state is neither used nor
    changed. Where ``torch.distributed`` runs, every rank has to call this with the same arguments.

    Args:
        model: any module; its parameters may be DTensors (FSDP2, tensor parallel) or FSDP1's.
        scheme: a name of ``SCHEMES`` or a scheme object.
        rules: ahead of the scheme, the first that matches wins.
        activation: name of the nonlinearity that feeds the layers; its gain replaces the scheme's own. ``"auto"``: for
            each weight that of what feeds it, a custom function or a gate as well, found by calling the model with
            ``batch``; where it is not found, the scheme's own stays, and the report says so.
        bias: one value for every bias in place of the scheme's own.
        head: a scheme for the weights that give the model's outputs, such as ``"zeros"``.
        strict: an error, in place of a line in the report, if parameters are of a module type that is not known.
        seed: any integer; None: that of ``seed_everything``, else of ``torch.manual_seed``, else one drawn at random.
        batch: what the model is called with (a tuple: its arguments; a dictionary: its keyword arguments), to find what
            feeds each weight: where nothing nonlinear does, the gain is 1. Nothing is left behind. None: only
            ``nn.Sequential`` shows what feeds what.
        calibrate: scale the weights in one more call with ``batch``, so that what comes out of every layer has its
            target variance: True, the one that fits the depth, or a :class:`Calibration`.

    Returns:
        What was done to every parameter, with target and measured standard deviation.

    Raises:
        ValueError: an unknown name, a rule that matches nothing, a parameter on the meta device, ``calibrate`` without
            a batch.
        TypeError: an argument of the wrong type.
        RuntimeError: ranks disagree; names the first parameter that differs.

    >>> layer = nn.Linear(512, 256)
    >>> report = initialize(layer, "he_normal", seed=1)
    >>> abs(layer.weight.std().item() / (2 / 512) ** 0.5 - 1) < 0.02
    True
    """
    request = Request.of(scheme, rules, activation, bias, head, strict, calibrate)
    if request.calibration and batch is None:
        raise ValueError("calibrate measures what comes out of the layers: give a batch to call the model with")
    return carry_out(model, request, agreed_seed() if seed is None else seed, look=_look_at(model, batch))


def plan(
    model: nn.Module,
    scheme: str | Scheme = "he_normal",
    *,
    rules: Iterable[Rule] = (),
    activation: str | None = None,
    bias: float | None = None,
    head: str | Scheme | None = None,
    strict: bool = False,
    batch: object = None,
) -> list[Assignment]:
    """What :func:`initialize` would do to each parameter; touches nothing. Arguments and errors as there.

    >>> [(assignment.name, assignment.scheme) for assignment in plan(nn.Linear(2, 3))]
    [('weight', 'he_normal'), ('bias', 'zeros')]
    """
    request = Request.of(scheme, rules, activation, bias, head, strict)
    candidates = with_empty_memory_marked(survey(model, request))
    signs = signs_of_training(candidates, model) if is_doubtful(candidates) else []
    seen = _see(model, request, _look_at(model, batch))
    return decide(candidates, request, was_trained=bool(signs), trace=seen.trace)


def _look_at(model: nn.Module, batch: object) -> Callable[[], Look] | None:
    """How to call the model with a batch; None without one."""
    return None if batch is None else functools.partial(Look, model, [functools.partial(call_with, model, batch)])


def _nothing() -> None:
    """In place of another call, where there is no way to call."""


class _Seen(NamedTuple):
    """What one call has shown, and the way to call once more."""

    trace: Trace
    again: Callable[[], None] = _nothing


def _see(model: nn.Module, request: Request, make_look: Callable[[], Look] | None) -> _Seen:
    """What feeds the weights, where that matters: by one call, or else by the order of modules."""
    if not request.asks_for_trace:
        return _Seen(Trace())
    if make_look is None:
        return _Seen(Trace().or_else(trace_of_order(model)))
    look = make_look()
    return _Seen(look.trace().or_else(trace_of_order(model)), look.again)


def carry_out(
    model: nn.Module,
    request: Request,
    seed: int,
    *,
    trained: Trained = "overwrite",
    from_meta: bool = False,
    why_settled: WhySettled = nothing_is_settled,
    holders: Mapping[str, object] = MappingProxyType({}),
    look: Callable[[], Look] | None = None,
) -> InitReport:
    """Plan, guard, draw and write, compare between ranks, report.

    Args:
        model: as for :func:`initialize`.
        request: scheme, rules, gain and bias.
        seed: any integer.
        trained: what to do where weights show signs of training.
        from_meta: the model was on the meta device; nothing is read from its memory, and none of it may stay as it is.
        why_settled: says of a parameter why it has its weights already; "" if it has not.
        holders: what else may have copied weights, by what it is called: they get the new ones.
        look: gives the ways to call the model, to see what feeds the weights; None: by the order of modules only.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`initialize`, on all ranks before any has written.
    """
    check_model(model)
    check_integer("seed", seed)
    seed = int(seed)
    seen, look_failure = _attempt(functools.partial(_see, model, request, look), _Seen(Trace()))
    trace = seen.trace
    with summon_fsdp1_parameters(model):
        candidates, failure = _attempt(
            functools.partial(survey, model, request, is_uninitialised=from_meta, why_settled=why_settled),
            _NO_CANDIDATES,
        )
        candidates, trace = _agreed(candidates, trace, look_failure or failure)
        past = _Past.asked(model, candidates, trained) if not from_meta else _NO_PAST
        if trained == "refuse":
            refuse_trained(past.signs)
        prepare = functools.partial(_prepare, candidates, request, seed, past, trained == "keep", from_meta, trace)
        prepared, failure = _attempt(prepare, _Prepared([], []))
        to_draw = [task.assignment.site for task in prepared.tasks]
        copies, copies_failure = _attempt(functools.partial(find_copies, model, to_draw, holders), Copies({}, {}))
        copies = copies._replace(sources=merge_sources(gather_or_raise(copies.sources, failure or copies_failure)))
        measured, failure = _attempt(functools.partial(write_all, prepared.tasks), _NOTHING)
        totals = agree([task.assignment.name for task in prepared.tasks], measured, failure)
        _remember_authors(candidates)
        factors = _calibrate(prepared.plan, request, seen)
        drawn = {
            task.assignment.name: (task.expected(), total) for task, total in zip(prepared.tasks, totals, strict=True)
        }
        notes = refresh(copies, {site.stored_fqn: site.parameter for site in to_draw})
        entries = tuple(
            _scaled(_entry(one, *drawn.get(one.name, (None, None))), factors.get(one.name)) for one in prepared.plan
        )
    notes = [
        *([] if request.calibration is None else [note_on_calibration(factors, trace)]),
        *notes_on_gains(trace, prepared.plan, heads_among(candidates, trace), is_gain_traced=request.is_gain_traced),
        *notes_on_parts(prepared.plan),
        *notes_on_twins(prepared.plan, past.twins),
        *notes,
    ]
    _warn_if_mostly_unknown(prepared.plan)
    report = InitReport(request.text, seed, entries, tuple(notes))
    _refuse_absurd(report)
    return report


def _calibrate(plan: Sequence[Assignment], request: Request, seen: _Seen) -> dict[str, float]:
    """Scale the new weights on real data, if that was asked for; by name, the factors, the same on all ranks."""
    if request.calibration is None:
        return {}
    wanted = targets(plan, seen.trace, request.calibration)
    nothing: dict[str, float] = {}
    measured, failure = _attempt(functools.partial(measured_factors, plan, wanted, seen.again), nothing)
    factors = agreed_factors(gather_or_raise(measured, failure))
    scale_weights(plan, factors)
    return factors


def _scaled(entry: Entry, factor: float | None) -> Entry:
    """The report's line on a parameter that was calibrated."""
    if factor is None or entry.target_std is None or entry.measured_std is None:
        return entry
    return dataclasses.replace(
        entry,
        gain=None if entry.gain is None else entry.gain * factor,
        target_std=entry.target_std * factor,
        measured_std=entry.measured_std * factor,
        tolerance=entry.tolerance * factor,
    )


def _warn_if_mostly_unknown(plan: Sequence[Assignment]) -> None:
    """Say loudly, on the first rank, that a report which looks calm is about the smaller part of a model."""
    unknown: dict[str, int] = {}
    drawn = 0
    for one in plan:
        parameter = one.site.parameter
        if one.left is Reason.TYPE_UNKNOWN and parameter.ndim > 1:
            unknown[one.module_type] = unknown.get(one.module_type, 0) + parameter.numel()
        drawn += parameter.numel() if one.is_drawn and parameter.ndim > 1 else 0
    sentence = mostly_unknown(unknown, drawn)
    if sentence and is_first_rank():
        warnings.warn(sentence, stacklevel=3)


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


def _agreed(candidates: Sequence[Candidate], trace: Trace, failure: Exception | None) -> tuple[list[Candidate], Trace]:
    """The candidates with what all ranks hold of them: the sum over shards, and else what rank 0 holds; its trace."""
    mine = [(one.evidence, one.shard.local.numel() if one.shard else 0) for one in candidates]
    ranks, traces = zip(*gather_or_raise((mine, trace), failure), strict=True)
    if len(ranks) == 1 or any(len(theirs) != len(mine) for theirs in ranks):  # other models: said after drawing
        return with_empty_memory_marked(candidates), traces[0]
    agreed = []
    for one, theirs in zip(candidates, zip(*ranks, strict=True), strict=True):
        evidence = theirs[0][0]
        if one.shard is not None and one.shard.is_sharded:
            parts = [part for part, _ in theirs if part is not None]
            evidence = functools.reduce(operator.add, parts) if parts else None
            copies = sum(held for _, held in theirs) / max(1, one.shard.full_shape.numel())
            evidence = evidence.divided_by(copies) if evidence and copies else evidence
        agreed.append(dataclasses.replace(one, evidence=evidence))
    return with_empty_memory_marked(agreed), traces[0]


class _Past(NamedTuple):
    """What the values say of a model's past.

    Attributes:
        signs: of training.
        fresh: names of the layers that still hold what their module's own reset drew, where that is asked for.
        twins: names of parameters that equal a frozen one, with its name.
        is_body_trained: whether the frozen parameters show signs of training; asked only where there are twins.
    """

    signs: list[Finding]
    fresh: frozenset[str]
    twins: Mapping[str, str]
    is_body_trained: bool

    @classmethod
    def of(cls, model: nn.Module, candidates: Sequence[Candidate], asks_for_signs: bool, asks_for_fresh: bool) -> _Past:
        """As this rank's shards show it."""
        untouched = filter(is_as_reset, candidates if asks_for_fresh else ())
        fresh = frozenset(one.site.forward_fqn.rpartition(".")[0] for one in untouched)
        twins = frozen_twins(candidates)
        is_body_trained = bool(twins) and were_trained(candidates, model)
        others = [one for one in candidates if not (is_body_trained and one.site.stored_fqn in twins)]
        return cls(signs_of_training(others, model) if asks_for_signs else [], fresh, twins, is_body_trained)

    @classmethod
    def asked(cls, model: nn.Module, candidates: Sequence[Candidate], trained: Trained) -> _Past:
        """As far as ``trained`` makes it matter, as all ranks see it."""
        asks_for_signs = trained != "overwrite" or is_doubtful(candidates)
        ask = functools.partial(cls.of, model, candidates, asks_for_signs, trained == "keep")
        return cls.agreed(*_attempt(ask, _NO_PAST))

    @classmethod
    def agreed(cls, mine: _Past, failure: Exception | None) -> _Past:
        """As the shards of all ranks show it together."""
        ranks = gather_or_raise(mine, failure)
        twins = {name: of for name, of in ranks[0].twins.items() if all(name in one.twins for one in ranks)}
        return cls(
            [sign for one in ranks for sign in one.signs],
            frozenset().union(*(one.fresh for one in ranks)),
            twins,
            any(one.is_body_trained for one in ranks),
        )


_NO_PAST = _Past([], frozenset(), {}, is_body_trained=False)


class _Prepared(NamedTuple):
    """What will be done: the plan, and the tasks of what is drawn."""

    plan: list[Assignment]
    tasks: list[DrawTask]


def _prepare(
    candidates: Sequence[Candidate],
    request: Request,
    seed: int,
    past: _Past,
    is_trained_kept: bool,
    from_meta: bool,
    trace: Trace,
) -> _Prepared:
    """The plan, without what was trained if that is kept, and refused where it could not be carried out."""
    plan = decide(candidates, request, was_trained=bool(past.signs), trace=trace)
    if is_trained_kept and past.signs:
        plan = keep_trained(plan, past.signs, past.fresh)
    if past.is_body_trained:
        plan = keep_twins(plan, past.twins)
    refuse_meta(plan)
    if from_meta:
        refuse_uninitialised(plan)
    return _Prepared(plan, make_tasks(plan, seed))


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
