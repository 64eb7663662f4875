"""Models as drawn, after some steps without a Trainer, and as a Trainer finds them when training starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import Callback
from torch import nn

from tests.support.kinds import Build
from tests.support.models import DigitsModule, digits
from tests.support.trainers import make_trainer
from tests.support.weights import Weights, WeightsAtStart


def fresh(build: Build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def trained(
    model: nn.Module, steps: int, make_optimizer: Callable[..., torch.optim.Optimizer] | None = None
) -> nn.Module:
    """Real steps on real digits, 32 a batch; AdamW with a learning rate of 1e-3 unless said otherwise."""
    optimizer = (make_optimizer or partial(torch.optim.AdamW, lr=1e-3))(model.parameters())
    pixels, classes = digits()
    for step in range(steps):
        batch = slice(32 * step % 1600, 32 * step % 1600 + 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[batch]), classes[batch]).backward()
        optimizer.step()
    return model


def weights_at_start(model: DigitsModule, callback: Callback) -> Weights:
    """The weights that training starts from in a fit with this callback."""
    start = WeightsAtStart()
    make_trainer(callbacks=[callback, start], max_steps=1, limit_val_batches=0).fit(model)
    return start.at_start
