"""What a model of the zoo is: its author's code, what it learns from, and how its author would train it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A model, with the data and the optimizer of its author.

    Attributes:
        name: in the table; ``--models`` goes by it.
        kind: what its author did about the first weights, in a few words.
        build: the model as its author leaves it, drawn from torch's global generator.
        data: tensors of equal length: what there is to learn from.
        loss: of the model on a batch of those tensors.
        learning_rate: of the optimizer.
        steps: so many does one training take.
        batch_size: samples a step.
        optimizer: class of the optimizer, with PyTorch's settings but for the learning rate.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    data: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    learning_rate: float = 1e-3
    steps: int = 200
    batch_size: int = 32
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


def output_of(network: nn.Module, *inputs: Tensor) -> Tensor:
    """What a model computes; the logits, where it is one of ``transformers``."""
    output: Any = network(*inputs)
    return output if isinstance(output, Tensor) else output.logits


def classes_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the last tensor of the batch, given all others."""
    *inputs, classes = batch
    logits = output_of(network, *inputs)
    return F.cross_entropy(logits.flatten(0, -2), classes.flatten())


def squared_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error for the last tensor of the batch, given all others."""
    *inputs, targets = batch
    return F.mse_loss(output_of(network, *inputs), targets)


def next_word_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each word given those before it."""
    (words,) = batch
    return classes_loss(network, (words[:, :-1], words[:, 1:]))
