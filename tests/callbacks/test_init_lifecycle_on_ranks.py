"""InitCallback on several processes: when it has to initialise, and when it has to leave weights alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_init import InitCallback
from tests.support.lifecycle import (
    EVERYWHERE,
    EXPECTED_WARNINGS,
    FINDERS,
    NOT_SHARDED,
    ON_META,
    Case,
    average_before,
    first_fit,
    learning_rate_finder_before,
    resume_from_a_path,
)
from tests.support.lifecycle.setting import Setting, assert_kept, new_callback, small_mlp
from tests.support.models import DigitsModule
from tests.support.namespaces import PYTORCH_LIGHTNING
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer, make_trainer
from tests.support.weights import weights_of

pytestmark = [pytest.mark.filterwarnings(line) for line in EXPECTED_WARNINGS]


@pytest.mark.parametrize("case", [*EVERYWHERE, *FINDERS, *NOT_SHARDED], ids=lambda case: case.__name__)
def test_init_callback_on_ddp(case: Case, tmp_path: Path) -> None:
    run_ranks(case, 2, Setting("ddp", tmp_path))


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        ("ddp", first_fit),
        ("ddp", resume_from_a_path),
        ("ddp", learning_rate_finder_before),
        ("ddp", average_before),
        ("fsdp2", resume_from_a_path),
        ("fsdp2 meta", first_fit),
    ],
)
def test_init_callback_on_ranks_of_pytorch_lightning(strategy: Any, case: Case, tmp_path: Path) -> None:
    """What depends on the host; alone, all cases run under this name too."""
    run_ranks(case, 2, Setting(strategy, tmp_path, PYTORCH_LIGHTNING))


@pytest.mark.parametrize("case", EVERYWHERE, ids=lambda case: case.__name__)
def test_init_callback_on_fsdp2(case: Case, tmp_path: Path) -> None:
    run_ranks(case, 2, Setting("fsdp2", tmp_path))


@pytest.mark.parametrize("case", ON_META, ids=lambda case: case.__name__)
def test_init_callback_on_fsdp2_from_meta(case: Case, tmp_path: Path) -> None:
    run_ranks(case, 2, Setting("fsdp2 meta", tmp_path))


@pytest.mark.parametrize("case", FINDERS, ids=lambda case: case.__name__)
def test_init_callback_with_finders_on_fsdp2(case: Case, tmp_path: Path) -> None:
    run_ranks(case, 2, Setting("fsdp2 one file", tmp_path))


def test_spawned_processes_resume_from_a_checkpoint(tmp_path: Path) -> None:
    """From the forkserver, which is fast. On the CPU, Lightning lets its processes share the model's memory:
    they may load the same file into it, but not train."""
    path, trained = Setting("single", tmp_path).trained(new_callback())
    model = DigitsModule(small_mlp)
    trainer = make_trainer(
        strategy=DDPStrategy(start_method="forkserver"),
        devices=2,
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        callbacks=[new_callback()],
        default_root_dir=tmp_path,
    )
    trainer.fit(model, ckpt_path=path)  # its one epoch is all there is to do
    assert_kept(weights_of(model), trained)


def seed_when_rank_zero_alone_has_one() -> int:
    os.environ.pop("PL_GLOBAL_SEED", None)
    if dist.get_rank() == 0:
        os.environ["PL_GLOBAL_SEED"] = "3"  # as seed_everything behind `if rank == 0` leaves it
    callback = InitCallback()
    make_ddp_trainer(max_steps=1, callbacks=[callback]).fit(DigitsModule(small_mlp))
    assert callback.report is not None
    return callback.report.seed


def test_seed_on_one_rank_is_taken_by_all() -> None:
    """And nobody waits for a broadcast that the others don't make."""
    assert run_ranks(seed_when_rank_zero_alone_has_one, 2) == [3, 3]
