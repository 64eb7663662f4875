"""Faults to inject into the monitor: which function to break, and where the monitor then says it happened.

    monkeypatch.setattr(PACK.target, broken)       # in this process
    break_on_this_rank(PACK.target, from_call=1)   # in a rank that will end: the first call still succeeds

This is the only file of the tests that names internals by their path, so that moving one changes one line.
"""

from __future__ import annotations

import pkgutil
from typing import Any, NamedTuple, NoReturn

import pytest


class Fault(NamedTuple):
    """A function of the package by its path, and the words in which the monitor names the spot."""

    target: str
    where: str


def moments_of_layer(name: str) -> Fault:
    """The hook that measures the outputs of one layer."""
    return Fault("lightning_init.monitor.collector.moments_of", f"hook on layer '{name}'")


FIND_LAYERS = Fault("lightning_init.callbacks.monitor.find_layers", "finding the layers")
ATTACH = Fault("lightning_init.monitor.collector.ActivationCollector.attach", "on_train_batch_start")
MOMENTS_OF = moments_of_layer("network.0")
LOSS_SCALE = Fault("lightning_init.callbacks._lightning.loss_scale", "on_before_backward")
SUMS_OF_SQUARES = Fault("lightning_init.monitor.parameter_norms.sums_of_squares", "on_before_optimizer_step")
PACK_NORMS = Fault("lightning_init.monitor.parameter_norms.ParameterNorms.packed", "packing")
PACK = Fault("lightning_init.monitor.exchange.VectorLayout.pack", "packing")
STEP_RESULT = Fault("lightning_init.monitor.recorder.StepResult", "reading")
WRITE = Fault("lightning_init.show.loggers.StatisticsWriter.write", "writing")
AFTER_STEP = Fault("lightning_init.monitor.parameter_norms.ParameterNorms.after_step", "after the optimizer's step")


def broken(*args: Any, **kwargs: Any) -> NoReturn:
    """Takes the place of a function that fails."""
    raise RuntimeError("bad luck")


def break_on_this_rank(target: str, from_call: int) -> None:
    """Make a function of the package fail after ``from_call`` calls, for as long as this process lives."""
    calls = 0
    owner_name, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)

    def broken_later(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return broken() if calls > from_call else original(*args, **kwargs)

    pytest.MonkeyPatch().setattr(owner, name, broken_later)
