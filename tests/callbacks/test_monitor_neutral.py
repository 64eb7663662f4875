"""Training is bit-identical with the monitor, also when the monitor breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_init import ActivationVarianceMonitor
from tests.support import faults
from tests.support.faults import (
    ATTACH,
    FIND_LAYERS,
    LOSS_SCALE,
    PACK,
    STEP_RESULT,
    SUMS_OF_SQUARES,
    WRITE,
    moments_of_layer,
)
from tests.support.models import LSTM, DigitsConvNet, DigitsTransformer
from tests.support.monitored_fits import fit, hooks_of
from tests.support.namespaces import LIGHTNING, PYTORCH_LIGHTNING, Namespace, in_both_namespaces, module_class


def no_change_module(kind: str, namespace: Namespace = LIGHTNING) -> Any:
    seed_everything(7, verbose=False)
    if kind == "conv":
        return DigitsConvNet(num_samples=96)
    if kind == "lstm":
        return module_class(LSTM, namespace)(num_samples=96, bidirectional=True)
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


@pytest.mark.parametrize(
    ("kind", "namespace"),
    [("conv", LIGHTNING), ("lstm", LIGHTNING), ("transformer", LIGHTNING), ("lstm", PYTORCH_LIGHTNING)],
)
def test_training_with_the_monitor_is_bit_identical(kind: str, namespace: Namespace) -> None:
    traces = []
    for monitor in (None, ActivationVarianceMonitor(1), ActivationVarianceMonitor(2)):
        trace = Trace()
        fit(no_change_module(kind, namespace), monitor, trace, max_epochs=2, namespace=namespace)
        traces.append(trace.seen)
    for other in traces[1:]:
        assert len(other) == len(traces[0])
        assert all(torch.equal(a, b) for a, b in zip(traces[0], other, strict=True))


@pytest.mark.parametrize(
    ("target", "where"),
    [FIND_LAYERS, ATTACH, moments_of_layer("network.lstm"), LOSS_SCALE, SUMS_OF_SQUARES, PACK, STEP_RESULT, WRITE],
)
@in_both_namespaces
def test_fault_is_warned_about_once_and_training_is_bit_identical(
    monkeypatch: pytest.MonkeyPatch, target: str, where: str, namespace: Namespace
) -> None:
    plain, broken = Trace(), Trace()
    fit(no_change_module("lstm", namespace), None, plain, namespace=namespace)
    module, monitor = no_change_module("lstm", namespace), ActivationVarianceMonitor(1)
    monkeypatch.setattr(target, faults.broken)
    with pytest.warns(
        UserWarning, match=f"switched off; training goes on. .*{where}: RuntimeError: bad luck"
    ) as caught:
        fit(module, monitor, broken, namespace=namespace)
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, broken.seen, strict=True))
    assert hooks_of(module) == []
