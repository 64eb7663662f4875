"""Weights that show signs of training, and `when="always"`."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_init import Rule
from tests.support.lifecycle.setting import Setting, initialized, new_callback, small_conv_net
from tests.support.weights import assert_same, weights_of

REFUSAL = r"num_batches_tracked(.|\n)*keep"  # the evidence, and the rule to paste


def always_initialises_again(setting: Setting) -> None:
    model, trainer = setting.model(small_conv_net), setting.trainer(new_callback(when="always"))
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert len(model.starts) == 2
    for start in model.starts:
        assert_same(start, initialized(small_conv_net))


def trained_weights_are_refused(setting: Setting) -> None:
    """Another callback object doesn't know the module, but batch norm remembers what it saw."""
    model = setting.model(small_conv_net)
    setting.trainer().fit(model)
    trained = weights_of(model)
    with pytest.raises(ValueError, match=REFUSAL):
        setting.trainer(new_callback()).fit(model)
    assert_same(weights_of(model), trained)


def weights_only_file_is_refused(setting: Setting) -> None:
    """Nothing tells a callback that validate loaded such a file; the weights themselves do."""
    model = setting.model(small_conv_net)
    checkpoints = ModelCheckpoint(setting.folder, save_weights_only=True, filename="weights")
    setting.trainer(checkpoints, enable_checkpointing=True).fit(model)
    trained = weights_of(model)
    model, trainer = setting.model(small_conv_net), setting.trainer(new_callback())
    trainer.validate(model, ckpt_path=setting.folder / "weights.ckpt", verbose=False)
    with pytest.raises(ValueError, match=REFUSAL):
        trainer.fit(model)
    assert_same(weights_of(model), trained)


def keep_rules_keep(setting: Setting) -> None:
    """What the refusal asks for."""
    model = setting.model(small_conv_net)
    setting.trainer().fit(model)
    trained = weights_of(model)
    setting.trainer(new_callback(rules=[Rule("*", "keep")])).fit(model)
    assert_same(model.starts[-1], trained)
