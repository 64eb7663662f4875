"""Weight averaging: the average starts from the initialised weights too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Callback, Trainer

from tests.support.lifecycle.setting import Setting, initialized, new_callback
from tests.support.weights import assert_same, weights_of


def average_before(setting: Setting) -> None:
    average_never_updated(setting, lambda average: [average, new_callback()])


def average_after(setting: Setting) -> None:
    average_never_updated(setting, lambda average: [new_callback(), average])


def average_never_updated(setting: Setting, order: Callable[[Callback], list[Callback]]) -> None:
    """At the end the average replaces the weights; not updated once, it has to be the initialised ones."""
    model = setting.model()
    setting.trainer(*order(setting.lightning.callbacks.EMAWeightAveraging(update_starting_at_step=1000))).fit(model)
    assert_same(model.starts[0], initialized())
    assert_same(weights_of(model), initialized())


def average_of_all_steps(setting: Setting) -> None:
    """One step, so the average is the model after it."""
    model, plain = setting.model(), setting.model()
    setting.trainer(setting.lightning.callbacks.WeightAveraging(), new_callback(), max_steps=1).fit(model)
    setting.trainer(new_callback(), max_steps=1).fit(plain)
    assert_same(weights_of(model), weights_of(plain))


def resumed_average(setting: Setting) -> None:
    """A checkpoint holds the average as the model, and the model beside it: training goes on from the latter."""

    def trainer(max_epochs: int) -> Trainer:
        checkpoints = setting.lightning.callbacks.ModelCheckpoint(setting.folder, save_last=True)
        callbacks = [new_callback(), setting.lightning.callbacks.EMAWeightAveraging(decay=0.5), checkpoints]
        return setting.trainer(*callbacks, enable_checkpointing=True, max_epochs=max_epochs)

    trainer(1).fit(setting.model())
    saved = torch.load(setting.folder / "last.ckpt", weights_only=True)["current_model_state"]
    model = setting.model()
    trainer(2).fit(model, ckpt_path=setting.folder / "last.ckpt")
    assert_same(model.starts[0], {name: saved[name] for name in model.starts[0]})
