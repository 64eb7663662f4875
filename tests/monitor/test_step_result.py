"""Summed moments become the numbers that are shown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_init import LayerStats
from lightning_init.introspect.activations import ActivationTraits
from lightning_init.introspect.layers import Layer
from lightning_init.monitor.exchange import SecondPass, VectorLayout
from lightning_init.monitor.moments import merge, moments_of
from lightning_init.monitor.parameter_norms import ParameterNorms
from lightning_init.monitor.record import LayerRecord
from lightning_init.monitor.statistics import DEFAULT_STATS
from lightning_init.monitor.step_result import StepResult
from tests.support.recording import slots_of

CPU = torch.device("cpu")
NO_NORMS = [0.0, 0.0]


def read(records: dict[str, LayerRecord], *, norms: list[float] = NO_NORMS, owners: int = 0) -> LayerStats:
    """As one process does it; ``norms`` are packed norms of others, and of layers "a", "b", "c", … of one parameter."""
    layers = [Layer("abc"[i], nn.Identity(), None, (nn.Parameter(torch.ones(1)),)) for i in range(owners)]
    who = ParameterNorms(layers, ["gradient_norm"])
    layout = VectorLayout(slots_of(records), who.size, CPU)
    total = layout.pack(records, norms, [0.0, 0.0])
    reading = StepResult(total, layout, SecondPass(DEFAULT_STATS, layout, records), who)
    assert reading.flags == [0.0, 0.0]
    shown = {name: Layer(name, nn.Identity(), None, ()) for name in layout.layers}
    shown["relu"] = Layer("relu", nn.ReLU(), ActivationTraits(True), ())
    shown["tanh"] = Layer("tanh", nn.Tanh(), ActivationTraits(False, -1.0, 1.0), ())
    return reading.stats(DEFAULT_STATS, shown)


def test_variances_of_a_layer_with_two_widths() -> None:
    """Pooled over all elements; the signal's is the mean over all units of both widths."""
    torch.manual_seed(0)
    wide, narrow = torch.randn(20, 6).relu() + 3, torch.randn(7, 2).relu()
    wide[:, 1] = narrow[:, 0] = 0.0
    record = LayerRecord({6: moments_of(wide, 1), 2: moments_of(narrow, 1)})
    values = read({"relu": record}).values
    everything = torch.cat((wide.flatten(), narrow.flatten())).double()
    signal = torch.cat((wide.double().var(0, correction=0), narrow.double().var(0, correction=0)))
    assert values["activation_variance"]["relu"] == pytest.approx(everything.var(correction=0).item(), rel=1e-12)
    assert values["signal_variance"]["relu"] == pytest.approx(signal.mean().item(), rel=1e-12)
    assert values["dead_units"] == {"relu": 2 / 8}
    assert values["gradient_variance"] == values["gradient_norm"] == {}


def test_dead_units_are_never_positive() -> None:
    first = moments_of(torch.tensor([[0.0, 0.0, 1e-30], [0.0, 1e-38, 0.0]]), 1)
    assert read({"relu": LayerRecord({3: first})}).values["dead_units"]["relu"] == 1 / 3
    later = merge(first, moments_of(torch.tensor([[5.0, 0.0, 0.0]]), 1))
    assert read({"relu": LayerRecord({3: later})}).values["dead_units"]["relu"] == 0.0
    assert read({"tanh": LayerRecord({3: first})}).values["dead_units"] == {}


def test_unmeasured_statistics_are_absent() -> None:
    """A width without elements among others, and a layer without any: no value, and no harm to the others."""
    nothing, gradients = moments_of(torch.empty(0, 4), 1), moments_of(torch.tensor([1.0, 3.0]))
    records = {
        "expert": LayerRecord({4: nothing}),
        "relu": LayerRecord({4: nothing, 1: moments_of(torch.tensor([[1.0], [2.0]]), 1)}, gradients),
    }
    values = read(records).values
    assert values["activation_variance"] == values["signal_variance"] == {"relu": 0.25}
    assert values["dead_units"] == {"relu": 0.0}
    assert values["gradient_variance"] == {"relu": 1.0}


def test_norms_are_roots_in_execution_order() -> None:
    one = LayerRecord({1: moments_of(torch.ones(1, 1), 1)})
    norms = [0.0, 16.0, 9.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    values = read({"b": one, "a": one}, norms=norms, owners=3).values
    assert list(values["gradient_norm"].items()) == [("b", 3.0), ("a", 4.0), ("total", 5.0)]


def test_variance_is_never_negative_by_rounding() -> None:
    constant = torch.full((1000, 3), 0.1)
    values = read({"a": LayerRecord({3: moments_of(constant, 1)}, moments_of(constant))}).values
    for stat in ("activation_variance", "signal_variance", "gradient_variance"):
        assert 0 <= values[stat]["a"] < 1e-15
