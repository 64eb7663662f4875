"""Optimizers that step in some batches only, or where Lightning does not see it; gradients that are clipped by hand."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from lightning_init.callbacks.stepping import LoggedSteps
from tests.support.monitored_fits import fit
from tests.support.oracle import BatchModule
from tests.support.trainers import make_trainer

NUM_BATCHES = 40


def norm_of(parameters: Any) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm())


class Manual(BatchModule):
    """Optimizes by hand: ``step`` is called with the module, the loss and the number of the batch."""

    def __init__(self, step: Callable[[Any, Tensor, int], None]) -> None:
        torch.manual_seed(0)
        data = [(torch.randn(16, 6), torch.randn(16, 1)) for _ in range(NUM_BATCHES)]
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), data)
        self.automatic_optimization = False
        self.step = step
        self.true: dict[int, float] = {}

    def training_step(self, batch: Any, batch_index: int) -> None:
        self.step(self, (self.network(batch[0]) - batch[1]).square().mean(), batch_index)


def logged(module: LightningModule, every: int | None, **options: Any) -> dict[int, dict[str, float]]:
    return fit(module, ActivationVarianceMonitor(every), max_epochs=1, **options)


def accumulate(module: Any, loss: Tensor, batch: int) -> None:
    module.manual_backward(loss / 4)
    if (batch + 1) % 4 == 0:
        module.true[batch] = norm_of(module.parameters())
        module.optimizers().step()
        module.optimizers().zero_grad()


@pytest.mark.parametrize(("every", "steps"), [(10, [0, 7, 11, 19, 31, 39]), (20, [0, 7, 19, 39]), (4, range(3, 40, 4))])
def test_steps_are_logged_where_gradients_accumulated_by_hand_are_complete(every: int, steps: list[int]) -> None:
    module = Manual(accumulate)
    tags = logged(module, every)
    assert sorted(tags) == sorted({0, *steps})
    for step in {*steps} - {0}:
        assert tags[step]["gradient_norm/total"] == pytest.approx(module.true[step], rel=1e-5)
    assert "gradient_norm/total" not in tags[0]  # the first step is logged whatever it has


def test_every_step_stays_every_step() -> None:
    assert sorted(logged(Manual(accumulate), 1)) == list(range(NUM_BATCHES))


@pytest.mark.parametrize("every", [10, 7])
def test_optimizers_that_take_turns_are_all_seen(every: int) -> None:
    class Turns(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.network[i].parameters(), lr=0.1) for i in (0, 2)]

    def turn(module: Any, loss: Tensor, batch: int) -> None:
        one = module.optimizers()[batch % 2]
        one.zero_grad()
        module.manual_backward(loss)
        one.step()

    tags = logged(Turns(turn), every)
    for layer, parity in (("network.0", 0), ("network.2", 1)):
        steps = [step for step, row in tags.items() if f"gradient_norm/{layer}" in row]
        assert len(steps) >= NUM_BATCHES // every
        assert {step % 2 for step in steps} == {parity}


def test_automatic_optimization_that_steps_every_second_batch() -> None:
    class Skips(BatchModule):
        def optimizer_step(self, epoch: Any, batch: Any, optimizer: Any, closure: Any = None) -> None:
            optimizer.step(closure=closure) if batch % 2 else closure()

    data = [(torch.randn(8, 6), torch.randint(2, (8,))) for _ in range(20)]
    tags = logged(Skips(nn.Sequential(nn.Linear(6, 2)), data), 5)
    assert [step for step, row in tags.items() if "gradient_norm/total" in row] == [3, 5, 9, 15, 19]


def test_gradient_norm_is_before_clipping_by_hand() -> None:
    def clip(module: Any, loss: Tensor, batch: int) -> None:
        module.optimizers().zero_grad()
        module.manual_backward(100 * loss)
        module.true[batch] = norm_of(module.parameters())
        module.clip_gradients(module.optimizers(), gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        if batch % 2:
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        module.optimizers().step()

    module = Manual(clip)
    monitor = ActivationVarianceMonitor(1, stats=["gradient_norm", "gradient_norm_clipped"])
    for step, tags in fit(module, monitor, max_steps=4).items():
        assert tags["gradient_norm/total"] == pytest.approx(module.true[step], rel=1e-5)
        assert tags["gradient_norm_clipped/total"] == pytest.approx(0.1 if step % 2 else 0.5, rel=1e-3)


def test_gradient_norm_is_before_clipping_in_the_modules_own_hook() -> None:
    class Clips(BatchModule):
        true: list[float]

        def on_after_backward(self) -> None:
            self.true.append(norm_of(self.parameters()))
            nn.utils.clip_grad_value_(self.parameters(), 1e-4)

    module = Clips(nn.Sequential(nn.Linear(6, 2)), [(torch.randn(8, 6), torch.randint(2, (8,))) for _ in range(4)])
    module.true = []
    tags = logged(module, 1)
    assert [row["gradient_norm/total"] for row in tags.values()] == pytest.approx(module.true, rel=1e-5)


def said_of(module: LightningModule) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logged(module, 2)
    return [str(w.message) for w in caught if "ActivationVarianceMonitor" in str(w.message)]


def raw(module: Any, loss: Tensor, batch: int) -> None:
    optimizer = module.optimizers(use_pl_optimizer=False)
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()


def test_norms_that_stay_empty_are_explained() -> None:
    (said,) = said_of(Manual(raw))
    assert "no gradient_norm" in said
    assert "self.optimizers()" in said


def test_norms_that_come_now_and_then_are_no_news() -> None:
    assert said_of(Manual(accumulate)) == []


def test_gradients_of_a_loss_that_lightning_does_not_see_are_named() -> None:
    class Mixed(Manual):
        def __init__(self) -> None:
            super().__init__(both)
            self.aux = nn.Linear(1, 1)

    def both(module: Any, loss: Tensor, batch: int) -> None:
        module.optimizers().zero_grad()
        module.manual_backward(loss)
        module.aux(torch.ones(3, 1)).square().mean().backward()
        module.optimizers().step()

    (said,) = said_of(Mixed())
    assert "no gradient of 'aux'" in said
    assert "manual_backward" in said


def test_optimizer_with_copies_of_the_weights() -> None:
    class Master(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            self.mine = list(parameters)
            super().__init__([p.detach().clone() for p in self.mine], {})

        def zero_grad(self, set_to_none: bool = True) -> None:
            for parameter in self.mine:
                parameter.grad = None

        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for copied, parameter in zip(self.param_groups[0]["params"], self.mine, strict=True):
                copied.sub_(parameter.grad, alpha=0.1)
                parameter.data.copy_(copied)
            return loss

    class WithMaster(BatchModule):
        def configure_optimizers(self) -> Any:
            return Master(self.parameters())

    data = [(torch.randn(8, 6), torch.randint(2, (8,))) for _ in range(4)]
    tags = logged(WithMaster(nn.Sequential(nn.Linear(6, 2)), data), 1)
    assert all(row["gradient_norm/total"] > 0 for row in tags.values())


def test_logged_steps_are_those_that_lightning_logs_at(tmp_path: Path) -> None:
    class Logs(BatchModule):
        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            loss = super().training_step(batch, batch_index)
            self.log("loss", loss)
            return loss

    data = [(torch.randn(8, 6), torch.randint(2, (8,))) for _ in range(15)]
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        max_epochs=1, log_every_n_steps=5, logger=logger, callbacks=[ActivationVarianceMonitor(stats=["gradient_norm"])]
    )
    trainer.fit(Logs(nn.Sequential(nn.Linear(6, 2)), data))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    steps = {column: [row["step"] for row in rows if row[column]] for column in ("loss", "gradient_norm/total")}
    assert steps == {"loss": ["4", "9", "14"], "gradient_norm/total": ["0", "4", "9", "14"]}


def test_logged_steps_wait_no_longer_than_an_interval() -> None:
    """An optimizer that steps every tenth batch cannot make an interval of three wait."""
    steps, optimizer = LoggedSteps(3), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    found = []
    for step in range(24):
        if steps.is_logged(step, [optimizer]):
            found.append(step)
        if step % 10 == 9:
            steps.stepped(optimizer, step, logged=bool(found) and found[-1] == step)
    assert found == [0, 2, 5, 8, 11, 14, 19, 20, 23]


def test_logged_steps_do_not_follow_an_optimizer_that_steps_irregularly() -> None:
    steps, optimizer = LoggedSteps(1000), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert steps.is_logged(0, [optimizer])
    steps.stepped(optimizer, 1, logged=False)
    assert sum(steps.is_logged(step, [optimizer]) for step in range(2, 900)) <= 4
