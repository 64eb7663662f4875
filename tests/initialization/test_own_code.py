"""Modules that make something else of a parameter than their base class: what forward reads counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_init import Normal, Rule, initialize
from lightning_init.initialization.reasons import Reason
from tests.support.weights import assert_same, weights_of


class EqualizedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (2 / self.in_features) ** 0.5, self.bias)


class MaskedLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.tril(torch.ones(outputs, inputs)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class PositiveLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.exp(), self.bias)


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class TaskLinear(nn.Linear):
    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return F.linear(x, self.weight * task, self.bias)


OTHERS: list[Callable[[], nn.Module]] = [
    lambda: EqualizedLinear(16, 16),
    lambda: MaskedLinear(16, 16),
    lambda: PositiveLinear(16, 16),
    lambda: StandardizedConv(4, 8, 3),
    lambda: TaskLinear(16, 16),
]


@pytest.mark.parametrize("build", OTHERS, ids=lambda build: type(build()).__name__)
def test_forward_that_makes_something_else_of_a_weight_keeps_it(build: Callable[[], nn.Module]) -> None:
    module = build()
    before = weights_of(module)["weight"].clone()
    entry = initialize(module)["weight"]
    assert entry.left is Reason.OWN_CODE
    assert entry.reason == f"forward of {type(module).__name__} makes something else of it than its base class"
    assert_same({"weight": weights_of(module)["weight"]}, {"weight": before})
    assert initialize(module, rules=[Rule("weight", Normal(0.1))])["weight"].left is None


class CastingLinear(nn.Linear):
    """What libraries do around the same computation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class SameConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CastingLinear(16, 16),
        lambda: CastingLinear(16, 16).bfloat16(),
        lambda: SameConv(4, 8, (3, 1), dilation=2, stride=2, padding=1),
        lambda: SameConv(4, 8, 3, groups=2),
    ],
)
def test_forward_that_computes_the_same_is_drawn_and_leaves_no_trace(build: Callable[[], nn.Module]) -> None:
    module = build()
    state = torch.get_rng_state()
    assert initialize(module, seed=1)["weight"].left is None
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(module, "calls", 0) == 0


class EqualizedHook:
    def __init__(self, module: nn.Module) -> None:
        weight = module.weight
        del module._parameters["weight"]
        module.register_parameter("weight_orig", nn.Parameter(weight.data))
        self(module, None)
        module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, _: object) -> None:
        module.weight = module.weight_orig * (2 / module.weight_orig.shape[1]) ** 0.5


def test_hook_of_its_own_keeps_what_it_computes_from() -> None:
    module = nn.Linear(16, 16)
    EqualizedHook(module)
    before = module.weight_orig.detach().clone()
    entry = initialize(module)["weight_orig"]
    assert entry.left is Reason.OWN_CODE
    assert entry.reason == "a hook computes weight from it, in a way of its own"
    assert torch.equal(module.weight_orig, before)


def test_weight_of_other_sizes_has_the_fans_of_its_shape() -> None:
    """A first convolution made grey."""
    conv = nn.Conv2d(3, 64, 7, stride=2, bias=False)
    conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))
    entry = initialize(conv)["weight"]
    assert entry.fans == (49, 64 * 49 / 4)
    assert entry.target_std == pytest.approx(math.sqrt(2 / 49))
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(torch.randn(4, 6))
    assert initialize(linear)["weight"].fans == (6, 4)


def test_stacked_weights_are_left_alone_with_their_shape() -> None:
    table, experts = nn.Embedding(50, 8, padding_idx=1), nn.Conv2d(16, 16, 3, bias=False)
    table.weight = nn.Parameter(torch.randn(4, 50, 8))
    experts.weight = nn.Parameter(torch.randn(4, 16, 16, 3, 3))
    for module in (table, experts):
        before = module.weight.detach().clone()
        entry = initialize(module)["weight"]
        assert entry.left is Reason.OWN_CODE
        assert entry.reason == f"its shape {tuple(before.shape)} is not that of a {type(module).__name__}"
        assert torch.equal(module.weight, before)


def test_parameters_that_share_memory_are_one() -> None:
    model = nn.Module()
    model.encoder, model.decoder = nn.Linear(64, 16), nn.Linear(16, 64)
    model.decoder.weight.data = model.encoder.weight.data.t()
    report = initialize(model)
    report.check()
    assert report["encoder.weight"].reason == "tied to decoder.weight"
    assert report["decoder.weight"].measured_std == pytest.approx(model.encoder.weight.std().item(), rel=0.01)
