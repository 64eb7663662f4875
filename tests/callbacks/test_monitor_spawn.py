"""Processes that Lightning starts itself: the callback is pickled into them."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from lightning_init import ActivationVarianceMonitor
from tests.support.models import DigitsMLP
from tests.support.trainers import make_trainer


def test_spawned_processes(tmp_path: Path) -> None:
    """Values are written in there; the callback here has not seen them."""
    monitor, logger = ActivationVarianceMonitor(1), CSVLogger(tmp_path, name="spawned", version="one")
    trainer = make_trainer(
        strategy="ddp_spawn",
        devices=2,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=0,
        callbacks=[monitor],
        logger=logger,
    )
    trainer.fit(DigitsMLP())
    rows = list(csv.DictReader((tmp_path / "spawned" / "one" / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["gradient_norm/total"]] == ["0", "1", "2"]
    assert all(float(row["activation_variance/network.0"]) > 0 for row in rows if row["gradient_norm/total"])
    assert monitor.latest == {}
