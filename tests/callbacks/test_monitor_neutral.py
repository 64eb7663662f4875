"""Training is bit-identical with the monitor, also when the monitor breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_init import ActivationVarianceMonitor
from tests.support.models import DigitsConvNet, DigitsLSTM, DigitsTransformer
from tests.support.monitored_fits import fit, hooks_of, raise_runtime_error


def no_change_module(kind: str) -> LightningModule:
    seed_everything(7, verbose=False)
    if kind == "conv":
        return DigitsConvNet(num_samples=96)
    if kind == "lstm":
        return DigitsLSTM(num_samples=96, bidirectional=True)
    return DigitsTransformer(num_samples=96, dropout=0.1)


class Trace(Callback):
    """Everything that could differ: losses, gradients, weights, batches, random state."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        state = {**module.state_dict()}
        self.seen += [outputs["loss"], batch[0], torch.get_rng_state(), *(t.clone() for t in state.values())]


@pytest.mark.parametrize("kind", ["conv", "lstm", "transformer"])
def test_training_is_bit_identical(kind: str) -> None:
    traces = []
    for monitor in (None, ActivationVarianceMonitor(1), ActivationVarianceMonitor(2)):
        trace = Trace()
        fit(no_change_module(kind), monitor, trace, max_epochs=2)
        traces.append(trace.seen)
    for other in traces[1:]:
        assert len(other) == len(traces[0])
        assert all(torch.equal(a, b) for a, b in zip(traces[0], other, strict=True))


@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("lightning_init.callbacks.monitor.find_layers", "finding the layers"),
        ("lightning_init.monitor.collector.ActivationCollector.attach", "on_train_batch_start"),
        ("lightning_init.monitor.collector.moments_of", "hook on layer 'network.0'"),
        ("lightning_init.callbacks._lightning.loss_scale", "on_before_backward"),
        ("lightning_init.monitor.parameter_norms.sums_of_squares", "on_before_optimizer_step"),
        ("lightning_init.monitor.exchange.VectorLayout.pack", "packing"),
        ("lightning_init.monitor.recorder.StepResult", "reading"),
        ("lightning_init.show.loggers.StatisticsWriter.write", "writing"),
    ],
)
def test_a_fault_is_said_once_and_training_ends_as_without(
    monkeypatch: pytest.MonkeyPatch, target: str, where: str
) -> None:
    plain, broken = Trace(), Trace()
    fit(no_change_module("lstm"), None, plain)
    module, monitor = no_change_module("lstm"), ActivationVarianceMonitor(1)
    monkeypatch.setattr(target, raise_runtime_error)
    where = where.replace("network.0", "network.lstm")
    with pytest.warns(
        UserWarning, match=f"switched off; training goes on. .*{where}: RuntimeError: bad luck"
    ) as caught:
        fit(module, monitor, broken)
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, broken.seen, strict=True))
    assert hooks_of(module) == []
