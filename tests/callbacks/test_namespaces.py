"""Lightning under its two names: its classes are found under both, and the monitor's numbers are the same."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lightning_init import ActivationVarianceMonitor, InitCallback
from lightning_init.callbacks._lightning import classes
from tests.support.models import LSTM, MLP
from tests.support.monitored_fits import fit
from tests.support.namespaces import (
    LIGHTNING,
    NAMESPACES,
    PYTORCH_LIGHTNING,
    Namespace,
    in_both_namespaces,
    lightning,
    module_class,
)
from tests.support.trainers import make_trainer


def test_classes_are_those_of_every_name_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = [lightning(namespace).strategies.DeepSpeedStrategy for namespace in NAMESPACES]
    assert strategies[0] is not strategies[1]
    assert classes("strategies", "DeepSpeedStrategy") == tuple(strategies)
    monkeypatch.delitem(sys.modules, f"{PYTORCH_LIGHTNING}.strategies")
    assert classes("strategies", "DeepSpeedStrategy") == (strategies[0],)
    assert f"{PYTORCH_LIGHTNING}.strategies" not in sys.modules


@in_both_namespaces
def test_batch_of_a_combined_loader_is_looked_at(namespace: Namespace) -> None:
    class OfTwoLoaders(LSTM):
        def train_dataloader(self) -> Any:
            loaders = [super(OfTwoLoaders, self).train_dataloader() for _ in range(2)]
            return lightning(namespace).utilities.CombinedLoader(loaders)

        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            return super().training_step(batch[0], batch_index) + super().training_step(batch[1], batch_index)

    callback = InitCallback("lecun_normal", head="zeros")  # without a look, no head is found
    make_trainer(namespace, max_steps=1, callbacks=[callback]).fit(module_class(OfTwoLoaders, namespace)())
    assert callback.report is not None
    assert [entry.name for entry in callback.report.drawn if entry.decided_by == "head"] == ["network.head.weight"]


def logged(namespace: Namespace, options: dict[str, Any]) -> dict[int, dict[str, float]]:
    torch.manual_seed(3)
    module, monitor = module_class(MLP, namespace)(), ActivationVarianceMonitor(2)
    if options.pop("loss_is_scaled", False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        plugin = lightning(namespace).plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)  # what CUDA does, as far as a CPU can
        options["plugins"] = [plugin]
    return fit(module, monitor, namespace=namespace, **options)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"loss_is_scaled": True}], ids=str)
def test_monitor_logs_the_same_numbers_under_either_name(options: dict[str, Any]) -> None:
    steps = logged(LIGHTNING, dict(options))
    assert 0 in steps
    assert logged(PYTORCH_LIGHTNING, dict(options)) == steps
