"""Who watches a network while it trains: this package's monitor, and what people do without it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_init import ActivationVarianceMonitor, native


class Monitor:
    """``ActivationVarianceMonitor`` with its default statistics, of every layer."""

    def __init__(self, interval: int, folder: Path) -> None:
        self.callbacks: list[Callback] = [ActivationVarianceMonitor()]  # follows the Trainer's log_every_n_steps

    def start(self, module: LightningModule) -> None:
        pass

    def stop(self, module: LightningModule) -> None:
        pass


class MonitorInTorch(Monitor):
    """The same as it is where the package was installed without a C compiler."""

    compiled = native.sums

    def start(self, module: LightningModule) -> None:
        native.sums = None

    def stop(self, module: LightningModule) -> None:
        native.sums = self.compiled


class NaiveHooks(Callback):
    """A forward and a backward hook on every leaf, each with ``.item()``, and a norm of every parameter.

    ``watcher.start`` puts the hooks on. Between logged steps they return at once.
    """

    def __init__(self, interval: int, folder: Path) -> None:
        self.callbacks: list[Callback] = [self]
        self.interval = interval
        self.step = 0
        self.handles: list[RemovableHandle] = []
        self.numbers: dict[str, float] = {}

    def start(self, module: LightningModule) -> None:
        for name, layer in module.named_modules():
            if not list(layer.children()):
                self.handles.append(layer.register_forward_hook(functools.partial(self.forward, name)))
                self.handles.append(layer.register_full_backward_hook(functools.partial(self.backward, name)))

    def stop(self, module: LightningModule) -> None:
        self.step += 1
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @property
    def logs(self) -> bool:
        return self.step % self.interval == 0

    def forward(self, name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.logs:
            self.numbers[f"activation_variance/{name}"] = output.var().item()
            if isinstance(layer, nn.ReLU):
                self.numbers[f"zeros/{name}"] = (output == 0).float().mean().item()

    def backward(self, name: str, layer: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        if self.logs:
            self.numbers[f"gradient_variance/{name}"] = outputs[0].var().item()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.logs:
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    self.numbers[f"gradient_norm/{name}"] = parameter.grad.norm().item()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.logs and trainer.logger is not None:
            trainer.logger.log_metrics(self.numbers, self.step)


class GradNorm(Callback):
    """Lightning's ``grad_norm`` and ``log_dict`` before every optimizer step, as its documentation shows."""

    def __init__(self, interval: int, folder: Path) -> None:
        self.callbacks: list[Callback] = [self]

    def start(self, module: LightningModule) -> None:
        pass

    def stop(self, module: LightningModule) -> None:
        pass

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class WandbWatch(Callback):
    """``wandb.watch`` as it comes, a histogram of every parameter's gradient, offline."""

    def __init__(self, interval: int, folder: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.callbacks: list[Callback] = [self]
        self.interval = interval
        self.step = 0
        self.run = wandb.init(mode="offline", dir=folder)

    def start(self, module: LightningModule) -> None:
        # unwatch forgets how many steps it has seen, so this counts for it
        logs = self.step % self.interval == 0
        self.run.watch(module, log="gradients", log_freq=1 if logs else 1 << 30, idx=0)

    def stop(self, module: LightningModule) -> None:
        self.run.unwatch(module)
        self.step += 1

    def on_train_batch_end(self, *_: Any) -> None:
        if self.step % self.interval == 0:
            self.run.log({"step": self.step})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run.finish()


WATCHERS: dict[str, tuple[str, Callable[[int, Path], Any]]] = {
    "`ActivationVarianceMonitor`": ("5 statistics a layer", Monitor),
    "installed without a C compiler": ("the same", MonitorInTorch),
    "hooks with `.item()`": ("variances, zeros, norms, naively", NaiveHooks),
    "`wandb.watch`, offline": ("gradient histograms", WandbWatch),
    "`grad_norm`, `log_dict`": ("gradient norms, Lightning's way", GradNorm),
}
"""By the name they have in the table: what they measure, and what makes one for an interval and a folder."""


def missing(name: str) -> str | None:
    """What to install before ``name`` can be measured."""
    return "pip install wandb" if WATCHERS[name][1] is WandbWatch and find_spec("wandb") is None else None
