"""Modules of unknown types are asked what they draw themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_init import initialize
from lightning_init.introspect.own_reset import role_by_own_reset
from lightning_init.schemes.distributions import Constant, Distribution, Normal, Uniform
from tests.support.training import fresh

Fill = Callable[[Tensor], object]


class Custom(nn.Module):
    """A matrix that its author's reset fills."""

    def __init__(self, fill: Fill) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(64, 32))
        self.fill = fill
        self.resets = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.resets += 1
        self.fill(self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def zeroed_then_drawn(matrix: Tensor) -> None:
    nn.init.zeros_(matrix)
    matrix.data.normal_(std=0.3)


PLAIN: dict[str, tuple[Fill, Distribution]] = {
    "uniform": (lambda w: nn.init.uniform_(w, -0.1, 0.2), Uniform(-0.1, 0.2)),
    "kaiming": (lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)), Uniform(-(32**-0.5), 32**-0.5)),
    "normal": (lambda w: nn.init.normal_(w, 0.1, 0.02), Normal(0.02, 0.1)),
    "standard normal": (lambda w: w.data.normal_(), Normal()),
    "constant": (lambda w: nn.init.constant_(w, 0.5), Constant(0.5)),
    "zeros": (nn.init.zeros_, Constant(0.0)),
    "twice": (zeroed_then_drawn, Normal(0.3)),
}


def half(matrix: Tensor) -> None:
    matrix.data[:32].normal_()


def fails(matrix: Tensor) -> None:
    if matrix.count_nonzero() == 0:
        raise RuntimeError("not of zeros")


OTHERS: dict[str, Fill] = {
    "orthogonal": nn.init.orthogonal_,
    "a part": half,
    "changed afterwards": lambda w: nn.init.normal_(w).data.mul_(2),
    "nothing": lambda w: None,
}


@pytest.mark.parametrize("name", PLAIN)
def test_own_reset_is_watched(name: str) -> None:
    fill, expected = PLAIN[name]
    module = Custom(fill)
    before = module.matrix.detach().clone(), torch.get_rng_state()
    role = role_by_own_reset(module, "matrix")
    assert role is not None
    drawn = role.default
    assert type(drawn) is type(expected)
    assert vars(drawn) == pytest.approx(vars(expected))
    assert torch.equal(module.matrix, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert module.resets == 1


@pytest.mark.parametrize("name", OTHERS)
def test_own_reset_that_is_no_plain_draw_says_nothing(name: str) -> None:
    assert role_by_own_reset(fresh(lambda: Custom(OTHERS[name])), "matrix") is None


def test_own_reset_that_fails_says_nothing() -> None:
    module = fresh(lambda: Custom(nn.init.normal_))
    module.fill = fails
    assert role_by_own_reset(module, "matrix") is None


def test_torch_default_draws_unknown_types_by_their_own_reset() -> None:
    """From the streams: the same seed gives the same weights."""
    build = lambda: Custom(lambda w: nn.init.uniform_(w, -0.3, 0.3))  # noqa: E731
    first, second = fresh(build, 0), fresh(build, 1)
    report = initialize(first, "torch_default", seed=3)
    initialize(second, "torch_default", seed=3)
    assert torch.equal(first.matrix, second.matrix)
    assert report["matrix"].target_std == pytest.approx(0.3 / math.sqrt(3))
    with pytest.warns(UserWarning, match="only 0 % of the weights"):
        assert initialize(fresh(build), "he_normal")["matrix"].reason == "module type unknown"
