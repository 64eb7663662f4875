"""Fits that continue something: the callback keeps the weights.

Plain MLPs show no signs of training, so nothing but its own knowledge of the run can tell the callback.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from tests.support.lifecycle.setting import FailsOnce, Setting, assert_kept, new_callback
from tests.support.weights import assert_same, weights_of


def resume_from_a_path(setting: Setting) -> None:
    path, trained = setting.trained(new_callback())
    model = setting.model()
    setting.trainer(new_callback(), max_epochs=2).fit(model, ckpt_path=path)
    assert_kept(model.starts[0], trained)


def resume_from_a_file_that_knows_no_callback(setting: Setting) -> None:
    """The run was started before InitCallback was added to it."""
    path, trained = setting.trained()
    model = setting.model()
    setting.trainer(new_callback(), max_epochs=2).fit(model, ckpt_path=path)
    assert_kept(model.starts[0], trained)


def resume_from_a_file_without_callbacks(setting: Setting) -> None:
    """Then Lightning does not call on_load_checkpoint."""
    path, trained = setting.trained(new_callback())
    if setting.is_first_rank:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]
        torch.save(checkpoint, path)
    model, trainer = setting.model(), setting.trainer(new_callback(), max_epochs=2)
    trainer.strategy.barrier()
    trainer.fit(model, ckpt_path=path)
    assert_kept(model.starts[0], trained)


def resume_with_weights_only(setting: Setting) -> None:
    path, trained = setting.trained(new_callback())
    model = setting.model()
    setting.trainer(new_callback(), max_epochs=2).fit(model, ckpt_path=path, weights_only=True)
    assert_kept(model.starts[0], trained)


def resume_from_last(setting: Setting) -> None:
    def trainer(max_epochs: int) -> Trainer:
        checkpoints = setting.lightning.callbacks.ModelCheckpoint(setting.folder / "last", save_last=True)
        return setting.trainer(new_callback(), checkpoints, enable_checkpointing=True, max_epochs=max_epochs)

    first, second = setting.model(), setting.model()
    trainer(1).fit(first)
    trainer(2).fit(second, ckpt_path="last")
    assert_kept(second.starts[0], weights_of(first))


def resume_after_an_exception(setting: Setting) -> None:
    """OnExceptionCheckpoint makes Lightning resume by itself: fit gets no ckpt_path."""

    failure = FailsOnce()
    callbacks = [new_callback(), failure, setting.lightning.callbacks.OnExceptionCheckpoint(setting.folder)]
    with pytest.raises(ArithmeticError):
        setting.trainer(*callbacks, enable_checkpointing=True).fit(setting.model())
    model = setting.model()
    setting.trainer(*callbacks, enable_checkpointing=True).fit(model)
    assert failure.weights is not None
    assert_kept(model.starts[0], failure.weights)


def resume_by_slurm(setting: Setting) -> None:
    """A requeued job finds hpc_ckpt_*.ckpt: fit gets no ckpt_path."""
    _, trained = setting.trained(new_callback(), name="hpc_ckpt_1.ckpt")
    rank = os.environ.get("RANK", "0")
    os.environ.update(SLURM_JOB_ID="1", SLURM_JOB_NAME="train", SLURM_PROCID=rank)
    os.environ.update(SLURM_LOCALID=rank, SLURM_NODEID="0")
    world_size = str(dist.get_world_size() if dist.is_initialized() else 1)
    os.environ.update(SLURM_NTASKS=world_size, SLURM_NTASKS_PER_NODE=world_size)
    model = setting.model()
    setting.trainer(new_callback(), max_epochs=2).fit(model)
    assert_kept(model.starts[0], trained)


def second_fit(setting: Setting) -> None:
    model, trainer = setting.model(), setting.trainer(new_callback())
    trainer.fit(model)
    trained = weights_of(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert len(model.starts) == 2
    assert_kept(model.starts[1], trained)


def second_fit_in_a_new_trainer(setting: Setting) -> None:
    model, callback = setting.model(), new_callback()
    setting.trainer(callback).fit(model)
    trained = weights_of(model)
    setting.trainer(callback).fit(model)
    assert len(model.starts) == 2
    assert_kept(model.starts[1], trained)


def second_fit_with_a_checkpoint(setting: Setting) -> None:
    path, trained = setting.trained(new_callback())
    model, trainer = setting.model(), setting.trainer(new_callback(), max_epochs=2)
    trainer.fit(model)
    trainer.fit(model, ckpt_path=path)
    assert_kept(model.starts[-1], trained)


def third_fit_after_a_checkpoint(setting: Setting) -> None:
    """trainer.ckpt_path still names the file of the second fit."""
    path, _ = setting.trained(new_callback())
    model, trainer = setting.model(), setting.trainer(new_callback(), max_epochs=2)
    trainer.fit(model, ckpt_path=path)
    trained = weights_of(model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)
    assert_kept(model.starts[-1], trained)


def second_fit_with_a_copied_callback(setting: Setting) -> None:
    """Libraries copy the callbacks at every fit; the report is to be had from the one that the user holds."""
    model, callback = setting.model(), new_callback()
    setting.trainer(copy.deepcopy(callback)).fit(model)
    trained = weights_of(model)
    setting.trainer(copy.deepcopy(callback)).fit(model)
    assert_kept(model.starts[1], trained)
    assert callback.report is not None
    assert callback.report.drawn


def second_fit_with_other_arguments(setting: Setting) -> None:
    """Somebody who compares schemes on one module wants new weights each time."""
    model = setting.model()
    setting.trainer(new_callback()).fit(model)
    setting.trainer(new_callback(bias=0.5, trained="overwrite")).fit(model)
    biases = [value for name, value in model.starts[1].items() if name.endswith("bias")]
    assert biases
    assert all(bool((value == 0.5).all()) for value in biases)


def fit_after_validating_a_checkpoint_always(setting: Setting) -> None:
    path, trained = setting.trained(new_callback())
    model, trainer = setting.model(), setting.trainer(new_callback(when="always"))
    trainer.validate(model, ckpt_path=path, verbose=False)
    trainer.fit(model)
    assert_kept(model.starts[0], trained)


def fit_after_validating_a_checkpoint(setting: Setting) -> None:
    path, trained = setting.trained(new_callback())
    model, trainer = setting.model(), setting.trainer(new_callback())
    trainer.validate(model, ckpt_path=path, verbose=False)
    trainer.fit(model)
    assert_kept(model.starts[0], trained)


def fit_after_validating_a_file_that_knows_no_callback(setting: Setting) -> None:
    path, trained = setting.trained()
    model, trainer = setting.model(), setting.trainer(new_callback())
    trainer.validate(model, ckpt_path=path, verbose=False)
    trainer.fit(model)
    assert_kept(model.starts[0], trained)


def fit_after_an_exception(setting: Setting) -> None:
    """No checkpoint, the same module: what was learned so far stays."""

    model, failure, callback = setting.model(), FailsOnce(), new_callback()
    with pytest.raises(ArithmeticError):
        setting.trainer(callback, failure).fit(model)
    setting.trainer(callback, failure).fit(model)
    assert failure.weights is not None
    assert_kept(model.starts[-1], failure.weights)


def validate_and_test_only(setting: Setting) -> None:
    model = setting.model()
    model.test_step = model.validation_step
    model.test_dataloader = model.val_dataloader
    trainer = setting.trainer(new_callback(), limit_test_batches=1)
    trainer.validate(model, verbose=False)
    before = weights_of(model)
    trainer.test(model, verbose=False)
    trainer.validate(model, verbose=False)
    assert_same(weights_of(model), before)
