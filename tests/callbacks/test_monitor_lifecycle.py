"""Nothing stays behind, however a fit ends."""

from __future__ import annotations

import copy
import io
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_init import ActivationVarianceMonitor
from tests.support.faults import broken
from tests.support.models import MLP, DigitsMLP, digits
from tests.support.monitored_fits import At, fit, hooks_of
from tests.support.namespaces import Namespace, in_both_namespaces, lightning, module_class
from tests.support.oracle import MemoryLogger
from tests.support.trainers import make_trainer


def interrupt(module: LightningModule) -> None:
    raise KeyboardInterrupt


def terminate(module: LightningModule) -> None:
    signal.raise_signal(signal.SIGTERM)


def failing_step(module: LightningModule) -> None:
    def step(*args: Any) -> None:
        module.network(digits()[0][:4])
        raise RuntimeError("bad luck")

    module.training_step = step


@pytest.mark.parametrize(
    ("event", "action"),
    [
        ("on_fit_start", broken),
        ("on_fit_start", failing_step),
        ("on_train_batch_start", broken),
        ("on_before_backward", broken),
        ("on_before_optimizer_step", interrupt),
        ("on_train_batch_end", broken),
        ("on_train_batch_start", terminate),
        ("on_train_end", broken),
    ],
)
@pytest.mark.parametrize("neighbour_first", [True, False])
@in_both_namespaces
def test_hooks_are_removed_after_the_fit(
    event: str, action: Callable[[LightningModule], Any], neighbour_first: bool, namespace: Namespace
) -> None:
    module, monitor, neighbour = module_class(MLP, namespace)(), ActivationVarianceMonitor(1), At(event, action)
    callbacks = [neighbour, monitor] if neighbour_first else [monitor, neighbour]
    trainer = make_trainer(namespace, max_epochs=1, logger=MemoryLogger(), callbacks=callbacks)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(module)
    assert hooks_of(module) == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_hooks_exist_in_logged_batches_only() -> None:
    module, between = DigitsMLP(), []
    spy = At("on_train_batch_start", lambda m: between.append(len(hooks_of(m))))
    fit(module, ActivationVarianceMonitor(3), spy)
    assert between == [1, 0, 1, 0, 0, 1, 0, 0]
    assert hooks_of(module) == []


def test_epoch_that_ends_in_the_middle_of_a_batch() -> None:
    class Leaving(DigitsMLP):
        def on_train_batch_start(self, batch: Any, batch_index: int) -> int | None:
            return -1 if batch_index == 2 else None

    between: list[int] = []
    module = Leaving()
    spy = At("on_train_epoch_start", lambda m: between.append(len(hooks_of(m))))
    steps = fit(module, ActivationVarianceMonitor(1), spy, max_epochs=2)
    assert sorted(steps) == [0, 1, 2, 3]
    assert between == [0, 0]


def test_model_is_saved_and_copied_during_a_monitored_fit() -> None:
    saved: list[nn.Module] = []

    def save(module: LightningModule) -> None:
        assert hooks_of(module)
        buffer = io.BytesIO()
        torch.save(module.network, buffer)
        saved.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
        saved.append(copy.deepcopy(module.network))
        saved.append(pickle.loads(pickle.dumps(module.network)))

    module = DigitsMLP()
    before = copy.deepcopy(module.network)
    fit(module, ActivationVarianceMonitor(1), At("on_train_batch_start", save), max_steps=1)
    x = torch.randn(3, 64)
    assert len(saved) == 3
    assert all(torch.equal(twin(x), before(x)) for twin in saved)
    assert not any(m._forward_hooks for twin in saved for m in twin.modules())


def test_callback_pickles_and_copies_also_during_a_fit() -> None:
    twins: list[ActivationVarianceMonitor] = []
    monitor = ActivationVarianceMonitor(2, layers=["network.*"], stats=["default"])

    def twin(module: LightningModule) -> None:
        twins.extend([copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))])

    fit(DigitsMLP(), monitor, At("on_before_backward", twin), max_steps=1)
    for other in twins:
        assert (other.every_n_steps, other.layers, other.stats) == (2, ["network.*"], monitor.stats)
        fit(DigitsMLP(), other, max_steps=1)
        assert set(other.latest) == set(monitor.latest)


@in_both_namespaces
def test_interval_continues_when_resuming_and_starts_again_in_a_second_fit(
    namespace: Namespace, tmp_path: Path
) -> None:
    module = module_class(MLP, namespace)()
    trainer = make_trainer(namespace, max_steps=4, logger=MemoryLogger(), callbacks=[ActivationVarianceMonitor(3)])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    memory, monitor = MemoryLogger(), ActivationVarianceMonitor(3)
    trainer = make_trainer(namespace, max_steps=8, logger=memory, callbacks=[monitor])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        trainer.fit(module, ckpt_path=tmp_path / "four.ckpt")
    assert [step for step, tags in memory.steps.items() if "gradient_norm/total" in tags] == [4, 5]
    assert sorted(fit(module, monitor, namespace=namespace)) == [0, 2, 5]


@pytest.mark.parametrize("first", [True, False])
@in_both_namespaces
def test_finder_steps_before_the_fit_are_not_logged(first: bool, namespace: Namespace, tmp_path: Path) -> None:
    """It trains inside on_fit_start, then puts the weights back."""
    torch.manual_seed(0)
    module = module_class(MLP, namespace)(num_samples=128)
    alone = fit(copy.deepcopy(module), ActivationVarianceMonitor(2), namespace=namespace)
    finder = lightning(namespace).callbacks.LearningRateFinder(num_training_steps=6)
    monitor = ActivationVarianceMonitor(2)
    memory = MemoryLogger()
    callbacks = [monitor, finder] if first else [finder, monitor]
    options = {"max_epochs": 1, "default_root_dir": tmp_path}
    trainer = make_trainer(namespace, logger=memory, callbacks=callbacks, **options)
    trainer.fit(module)
    watched = [step for step, tags in memory.steps.items() if "gradient_norm/total" in tags]
    assert watched == [0, 1, 3]
    assert {tag: value for tag, value in memory.steps[0].items() if "/" in tag} == alone[0]
