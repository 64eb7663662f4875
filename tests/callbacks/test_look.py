"""InitCallback looks at one batch before training; training is as if it had not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_init import InitCallback, Rule
from tests.support.trainers import make_trainer

WIDTH = 8


class Counting(Dataset[Tensor]):
    """Draws from a generator of its own and from the global one, and counts what was asked for."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.full((WIDTH,), float(index)) + torch.randn((), generator=self.generator) + torch.randn(())


class Looked(LightningModule):
    """A first layer, one that nothing nonlinear feeds, one behind a ReLU, and a head; it keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.batches: list[Tensor] = []
        self.data: Any = Counting()

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.head(self.third(F.relu(self.second(self.first(rows)))))
        return output

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(rows)
        loss = self(rows).square().mean()
        self.log("loss", loss)
        if self.logger is not None:
            self.logger.log_metrics({"mine": 1.0}, step=batch_idx)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return DataLoader(self.data, batch_size=4, shuffle=True, generator=generator)


def fitted(callbacks: list[InitCallback], model: LightningModule | None = None, **options: Any) -> Looked:
    torch.manual_seed(0)
    module: Any = model or Looked()
    make_trainer(callbacks=callbacks, max_epochs=1, **options).fit(module)
    return module


def gains(callback: InitCallback) -> dict[str, float | None]:
    assert callback.report is not None
    return {entry.name: round(entry.gain, 2) for entry in callback.report.drawn if entry.gain is not None}


def test_gain_is_1_where_nothing_nonlinear_feeds() -> None:
    callback = InitCallback("he_normal", seed=1)
    fitted([callback])
    assert gains(callback) == {"first.weight": 1.41, "second.weight": 1, "third.weight": 1.41, "head.weight": 1}
    assert callback.report is not None
    assert callback.report.notes[:2] == (
        "nothing nonlinear feeds them, so their gain is 1: second.weight, head.weight",
        "output layers, which head='zeros' would start at 0: head.weight",
    )


def test_rule_that_names_a_weight_has_its_own_gain() -> None:
    callback = InitCallback("he_normal", seed=1, rules=[Rule("head.weight", "he_normal")])
    fitted([callback])
    assert gains(callback)["head.weight"] == 1.41


def test_head_gets_a_scheme_of_its_own() -> None:
    callback = InitCallback("lecun_normal", seed=1, head="zeros")
    fitted([callback])
    assert callback.report is not None
    assert [entry.name for entry in callback.report.drawn if entry.decided_by == "head"] == ["head.weight"]
    assert callback.report["head.weight"].measured_std == 0


def test_look_changes_neither_data_nor_random_states_nor_loggers(tmp_path: Any) -> None:
    """A scheme that does not ask what feeds a weight does not look."""
    looked, plain = (
        fitted([InitCallback(scheme, seed=1)], logger=CSVLogger(tmp_path / scheme))
        for scheme in ("he_normal", "lecun_normal")
    )
    assert looked.data.asked == plain.data.asked
    assert len(looked.batches) == len(plain.batches)
    assert all(map(torch.equal, looked.batches, plain.batches))
    logs = [(tmp_path / scheme).rglob("metrics.csv") for scheme in ("he_normal", "lecun_normal")]
    lines = [len(path.read_text().splitlines()) for found in logs for path in found]
    assert len(lines) == 2
    assert lines[0] == lines[1]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(16, WIDTH))


def test_streams_are_not_asked_twice() -> None:
    class Streamed(Looked):
        def train_dataloader(self) -> DataLoader[Tensor]:
            return DataLoader(Stream(), batch_size=4)

    callback = InitCallback("he_normal", seed=1)
    fitted([callback], Streamed())
    assert set(gains(callback).values()) == {1.41}
    assert callback.report is not None
    assert "an iterable cannot be asked for a batch twice" in callback.report.notes[-1]


def test_example_input_array_stands_in_for_data() -> None:
    class Manual(Looked):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.example_input_array = torch.randn(2, WIDTH)

    callback = InitCallback("he_normal", seed=1)
    fitted([callback], Manual(), limit_train_batches=0)
    assert gains(callback)["head.weight"] == 1


def test_head_without_a_look_is_an_error() -> None:
    class Manual(Looked):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"head='zeros' found no output layer(.|\n)*manual optimization(.|\n)*Rule\("):
        fitted([InitCallback("he_normal", head="zeros")], Manual())
