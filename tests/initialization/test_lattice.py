"""Whether numbers are exactly what a uniform draw writes, against draws of all bounds and the smallest changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_init.initialization.lattice import is_as_written, is_uniform_as_written

BOUNDS = st.floats(2**-20, 1024, width=32)
SEEDS = st.integers(0, 2**31)


def drawn(bound: float, seed: int, count: int = 400) -> torch.Tensor:
    return torch.empty(count).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


@given(BOUNDS, SEEDS)
def test_lattice_has_every_uniform_draw(bound: float, seed: int) -> None:
    assert is_as_written(drawn(bound, seed), bound) is True


@given(BOUNDS, SEEDS)
def test_lattice_has_every_draw_that_is_rounded_once(bound: float, seed: int) -> None:
    """As with a fused multiplication and addition."""
    u = torch.rand(400, generator=torch.Generator().manual_seed(seed)).double()
    wide = torch.tensor(bound, dtype=torch.float32).double()
    assert is_as_written((u * 2 * wide - wide).float(), bound) is True


@settings(max_examples=10, deadline=None)
@given(BOUNDS, SEEDS)
def test_lattice_has_no_draw_that_moved_by_a_millionth(bound: float, seed: int) -> None:
    moved = drawn(bound, seed) + 1e-6 * bound * torch.randn(400, generator=torch.Generator().manual_seed(seed))
    assert is_as_written(moved, bound) is False
    assert is_uniform_as_written(moved, 0.02) is False


@pytest.mark.parametrize("bound", [0.125, 0.1, math.sqrt(6 / 96), 0.07771])
def test_lattice_of_an_unknown_bound_is_found(bound: float) -> None:
    assert is_uniform_as_written(drawn(bound, 3), 0.02) is True


def test_lattice_has_the_other_half_of_coarser_generators_too() -> None:
    """A generator that gives u as a float32 number has finer steps below 1/2: only the numbers from 0 on are asked."""
    u = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    values = torch.where(u < 0.5, u * 0.6 - 0.3, drawn(0.3, 0).abs())
    assert is_as_written(values, 0.3) is True


def test_lattice_needs_enough_numbers() -> None:
    assert is_as_written(drawn(0.3, 0, count=20)[:3], 0.3) is None
    assert is_uniform_as_written(drawn(0.3, 0, count=20)[:3], 0.02) is None


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 33), lambda: nn.Conv2d(3, 32, 3), lambda: nn.LSTM(9, 64)])
def test_lattice_has_what_modules_draw(make: type[nn.Module]) -> None:
    module: nn.Module = make()
    weight = next(parameter for parameter in module.parameters() if parameter.ndim > 1)
    fan_in = 64 if isinstance(module, nn.LSTM) else weight[0].numel()
    assert is_as_written(weight.detach().flatten(), fan_in**-0.5) is True
