"""Compiled models run the graphs they would run without the monitor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from tests.support.models import mlp
from tests.support.monitored_fits import At, batches, fit
from tests.support.oracle import BatchModule, assert_tags_close, expected_tags


def counted(graphs: list[Any]) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


class Chain(nn.Sequential):
    """``compile`` in place ignores forward methods that torch wrote."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def compiled_module(part: str, graphs: list[Any]) -> LightningModule:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = BatchModule(Chain(*mlp()), batches(6))
    compile_ = partial(torch.compile, backend=counted(graphs))
    if part == "submodule":
        module.network = compile_(module.network)
        return module
    if part == "in place":
        module.network.compile(backend=counted(graphs))
        return module
    return compile_(module)  # type: ignore[return-value]


@pytest.mark.parametrize("part", ["module", "submodule", "in place"])
def test_compiled_models_run_the_same_graphs(part: str) -> None:
    """Three of six steps are logged; the others run the one graph they would run without a monitor."""
    torch.manual_seed(0)
    slow = mlp().double()
    weights: list[list[Tensor]] = []  # before each step
    keep = At("on_train_batch_start", lambda m: weights.append([p.detach().double() for p in m.parameters()]))
    graphs: list[Any] = []
    plain_graphs: list[Any] = []
    fit(compiled_module(part, plain_graphs), None)
    steps = fit(compiled_module(part, graphs), ActivationVarianceMonitor(3), keep)
    assert len(graphs) == len(plain_graphs) == 1
    assert [len(list(graph.graph.nodes)) for graph in graphs] == [len(list(g.graph.nodes)) for g in plain_graphs]
    assert sorted(steps) == [0, 2, 5]
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches(4)):
        expected = partial(expected_tags, steps=[[(x.double(), y)]], accumulation=1, rectifiers=["1", "3"])
        on_its_own = expected(slow)
        if step in steps:
            assert_tags_close(steps[step], on_its_own, relative=2e-5)  # compiled steps before it round differently
            assert_tags_close(steps[step], expected(with_weights(weights[step])))
        optimizer.step()


def with_weights(weights: list[Tensor]) -> nn.Module:
    network = mlp().double()
    with torch.no_grad():
        for parameter, weight in zip(network.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return network
