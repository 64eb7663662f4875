"""What is known about the units of a module before it is called."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from lightning_init.introspect.unit_rules import UnitRule, unit_rule
from tests.support.modules import LlamaRMSNorm, TransformersConv1D, Unknown


class OwnConv(nn.Conv2d):
    """A subclass has the rule of its base."""


class ChannelsFirst(nn.LayerNorm):
    """A subclass with a ``forward`` of its own may have its units elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


@pytest.mark.parametrize(
    ("module", "rule"),
    [
        (nn.Linear(3, 5), UnitRule(5, -1)),
        (nn.Bilinear(3, 4, 5), UnitRule(5, -1)),
        (nn.Embedding(9, 5), UnitRule(5, -1)),
        (nn.EmbeddingBag(9, 5), UnitRule(5, -1)),
        (nn.MultiheadAttention(6, 2), UnitRule(6, -1)),
        (nn.Conv1d(3, 5, 1), UnitRule(5, -2)),
        (nn.Conv2d(3, 5, 1), UnitRule(5, -3)),
        (nn.ConvTranspose3d(3, 5, 1), UnitRule(5, -4)),
        (OwnConv(3, 5, 1), UnitRule(5, -3)),
        (nn.InstanceNorm1d(5), UnitRule(5, -2)),
        (nn.InstanceNorm2d(5), UnitRule(5, -3)),
        (nn.InstanceNorm3d(5), UnitRule(5, -4)),
        (nn.BatchNorm2d(5), UnitRule(5, 1)),
        (nn.SyncBatchNorm(5), UnitRule(5, 1)),
        (nn.GroupNorm(2, 6), UnitRule(6, 1)),
        (nn.LayerNorm(5), UnitRule(5, -1)),
        (nn.LayerNorm([5, 7, 7]), UnitRule(5, -3)),
        (nn.RMSNorm(5), UnitRule(5, -1)),
        (ChannelsFirst(5), UnitRule(5)),
        (nn.PReLU(5), UnitRule(5, 1)),
        (nn.PReLU(), UnitRule()),
        (nn.RNN(3, 4), UnitRule(4, -1)),
        (nn.LSTM(3, 4, proj_size=2), UnitRule(2, -1)),
        (nn.GRU(3, 4, bidirectional=True), UnitRule(8, -1)),
        (nn.LSTMCell(3, 4), UnitRule(4, -1)),
        (LlamaRMSNorm(6), UnitRule(6)),
        (TransformersConv1D(5, 3), UnitRule(5)),
        (Unknown(), UnitRule()),
        (nn.ReLU(), UnitRule()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unit_rule_of_modules(module: nn.Module, rule: UnitRule) -> None:
    assert unit_rule(module) == rule
