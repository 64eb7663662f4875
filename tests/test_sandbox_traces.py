"""A module that is asked what it does is as it was before, and so are the random states."""

from __future__ import annotations

import functools
import math
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_init import gain_of
from lightning_init.introspect.activations import traits_of
from lightning_init.introspect.normalization import norm_role
from lightning_init.sandbox import is_elementwise, random_states_kept, sandbox


class Shared:
    """An object that ``copy.deepcopy`` does not copy."""

    def __init__(self) -> None:
        self.calls = 0
        self.log: list[int] = []
        self.total = torch.zeros(2)

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self


def with_closure() -> Callable[[Tensor], Tensor]:
    calls, log = 0, []

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        log.append(calls)
        return x.tanh()

    return function


class Busy(nn.Module):
    """An activation that changes all that it can reach each time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[Any] = [[], 1]
        self.by_name: dict[str, Any] = {"inner": {}}
        self.seen, self.recent = {0}, deque([0], maxlen=2)
        self.register_buffer("total", torch.zeros(2))
        self.plain = torch.zeros(2)
        self.shared = Shared()
        self.function = with_closure()
        self.method = self.note
        self.partial = functools.partial(self.note, "partial")

    def note(self, name: str) -> None:
        self.log[0].append(name)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.note("forward")
        self.method("method")
        self.partial()
        self.by_name["inner"][self.calls] = x
        self.by_name["outer"] = x
        self.seen.add(self.calls)
        self.recent.append(self.calls)
        self.total += 1
        self.plain.add_(1)
        self.shared.calls += 1
        self.shared.log.append(1)
        self.shared.total += 1
        torch.rand(1), random.random(), np.random.rand()
        warnings.warn("busy", stacklevel=1)
        return self.function(x)


class BusyNorm(Busy):
    """Multiplies by 1 + scale, while all its state is shared with the copy that is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.weight)


class CopiedAsItself(nn.Module):
    """Its copy is the module: the weight would become float64, the mode eval."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_parameter("weight", nn.Parameter(torch.ones(1)))
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, object]) -> CopiedAsItself:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.relu() * self.inner.weight


def state_of(value: object) -> object:
    """All that is in a module, as values that can be compared."""
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {name: state_of(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return type(value), [state_of(part) for part in value]
    if isinstance(value, (nn.Module, Shared)):
        return state_of(vars(value))
    if isinstance(value, functools.partial):
        return state_of(value.args)
    if hasattr(value, "__closure__"):
        return [state_of(cell.cell_contents) for cell in value.__closure__ or ()]
    return str(value) if callable(value) else value


def random_states() -> tuple[object, ...]:
    _, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (words.tolist(), *rest)


QUESTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "activation": (Busy, traits_of),
    "norm": (BusyNorm, lambda module: norm_role(module, "weight")),
    "gain": (Busy, gain_of),
    "gain of several": (lambda: nn.Sequential(Busy(), nn.PReLU()), gain_of),
    "gain of what is its own copy": (CopiedAsItself, gain_of),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_sandbox_leaves_module_and_random_states_as_they_were(question: str) -> None:
    make, ask = QUESTIONS[question]
    module = make().train()
    module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    for inner in module.children():
        inner.register_forward_pre_hook(lambda *_: pytest.fail("an inner hook was called"))
    before, states = state_of(module), random_states()
    assert ask(module) is not None  # it was called, and gave an answer
    assert state_of(module) == before
    assert random_states() == states
    assert module.training


def test_busy_module_changes_all_of_its_state() -> None:
    """Or the test above would show nothing."""
    module = Busy()
    before, states = state_of(module), random_states()
    with pytest.warns(UserWarning, match="busy"):
        module(torch.ones(2))
    after = state_of(module)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        *("calls", "log", "by_name", "seen", "recent", "_buffers", "plain", "shared", "function"),
    }
    assert all(now != then for now, then in zip(random_states(), states, strict=True))


def test_sandbox_restores_after_an_error() -> None:
    module, outer = Busy(), nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    outer[0] = module
    before, states = state_of(module), random_states()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), sandbox(outer) as copied:
        copied(torch.ones(2))
    assert state_of(module) == before
    assert random_states() == states


def test_sandbox_copies_to_cpu_eval_and_dtype() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    with sandbox(module, dtype=torch.float64) as copied:
        assert not any(inner.training for inner in copied.modules())
        assert {parameter.dtype for parameter in copied.parameters()} == {torch.float64}
        assert torch.equal(copied[0].weight, module[0].weight.double())
    assert module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sandbox_of_zeros_has_the_shapes_and_no_values(device: str) -> None:
    module = nn.BatchNorm1d(3, device=device, dtype=torch.float16).train()
    with sandbox(module, zeros=True) as copied:
        for name, tensor in [*copied.named_buffers(), *copied._parameters.items()]:
            original = getattr(module, name)
            assert (tensor.shape, tensor.dtype, tensor.device.type) == (original.shape, original.dtype, "cpu")
            assert not tensor.any()
        assert not copied.training
    assert module.training
    assert module.weight.device.type == device


def test_sandbox_of_what_cannot_be_copied_raises() -> None:
    module = nn.ReLU()
    module.computed = torch.ones(1, requires_grad=True) * 2  # deepcopy refuses: it is part of a graph
    with pytest.raises(RuntimeError, match="deepcopy"), sandbox(module):
        pass
    assert traits_of(module) is None


def test_random_states_kept_after_an_error() -> None:
    def draw() -> None:
        torch.rand(1), random.random(), np.random.rand()
        raise ValueError("no")

    states = random_states()
    with pytest.raises(ValueError, match="no"), random_states_kept():
        draw()
    assert random_states() == states


NUMBERS = torch.tensor([-2.0, -1.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (torch.relu_, True),
        (torch.log, True),  # NaN equals NaN
        (lambda z: z.double(), True),
        (lambda z: z - z.mean(), False),
        (lambda z: z * torch.arange(len(z)), False),  # of the place
        (lambda z: z + torch.rand_like(z), False),
        (lambda z: z.sum(), False),
        (lambda z: z.reshape(2, -1) if len(z) > 2 else z, False),
        (lambda z: z if len(z) > 2 else z.sum(), False),
        (lambda z: (z,), False),
        (lambda z: z if len(z) > 2 else None, False),
        (lambda z: z > 0, False),
    ],
)
def test_is_elementwise_alone_and_in_groups(function: Callable[[Tensor], Any], expected: bool) -> None:
    for groups in (None, [torch.tensor([1, 0])]):
        assert is_elementwise(function, NUMBERS, groups=groups) is expected
    assert NUMBERS.tolist() == [-2.0, -1.0, 0.5, 3.0]


def test_is_elementwise_within_the_tolerance() -> None:
    def rough(z: Tensor) -> Tensor:
        return z * (1 + 1e-3 * (len(z) > 2))

    assert is_elementwise(rough, NUMBERS, rtol=2e-3)
    assert not is_elementwise(rough, NUMBERS, rtol=5e-4)


class LockedNorm(BusyNorm):
    """Holds what cannot be copied, and needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


def test_sandbox_of_zeros_shares_what_cannot_be_copied() -> None:
    assert norm_role(LockedNorm(), "weight").default.value == 0.0


def test_gain_of_a_function_that_drops_dimensions_of_size_one() -> None:
    assert gain_of(lambda z: z.squeeze().relu()) == gain_of("relu")


def test_answers_in_the_sandbox_are_those_of_the_module() -> None:
    assert traits_of(Busy()) == traits_of(nn.Tanh())
    assert math.isclose(gain_of(Busy()), gain_of("tanh"), rel_tol=1e-12)
    assert norm_role(BusyNorm(), "weight").default.value == 0.0
