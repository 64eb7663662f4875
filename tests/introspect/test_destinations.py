"""What becomes of each product: which tables it is added to, and what constants do to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_init.introspect.probe import trace_call
from lightning_init.introspect.trace import Trace

TOKENS = torch.arange(12).view(2, 6)


class Streams(nn.Module):
    """Words and positions, two branches added to them, a norm, and one more branch behind it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(12, 8), nn.Embedding(6, 8)
        self.reader, self.writer, self.second = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.behind, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.factor = factor

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) * self.factor + self.positions(torch.arange(6))
        x = x + F.dropout(self.writer(F.relu(self.reader(F.layer_norm(x, (8,))))), 0.1)
        x = F.layer_norm(x + self.second(F.layer_norm(x, (8,))).view(2, 6, 8), (8,))
        output: Tensor = self.head(x + self.behind(x))
        return output


def traced(model: nn.Module, *arguments: Tensor) -> Trace:
    trace = trace_call(model, lambda: model(*arguments))
    assert trace.why_not == ""
    return trace


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_what_is_added_to_tables_is_known_with_them(factor: float) -> None:
    trace = traced(Streams(factor), TOKENS)
    for name in ("writer.weight", "second.weight"):
        assert trace.tables_beside(name) == {"words.weight": factor, "positions.weight": 1.0}
        assert trace.summands_with(name) == 2
    for name in ("reader.weight", "behind.weight", "head.weight"):
        assert trace.tables_beside(name) == {}


class Multiplied(nn.Module):
    """Two layers with something between them that multiplies."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between
        self.register_buffer("frequency", torch.tensor(30.0))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.between(self.first(x)))
        return output


ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
ENLARGING: dict[str, Callable[[Tensor], Tensor]] = {
    "sin(30·x)": lambda x: torch.sin(30 * x),
    "sin(x·tensor)": lambda x: torch.sin(x * torch.tensor(30.0)),
    "cos(x / .1)": lambda x: torch.cos(x / 0.1),
    "in steps": lambda x: torch.sin(5 * (6 * x + 1)),
    "in another shape": lambda x: torch.sin(30 * x.view(2, 2, 8)).view(4, 8),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "a norm": lambda x: F.layer_norm(30 * x, (8,)),
    "nothing nonlinear": lambda x: 30 * x,
    "made smaller": lambda x: torch.tanh(x / 30),
}


@pytest.mark.parametrize("name", ENLARGING)
def test_weights_whose_outputs_a_constant_enlarges(name: str) -> None:
    trace = traced(Multiplied(ENLARGING[name]), ROWS)
    assert trace.is_enlarged("first.weight")
    assert not trace.is_enlarged("last.weight")


@pytest.mark.parametrize("name", OTHERS)
def test_weights_whose_outputs_are_not_enlarged(name: str) -> None:
    assert not traced(Multiplied(OTHERS[name]), ROWS).is_enlarged("first.weight")


def test_weights_that_read_what_was_made_smaller() -> None:
    """As T5 does before its output layer."""
    trace = traced(Multiplied(lambda x: F.layer_norm(x, (8,)) * 8**-0.5), ROWS)
    assert trace.is_reduced("last.weight")
    assert not trace.is_reduced("first.weight")
    assert traced(Multiplied(lambda x: torch.tanh(x / 8)), ROWS).is_reduced("first.weight")
