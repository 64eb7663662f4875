"""What a logged step costs beyond arithmetic: copies to the host, memory, hooks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_init import native
from lightning_init.introspect.layers import find_layers
from lightning_init.monitor import moments, parameter_norms, step_result
from lightning_init.monitor.moments import moments_of, pack
from lightning_init.monitor.parameter_norms import ParameterNorms, whole_gradients
from lightning_init.monitor.recorder import Recorder
from lightning_init.monitor.statistics import DEFAULT_STATS
from tests.support.models import conv_net, mlp

CPU = torch.device("cpu")
READS = {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__format__"}


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on this machine waits for a device; the code that has to avoid it runs all the same."""
    for module in (moments, parameter_norms, step_result):
        monkeypatch.setattr(module, "needs_device_sync", lambda values: True)
    monkeypatch.setattr(native, "sums", None)


class PythonReads(TorchFunctionMode):
    """Counts what makes Python wait for a device. On a CPU nothing waits, but the calls are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READS:
            self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class DispatchedCalls(TorchDispatchMode):
    """Counts PyTorch's functions, each a kernel or a copy where there is an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def counts_here(self, name: str) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        if self.counts_here(name):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class DispatchedReads(DispatchedCalls):
    """Counts the reads that PyTorch makes by itself: of one scalar, of a mask's length."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def counts_here(self, name: str) -> bool:
        return name in self.NAMES


def stats_of(recorder: Recorder, network: nn.Module, x: Tensor) -> dict[str, float]:
    recorder.start_step()
    recorder.attach()
    loss = network(x).square().mean()
    recorder.announce_backward(1.0)
    loss.backward()
    recorder.detach()
    recorder.before_optimizer_step(network.parameters())
    stats = recorder.exchange()
    assert stats is not None
    network.zero_grad()
    return stats.tags


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("depth", [5, 500])
def test_one_copy_to_the_host_a_step(depth: int) -> None:
    """Ten layers or a thousand. The accelerator's way of summing decides nothing on the host."""
    network = mlp(4, depth)
    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    assert len(recorder.layers) == 2 * depth + 1
    for _ in range(2):
        with PythonReads() as python, DispatchedReads() as dispatched:
            stats_of(recorder, network, torch.randn(3, 64))
        assert python.counts == {"cpu": 1, "numpy": 1}  # the copy, and how what has been copied is read
        assert dispatched.counts == {}


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_norms_of_what_no_layer_owns_are_added_up_at_once() -> None:
    """With globs that may be nearly all of the model."""
    counts = []
    for depth in (3, 30):
        network = mlp(16, depth)
        network(torch.randn(8, 64)).square().mean().backward()
        norms = ParameterNorms(find_layers(network)[-1:], ["gradient_norm"])
        norms.before_step(whole_gradients(network.parameters()))
        with DispatchedCalls() as calls:
            packed = norms.packed()
        counts.append(calls.counts.total())
        found = norms.read(pack(packed, CPU).numpy())["gradient"]["total"]
        expected = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        assert found == pytest.approx(expected.item(), rel=1e-6)
    assert counts[0] == counts[1]


def test_an_accelerator_finds_the_same(request: pytest.FixtureRequest) -> None:
    """No number is read before the end there; here they are as soon as they are known."""
    torch.manual_seed(0)
    network, x = conv_net(16, 3), torch.randn(40, 64)
    here, there = (Recorder(find_layers(network), DEFAULT_STATS, CPU) for _ in range(2))
    expected = stats_of(here, network, x)
    request.getfixturevalue("as_on_an_accelerator")
    found = stats_of(there, network, x)
    assert all(isinstance(number, Tensor) for number in moments_of(x)[1:])
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def peak(run: Callable[[], object], folder: Path) -> int:
    """The most memory that PyTorch had on the CPU at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_no_activation_lives_longer(kind: str, tmp_path: Path) -> None:
    """The peak is within 1 % of the unmonitored one and the moments: nothing is kept, no copy is large."""
    torch.manual_seed(0)
    network = mlp(256, 12) if kind == "mlp" else conv_net(16, 6)
    x = torch.randn(2048, 64)

    def plain() -> None:
        network(x).square().mean().backward()
        network.zero_grad()

    recorder = Recorder(find_layers(network), DEFAULT_STATS, CPU)
    sums = 8 * 4 * sum(256 + 8 for _ in recorder.layers)  # float64, and three temporary copies of them
    plain()
    stats_of(recorder, network, x)
    without, with_it = peak(plain, tmp_path), peak(lambda: stats_of(recorder, network, x), tmp_path)
    assert without > 10_000_000
    assert with_it <= 1.01 * without + sums
