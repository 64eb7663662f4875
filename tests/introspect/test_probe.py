"""A call that leaves nothing behind, whatever the model's code does."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_init.introspect.probe import nothing_left_behind, trace_call


class Restless(nn.Module):
    """Changes everything that a model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.momentum = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("large", torch.zeros(1 << 17))
        self.queue: deque[int] = deque([1], maxlen=3)
        self.seen: dict[str, list[Tensor]] = {"rows": []}
        self.calls = 0
        self.plain = torch.zeros(1 << 17)  # neither a buffer nor small
        self.noise = np.random.default_rng(3)
        self.generator = torch.Generator().manual_seed(4)

    def forward(self, rows: Tensor) -> Tensor:
        print("called")
        self.calls += 1
        self.queue.append(self.calls)
        self.seen["rows"].append(rows)
        self.seen["new"] = []
        self.late = nn.Linear(2, 2)
        with torch.no_grad():
            self.large[5] += 1
            self.plain.add_(1)
            for mine, theirs in zip(self.momentum.parameters(), self.layer.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        self.noise.normal()
        torch.randn(2, generator=self.generator)
        random.random()
        np.random.rand()
        self.eval()
        self.train()
        self.layer.weight.grad = torch.ones(4, 4)
        output: Tensor = self.norm(self.layer(rows)) + torch.randn(())
        return output


def state_of(model: Restless) -> dict[str, Any]:
    return {
        **{name: tensor.clone() for name, tensor in model.state_dict().items()},
        "plain": model.plain.clone(),
        "attributes": sorted(vars(model)),
        "modules": [name for name, _ in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "queue": list(model.queue),
        "seen": {name: len(rows) for name, rows in model.seen.items()},
        "calls": model.calls,
        "generators": (model.noise.bit_generator.state, model.generator.get_state()),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
    }


def assert_equal(now: Any, before: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(now, before)
    elif isinstance(before, dict):
        assert now.keys() == before.keys()
        for name, value in before.items():
            assert_equal(now[name], value)
    elif isinstance(before, (list, tuple)):
        assert len(now) == len(before)
        for one, other in zip(now, before, strict=True):
            assert_equal(one, other)
    else:
        assert now == before


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = Restless(), torch.randn(8, 4)
    before, queue, seen = state_of(model), model.queue, model.seen
    try:
        with nothing_left_behind(model):
            model(rows)
            assert model.calls == 1
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert_equal(state_of(model), before)
    assert model.queue is queue
    assert model.seen is seen
    assert capsys.readouterr().out == ""
    assert model(rows).shape == (8, 4)


def test_trace_leaves_random_states_where_operations_draw() -> None:
    """They are called again to see whether they are linear."""
    model, rows = nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Linear(4, 4)), torch.randn(8, 4)
    before = torch.get_rng_state()
    assert trace_call(model, lambda: model(rows)).feed_of("2.weight") == "nonlinear"
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_a_model_overwrites_are_put_back() -> None:
    rows = torch.randn(8, 4)
    before = rows.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    with nothing_left_behind(model):
        model(rows)
        assert not torch.equal(rows, before)
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(4, 3), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))]
)
def test_vectors_and_states_of_modules_stay(make: Callable[[], nn.Module]) -> None:
    model, rows = make(), torch.randn(8, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with nothing_left_behind(model):
        model(rows)
    assert_equal(dict(model.state_dict()), before)
