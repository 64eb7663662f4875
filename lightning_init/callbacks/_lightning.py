"""What the callbacks need from Lightning that is private, untyped or merely a matter of how Lightning works inside.

One short function each, so that a new Lightning release has to be checked against this file only. The order is that
of a fit: what the Trainer is like, what happens before training, where the loop is, what scales the gradients.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
"""The two names under which Lightning is published, in packages of their own: every class exists twice."""


def classes(module: str, name: str) -> tuple[type[Any], ...]:
    """A class of Lightning under every name that is loaded, for ``isinstance``; none is imported for that.

    Args:
        module: below the namespace, such as "strategies".
        name: of the class.
    """
    loaded = (sys.modules.get(f"{namespace}.{module}") for namespace in NAMESPACES)
    return tuple(getattr(home, name) for home in loaded if home is not None)


# --- The Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks: a public attribute, but set where type checkers do not find it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def logging_interval(trainer: Trainer) -> int:
    """The Trainer's ``log_every_n_steps``: public, but set where type checkers do not find it."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def why_nothing_is_written(trainer: Trainer) -> str | None:
    """The reason why no logger gets anything, as the end of a sentence with "because"; None if one does.

    ``fast_dev_run``, public but untyped, replaces the user's loggers by one that writes nothing.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "of fast_dev_run"
    return None if trainer.loggers else "the Trainer has no logger"


def is_deepspeed(trainer: Trainer) -> bool:
    """Whether DeepSpeed runs the training: its optimizer holds copies of the weights from before ``on_fit_start``."""
    return isinstance(trainer.strategy, classes("strategies", "DeepSpeedStrategy"))


def data_parallel_size(trainer: Trainer) -> int:
    """Number of ranks whose losses are averaged; under tensor parallelism fewer than all ranks.

    That is among how many ranks Lightning divides the data, which a strategy tells its samplers. Strategies of one
    device have no samplers' arguments.
    """
    sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return int(sampler["num_replicas"]) if sampler else 1


# --- Before training starts


def refuse_to_stay_on_meta(trainer: Trainer, module: LightningModule) -> None:
    """Raise ValueError if parameters on the meta device will get no memory: only sharding strategies give it to them.

    Lightning itself fails when it moves the module to its device, and again when it takes it back from there after
    any error; that would hide this one, so the parameters get memory before.
    """
    gives_memory = (
        *classes("strategies", "FSDPStrategy"),
        *classes("strategies", "ModelParallelStrategy"),
        *classes("strategies", "DeepSpeedStrategy"),
    )
    is_configured = not type(module).configure_model.__module__.startswith(NAMESPACES)
    is_meta = any(parameter.is_meta for parameter in module.parameters())
    if is_meta and not is_configured and not isinstance(trainer.strategy, gives_memory):
        give_memory: Callable[..., object] = module._apply
        give_memory(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
        raise ValueError(
            "the model is on the meta device, and the Trainer gives it no memory: make it without "
            "torch.device('meta'), call model.to_empty(device='cpu') before fit, or train it with FSDP or "
            "ModelParallelStrategy"
        )


def restores_weights_before_fit_start(trainer: Trainer) -> bool:
    """Whether this fit has loaded a checkpoint by the time of ``on_fit_start``.

    Strategies that restore later (FSDP2) have no ``ckpt_path`` yet when they resume, and keep an old one afterwards.
    The answer is False for them: their checkpoint overwrites whatever was drawn.
    """
    return bool(trainer.ckpt_path) and not trainer.strategy.restore_checkpoint_after_setup


def holders_of_copies(trainer: Trainer) -> dict[str, object]:
    """What may have copied the weights by now: callbacks in their ``setup``, optimizers of an earlier fit."""
    optimizers = {f"optimizer {index}": optimizer for index, optimizer in enumerate(trainer.optimizers)}
    return {**{type(callback).__name__: callback for callback in callbacks_of(trainer)}, **optimizers}


def call_before_optimizers_are_made(module: LightningModule, action: Callable[[], None]) -> None:
    """Call ``action`` once, right before the module's ``configure_optimizers``.

    A strategy calls that after it has restored, wrapped, sharded and moved the weights, and no hook of a callback runs
    there. Optimizers may copy weights, and learning rate finders train, before ``on_fit_start``.
    """
    module.configure_optimizers = _ActsFirst(module, action)  # type: ignore[method-assign]


def start_meta_watch(module: LightningModule) -> None:
    """From now on, remember whether Lightning gives memory to parameters that were made on the meta device.

    ``ModelParallelStrategy`` calls ``to_empty`` on the module between ``configure_model`` and ``on_fit_start``, where
    no hook of a callback runs, and afterwards its uninitialised memory cannot be told from weights.
    """
    module.to_empty = _RememberingToEmpty(module)  # type: ignore[method-assign]


def end_watches(module: LightningModule) -> bool:
    """Give the module its own methods back, and return whether parameters on the meta device got memory.

    False, without an effect, if :func:`start_meta_watch` was not called or its watch has ended before.
    """
    acts_first, watch = module.configure_optimizers, module.to_empty
    if isinstance(acts_first, _ActsFirst):
        acts_first.end()
    if not isinstance(watch, _RememberingToEmpty):
        return False
    del module.to_empty
    return watch.parameters_were_meta


def _itself(method: Callable[[], Any]) -> Callable[[], Any]:
    return method


class _ActsFirst:
    """Stands in for a module's ``configure_optimizers``; Lightning finds what it stands in for as ``__wrapped__``."""

    def __init__(self, module: LightningModule, action: Callable[[], None]) -> None:
        self.module, self.action = module, action
        self.is_on_instance = "configure_optimizers" in vars(module)  # where LightningCLI puts it
        self.__wrapped__ = module.configure_optimizers

    def __call__(self) -> Any:
        self.action()
        return self.__wrapped__()

    def end(self) -> None:
        """Put back what was there."""
        if self.is_on_instance:
            self.module.configure_optimizers = self.__wrapped__  # type: ignore[method-assign]
        else:
            del self.module.configure_optimizers

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module, such as an average, is not being fitted: it gets the method itself."""
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return _itself, (self.__wrapped__,)


class _RememberingToEmpty:
    """Stands in for a module's ``to_empty`` and remembers on what it was called. A class, so that it can be pickled."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.parameters_were_meta = False

    def __call__(self, *args: Any, **kwargs: Any) -> LightningModule:
        self.parameters_were_meta = any(parameter.is_meta for parameter in self.module.parameters())
        return type(self.module).to_empty(self.module, *args, **kwargs)


# --- One batch before training


def train_dataloader(trainer: Trainer) -> Any:
    """What the user's ``train_dataloader`` returns, or was given to fit: the Trainer's own is None before training."""
    loaders = trainer.fit_loop._data_source.dataloader()
    return loaders.iterables if isinstance(loaders, classes("utilities", "CombinedLoader")) else loaders


def on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A batch as the training loop hands it over: converted, through the user's hooks, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_precision(trainer: Trainer) -> AbstractContextManager[Any]:
    """Autocast, or whatever else the precision asks for."""
    return trainer.precision_plugin.train_step_context()


@contextmanager
def no_loggers(trainer: Trainer) -> Iterator[None]:
    """A call of the training step that is no step of the training writes nothing."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


# --- In the training loop


def step_number(trainer: Trainer) -> int:
    """Number of batches after which an optimizer has stepped so far, as LearningRateMonitor numbers its values.

    The public ``global_step`` counts the steps of every optimizer.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def steps_per_epoch(trainer: Trainer) -> float:
    """How many optimizer steps an epoch has, once training starts; infinite for data that come as a stream."""
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf


def step_ends_with_this_batch(trainer: Trainer) -> bool:
    """Whether the optimizer steps after this micro-batch: the last to be accumulated, or the last of an epoch."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_overridden(method: str, module: LightningModule) -> bool:
    """Whether the user has written this hook of a LightningModule; Lightning asks the same, for one of its names."""
    return not getattr(type(module), method).__module__.startswith(NAMESPACES)


def in_training_step(module: LightningModule) -> bool:
    """Whether ``training_step`` is running, and not another callback, the model summary or validation."""
    return module._current_fx_name == "training_step"


def in_validation_step(module: LightningModule) -> bool:
    """Whether ``validation_step`` is running."""
    return module._current_fx_name == "validation_step"


# --- What a gradient is scaled by


def loss_scale(trainer: Trainer) -> Tensor | None:
    """What the gradient scaler multiplies the loss by now: a float64 scalar on its device; None without a scaler.

    It is found by scaling a 1, because the scaler's ``get_scale`` would wait for the device.
    """
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    one = torch.ones((), dtype=torch.float32, device=trainer.strategy.root_device)
    scaled: Tensor = scaler.scale(one)
    return scaled.double()


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether gradients are still scaled before this optimizer's step, as for fused ones; Lightning asks the same."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
