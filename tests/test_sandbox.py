"""Asking a copy: the module, its hooks and the random states stay as they were."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_init import gain_of, plan
from lightning_init.introspect.activations import traits_of
from lightning_init.introspect.layers import find_layers
from lightning_init.sandbox import is_elementwise, sandbox


class Nosy(nn.Module):
    """Does all that a forward pass should not: it counts, collects, writes to a buffer and draws random numbers."""

    def __init__(self, with_weight: bool = False) -> None:
        super().__init__()
        self.calls = 0
        self.inputs: list[Tensor] = []
        self.settings = {"seen": {"shapes": [(0,)]}}
        self.register_buffer("last", torch.zeros(3))
        if with_weight:
            self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.inputs.append(x)
        self.settings["seen"]["shapes"].append(tuple(x.shape))
        self.last.add_(1)
        warnings.warn("looked at", stacklevel=1)
        scale = 1 + 0 * (torch.rand(1).item() + random.random() + np.random.rand())
        return torch.tanh(x) * scale * getattr(self, "weight", torch.ones(1)).mean()


class NosyNorm(Nosy):
    """Its class name makes it a norm, whose scale is found out by a forward pass."""


def everything(module: Nosy) -> list[Any]:
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    values = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return [*states, values, module.calls, len(module.inputs), copy.deepcopy(module.settings), module.training]


def call_copy(module: Nosy, zeros: bool = False) -> Tensor:
    with sandbox(module, zeros=zeros) as copied:
        return copied(torch.ones(3))


ASK: dict[str, tuple[Callable[[], Nosy], Callable[[Nosy], object]]] = {
    "traits_of": (Nosy, traits_of),
    "find_layers": (Nosy, lambda module: find_layers(nn.Sequential(module))),
    "gain_of": (Nosy, gain_of),
    "gain_of with a weight": (lambda: Nosy(True), gain_of),
    "plan of a norm": (lambda: NosyNorm(True), plan),
    "copy_of": (lambda: Nosy(True), call_copy),
    "copy_of with zeros": (lambda: Nosy(True), lambda module: call_copy(module, zeros=True)),
}


@pytest.mark.parametrize("name", ASK)
def test_asking_changes_nothing(name: str) -> None:
    build, ask = ASK[name]
    module = build()
    before = everything(module)
    answer = ask(module)  # a warning would be an error
    assert answer is not None
    assert everything(module) == before


def test_copy_has_no_hooks_and_runs_none() -> None:
    calls: list[str] = []
    inner = nn.Linear(2, 2)
    module = nn.Sequential(inner, nn.ReLU())
    inner.register_forward_hook(lambda *_: calls.append("inner"))
    module.register_forward_pre_hook(lambda *_: calls.append("outer"))
    with sandbox(module) as copied:
        copied(torch.ones(1, 2))
        assert calls == []
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())
        assert not copied.training
    assert module.training
    module(torch.ones(1, 2))
    assert calls == ["outer", "inner"]


def test_copy_with_zeros_holds_no_value_of_the_module() -> None:
    with torch.device("meta"):
        module = nn.BatchNorm1d(4, dtype=torch.bfloat16)
    with sandbox(module, zeros=True) as copied:
        tensors = [*copied._parameters.values(), *copied._buffers.values()]
    assert [tensor.dtype for tensor in tensors] == [
        tensor.dtype for tensor in (*module.parameters(), *module.buffers())
    ]
    assert all(tensor.device.type == "cpu" and not tensor.any() for tensor in tensors)


@pytest.mark.parametrize("function", [nn.Softmax(0), nn.Softmin(0), torch.cumsum, lambda x: x.flip(0), torch.rand_like])
def test_is_elementwise_of_what_mixes_numbers(function: Callable[..., Tensor]) -> None:
    asked = (lambda x: torch.cumsum(x, 0)) if function is torch.cumsum else function
    assert not is_elementwise(asked, torch.tensor([-30.0, -1.0, 0.5, 2.0]))


@pytest.mark.parametrize("function", [torch.tanh, torch.log, nn.ReLU(inplace=True), lambda x: x])
def test_is_elementwise_of_what_does_not(function: Callable[[Tensor], Tensor]) -> None:
    numbers = torch.tensor([-30.0, -1.0, 0.5, 2.0])
    assert is_elementwise(function, numbers)
    assert numbers.tolist() == [-30.0, -1.0, 0.5, 2.0]
