"""Something breaks on one rank: all ranks stop monitoring, none waits, training ends as if nothing had been."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor
from tests.support.models import DigitsMLP, digits
from tests.support.oracle import BatchModule, MemoryLogger, assert_tags_close, expected_tags
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer


def break_on_this_rank(target: str, from_call: int) -> None:
    """Make a function of the package fail from its n-th call on."""
    patch, calls = pytest.MonkeyPatch(), 0
    module_name, name = target.rsplit(".", 1)
    owner = __import__("pkgutil").resolve_name(module_name)
    original = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > from_call:
            raise RuntimeError("bad luck")
        return original(*args, **kwargs)

    patch.setattr(owner, name, broken)


def fit_with_fault(target: str | None, broken_rank: int, from_call: int) -> tuple[list[str], int, dict[str, Tensor]]:
    """What was warned about, how many steps were measured, and the weights."""
    torch.manual_seed(0)
    if target and dist.get_rank() == broken_rank:
        break_on_this_rank(target, from_call)
    module, memory = DigitsMLP(num_samples=256), MemoryLogger()
    callbacks = [ActivationVarianceMonitor(1)] if target is not None else []
    trainer = make_ddp_trainer(max_epochs=1, callbacks=callbacks, logger=memory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    said = [str(w.message) for w in caught if "ActivationVarianceMonitor" in str(w.message)]
    measured = sum("gradient_norm/total" in tags for tags in memory.steps.values())
    assert not any(m._forward_hooks for m in module.modules())
    return said, measured, {n: p.detach() for n, p in module.named_parameters()}


FAULTS = [
    # target, what it is called, calls that go well: none, or those of the first step on one rank
    ("lightning_init.callbacks.monitor.find_layers", "finding the layers", (0,)),
    ("lightning_init.monitor.collector.moments_of", "hook on layer 'network.0'", (0, 10)),
    ("lightning_init.monitor.parameter_norms.sums_of_squares", "on_before_optimizer_step", (0, 1)),
    ("lightning_init.monitor.exchange.VectorLayout.pack", "packing", (0, 1)),
]


@cache
def plain_weights() -> dict[str, Tensor]:
    weights: dict[str, Tensor] = run_ranks(fit_with_fault, 2, None, 0, 0)[0][2]
    return weights


@pytest.mark.parametrize("broken_rank", [0, 1])
@pytest.mark.parametrize(
    ("target", "where", "from_call"), [(t, w, c) for t, w, calls in FAULTS for c in calls], ids=str
)
def test_a_fault_on_one_rank_ends_it_on_all(target: str, where: str, from_call: int, broken_rank: int) -> None:
    results = run_ranks(fit_with_fault, 2, target, broken_rank, from_call)
    (message,), measured, weights = results[0]
    assert message == (
        "ActivationVarianceMonitor has failed and is switched off; training goes on. "
        f"rank {broken_rank}: {where}: RuntimeError: bad luck"
    )
    assert measured == (1 if from_call else 0)
    assert results[1][0] == []
    for name, weight in plain_weights().items():
        assert torch.equal(weight, weights[name])
        assert torch.equal(weight, results[1][2][name])


@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("lightning_init.show.loggers.StatisticsWriter.write", "writing"),
        ("lightning_init.monitor.recorder.StepResult", "reading"),
    ],
)
def test_a_fault_behind_the_collective(target: str, where: str) -> None:
    """Rank zero says it at once; the others hear of it at the next logged step."""
    (said, measured, _), (others, _, _) = run_ranks(fit_with_fault, 2, target, 0, 1)
    (message,) = said
    assert message.endswith(f"training goes on. {where}: RuntimeError: bad luck")
    assert measured == 1
    assert others == []


def test_a_fault_behind_the_collective_on_another_rank() -> None:
    """Rank one's own reading fails in the second step: rank zero has that step, and learns of it in the third."""
    (said, measured, _), _ = run_ranks(fit_with_fault, 2, "lightning_init.monitor.recorder.StepResult", 1, 1)
    assert [message.rpartition("goes on. ")[2] for message in said] == ["rank 1: reading: RuntimeError: bad luck"]
    assert measured == 2


class Uneven(nn.Module):
    """Rank 1 goes through another layer, at another width, from its second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.act, self.extra, self.head = nn.Linear(64, 8), nn.ReLU(), nn.Linear(64, 4), nn.Linear(8, 10)
        self.calls, self.rank = 0, None

    def forward(self, x: Tensor) -> Tensor:
        rank = dist.get_rank() if self.rank is None else self.rank
        hidden: Tensor = self.act(self.shared(x))
        if rank == 1 and self.calls >= 2:
            hidden = hidden + self.act(self.extra(x)).mean()
        else:
            hidden = hidden + 0 * sum(p.sum() for p in self.extra.parameters())  # DDP wants every gradient
        self.calls += 1
        return self.head(hidden)  # type: ignore[no-any-return]


def fit_uneven() -> dict[int, dict[str, float]]:
    torch.manual_seed(0)
    pixels, classes = digits()
    start = 100 * dist.get_rank()
    batches = [(pixels[start + 8 * i :][:8], classes[start + 8 * i :][:8]) for i in range(4)]
    memory = MemoryLogger()
    trainer = make_ddp_trainer(
        max_epochs=1, logger=memory, callbacks=[ActivationVarianceMonitor(1)], use_distributed_sampler=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*saw no output of these layers")
        trainer.fit(BatchModule(Uneven(), batches, learning_rate=0.0))
    return memory.steps


def test_ranks_whose_layouts_differ() -> None:
    """New slots on one rank, in the middle of training: agreed again, and the numbers stay the truth."""
    steps = run_ranks(fit_uneven, 2)[0]
    torch.manual_seed(0)
    slow = Uneven().double()
    pixels, classes = digits()
    assert sorted(steps) == [0, 1, 2, 3]
    for step, actual in steps.items():

        def loss(network: nn.Module, batch: Any, step: int = step) -> Tensor:
            x, y, network.rank = batch  # type: ignore[assignment]
            network.calls = step  # type: ignore[assignment]
            return nn.functional.cross_entropy(network(x), y)

        rows = [slice(100 * rank + 8 * step, 100 * rank + 8 * step + 8) for rank in range(2)]
        batches: Any = [[(pixels[row].double(), classes[row], rank)] for rank, row in enumerate(rows)]
        expected = expected_tags(slow, batches, accumulation=1, loss=loss, rectifiers=["act"])
        assert_tags_close(actual, expected)
        assert ("activation_variance/network.extra" in actual) == (step >= 2)
