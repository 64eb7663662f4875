"""What the callbacks need from Lightning that is not public, or public but hidden from type checkers.

One function each: first what both callbacks ask of a Trainer, then what initialisation needs around ``on_fit_start``,
then what the monitor needs of the training loop.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

_FROM_META = "lightning_init_from_meta"
"""Attribute of a user's module that says that parameters of it were on the meta device."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks; the attribute is public, but set where type checkers do not look."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def logging_interval(trainer: Trainer) -> int:
    """``log_every_n_steps``: public, but set where type checkers do not look."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def why_nothing_is_written(trainer: Trainer) -> str | None:
    """The reason why no logger will get anything; None if one will."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set where type checkers do not look
        return "of fast_dev_run"
    return None if trainer.loggers else "the Trainer has no logger"


def is_deepspeed(trainer: Trainer) -> bool:
    """Whether DeepSpeed runs the training."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def move_ahead_of_finders(trainer: Trainer, callback: Callback) -> None:
    """Make ``callback`` the first, if a learning rate or batch size finder is among the callbacks.

    A finder trains inside its own ``on_fit_start`` and then ends the fit: whatever stands behind it never runs.
    A new list is assigned, because the Trainer is walking through the present one.
    """
    others = [other for other in callbacks_of(trainer) if other is not callback]
    if any(isinstance(other, (LearningRateFinder, BatchSizeFinder)) for other in others):
        trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]


def restores_weights_before_fit_start(trainer: Trainer) -> bool:
    """Whether this fit has loaded a checkpoint by now.

    Strategies that restore later (FSDP2) leave ``ckpt_path`` empty on resume and stale afterwards: there the
    checkpoint overwrites whatever is drawn, so nothing needs to be known.
    """
    return bool(trainer.ckpt_path) and not trainer.strategy.restore_checkpoint_after_setup


def refresh_averages(trainer: Trainer, module: LightningModule) -> None:
    """Copy new weights into averages that have not averaged anything yet.

    ``WeightAveraging`` copies the model in ``setup``, ahead of ``on_fit_start``, and can write its copy back at
    the end of training. It keeps the copy in a private attribute.
    """
    for callback in callbacks_of(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and average is not None and int(average.n_averaged) == 0:
            for mine, new in zip(average.module.parameters(), module.parameters(), strict=True):
                mine.detach().copy_(new.detach())


def start_meta_watch(module: LightningModule) -> None:
    """Remember, on the module itself, whether Lightning gives memory to parameters that were made on the meta device.

    ``ModelParallelStrategy`` calls ``to_empty`` on the root module between ``configure_model`` and
    ``on_fit_start``, where no hook of a callback runs, and afterwards nothing tells fresh memory from weights.
    """
    module.to_empty = functools.partial(_to_empty_remembered, module)  # type: ignore[method-assign]


def end_meta_watch(module: LightningModule) -> bool:
    """End what :func:`start_meta_watch` began; whether parameters came from the meta device since."""
    module.__dict__.pop("to_empty", None)
    return bool(module.__dict__.pop(_FROM_META, False))


def _to_empty_remembered(module: LightningModule, *args: Any, **kwargs: Any) -> LightningModule:
    module.__dict__[_FROM_META] = any(parameter.is_meta for parameter in module.parameters())
    return type(module).to_empty(module, *args, **kwargs)


def in_training_step(module: LightningModule) -> bool:
    """Whether ``training_step`` is what runs now, and not another callback, the summary or validation."""
    return module._current_fx_name == "training_step"


def step_number(trainer: Trainer) -> int:
    """Batches that stepped so far, as LearningRateMonitor counts: ``global_step`` counts every optimizer."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def step_ends_with_this_batch(trainer: Trainer) -> bool:
    """Whether the optimizer steps after this micro-batch, the short last accumulation of an epoch included."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def data_parallel_size(trainer: Trainer) -> int:
    """Number of ranks whose losses are averaged: fewer than all ranks under tensor parallelism."""
    sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None)  # strategies of one device have none
    return int(sampler["num_replicas"]) if sampler else 1


def loss_scale(trainer: Trainer) -> Tensor | None:
    """What the gradient scaler multiplies the loss by now, float64 on its device; None without a scaler.

    Asked by scaling a one: ``get_scale`` would wait for the device.
    """
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    one = torch.ones((), dtype=torch.float32, device=trainer.strategy.root_device)
    scaled: Tensor = scaler.scale(one)
    return scaled.double()


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether gradients are still scaled before this optimizer's step (the fused ones), as Lightning asks."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
