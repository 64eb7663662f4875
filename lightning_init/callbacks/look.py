"""One call of the model on the Trainer's own data before training, to see what feeds each weight; it leaves nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_init.callbacks import _lightning
from lightning_init.introspect.probe import Look, call_with
from lightning_init.sandbox import random_states_kept, shared_state_kept


def look_at_first_batch(trainer: Trainer, module: LightningModule) -> Look:
    """Ways to call the training step, or else ``forward`` with ``example_input_array``, before training.

    The first batch stays the first: no sampler, generator or data set is moved on.

    Returns:
        What can be called without consequences; where that is nothing, it says why.
    """
    calls: list[Callable[[], object]] = []
    why_not = ""
    try:
        calls.append(_training_step(trainer, module))
    except _Unwise as reason:
        why_not = str(reason)
    except Exception as error:  # data are any code
        why_not = f"no batch could be made: {type(error).__name__}: {error}"
    if module.example_input_array is not None:
        calls.append(partial(_forward, trainer, module))
    return Look(module, calls, [trainer], why_not)


class _Unwise(Exception):
    """The training step cannot be called without consequences; the message says why."""


def _forward(trainer: Trainer, module: LightningModule) -> object:
    example = _lightning.on_device(trainer, module, module.example_input_array)
    with _lightning.training_precision(trainer):
        return call_with(module, example)


def _training_step(trainer: Trainer, module: LightningModule) -> Callable[[], object]:
    """What calls the training step with the first batch."""
    if not module.automatic_optimization:
        raise _Unwise("with manual optimization the training step trains, and there is no example_input_array")
    names = list(inspect.signature(module.training_step).parameters)
    if "dataloader_iter" in names:
        raise _Unwise("the training step takes batches from the loader itself")
    batch = _first_batch(_lightning.train_dataloader(trainer))

    def call() -> object:
        for silenced in ("log", "log_dict"):  # there is no loop yet that would take it
            setattr(module, silenced, _say_nothing)
        with _lightning.no_loggers(trainer), _lightning.training_precision(trainer):
            moved = _lightning.on_device(trainer, module, batch)
            return module.training_step(*([moved, 0] if len(names) > 1 else [moved]))

    return call


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``LightningModule.log``."""


def _first_batch(loaders: Any) -> Any:
    """The first batch of one or several loaders, in their structure.

    Raises:
        TypeError: one of them cannot be asked without moving it on.
    """
    if isinstance(loaders, Mapping):
        return {name: _first_batch(loader) for name, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_first_batch(loader) for loader in loaders]
    if not isinstance(loaders, DataLoader) or isinstance(loaders.dataset, IterableDataset):
        raise TypeError("an iterable cannot be asked for a batch twice")
    return _first_of_loader(loaders)


def _first_of_loader(loader: DataLoader[Any]) -> Any:
    """What the loader would give first, made without its workers."""
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if iter(sampler) is sampler:
        raise TypeError("its sampler cannot be asked twice")
    state = [loader.dataset, sampler, loader.sampler, loader.generator, getattr(loader.sampler, "generator", None)]
    with random_states_kept(), shared_state_kept(state):
        indices = next(iter(sampler))
        if loader.batch_sampler is None:
            return loader.collate_fn(loader.dataset[indices])
        fetch = getattr(loader.dataset, "__getitems__", None)
        return loader.collate_fn(fetch(indices) if fetch else [loader.dataset[index] for index in indices])
