"""Fits under the monitor, for its tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_init import ActivationVarianceMonitor
from tests.support.models import digits
from tests.support.oracle import Batch, MemoryLogger
from tests.support.trainers import make_trainer


def batches(count: int, size: int = 16) -> list[Batch]:
    pixels, classes = digits()
    return [(pixels[i * size : (i + 1) * size], classes[i * size : (i + 1) * size]) for i in range(count)]


def fit(
    module: LightningModule,
    monitor: ActivationVarianceMonitor | None,
    *callbacks: Callback,
    max_epochs: int = 1,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """What the loggers got, by step."""
    memory = MemoryLogger()
    every = [*([monitor] if monitor else []), *callbacks]
    trainer = make_trainer(max_epochs=max_epochs, logger=memory, callbacks=every, **options)
    trainer.fit(module)
    return {
        step: watched
        for step, tags in memory.steps.items()
        if (watched := {tag: value for tag, value in tags.items() if "/" in tag})
    }


def hooks_of(module: nn.Module) -> list[Any]:
    """Those on the module, and those that are called after every module of the process."""
    everywhere = list(torch.nn.modules.module._global_forward_hooks.values())
    return [*everywhere, *(hook for m in module.modules() for hook in m._forward_hooks.values())]


class At(Callback):
    """Calls a function at one event."""

    def __init__(self, event: str, action: Callable[[LightningModule], Any]) -> None:
        setattr(self, event, lambda trainer, module, *args: action(module))
