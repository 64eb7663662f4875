"""The weights of a model as full tensors, wherever their shards are, and as they were when training started."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """Copies of all parameters as full tensors. Sharded ones are gathered, so every rank has to call it."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def assert_same(actual: Weights, expected: Weights) -> None:
    """The same names, types and bits."""
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype, f"{name}: {actual[name].dtype}, not {weight.dtype}"
        unequal = actual[name] != weight  # a NaN is not equal to itself either
        assert not unequal.any(), f"{name}: {int(unequal.sum())} of {weight.numel()} elements differ"


def assert_differ(actual: Weights, other: Weights) -> None:
    """No weight matrix is the same. (Biases and norms may be: 0 and 1 before and after.)"""
    assert set(actual) == set(other)
    for name, weight in other.items():
        assert weight.ndim < 2 or (actual[name] != weight).any(), f"{name} is the same"


class WeightsAtStart(Callback):
    """Keeps the weights with which training starts: after every initialisation and every restore."""

    at_start: Weights

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_start = weights_of(pl_module)
