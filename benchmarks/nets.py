"""What is trained while the clock runs: networks at the sizes people watch, on one random batch again and again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network, its name in the table and the shape of the batches it takes."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def mlp(width: int, depth: int) -> nn.Module:
    """``depth`` hidden layers of ``width`` ReLU units."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def conv_net(width: int, depth: int) -> nn.Module:
    """``depth`` 3×3 convolutions of ``width`` channels with batch norm and ReLU, then global average pooling."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise([3, *[width] * depth]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Encoder(nn.Module):
    """``depth`` transformer encoder layers, then the mean over positions. No dropout: it costs the plain step too."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)  # which only warns
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


CASES = [
    Case("MLP 20×512", lambda: mlp(512, 20), (256, 512)),
    Case("conv net 9×32", lambda: conv_net(32, 9), (16, 3, 32, 32)),
    Case("transformer 6×256", lambda: Encoder(256, 6), (8, 128, 256)),
]
TINY_CASES = [
    Case("MLP 2×8", lambda: mlp(8, 2), (4, 8)),
    Case("conv net 2×4", lambda: conv_net(4, 2), (2, 3, 8, 8)),
    Case("transformer 1×8", lambda: Encoder(8, 1), (2, 4, 8)),
]


class Batches:
    """The same batch ``count`` times: reading data is not what is measured."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.randn(shape, generator=generator), torch.randint(CLASSES, shape[:1], generator=generator)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.count)


OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
"""What most networks are trained with, and the cheapest step there is, which shows a watcher at its dearest."""


class Classifier(LightningModule):
    """Cross-entropy, and an optimizer as PyTorch sets it up."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, classes = batch
        return nn.functional.cross_entropy(self.network(inputs), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=1e-5)
