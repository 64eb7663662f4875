"""Models that change while they are trained: the numbers are those of the present layers, on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from tests.support.oracle import BatchModule, MemoryLogger
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer, make_trainer


def assign_weight(module: Any) -> list[nn.Parameter]:
    module.network[2].weight = nn.Parameter(torch.full((1, 8), 0.5))
    return [module.network[2].weight]


def add_weight_norm(module: Any) -> list[nn.Parameter]:
    nn.utils.parametrizations.weight_norm(module.network[2])
    return list(module.network[2].parametrizations.parameters())


def replace_head(module: Any) -> list[nn.Parameter]:
    torch.manual_seed(1)
    module.network[2] = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    return list(module.network[2].parameters())


CHANGES: dict[str, Callable[[Any], list[nn.Parameter]]] = {
    "weight assigned": assign_weight,
    "weight_norm": add_weight_norm,
    "head replaced": replace_head,
}


class Changing(BatchModule):
    """Changes before its third step, and notes the true norms of all parameters of the head."""

    def __init__(self, change: str) -> None:
        torch.manual_seed(0)
        rank = dist.get_rank() if dist.is_initialized() else 0
        data = [(torch.randn(16, 6) + rank, torch.randn(16, 1)) for _ in range(5)]
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), data)
        self.change = change
        self.true: list[float] = []

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return (self.network(batch[0]) - batch[1]).square().mean()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if batch_index == 1:  # after this step has begun
            new = CHANGES[self.change](self)
            self.trainer.optimizers[0].add_param_group({"params": new})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad.double().flatten() for p in self.network[2].parameters() if p.grad is not None]
        self.true.append(float(torch.cat(gradients).norm()))


def head_norms(tags: dict[str, float]) -> float:
    return sum(v**2 for tag, v in tags.items() if tag.startswith("gradient_norm/network.2")) ** 0.5


@pytest.mark.parametrize("change", CHANGES)
def test_layers_are_those_of_the_present_step(change: str) -> None:
    module, memory = Changing(change), MemoryLogger()
    trainer = make_trainer(max_epochs=1, logger=memory, callbacks=[ActivationVarianceMonitor(1)])
    with pytest.warns(UserWarning, match="present layers and parameters"):
        trainer.fit(module)
    for step in (0, 2, 3, 4):
        assert head_norms(memory.steps[step]) == pytest.approx(module.true[step], rel=1e-5)
    names = {tag for tag in memory.steps[4] if tag.startswith("activation_variance/network.2")}
    inner = {"activation_variance/network.2.0", "activation_variance/network.2.1"}
    assert names == (inner if change == "head replaced" else {"activation_variance/network.2"})


def fit_on_ranks(change: str) -> tuple[dict[int, dict[str, float]], list[float], list[str]]:
    module, memory = Changing(change), MemoryLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # one process without DDP's reducer a rank: it cannot take parameters that appear later
        make_trainer(max_epochs=1, logger=memory, callbacks=[ActivationVarianceMonitor(1)]).fit(module)
    said = [str(w.message) for w in caught if "ActivationVarianceMonitor" in str(w.message)]
    return memory.steps, module.true, said


@pytest.mark.processes
def test_layers_that_change_on_all_ranks_are_agreed_on_again() -> None:
    results = run_ranks(fit_on_ranks, 2, "head replaced")
    assert any("present layers" in line for line in results[0][2])
    for steps, _, said in results:
        assert not any("switched off" in line for line in said)
        assert "activation_variance/network.2.1" in steps[4]


def fit_with_change_on_one_rank() -> list[str]:
    class OnOneRank(BatchModule):
        def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
            if batch_index == 1 and dist.get_rank() == 1:
                self.network[1] = nn.Sequential(nn.PReLU())  # of which DDP knows nothing

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    module = OnOneRank(network, [(torch.randn(16, 6), torch.randint(2, (16,))) for _ in range(5)])
    trainer = make_ddp_trainer(max_epochs=1, logger=MemoryLogger(), callbacks=[ActivationVarianceMonitor(1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    return [str(w.message) for w in caught if "switched off" in str(w.message)]


@pytest.mark.processes
def test_model_that_changes_on_one_rank_switches_the_monitor_off_everywhere() -> None:
    said = run_ranks(fit_with_change_on_one_rank, 2)
    assert "different parameters" in said[0][0]
