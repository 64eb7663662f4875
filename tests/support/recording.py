"""One step under the recorder without a Trainer, and what tests of the collector hand to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lightning_init import LayerStats
from lightning_init.monitor.exchange import Slot
from lightning_init.monitor.record import LayerRecord, Place
from lightning_init.monitor.recorder import Recorder

Loss = Callable[[nn.Module, Tensor], Tensor]


def squared(network: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = network(x).square().mean()
    return loss


def record_step(recorder: Recorder, network: nn.Module, loss: Callable[[], Tensor]) -> LayerStats | None:
    """Record forward and backward of one step as the callback does; ``loss`` calls the network."""
    recorder.start_step()
    recorder.attach()
    network.zero_grad()
    value = loss()
    recorder.announce_backward(1.0)
    value.backward()
    recorder.detach()
    recorder.before_optimizer_step(network.parameters())
    return recorder.exchange()


def by_layer(records: dict[Place, LayerRecord]) -> dict[str, LayerRecord]:
    """Records of layers that are called at one place each."""
    assert len({place.layer for place in records}) == len(records)
    return {place.layer: record for place, record in records.items()}


def slots_of(records: Mapping[str, LayerRecord]) -> list[Slot]:
    """The slots of ``records``, in their order."""
    return [Slot(name, units) for name, record in records.items() for units in record.outputs]


def fail(name: str, error: Exception) -> None:
    """For ``on_fault``: the hook on layer ``name`` must not fail in this test."""
    raise AssertionError(name) from error
