"""What the finder of units remembers, and for how long."""

from __future__ import annotations

import torch
from torch import nn

from lightning_init.introspect.layers import find_layers
from lightning_init.monitor.collector import ActivationCollector
from lightning_init.monitor.statistics import DEFAULT_STATS
from tests.support.recording import by_layer, fail


def test_units_of_an_activation_without_predecessor_ignore_the_last_batch() -> None:
    """The Linear's three units are as many as the ReLU's input has rows: the last layer to run, but a batch ago."""
    network = nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    collector = ActivationCollector(find_layers(network), DEFAULT_STATS, on_fault=fail)
    for _ in range(2):
        collector.attach()
        network(torch.ones(3, 5))
        collector.detach()
        records = by_layer(collector.drain())
        assert {name: list(record.outputs) for name, record in records.items()} == {"0": [5], "1": [3]}
