"""Statistics of validations, and what the monitor says that it has seen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_init import ActivationVarianceMonitor
from tests.support.models import mlp
from tests.support.oracle import BatchModule, MemoryLogger
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer, make_trainer


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 64, generator=generator), torch.randint(10, (16,), generator=generator)


class Validating(BatchModule):
    def __init__(self, rank: int = 0) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(), [batch(i) for i in range(4)])
        self.held_out = [batch(100 + 10 * rank + i) for i in range(3)]

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.network(2 * batch[0])

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=None)


def true_variances(network: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    slow = network.double().eval()
    x = torch.cat([2 * inputs.double() for inputs, _ in batches])
    variances = {}
    with torch.no_grad():
        for name, layer in slow.named_children():
            x = layer(x)
            variances[f"validation/activation_variance/network.{name}"] = float(x.var(correction=0))
    return variances


def test_validation_statistics_are_of_all_its_batches(tmp_path: Path) -> None:
    module, memory, logger = Validating(), MemoryLogger(), TensorBoardLogger(tmp_path)
    monitor = ActivationVarianceMonitor(1, validation=True, stats=["activation_variance", "gradient_norm"])
    make_trainer(max_epochs=2, logger=[memory, logger], callbacks=[monitor]).fit(module)
    expected = true_variances(module.network, module.held_out)
    for tag, value in expected.items():
        steps = [step for step, tags in memory.steps.items() if tag in tags]
        assert len(steps) == 2  # none of the sanity check
        assert memory.steps[steps[-1]][tag] == pytest.approx(value, rel=1e-5)
    written = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    assert set(expected) <= set(written)
    assert not any(tag.startswith("validation/gradient") for tag in written)
    assert not any(m._forward_hooks for m in module.modules())


def test_validation_is_not_recorded_unless_asked_for() -> None:
    module, memory = Validating(), MemoryLogger()
    make_trainer(max_epochs=1, logger=memory, callbacks=[ActivationVarianceMonitor(1)]).fit(module)
    assert not any(tag.startswith("validation") for tags in memory.steps.values() for tag in tags)


def test_validation_is_of_the_layers_that_the_model_has_by_then() -> None:
    class Changing(Validating):
        def on_train_epoch_end(self) -> None:
            self.network[2] = nn.Sequential(nn.Linear(16, 16))

    module, memory = Changing(), MemoryLogger()
    module.network = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    monitor = ActivationVarianceMonitor(100, validation=True, stats=["activation_variance"])
    make_trainer(max_epochs=2, logger=memory, callbacks=[monitor], val_check_interval=4).fit(module)
    tags = [set(row) for row in memory.steps.values() if any(tag.startswith("validation") for tag in row)]
    assert "validation/activation_variance/network.2" in tags[0]
    assert "validation/activation_variance/network.2.0" in tags[-1]
    assert "validation/activation_variance/network.2" not in tags[-1]


def test_validation_does_not_change_what_training_logs() -> None:
    logged = []
    for validation in (False, True):
        memory = MemoryLogger()
        monitor = ActivationVarianceMonitor(1, validation=validation)
        options: dict[str, Any] = {"max_epochs": 1, "val_check_interval": 2}
        make_trainer(logger=memory, callbacks=[monitor], **options).fit(Validating())
        rows = {s: {k: v for k, v in tags.items() if not k.startswith("val")} for s, tags in memory.steps.items()}
        logged.append({step: row for step, row in rows.items() if row})
    assert logged[0] == logged[1]


def fit_on_ranks() -> tuple[dict[str, float], dict[str, float], int]:
    module, memory = Validating(dist.get_rank()), MemoryLogger()
    monitor = ActivationVarianceMonitor(1, validation=True)
    options: dict[str, Any] = {"max_epochs": 1, "use_distributed_sampler": False}
    make_ddp_trainer(logger=memory, callbacks=[monitor], **options).fit(module)
    of_both = [b for rank in range(dist.get_world_size()) for b in Validating(rank).held_out]
    tags = {tag: value for row in memory.steps.values() for tag, value in row.items() if tag.startswith("validation")}
    return tags, true_variances(module.network, of_both), len(monitor.coverage.seen) if monitor.coverage else 0


@pytest.mark.processes
def test_validation_statistics_are_of_all_ranks() -> None:
    (tags, expected, seen), (_, _, seen_there) = run_ranks(fit_on_ranks, 2)
    for tag, value in expected.items():
        assert tags[tag] == pytest.approx(value, rel=1e-5)
    assert seen == seen_there == len(expected)


class Partly(BatchModule):
    """Calls some of its layers; one of them only on rank 1."""

    def __init__(self) -> None:
        super().__init__(mlp(), [batch(0)])
        self.extra, self.idle = nn.Linear(64, 64), nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        if dist.is_initialized() and dist.get_rank() == 1:
            batch = self.extra(batch[0]), batch[1]
        return super().training_step(batch, batch_index)


def test_coverage_says_what_was_seen() -> None:
    module, monitor = Partly(), ActivationVarianceMonitor(1)
    assert monitor.coverage is None
    with pytest.warns(UserWarning, match="no output of these layers"):
        make_trainer(max_epochs=1, logger=MemoryLogger(), callbacks=[monitor]).fit(module)
    coverage = monitor.coverage
    assert coverage is not None
    assert coverage.not_called == ("extra", "idle")
    assert set(coverage.seen) == set(coverage.expected) - {"extra", "idle"}
    assert str(coverage) == f"{len(coverage.seen)} of {len(coverage.expected)} layers seen; not called: extra, idle"


def cover_on_ranks() -> str:
    monitor = ActivationVarianceMonitor(1)
    options: dict[str, Any] = {"max_epochs": 1, "strategy": "ddp_find_unused_parameters_true", "devices": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(logger=MemoryLogger(), callbacks=[monitor], **options).fit(Partly())
    return str(monitor.coverage)


@pytest.mark.processes
def test_coverage_says_what_a_rank_has_not_seen() -> None:
    for said in run_ranks(cover_on_ranks, 2):
        assert said.endswith("not called: idle; not on rank 0: extra")
