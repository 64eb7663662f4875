"""Processes that Lightning starts itself: both callbacks are pickled into them, and the weights come back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_init import ActivationVarianceMonitor
from tests.support.lifecycle.setting import initialized, new_callback, small_mlp
from tests.support.models import DigitsModule
from tests.support.trainers import make_trainer
from tests.support.weights import assert_same, weights_of

pytestmark = pytest.mark.processes


class Spawned(NamedTuple):
    model: DigitsModule
    monitor: ActivationVarianceMonitor
    metrics: Path


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Spawned:
    """One fit for both callbacks, for each of its processes imports everything anew. It leaves the weights alone."""
    folder = tmp_path_factory.mktemp("spawned")
    monitor, logger = ActivationVarianceMonitor(1), CSVLogger(folder, name="spawned", version="one")
    model = DigitsModule(small_mlp, learning_rate=0.0)
    trainer = make_trainer(
        strategy="ddp_spawn",
        devices=2,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=0,
        callbacks=[new_callback(), monitor],
        logger=logger,
        default_root_dir=folder,
    )
    trainer.fit(model)
    return Spawned(model, monitor, folder / "spawned" / "one" / "metrics.csv")


def test_spawned_processes_initialise(spawned: Spawned) -> None:
    """Everything is pickled into new processes, and the weights come back from there."""
    assert_same(weights_of(spawned.model), initialized())


def test_spawned_processes(spawned: Spawned) -> None:
    """Values are written in there; the callback here has not got them."""
    rows = list(csv.DictReader(spawned.metrics.read_text().splitlines()))
    assert [row["step"] for row in rows if row["gradient_norm/total"]] == ["0", "1", "2"]
    assert all(float(row["activation_variance/network.0"]) > 0 for row in rows if row["gradient_norm/total"])
    assert spawned.monitor.latest == {}
