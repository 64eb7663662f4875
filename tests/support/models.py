"""Real, small LightningModules on scikit-learn's handwritten digits, for tests that train.

All are deterministic: no dropout unless asked for, data in a fixed order. Their weights come from torch's
global generator, so ``torch.manual_seed`` before building one repeats it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PIXELS = 64
CLASSES = 10


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images of 8×8 pixels as rows with mean 0 and variance 1 over all pixels, and their classes."""
    images, classes = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float()
    return (pixels - pixels.mean()) / pixels.std(), torch.from_numpy(classes)


def mlp(width: int = 32, depth: int = 2, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` units."""
    widths = [PIXELS, *[width] * depth]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def conv_net(width: int = 8, depth: int = 2) -> nn.Sequential:
    """``depth`` 3×3 convolutions of ``width`` channels with batch norm, then global average pooling."""
    channels = [1, *[width] * depth]
    blocks = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        for inputs, outputs in itertools.pairwise(channels)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, *head)


class RowLSTM(nn.Module):
    """Reads the eight rows of an image as a sequence; the last output is classified."""

    def __init__(self, width: int = 16, depth: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=depth, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(width * (1 + bidirectional), CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        outputs, _ = self.lstm(pixels.unflatten(1, (8, 8)))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


class RowTransformer(nn.Module):
    """A transformer encoder over the eight rows of an image, with a learned position for each."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.positions = nn.Embedding(8, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.rows(pixels.unflatten(1, (8, 8)))
        positions = self.positions(torch.arange(8, device=pixels.device))
        logits: Tensor = self.head(self.encoder(rows + positions).mean(1))
        return logits


class AllKinds(nn.Module):
    """One of each, with sizes that two or four ranks cannot share evenly; the logits are summed.

    ``wide``'s first weight has 64 × 4099 = 262,336 elements: just more than one block of 2¹⁸ random numbers.
    """

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        parts = {
            "conv": partial(conv_net, 7),
            "lstm": partial(RowLSTM, 9, 2, bidirectional=True),
            "transformer": partial(RowTransformer, 10),
            "wide": partial(mlp, 4099, 1),
        }
        for name in reversed(parts) if reverse else parts:
            self.add_module(name, parts[name]())

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([part(pixels) for part in self.children()]).sum(0)


class Authored(nn.Module):
    """Whose author set everything on purpose: tables of .02 that are added, a zeroed gate, a prior, a tiny head.

    Pixels are rounded to sixteen words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(16, 21), nn.Embedding(PIXELS, 21)
        self.body, self.gate = nn.Linear(21, 21), nn.Linear(21, 21)
        self.hidden, self.head = nn.Linear(21, 33), nn.Linear(33, CLASSES)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        for parameter in self.gate.parameters():
            nn.init.zeros_(parameter)
        nn.init.uniform_(self.head.weight, -1e-4, 1e-4)
        nn.init.constant_(self.head.bias, -2.0)

    def forward(self, pixels: Tensor) -> Tensor:
        words = ((pixels - pixels.min()) * 3).long().clamp(0, 15)
        x = self.words(words) + self.positions(torch.arange(PIXELS, device=pixels.device))
        x = x + self.gate(x) * self.body(x)
        logits: Tensor = self.head(self.hidden(x.mean(1)).relu())
        return logits


class OwnReset(nn.Module):
    """A matrix of a type that nobody knows, filled by its own reset."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(21, 21))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.matrix, -0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class WholeModel(nn.Module):
    """Whose scales only the whole model tells: layers added to a small table, one in front of sin(30 x), a formula of
    the author's, a type of its own, a layer that is frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 21)
        nn.init.normal_(self.words.weight, std=0.02)
        self.reader, self.writer = nn.Linear(21, 42), nn.Linear(42, 21)
        self.other_reader, self.other_writer = nn.Linear(21, 42), nn.Linear(42, 21)
        self.norm, self.own, self.wave, self.frozen = nn.LayerNorm(21), OwnReset(), nn.Linear(21, 33), nn.Linear(21, 21)
        nn.init.uniform_(self.wave.weight, -1 / 21, 1 / 21)
        self.frozen.requires_grad_(False)
        self.formulas = nn.Sequential(*(nn.Linear(33, 33) for _ in range(3)))
        for layer in self.formulas:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="tanh")
        self.head = nn.Linear(33, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.words(((pixels - pixels.min()) * 3).long().clamp(0, 15)).mean(1)
        x = x + self.writer(self.reader(self.norm(x)).relu())
        x = x + self.other_writer(self.other_reader(self.norm(x)).relu())
        x = torch.sin(30 * self.wave(self.own(self.frozen(self.norm(x)))))
        logits: Tensor = self.head(self.formulas(x).tanh())
        return logits


class Digits:
    """Trains ``build()``, which maps rows of 64 pixels to 10 logits, as ``self.network``: what a LightningModule does.

    It has no base, because there are two classes of the name LightningModule: see :func:`module_class`.

    Args:
        build: makes the network; at module level if the module shall pickle (``functools.partial`` does).
        batch_size: samples a batch and rank.
        num_samples: the first so many digits are the training set; the last 297 validate.
    """

    network: nn.Module

    def __init__(
        self,
        build: Callable[[], nn.Module],
        batch_size: int = 32,
        num_samples: int = 256,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.learning_rate = learning_rate
        self.build = build
        self.build_network()

    def build_network(self) -> None:
        self.network = self.build()

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels)
        return logits

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        accuracy = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader[Any]:
        pixels, classes = digits()
        return DataLoader(TensorDataset(pixels[: self.num_samples], classes[: self.num_samples]), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        pixels, classes = digits()
        return DataLoader(TensorDataset(pixels[1500:], classes[1500:]), self.batch_size)


class DigitsModule(Digits, LightningModule):
    """See :class:`Digits`."""


class MLP(Digits):
    """See :func:`mlp`."""

    def __init__(self, width: int = 32, depth: int = 2, activation: type[nn.Module] = nn.ReLU, **options: Any) -> None:
        super().__init__(partial(mlp, width, depth, activation), **options)


class DigitsMLP(MLP, DigitsModule):
    """See :class:`MLP`."""


class DigitsConvNet(DigitsModule):
    """See :func:`conv_net`."""

    def __init__(self, width: int = 8, depth: int = 2, **options: Any) -> None:
        super().__init__(partial(conv_net, width, depth), **options)


class LSTM(Digits):
    """See :class:`RowLSTM`."""

    def __init__(self, width: int = 16, depth: int = 1, bidirectional: bool = False, **options: Any) -> None:
        super().__init__(partial(RowLSTM, width, depth, bidirectional), **options)


class DigitsLSTM(LSTM, DigitsModule):
    """See :class:`LSTM`."""


class DigitsTransformer(DigitsModule):
    """See :class:`RowTransformer`."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(partial(RowTransformer, width, depth, heads, dropout), **options)


class Late(Digits):
    """The network appears in ``configure_model``, on ``device``: what a large model does."""

    def __init__(self, build: Callable[[], nn.Module], device: str = "cpu", **options: Any) -> None:
        self.build_device = device
        super().__init__(build, **options)

    def build_network(self) -> None:
        self.network = nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.network, nn.Identity):  # Lightning calls this hook before every fit, validate, …
            with torch.device(self.build_device):
                self.network = self.build()
            self.parallelize()

    def parallelize(self) -> None:
        """Overridden by modules whose weights are spread over ranks."""


class Sharded(Late):
    """FSDP2 over the data-parallel dimension of ModelParallelStrategy's mesh: network and its children."""

    def parallelize(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for child in self.network.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


class LateModule(Late, DigitsModule):
    """See :class:`Late`."""


class ShardedModule(Sharded, LateModule):
    """See :class:`Sharded`."""
