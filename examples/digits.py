"""scikit-learn's handwritten digits and a deep, plain MLP: the model and the data of the demo.

The MLP has nothing that would repair bad weights: no normalisation, no residual connection. Whether it
learns at all is decided by its initialisation.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

NUM_PIXELS, NUM_CLASSES = 64, 10

# Neither is about this model: advice for data that must be loaded, and a name that torch has renamed since.
warnings.filterwarnings("ignore", ".*does not have many workers")
warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)


class DigitsMLP(LightningModule):
    """``depth`` hidden layers of ``width`` ReLUs and a linear head, trained by AdamW with a cosine decay."""

    def __init__(self, depth: int = 20, width: int = 128, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[tuple[str, nn.Module]] = []
        fan_in = NUM_PIXELS
        for index in range(1, depth + 1):
            layers += [(f"linear{index}", nn.Linear(fan_in, width)), (f"relu{index}", nn.ReLU())]
            fan_in = width
        layers.append(("head", nn.Linear(fan_in, NUM_CLASSES)))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.learning_rate = learning_rate

    def forward(self, pixels: Tensor) -> Tensor:  # [batch, 64] -> [batch, 10]
        return self.mlp(pixels)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, digits = batch
        logits = self(pixels)
        loss = F.cross_entropy(logits, digits)
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", (logits.argmax(1) == digits).float().mean(), prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        pixels, digits = batch
        self.log("test_accuracy", (self(pixels).argmax(1) == digits).float().mean(), on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Digits(LightningDataModule):
    """1797 handwritten digits of 8×8 pixels; one in five is kept for the test, stratified by class.

    Pixels are scaled to 0 … 1. ``batch_size`` counts the samples of one process.
    """

    def __init__(self, batch_size: int = 32, split_seed: int = 3) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        pixels, digits = load_digits(return_X_y=True)
        split = train_test_split(
            pixels.astype("float32") / 16, digits, test_size=0.2, random_state=self.split_seed, stratify=digits
        )
        train, test, train_digits, test_digits = map(torch.from_numpy, split)
        self.train, self.test = TensorDataset(train, train_digits), TensorDataset(test, test_digits)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=len(self.test))


def held_out_accuracy(checkpoint: Path) -> float:
    """Share of the 360 held-out digits that a checkpoint's model reads correctly."""
    data = Digits()
    data.setup("test")
    pixels, digits = data.test.tensors
    model = DigitsMLP.load_from_checkpoint(checkpoint).eval()
    with torch.inference_mode():
        return (model(pixels).argmax(1) == digits).float().mean().item()
