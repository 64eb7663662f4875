"""Compiled code runs as written for a moment, and stays compiled."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_init.monitor.collector import EagerMoment


def test_hooks_added_late_run_without_recompilation() -> None:
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(network, backend=count)
    x, fired, moment = torch.randn(2, 3), [], EagerMoment()
    compiled(x)
    for _ in range(2):
        handle = network[0].register_forward_hook(lambda *args: fired.append(1))
        moment.start()
        moment.start()  # twice is once
        compiled(x)
        moment.stop()
        moment.stop()
        handle.remove()
        compiled(x)
    assert len(fired) == 2
    assert len(graphs) == 1


def test_stance_of_the_user_is_restored() -> None:
    moment = EagerMoment()
    with torch.compiler.set_stance("fail_on_recompile"):
        before = torch._dynamo.eval_frame._stance
        moment.start()
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        moment.stop()
        assert torch._dynamo.eval_frame._stance == before


def test_compiler_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    moment = EagerMoment()
    moment.start()
    moment.stop()
    assert "torch._dynamo" not in sys.modules
