"""Fits that start something new: the callback initialises."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.support.lifecycle.setting import Setting, initialized, new_callback
from tests.support.weights import assert_differ, assert_same, weights_of


def first_fit(setting: Setting) -> None:
    model = setting.model()
    setting.trainer(new_callback()).fit(model)
    assert_same(model.starts[0], initialized())
    assert_differ(weights_of(model), initialized())  # and it trained


def last_without_a_checkpoint(setting: Setting) -> None:
    model = setting.model()
    checkpoints = setting.lightning.callbacks.ModelCheckpoint(setting.folder / "none", save_last=True)
    trainer = setting.trainer(new_callback(), checkpoints, enable_checkpointing=True)
    trainer.fit(model, ckpt_path="last")
    assert_same(model.starts[0], initialized())


def second_module(setting: Setting) -> None:
    callback = new_callback()
    setting.trainer(callback).fit(setting.model())
    model = setting.model()
    setting.trainer(callback).fit(model)
    assert_same(model.starts[0], initialized())


def another_module_after_a_checkpoint(setting: Setting) -> None:
    """FSDP2 strategies still show the path of the fit before at this point."""
    path, _ = setting.trained(new_callback())
    trainer = setting.trainer(new_callback(), max_epochs=2)
    trainer.fit(setting.model(), ckpt_path=path)
    trainer.fit_loop.max_epochs = 3
    model = setting.model()
    trainer.fit(model)
    assert_same(model.starts[0], initialized())


def fit_after_validating_fresh_weights(setting: Setting) -> None:
    model, trainer = setting.model(), setting.trainer(new_callback())
    trainer.validate(model, verbose=False)
    trainer.fit(model)
    assert_same(model.starts[0], initialized())


def fit_after_a_failed_start(setting: Setting) -> None:
    """Another callback fails in on_fit_start, the user repairs it and starts again."""

    class FailsToStart(Callback):
        failed = False

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not self.failed:
                self.failed = True
                raise ArithmeticError("neighbour")

    model, trainer = setting.model(), setting.trainer(new_callback(), FailsToStart())
    with pytest.raises(ArithmeticError):
        trainer.fit(model)
    trainer.fit(model)
    assert_same(model.starts[0], initialized())
