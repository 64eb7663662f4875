"""What tests of the collector hand to it: a loss, and what to do when one of its hooks fails."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]


def squared(network: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = network(x).square().mean()
    return loss


def fail(name: str, error: Exception) -> None:
    """For ``on_fault``: the hook on layer ``name`` must not fail in this test."""
    raise AssertionError(name) from error
