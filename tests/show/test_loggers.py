"""What reaches the loggers."""

from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_init.show.loggers import StatisticsWriter
from tests.support.oracle import MemoryLogger

TAGS = {
    "activation_variance/a": 1.5,
    "activation_variance/b.0": 2.5,
    "gradient_norm/a": 1.0,
    "gradient_norm/total": float("nan"),
}


def test_tensorboard_gets_one_event_a_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    writer = StatisticsWriter([logger])
    writer.write(TAGS, 0)
    writer.write({"activation_variance/a": 3.0}, 50)
    writer.write({}, 100)
    logger.experiment.flush()
    (file,) = Path(logger.log_dir).glob("events.*")
    events = [event for event in LegacyEventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert [(event.step, len(event.summary.value)) for event in events] == [(0, 4), (50, 1)]
    accumulator = EventAccumulator(logger.log_dir).Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("activation_variance/a")] == [(0, 1.5), (50, 3.0)]
    assert accumulator.Scalars("gradient_norm/total")[0].value != accumulator.Scalars("gradient_norm/total")[0].value
    assert [path.name for path in Path(logger.log_dir).iterdir()] == [file.name]  # no run per tag


def test_charts_one_per_statistic(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    StatisticsWriter([logger]).write_layout(["activation_variance", "gradient_norm"])
    logger.experiment.flush()
    accumulator = EventAccumulator(logger.log_dir).Reload()
    (event,) = accumulator.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    shown = {
        (category.title, chart.title): {tag for tag in TAGS if re.match(chart.multiline.tag[0], tag)}
        for category in layout.category
        for chart in category.chart
    }
    assert shown == {
        ("Activation variance", "all layers"): {"activation_variance/a", "activation_variance/b.0"},
        ("Gradient norm", "all layers"): {"gradient_norm/a"},
        ("Gradient norm", "total"): {"gradient_norm/total"},
    }


def test_loggers_of_other_kinds_get_log_metrics(tmp_path: Path) -> None:
    memory, table = MemoryLogger(), CSVLogger(tmp_path)
    writer = StatisticsWriter([memory, table])
    writer.write_layout(["activation_variance"])
    writer.write(TAGS, 7)
    table.save()
    assert memory.steps[7]["activation_variance/b.0"] == 2.5
    (row,) = csv.DictReader((Path(table.log_dir) / "metrics.csv").read_text().splitlines())
    assert row["step"] == "7"
    assert float(row["activation_variance/b.0"]) == 2.5


def test_writer_of_the_user(tmp_path: Path) -> None:
    """A logger is told by its experiment, whatever its class."""
    from torch.utils.tensorboard import SummaryWriter

    class Own(MemoryLogger):
        experiment = SummaryWriter(str(tmp_path))

    own = Own()
    StatisticsWriter([own]).write({"activation_variance/a": torch.tensor(2.0).item()}, 1)
    own.experiment.close()
    assert own.steps == {}
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("activation_variance/a")[0].value == pytest.approx(2.0)


def test_step_of_an_event_has_only_its_numbers(tmp_path: Path) -> None:
    """The messages of one step serve the next: nothing of them may stay where the tags are others."""
    logger = TensorBoardLogger(tmp_path)
    writer = StatisticsWriter([logger])
    steps = [{"x/a": 1.0, "x/b": 2.0}, {"x/b": 4.0, "x/a": 3.0}, {"x/b": 5.0}, {"x/b": 6.0, "x/c": 7.0}]
    for step, tags in enumerate(steps):
        writer.write(tags, step)
    logger.experiment.flush()
    accumulator = EventAccumulator(logger.log_dir).Reload()
    for tag in ("x/a", "x/b", "x/c"):
        told = [(step, tags[tag]) for step, tags in enumerate(steps) if tag in tags]
        assert [(event.step, event.value) for event in accumulator.Scalars(tag)] == told


class PerSample(TensorBoardLogger):
    """Counts samples, not steps."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, 32 * (step or 0))


@pytest.mark.parametrize(
    ("build", "tag", "step"),
    [
        (partial(TensorBoardLogger, prefix="fold1"), "fold1-activation_variance/a", 2),
        (PerSample, "activation_variance/a", 64),
    ],
)
def test_loggers_that_name_tags_or_steps_themselves_do_so(build: Any, tag: str, step: int, tmp_path: Path) -> None:
    logger = build(tmp_path)
    StatisticsWriter([logger]).write(TAGS, 2)
    logger.experiment.flush()
    (event,) = EventAccumulator(logger.log_dir).Reload().Scalars(tag)
    assert (event.step, event.value) == (step, 1.5)
