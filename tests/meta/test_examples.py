"""The demo as `make demo` runs it: the console script, two processes, both runs to the end, the table, the picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from examples import picture, table
from examples.digits import held_out_accuracy
from examples.runs import Run
from lightning_init import InitCLI

# Lightning 2.6 calls what jsonargparse 4 has renamed, also where it loads a checkpoint that its CLI has written.
pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
CONSOLE_SCRIPT = Path(sys.executable).with_name("lightning-init")
# Lightning leaves a port in the environment, and two fits at the same time need two.
LEFT_BY_OTHERS = ("PL_", "PYTHONPATH", "MASTER_", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK")
HIDDEN = [f"mlp.linear{number}" for number in range(1, 21)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the console script is started: not in the repository, whose runs/ belongs to its user."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "examples").symlink_to(ROOT / "examples")  # found because the working directory is on sys.path
    return folder


def start(folder: Path, name: str, *flags: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a fit of the demo by the console script; what it prints goes to the file."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_BY_OTHERS)}
    printed = folder / f"{name}.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(
            [CONSOLE_SCRIPT, "fit", "--config", f"{ROOT}/configs/digits.yaml", *flags],
            cwd=folder,
            env={**environment, "COLUMNS": "120"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, printed


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    """Both runs, at the same time: half of each is spent on imports and on waiting for one another."""
    started = {
        "torch_default": start(
            folder, "torch_default", "--init.scheme", "torch_default", "--trainer.logger.name", "torch_default"
        ),
        "he_normal": start(folder, "he_normal"),
    }
    try:
        for process, printed in started.values():
            assert process.wait() == 0, printed.read_text()
    finally:
        for process, _ in started.values():
            process.kill()
    printed_by_he = started["he_normal"][1].read_text()
    assert "Starting with 2 processes" in printed_by_he
    assert "he_normal, seed 1: 42 of 42 parameters drawn" in printed_by_he
    assert "Epoch 29/29" in printed_by_he  # the progress bar
    return {name: Run.read(folder / "runs/digits" / name) for name in started}


@pytest.fixture
def default(runs: dict[str, Run]) -> Run:
    return runs["torch_default"]


@pytest.fixture
def he(runs: dict[str, Run]) -> Run:
    return runs["he_normal"]


def at_first_step(run: Run, stat: str, layers: list[str]) -> list[float]:
    return [run.series(stat, layer)[0] for layer in layers]


def test_demo_learns_with_he_and_not_with_the_default(he: Run, default: Run) -> None:
    assert held_out_accuracy(he.checkpoint) > 0.95
    assert held_out_accuracy(default.checkpoint) < 0.30


def test_demo_with_he_keeps_signal_and_gradient_through_twenty_layers(he: Run) -> None:
    variance = at_first_step(he, "activation_variance", HIDDEN)
    gradient = at_first_step(he, "gradient_norm", HIDDEN)
    assert max(variance) / min(variance) < 10
    assert max(gradient) / min(gradient) < 10


def test_demo_with_the_default_loses_both(default: Run) -> None:
    signal = at_first_step(default, "signal_variance", HIDDEN)
    gradient = at_first_step(default, "gradient_norm", HIDDEN)
    assert signal[-1] / signal[0] < 1e-12  # (1/6)¹⁹ = 1.6e-15
    assert gradient[0] / gradient[-1] < 1e-5


def test_demo_logs_the_first_and_the_last_step(he: Run, default: Run) -> None:
    for run in (he, default):
        steps = list(run.scalars["gradient_norm/total"])
        assert (steps[0], steps[-1]) == (0, 689)


def test_demo_chart_has_every_layer(he: Run) -> None:
    relu = [f"mlp.relu{number}" for number in range(1, 21)]
    assert set(he.layers("activation_variance")) == {*HIDDEN, *relu, "mlp.head"}
    assert set(he.layers("gradient_norm")) == {*HIDDEN, "mlp.head"}
    assert set(he.layers("dead_units")) == set(relu)
    events = EventAccumulator(str(he.directory)).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart.multiline.tag[0] for category in layout.category for chart in category.chart]
    for stat, layers in (("activation_variance", [*HIDDEN, *relu]), ("gradient_norm", HIDDEN)):
        [chart] = [pattern for pattern in charts if re.match(pattern, f"{stat}/{layers[0]}")]
        assert all(re.match(chart, f"{stat}/{layer}") for layer in layers)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # ModelCheckpoint: no logger, other folder
def test_demo_config_tests_its_checkpoint(he: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-init"])
    config = he.directory / "config.yaml"
    assert yaml.safe_load(config.read_text())["init"]["init_args"]["scheme"] == "he_normal"
    one_process = ["--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"]
    cli = InitCLI(args=["test", f"--config={config}", f"--ckpt_path={he.checkpoint}", *one_process])
    assert cli.trainer.callback_metrics["test_accuracy"] == pytest.approx(held_out_accuracy(he.checkpoint))


def test_table_has_both_runs_side_by_side(he: Run, default: Run, capsys: pytest.CaptureFixture[str]) -> None:
    table.main([str(default.directory), str(he.directory)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    [last_hidden] = [line for line in lines if line.startswith("linear20 ")]
    assert len(last_hidden.split()) == 1 + 2 * len(table.COLUMNS)
    variance = he.series("activation_variance", HIDDEN[-1])
    assert table.cell(variance[0], variance[0]).plain in last_hidden.split()
    assert lines[-1].startswith("Every layer in one chart: tensorboard --logdir ")


def test_table_colors_depend_on_the_ratio_to_the_largest() -> None:
    assert [table.cell(value, 1.0).style for value in (1.0, 2e-3, 5e-4, 2e-6, 5e-7, 0.0)] == [
        *("green", "green", "yellow", "yellow", "red", "red")
    ]
    assert table.cell(0.0, 0.0).style == "red"


def test_picture_draws_every_layer(he: Run, default: Run, tmp_path: Path) -> None:
    figure = picture.picture([default, he], [0.1, 0.9])
    charts = [axes for axes in figure.axes if axes.get_lines()]
    assert len(charts) == 2 * len(picture.STATS)
    assert {len(axes.get_lines()) for axes in charts} == {21}
    picture.main([str(default.directory), str(he.directory), "--out", str(tmp_path / "picture.png")])
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width > 1000


def test_run_without_event_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no TensorBoard event file in .*; train first: make demo"):
        Run.read(tmp_path)
