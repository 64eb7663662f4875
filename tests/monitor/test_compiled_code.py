"""Compiled code runs as written for a moment, and stays compiled."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_init.monitor.collector import ActivationCollector


def collector_without_layers() -> ActivationCollector:
    """Its ``attach`` and ``detach`` do nothing but make compiled code run eagerly in between."""
    return ActivationCollector([], [], on_fault=lambda name, error: None)


def test_hooks_added_late_run_without_recompilation() -> None:
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(network, backend=count)
    x, fired, collector = torch.randn(2, 3), [], collector_without_layers()
    compiled(x)
    for _ in range(2):
        handle = network[0].register_forward_hook(lambda *args: fired.append(1))
        collector.attach()
        collector.attach()  # twice is once
        compiled(x)
        collector.detach()
        collector.detach()
        handle.remove()
        compiled(x)
    assert len(fired) == 2
    assert len(graphs) == 1


def test_stance_of_the_user_is_restored() -> None:
    collector = collector_without_layers()
    with torch.compiler.set_stance("fail_on_recompile"):
        before = torch._dynamo.eval_frame._stance
        collector.attach()
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        collector.detach()
        assert torch._dynamo.eval_frame._stance == before


def test_compiler_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    collector = collector_without_layers()
    collector.attach()
    collector.detach()
    assert "torch._dynamo" not in sys.modules
