"""Real Trainers for tests: quiet, on the CPU, alone or on the ranks of `tests.support.ranks`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from tests.support.namespaces import LIGHTNING, Namespace, lightning


def make_trainer(namespace: Namespace = LIGHTNING, **options: Any) -> Trainer:
    """A Trainer that prints and writes nothing unless asked; every option of Trainer overrides."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer: Trainer = lightning(namespace).Trainer(**{"accelerator": "cpu", "devices": 1, **quiet, **options})
    return trainer


def make_ddp_trainer(**options: Any) -> Trainer:
    """To be called on every rank: ``strategy="ddp"`` on the ranks that are there."""
    return make_trainer(strategy="ddp", devices=dist.get_world_size(), **options)


def make_fsdp2_trainer(
    tensor_parallel_size: int = 1, one_file: bool = False, namespace: Namespace = LIGHTNING, **options: Any
) -> Trainer:
    """To be called on every rank: FSDP2, and with ``tensor_parallel_size`` a mesh of two dimensions.

    Args:
        one_file: save full checkpoints instead of a folder of shards.
    """
    world_size = dist.get_world_size()
    strategy = lightning(namespace).strategies.ModelParallelStrategy(
        data_parallel_size=world_size // tensor_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        save_distributed_checkpoint=not one_file,
    )
    return make_trainer(namespace, strategy=strategy, devices=world_size, **options)
