"""Weights that show signs of training, what `trained=` says about them, and `when="always"`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_init import Rule
from tests.support.lifecycle.setting import Setting, assert_kept, initialized, new_callback, small_conv_net
from tests.support.models import conv_net
from tests.support.weights import assert_same, weights_of

wide_conv_net = partial(conv_net, 24)
REFUSAL = r"num_batches_tracked(.|\n)*keep"  # the evidence, and the rule to paste


def always_initialises_again(setting: Setting) -> None:
    model, trainer = setting.model(small_conv_net), setting.trainer(new_callback(when="always"))
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert len(model.starts) == 2
    for start in model.starts:
        assert_same(start, initialized(small_conv_net))


def checkpoint_wins_over_always(setting: Setting) -> None:
    """A job that is requeued with the same callback goes on where it was."""
    path, trained = setting.trained(new_callback(when="always"))
    model = setting.model()
    setting.trainer(new_callback(when="always", trained="overwrite"), max_epochs=2).fit(model, ckpt_path=path)
    assert_kept(model.starts[0], trained)


def trained_weights_are_overwritten(setting: Setting) -> None:
    model = setting.model(small_conv_net)
    setting.trainer().fit(model)
    setting.trainer(new_callback(trained="overwrite")).fit(model)
    assert_same(model.starts[-1], initialized(small_conv_net))


def trained_layers_are_kept_beside_a_new_head(setting: Setting) -> None:
    """What shows nothing itself is kept with its neighbours."""
    model = setting.model(wide_conv_net)
    setting.trainer().fit(model)
    trained = weights_of(model)
    callback = new_callback(trained="keep")
    torch.manual_seed(5)
    if setting.strategy != "single":  # a sharded head cannot be replaced by a whole one
        setting.trainer(callback).fit(model)
        assert_same(model.starts[-1], trained)
        return
    model.network[-1] = nn.Linear(24, 10)
    setting.trainer(callback).fit(model)
    start, drawn = model.starts[-1], initialized(wide_conv_net)
    head = [name for name in start if name.startswith(f"network.{len(model.network) - 1}.")]
    assert len(head) == 2
    assert_same({name: start[name] for name in head}, {name: drawn[name] for name in head})
    body = [name for name in start if name not in head]
    assert_same({name: start[name] for name in body}, {name: trained[name] for name in body})
    assert callback.report is not None
    kept = {entry.reason for entry in callback.report.left_alone}
    beside = {"trained: its neighbours show signs of training, kept"}
    assert kept | beside == {"trained: signs of training, kept", *beside}


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
    saved = {"save_weights_only": True, "filename": "weights"}
    checkpoints = setting.lightning.callbacks.ModelCheckpoint(setting.folder, **saved)
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
