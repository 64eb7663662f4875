"""Where a lifecycle case runs, and what it compares with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_init import InitCallback, initialize
from tests.support.models import Digits, DigitsModule, Sharded, conv_net, mlp
from tests.support.namespaces import LIGHTNING, Namespace, lightning, module_class
from tests.support.trainers import make_ddp_trainer, make_fsdp2_trainer, make_trainer
from tests.support.weights import Weights, assert_differ, assert_same, weights_of

SEED = 11
small_mlp = partial(mlp, 17, 2)
small_conv_net = partial(conv_net, 5)


class Recording(Digits):
    """Keeps the weights at every start of training, a finder's trials included."""

    def setup(self, stage: str) -> None:
        self.starts: list[Weights] = getattr(self, "starts", [])

    def on_train_start(self) -> None:
        self.starts.append(weights_of(self))


class RecordingSharded(Recording, Sharded):
    """The same, sharded."""


MAKE_TRAINER: dict[str, Callable[..., Trainer]] = {
    "single": make_trainer,
    "ddp": make_ddp_trainer,
    "fsdp2": make_fsdp2_trainer,  # a checkpoint is a folder of shards
    "fsdp2 meta": make_fsdp2_trainer,  # the model is made without memory
    "fsdp2 one file": partial(make_fsdp2_trainer, one_file=True),
}


@dataclass(frozen=True)
class Setting:
    """Where a case runs: the strategy, a folder that all its ranks share, and the name by which Lightning is used."""

    strategy: Literal["single", "ddp", "fsdp2", "fsdp2 meta", "fsdp2 one file"]
    folder: Path
    namespace: Namespace = LIGHTNING

    @property
    def lightning(self) -> Any:
        return lightning(self.namespace)

    @property
    def is_first_rank(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def trainer(self, *callbacks: Callback, **options: Any) -> Trainer:
        make = MAKE_TRAINER[self.strategy]
        defaults = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
        options = {"namespace": self.namespace, "default_root_dir": self.folder, **defaults, **options}
        return make(callbacks=list(callbacks), **options)

    def model(self, build: Callable[[], nn.Module] = small_mlp, **options: Any) -> Recording:
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        options = {"batch_size": 16, "learning_rate": 1e-2, **options}
        if not self.strategy.startswith("fsdp2"):
            return module_class(Recording, self.namespace)(build, **options)
        device = "meta" if self.strategy == "fsdp2 meta" else "cpu"
        return module_class(RecordingSharded, self.namespace)(build, device, **options)

    def trained(self, *callbacks: Callback, name: str = "trained.ckpt") -> tuple[Path, Weights]:
        """A checkpoint after one epoch, and the weights in it."""
        model, trainer = self.model(), self.trainer(*callbacks)
        trainer.fit(model)
        path = self.folder / name
        trainer.save_checkpoint(path)
        return path, weights_of(model)


def new_callback(**options: Any) -> InitCallback:
    return InitCallback("he_normal", seed=SEED, **options)


def initialized(build: Callable[[], nn.Module] = small_mlp) -> Weights:
    """What the callback has to draw."""
    model = DigitsModule(build)
    initialize(model, "he_normal", seed=SEED)
    return weights_of(model)


def assert_kept(start: Weights, trained: Weights) -> None:
    assert_differ(trained, initialized())
    assert_same(start, trained)


class FailsOnce(Callback):
    """Raises before the second step, and keeps the weights of that moment."""

    weights: Weights | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1 and self.weights is None:
            self.weights = weights_of(pl_module)
            raise ArithmeticError("the machine")
