"""Compiled modules run as written while their layers are recorded; all else stays compiled."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_init import LayerStats, observe
from lightning_init.monitor.eager import hold_eager, release_eager

# torch's compiler looks at .grad of every tensor that it is given
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(8, 3)
CALLS: list[str] = []
GRAPHS: list[str] = []


def backend(name: str) -> Callable[..., Any]:
    """Notes the graphs that are compiled, and the calls of compiled code."""

    def compile_(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        GRAPHS.append(name)

        def run(*args: Any) -> Any:
            CALLS.append(name)
            return graph.forward(*args)

        return run

    return compile_


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    CALLS.clear()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))


class Decorated(Block):
    @torch.compile(backend=backend("module"))
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))


def as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=backend("module"))
    return model


def own_method(model: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend("module"))
    return model


WAYS: dict[str, Callable[[], nn.Module]] = {
    "torch.compile(module)": lambda: as_module(torch.compile(Block(), backend=backend("module"))),
    "module.compile()": lambda: in_place(Block()),
    "a method of its own": lambda: own_method(Block()),
    "a method of its class": Decorated,
}


class Net(nn.Module):
    """A compiled block, a compiled function of tensors, and a layer outside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(normalized(self.block(x)))


@torch.compile(backend=backend("function"))
def normalized(x: Tensor) -> Tensor:
    return x / (1 + x.square().sum(-1, keepdim=True)).sqrt()


def step(model: nn.Module, layers: list[str] | None = None, *, recorded: bool) -> LayerStats | None:
    CALLS.clear()
    if not recorded:
        model(X).square().mean().backward()
        return None
    with observe(model, layers=layers) as watching:
        model(X).square().mean().backward()
    return watching.compute()


@pytest.mark.parametrize("way", WAYS)
def test_compiled_modules_are_eager_only_while_they_are_recorded(way: str) -> None:
    torch.manual_seed(0)
    model = Net(WAYS[way]())
    for recorded in (True, False, True, False):
        stats = step(model, recorded=recorded)
        assert (["function"] if recorded else ["module", "function"]) == CALLS
        if stats is not None:
            assert list(stats.values["activation_variance"]) == ["block.a", "block.act", "head"]
    assert sorted(GRAPHS) == ["function", "module"]  # one graph each, compiled once


@pytest.mark.parametrize("way", WAYS)
def test_compiled_modules_without_a_recorded_layer_stay_compiled(way: str) -> None:
    model = Net(WAYS[way]())
    stats = step(model, ["head"], recorded=True)
    assert stats is not None
    assert list(stats.values["activation_variance"]) == ["head"]
    assert CALLS == ["module", "function"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nested", [True, False])
def test_compiled_modules_are_given_back_in_any_order(way: str, nested: bool) -> None:
    model = WAYS[way]()
    model(X)
    before = dict(vars(model))
    one, other = object(), object()
    assert hold_eager(one, model.modules()) == hold_eager(other, model.modules()) != []
    for holder in (other, one) if nested else (one, other):
        CALLS.clear()
        model(X)
        assert CALLS == []
        release_eager(holder)
    model(X)
    assert CALLS == ["module"]
    assert {name: id(value) for name, value in vars(model).items()} == {name: id(v) for name, v in before.items()}


def test_compiled_module_that_is_changed_while_it_is_held_keeps_the_change() -> None:
    model = own_method(Block())
    hold_eager(model, [model])
    model.forward = lambda x: x
    release_eager(model)
    assert model(X) is X


def test_compiled_modules_are_given_back_when_recording_fails_to_begin() -> None:
    model: Any = Net(in_place(Block()))
    watching = observe(model)
    handle = model.block.a.register_forward_hook(lambda *args: None)
    model.block.a.register_forward_hook = None
    with pytest.raises(TypeError), watching:
        pass
    handle.remove()
    del model.block.a.register_forward_hook
    assert not any(m._forward_hooks for m in model.modules())
    model(X)
    assert CALLS == ["module", "function"]


def test_copies_made_while_a_compiled_module_is_held_work() -> None:
    model = WAYS["torch.compile(module)"]()
    with observe(model):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))


def test_compiled_function_that_calls_layers_stays_one_graph() -> None:
    """Hooks are nothing to the compiler: such layers are silent, and the function is what it would be without."""
    model = Block()

    @torch.compile(backend=backend("function"))
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    for recorded in (True, False, True, False, True):
        if recorded:
            with observe(model) as watching:
                loss(model, X).backward()
            assert watching.compute().values["activation_variance"] == {}
        else:
            loss(model, X).backward()
    assert len(CALLS) == 5
    assert len(GRAPHS) <= 2


def test_compiler_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    model = Block()
    assert hold_eager(model, model.modules()) == []
    assert "torch._dynamo" not in sys.modules
