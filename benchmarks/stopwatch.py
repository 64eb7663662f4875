"""Times single training steps of one ``fit``, watched and unwatched in turn.

Two runs, or two halves of one, differ by more than what is measured here, so neighbours are compared: steps go
watched, plain, plain, watched, and so on, and of every two the ratio is taken. What slows both cancels, and what
hits one of them, such as another process, is an outlier that the median leaves out.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.nets import Batches, Classifier

# At import, because ranks that are spawned import this too.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning.*")
warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
warnings.filterwarnings("error", message=".*has failed and is switched off")  # would be fast


class Watcher(Protocol):
    """Something that watches a network while it trains; neither ``start`` nor ``stop`` is timed."""

    @property
    def callbacks(self) -> list[Callback]:
        """Those that are in the Trainer's list while a step is watched."""

    def start(self, module: LightningModule) -> None:
        """The next step is watched."""

    def stop(self, module: LightningModule) -> None:
        """The next step is not watched."""


@dataclass
class Times:
    """Seconds of steps, neighbours at the same place."""

    watched: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median of watched over plain, neighbour by neighbour."""
        return statistics.median(a / b for a, b in zip(self.watched, self.plain, strict=True))

    @property
    def extra(self) -> float:
        """Median of watched minus plain, neighbour by neighbour, in seconds."""
        return statistics.median(a - b for a, b in zip(self.watched, self.plain, strict=True))

    def windows(self, length: int) -> Times:
        """The totals of every ``length`` pairs on end."""
        starts = range(0, len(self.watched) - length + 1, length)
        return Times(*([sum(row[i : i + length]) for i in starts] for row in (self.watched, self.plain)))


class Stopwatch(Callback):
    """The Trainer's last callback: from one of its ``on_train_batch_end`` to the next is one step.

    On a plain step the watcher's callbacks are not in the Trainer's list: plain means plain.

    Args:
        watcher: who watches.
        warm_up: steps before the clock counts, a multiple of four.
        results: a file for the times of rank zero, which may be another process than the caller's.
    """

    def __init__(self, watcher: Watcher, warm_up: int, results: Path) -> None:
        self.watcher = watcher
        self.warm_up = warm_up
        self.results = results
        self.times = Times()
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._start
        if batch_idx >= self.warm_up:
            (self.times.watched if is_watched(batch_idx) else self.times.plain).append(seconds)
        if is_watched(batch_idx):
            self.watcher.stop(pl_module)
        if batch_idx + 1 < trainer.num_training_batches:
            self._switch(trainer, pl_module, batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callbacks = [*self.watcher.callbacks, self]  # all get their teardown
        if trainer.is_global_zero:
            self.results.write_text(json.dumps(asdict(self.times)))

    def _switch(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        on_duty = [*self.watcher.callbacks, self] if is_watched(step) else [self]
        trainer.callbacks = on_duty  # a new list: the Trainer walks the present one
        if is_watched(step):
            self.watcher.start(module)
        self._start = time.perf_counter()


def is_watched(step: int) -> bool:
    """Watched, plain, plain, watched: neither always comes second."""
    return step % 4 in (0, 3)


def clock(
    module: Classifier,
    shape: tuple[int, ...],
    watcher: Watcher,
    *,
    pairs: int,
    folder: Path,
    interval: int = 1,
    ranks: int = 1,
) -> Times:
    """Fit ``module`` for twice ``pairs`` steps, after a warm-up; every other step is watched.

    Args:
        interval: watched steps from one logged step to the next.
        folder: for TensorBoard's files and the result.
    """
    every = interval if interval == 1 else 2 * interval  # the plain steps count too
    warm_up = max(12, -(-every // 4) * 4)  # also a logged step, and the ranks' first meeting
    stopwatch = Stopwatch(watcher, warm_up, folder / "times.json")
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_spawn" if ranks > 1 else "auto",
        max_epochs=1,
        log_every_n_steps=every,
        logger=TensorBoardLogger(folder),
        callbacks=[*watcher.callbacks, stopwatch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(shape, warm_up + 2 * pairs))
    return Times(**json.loads(stopwatch.results.read_text()))
