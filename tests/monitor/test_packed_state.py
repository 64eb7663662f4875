"""The torchmetrics state in one process. On ranks: tests/callbacks/test_monitor_faults_on_ranks.py."""

from __future__ import annotations

import pickle

import torch

from lightning_init.monitor.packed_state import PackedState

CPU = torch.device("cpu")


def test_packed_state_adds_up_updates_and_resets() -> None:
    state = PackedState(CPU)
    vector = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    state.update(vector)
    state.update(vector)
    assert state.compute().tolist() == [2.0, 4.0, 6.0]
    state.reset()
    state.update(vector)
    assert state.compute().tolist() == [1.0, 2.0, 3.0]
    assert vector.tolist() == [1.0, 2.0, 3.0]


def test_packed_state_stays_float64() -> None:
    """2^53 is exact there and nowhere below; casts of a surrounding module must not reach it."""
    state = PackedState(CPU).bfloat16()
    state.update(torch.tensor([2.0**53 - 1], dtype=torch.float64))
    assert state.half().compute().item() == 2.0**53 - 1
    assert state.state_dict() == {}


def test_packed_state_pickles() -> None:
    state = PackedState(CPU)
    state.update(torch.ones(1, dtype=torch.float64))
    again = pickle.loads(pickle.dumps(state))
    assert again.compute().item() == 1.0
