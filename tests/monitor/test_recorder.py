"""A logged step in one process: measured, exchanged, or given up. On ranks: tests/callbacks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_init import LayerStats
from lightning_init.distributed import ranks
from lightning_init.introspect.layers import find_layers
from lightning_init.monitor.recorder import Recorder
from lightning_init.monitor.statistics import DEFAULT_STATS
from tests.support.faults import PACK, PACK_NORMS, broken, moments_of_layer
from tests.support.models import mlp
from tests.support.oracle import assert_tags_close, expected_tags
from tests.support.recording import record_step

CPU = torch.device("cpu")


def measure(recorder: Recorder, network: nn.Module, x: Tensor, y: Tensor) -> LayerStats | None:
    return record_step(recorder, network, lambda: nn.functional.cross_entropy(network(x), y))


def batch(n: int = 16, width: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, width), torch.arange(n) % 10


def test_recorder_step_after_step() -> None:
    torch.manual_seed(0)
    network = mlp()
    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    x, y = batch()
    for n in (16, 3, 7):
        stats = measure(recorder, network, x[:n], y[:n])
        assert stats is not None
        slow = mlp().double()
        slow.load_state_dict(network.state_dict())
        expected = expected_tags(slow, [[(x[:n].double(), y[:n])]], accumulation=1, prefix="", rectifiers=["1", "3"])
        assert_tags_close(stats.tags, expected)
    assert recorder.silent_layers == []


def test_recorder_of_large_and_small_layers() -> None:
    """Large outputs are summed in float32, small ones in float64; one vector holds both."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    x, y = batch(512)
    slow = copy.deepcopy(network).double()
    stats = measure(Recorder(find_layers(network), DEFAULT_STATS, CPU), network, x, y)
    assert stats is not None
    expected = expected_tags(slow, [[(x.double(), y)]], accumulation=1, prefix="", rectifiers=["1"])
    assert_tags_close(stats.tags, expected)


def test_recorder_keeps_nothing_for_the_next_step() -> None:
    network = mlp()
    recorder = Recorder(find_layers(network), [*DEFAULT_STATS, "update_ratio"], CPU)
    assert measure(recorder, network, *batch()) is not None
    assert not any(recorder._norms.packed())
    assert recorder.needs_post_step
    recorder.after_optimizer_step([])  # would find weights of before the step, had any been kept
    assert not any(recorder._norms.packed())
    assert recorder._collector.drain() == {}


def test_recorder_measures_only_the_chosen_statistics() -> None:
    network = mlp()
    recorder = Recorder(find_layers(network), ["activation_variance"], CPU)
    stats = measure(recorder, network, *batch())
    assert stats is not None
    assert set(stats.values) == {"activation_variance"}
    assert recorder._collector.with_gradients is False
    assert not any(recorder._norms.packed())


def test_recorder_forgets_an_unfinished_step() -> None:
    network, (x, y) = mlp(), batch()
    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    recorder.attach()
    network(x * 100).sum().backward()  # and then the run skipped the rest of the batch
    recorder.before_optimizer_step(network.parameters())
    stats = measure(recorder, network, x, y)
    fresh = measure(Recorder(find_layers(network), DEFAULT_STATS, CPU), network, x, y)
    assert stats == fresh


class Growing(nn.Module):
    """Calls another layer, and another width, from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.act = nn.Linear(64, 10), nn.Linear(64, 20), nn.ReLU()
        self.grown = False
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.first(x))
        return out + self.act(self.late(x)).mean() if self.grown else out


def test_recorder_of_layers_that_appear_later() -> None:
    torch.manual_seed(0)
    network = Growing()
    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    before = measure(recorder, network, *batch())
    assert before is not None
    assert recorder.silent_layers == ["late", "never"]
    network.grown = True
    after = measure(recorder, network, *batch())
    assert after is not None
    assert set(after.values["activation_variance"]) == {"first", "act", "late", "act:2"}
    assert recorder.silent_layers == ["never"]
    network.grown = False
    again = measure(recorder, network, *batch())
    assert again == before


class Sequences(nn.Module):
    """An activation over positions, of which every batch has another number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.act, self.rare, self.head = nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(x)
        if self.calls == 1:
            x = self.rare(x)
        scores = self.act(x[:1] @ x.T)  # [1, batch]
        return self.head(x) + scores.mean()


def test_recorder_forgets_widths_that_do_not_recur() -> None:
    network = Sequences()
    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    sizes = []
    for n in range(3, 13):
        x, y = batch(n)
        stats = measure(recorder, network, x, y)
        assert stats is not None
        assert set(stats.values["activation_variance"]) == {"embed", "act", "head"} | ({"rare"} if n == 3 else set())
        assert recorder._layout is not None
        sizes.append(recorder._layout.size)
    assert sizes == [sizes[0] + n - 3 for n in range(3, 13)]
    assert recorder.silent_layers == []


@pytest.mark.parametrize(
    ("target", "where"),
    [moments_of_layer("0"), PACK, PACK_NORMS],
)
@pytest.mark.parametrize("healthy_steps", [0, 1])
def test_recorder_fault_disables_it_with_the_cause(
    monkeypatch: pytest.MonkeyPatch, target: str, where: str, healthy_steps: int
) -> None:
    network = mlp()
    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    for _ in range(healthy_steps):
        assert measure(recorder, network, *batch()) is not None

    monkeypatch.setattr(target, broken)
    assert measure(recorder, network, *batch()) is None
    assert recorder.disabled_reason == f"rank 0: {where}: RuntimeError: bad luck"
    monkeypatch.undo()
    assert measure(recorder, network, *batch()) is None


def test_recorder_of_a_model_without_layers() -> None:
    recorder = Recorder([], DEFAULT_STATS, CPU)
    stats = recorder.exchange()
    assert stats is not None
    assert stats.tags == {}


def test_recorder_on_mps_uses_the_cpu() -> None:
    assert Recorder([], DEFAULT_STATS, torch.device("mps")).device == CPU


def test_ranks_of_one_process() -> None:
    vector = torch.tensor([1.0, 2.0])
    ranks.all_reduce(vector)
    ranks.all_reduce(vector, maximum=True)
    assert vector.tolist() == [1.0, 2.0]
    assert ranks.all_gather_object("hello") == ["hello"]
    assert ranks.world_size() == 1
