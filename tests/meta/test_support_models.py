"""The models the other tests rely on: deterministic, and they learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.support.models import (
    DigitsConvNet,
    DigitsLSTM,
    DigitsMLP,
    DigitsModule,
    DigitsTransformer,
    LateModule,
    digits,
    mlp,
)
from tests.support.trainers import make_trainer


def test_digits_are_standardised() -> None:
    pixels, classes = digits()
    assert pixels.shape == (1797, 64)
    assert classes.unique().tolist() == list(range(10))
    assert abs(pixels.mean().item()) < 1e-6
    assert pixels.var().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [DigitsMLP, DigitsConvNet, DigitsLSTM, DigitsTransformer, partial(LateModule, mlp)],
    ids=["mlp", "conv", "lstm", "transformer", "late"],
)
def test_models_lower_the_loss_and_repeat(build: Callable[..., DigitsModule]) -> None:
    def train() -> tuple[DigitsModule, float, float]:
        torch.manual_seed(0)
        model = build(learning_rate=1e-2)
        losses = []
        for max_epochs in (1, 4):
            trainer = make_trainer(max_epochs=max_epochs, limit_val_batches=0)
            trainer.fit(model)
            losses.append(trainer.callback_metrics["train_loss"].item())
        return model, losses[0], losses[1]

    first, early, late = train()
    assert late < 0.9 * early
    second, *_ = train()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
