"""The callback in real fits of one process: what it takes, what it logs, and when."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_init import ActivationVarianceMonitor
from tests.support.models import MLP, DigitsMLP, mlp
from tests.support.monitored_fits import batches, fit, hooks_of
from tests.support.namespaces import Namespace, in_both_namespaces, lightning, module_class
from tests.support.oracle import BatchModule, MemoryLogger, assert_tags_close, expected_tags
from tests.support.trainers import make_trainer


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "5"])
def test_interval_must_be_a_whole_number_above_zero(interval: Any) -> None:
    with pytest.raises(
        ValueError, match="every_n_steps must be a whole number above 0, or None .* got " + repr(interval)
    ):
        ActivationVarianceMonitor(interval)


def test_statistic_of_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'activation_varience'; allowed: .*; did you mean 'activation_variance'"):
        ActivationVarianceMonitor(stats=["activation_varience"])


def test_stats_must_be_a_list() -> None:
    with pytest.raises(TypeError, match=r"layers must be a list of names, got 'network.0'; write \['network.0'\]"):
        ActivationVarianceMonitor(layers="network.0")
    with pytest.raises(TypeError, match="stats must be a list of names, got 'default'"):
        ActivationVarianceMonitor(stats="default")


def test_glob_that_matches_no_layer_stops_the_fit() -> None:
    module = DigitsMLP()
    with pytest.raises(ValueError, match=r"layers: 'netwrk\.\*' matches no layer.*network\.0"):
        fit(module, ActivationVarianceMonitor(layers=["netwrk.*"]))
    assert hooks_of(module) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"logger": False}, "the Trainer has no logger"), ({"fast_dev_run": True}, "of fast_dev_run")],
)
@in_both_namespaces
def test_logger_may_be_missing(options: dict[str, Any], reason: str, namespace: Namespace) -> None:
    monitor = ActivationVarianceMonitor(1)
    trainer = make_trainer(namespace, max_steps=2, callbacks=[monitor], **options)
    with pytest.warns(UserWarning, match=f"only fills its .latest, because {reason}"):
        trainer.fit(module_class(MLP, namespace)())
    assert monitor.latest["gradient_norm/total"] > 0


def test_interval_of_the_trainer_that_logs_nothing() -> None:
    monitor = ActivationVarianceMonitor()
    with pytest.warns(UserWarning, match="is off, because the Trainer's log_every_n_steps is 0"):
        assert fit(DigitsMLP(), monitor, max_steps=2, log_every_n_steps=0) == {}
    assert monitor.latest == {}


def test_logged_numbers_equal_the_oracle_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    network = mlp(32, 3)
    slow = copy.deepcopy(network).double()
    steps = fit(BatchModule(network, batches(4)), monitor := ActivationVarianceMonitor(2))
    assert sorted(steps) == [0, 1, 3]
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches(4)):
        expected = expected_tags(slow, [[(x.double(), y)]], accumulation=1, rectifiers=["1", "3", "5"])
        if step in steps:
            assert_tags_close(steps[step], expected)
        optimizer.step()
    assert monitor.latest == steps[3]


@pytest.mark.parametrize(
    ("every", "options", "logged"),
    [
        (3, {}, [0, 2, 5]),
        (None, {"log_every_n_steps": 4}, [0, 3, 7]),
        (None, {}, [0]),
        (2, {"accumulate_grad_batches": 3}, [0, 1]),  # 8 batches: steps of 3, 3 and 2
        (3, {"max_epochs": 2, "limit_train_batches": 4}, [0, 2, 5]),
    ],
)
def test_interval_logs_every_nth_step(every: int | None, options: dict[str, Any], logged: list[int]) -> None:
    assert sorted(fit(DigitsMLP(), ActivationVarianceMonitor(every), **options)) == logged


def test_layers_and_stats_are_chosen() -> None:
    monitor = ActivationVarianceMonitor(layers=["*.1", "network.2"], stats=["dead_units", "activation_variance"])
    (tags,) = fit(DigitsMLP(), monitor, max_steps=1).values()
    layers = ("network.1", "network.2")
    assert list(tags) == ["dead_units/network.1", *(f"activation_variance/{layer}" for layer in layers)]


@in_both_namespaces
def test_loggers_write_to_disk(namespace: Namespace, tmp_path: Path) -> None:
    kinds = lightning(namespace).loggers
    loggers = [kinds.TensorBoardLogger(tmp_path, name="tb"), kinds.CSVLogger(tmp_path, name="csv")]
    monitor = ActivationVarianceMonitor(2)
    make_trainer(namespace, max_steps=3, logger=loggers, callbacks=[monitor]).fit(module_class(MLP, namespace)())
    accumulator = EventAccumulator(loggers[0].log_dir).Reload()
    for tag, value in monitor.latest.items():
        assert [event.step for event in accumulator.Scalars(tag)] == [0, 1]
        assert accumulator.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6)
    assert "custom_scalars__config__" in accumulator.Tags()["tensors"]
    rows = list(csv.DictReader((tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    written = [row for row in rows if row["activation_variance/network.0"]]
    assert [row["step"] for row in written] == ["0", "1"]
    assert float(written[-1]["gradient_norm/total"]) == monitor.latest["gradient_norm/total"]


@in_both_namespaces
def test_aggregates_are_callback_metrics(namespace: Namespace, tmp_path: Path) -> None:
    """EarlyStopping and ModelCheckpoint find them, and they are what the tags say."""
    monitor, others = ActivationVarianceMonitor(1), lightning(namespace).callbacks
    stopping = others.EarlyStopping("gradient_norm/total", stopping_threshold=1e9, check_on_train_epoch_end=True)
    checkpoint = others.ModelCheckpoint(tmp_path, monitor="activation_variance/min", save_on_train_epoch_end=True)
    callbacks = [monitor, stopping, checkpoint]
    options = {"max_epochs": 3, "enable_checkpointing": True}
    trainer = make_trainer(namespace, logger=MemoryLogger(), callbacks=callbacks, **options)
    trainer.fit(module_class(MLP, namespace)(num_samples=64))
    assert trainer.current_epoch == 1  # the threshold is met at once
    variances = [v for tag, v in monitor.latest.items() if tag.startswith("activation_variance/")]
    assert trainer.callback_metrics["activation_variance/max"].item() == pytest.approx(max(variances))
    assert checkpoint.best_model_score is not None
    assert checkpoint.best_model_score.item() == pytest.approx(min(variances))
    assert trainer.callback_metrics["gradient_norm/total"].item() == pytest.approx(
        monitor.latest["gradient_norm/total"]
    )


@in_both_namespaces
def test_several_monitors_in_one_trainer(namespace: Namespace) -> None:
    """Lightning refuses two callbacks of one class if it takes them for some that have a state to save."""
    monitors = [ActivationVarianceMonitor(1, layers=[f"network.{index}"]) for index in (0, 2)]
    assert make_trainer(namespace, callbacks=monitors).callbacks == monitors


def test_layers_never_called_are_named_once() -> None:
    class Idle(DigitsMLP):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.spare = nn.Linear(2, 2), nn.Tanh()

    with pytest.warns(UserWarning, match="saw no output of these layers") as caught:
        fit(Idle(), ActivationVarianceMonitor(1), max_steps=3)
    (warning,) = [w for w in caught if "saw no output" in str(w.message)]
    assert str(warning.message).endswith("nested or complex): 'idle', 'spare'.")
