"""What the monitor asks of Lightning's training loop without a public name: one commented function a question."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer


def logging_interval(trainer: Trainer) -> int:
    """``log_every_n_steps``: public, but set where type checkers do not look."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def why_nothing_is_written(trainer: Trainer) -> str | None:
    """The reason why no logger will get anything; None if one will."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set where type checkers do not look
        return "of fast_dev_run"
    return None if trainer.loggers else "the Trainer has no logger"


def step_number(trainer: Trainer) -> int:
    """Batches that stepped so far, as LearningRateMonitor counts: ``global_step`` counts every optimizer."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def step_ends_with_this_batch(trainer: Trainer) -> bool:
    """Whether the optimizer steps after this micro-batch, the short last window of an epoch included."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def in_training_step(module: LightningModule) -> bool:
    """Whether ``training_step`` is what runs now, and not another callback, the summary or validation."""
    return module._current_fx_name == "training_step"


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
