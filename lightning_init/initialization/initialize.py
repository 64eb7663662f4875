"""The straight line from a model and a scheme to new weights and their report; works on any ``nn.Module``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_init.checks import check_integer
from lightning_init.initialization.draw import GENERIC_ROLE, Measured, matrix_of, stride_gain
from lightning_init.initialization.plan import Assignment, make_plan
from lightning_init.initialization.report import SIGMAS, Entry, InitReport
from lightning_init.initialization.rules import Request, Rule
from lightning_init.initialization.verify import agree
from lightning_init.initialization.write import summon_fsdp1_parameters, write_all
from lightning_init.schemes.distributions import Scheme
from lightning_init.schemes.structured import StructuredScheme

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


def carry_out(model: nn.Module, request: Request, seed: int) -> InitReport:
    """Plan, draw, write, compare between ranks, report."""
    check_integer("seed", seed)
    assignments: list[Assignment] = []
    measured: list[Measured] = []
    failure: Exception | None = None
    with summon_fsdp1_parameters(model):
        try:
            assignments = make_plan(model, request)
            _refuse_meta(assignments)
            measured = write_all(assignments, seed)
        except Exception as error:  # raised below, once every rank knows: nobody waits for a rank that has left
            failure = error
        totals = agree([assignment.name for assignment in assignments], measured, failure)
        entries = tuple(map(_entry, assignments, totals))
    return InitReport(request.text, seed, entries)


def _refuse_meta(assignments: Sequence[Assignment]) -> None:
    on_meta = [assignment.name for assignment in assignments if assignment.site.parameter.is_meta]
    if on_meta:
        raise ValueError(
            f"{len(on_meta)} parameters are on the meta device and hold no memory (the first: {on_meta[0]!r}): "
            "call model.to_empty(device=...) first, then initialise"
        )


def _entry(assignment: Assignment, measured: Measured) -> Entry:
    """The report's line on one parameter."""
    parameter = assignment.site.parameter
    entry = Entry(
        name=assignment.name,
        module_type=assignment.module_type,
        shape=() if is_lazy(parameter) else tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        decided_by=assignment.decided_by,
        fans=assignment.fans,
        reason=assignment.reason,
        advice=assignment.advice,
    )
    if not assignment.is_drawn:
        return entry
    target, tolerance = _target(assignment, measured)
    return dataclasses.replace(
        entry,
        scheme=assignment.scheme,
        gain=assignment.gain if assignment.fans else None,
        target_std=target,
        measured_std=measured.std,
        tolerance=tolerance,
    )


def _target(assignment: Assignment, measured: Measured) -> tuple[float, float]:
    """Target std over all slices, and how far the measured one may be off by sampling and rounding."""
    site = assignment.site
    count, shape = site.current.numel(), tuple(site.current.shape)
    chunk = (shape[0] // len(assignment.initializers), *shape[1:]) if shape else ()
    variance, rounding, error = 0.0, 0.0, 0.0
    eps = torch.finfo(site.parameter.dtype).eps
    for values in assignment.initializers:
        if isinstance(values, StructuredScheme):
            matrix = matrix_of(chunk, assignment.role or GENERIC_ROLE, site.parameter.is_complex())
            gain = assignment.gain * stride_gain(matrix, assignment.role or GENERIC_ROLE)
            std, relative = values.target_rms(matrix, gain), values.sampling_error(matrix)
            rounding = max(rounding, std * eps)  # equal elements are all rounded the same way
        else:
            std, relative = values.target_std, values.sampling_error(count)
            rounding = max(rounding, abs(values.target_mean) * eps)
        variance += std**2 / len(assignment.initializers)
        error = max(error, relative)
    target = math.sqrt(variance)
    tolerance = math.inf if measured.is_transformed else (SIGMAS * error + ROUNDING) * target + rounding
    return target, tolerance
