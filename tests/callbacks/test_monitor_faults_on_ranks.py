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
from lightning_init.monitor import collector
from tests.support.faults import FIND_LAYERS, MOMENTS_OF, PACK, STEP_RESULT, SUMS_OF_SQUARES, WRITE, break_on_this_rank
from tests.support.models import DigitsMLP, digits
from tests.support.oracle import BatchModule, MemoryLogger, assert_tags_close, expected_tags
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer


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
    # and how many calls go well: none, or those of the first step on one rank
    (FIND_LAYERS, (0,)),
    (MOMENTS_OF, (0,)),
    (SUMS_OF_SQUARES, (0, 1)),
    (PACK, (0, 1)),
]


@cache
def plain_weights() -> dict[str, Tensor]:
    weights: dict[str, Tensor] = run_ranks(fit_with_fault, 2, None, 0, 0)[0][2]
    return weights


@pytest.mark.parametrize("broken_rank", [0, 1])
@pytest.mark.parametrize(
    ("target", "where", "from_call"), [(*fault, c) for fault, calls in FAULTS for c in calls], ids=str
)
def test_fault_on_one_rank_ends_monitoring_on_all(target: str, where: str, from_call: int, broken_rank: int) -> None:
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


def fit_with_a_layer_that_fails(broken_rank: int | None) -> tuple[list[str], dict[int, dict[str, float]]]:
    """The layer of ten units cannot be measured on one rank, from the second step on."""
    calls, measure = 0, collector.moments_of

    def measured(tensor: Tensor, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if dist.get_rank() == broken_rank and tensor.shape[-1] == 10 and calls > 10:
            raise RuntimeError("bad luck")
        return measure(tensor, *args)

    collector.moments_of = measured
    memory = MemoryLogger()
    torch.manual_seed(0)
    trainer = make_ddp_trainer(max_epochs=1, callbacks=[ActivationVarianceMonitor(1)], logger=memory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(DigitsMLP(num_samples=256))
    collector.moments_of = measure
    return [str(w.message) for w in caught if "ActivationVarianceMonitor" in str(w.message)], memory.steps


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_hook_that_fails_on_one_rank_costs_its_layer_on_all(broken_rank: int) -> None:
    """The numbers of all other layers are those of a run in which nothing fails."""
    (said, steps), (others, _) = run_ranks(fit_with_a_layer_that_fails, 2, broken_rank)
    (message,) = said
    assert message.startswith("ActivationVarianceMonitor leaves out 'network.4', which cannot be measured")
    assert message.endswith(f"rank {broken_rank}: hook on layer 'network.4': RuntimeError: bad luck")
    assert others == []
    (_, whole), _ = run_ranks(fit_with_a_layer_that_fails, 2, None)
    assert steps.keys() == whole.keys()
    assert "activation_variance/network.4" in steps[0]
    for step in list(whole)[1:]:
        lost = {tag for tag in whole[step] if tag not in steps[step]}
        assert lost == {f"{stat}/network.4" for stat in ("activation_variance", "signal_variance", "gradient_variance")}
        assert {tag: steps[step][tag] for tag in steps[step]} == {tag: whole[step][tag] for tag in steps[step]}


@pytest.mark.parametrize(
    ("target", "where"),
    [WRITE, STEP_RESULT],
)
def test_fault_after_the_collective(target: str, where: str) -> None:
    """Rank zero says it at once; the others hear of it at the next logged step."""
    (said, measured, _), (others, _, _) = run_ranks(fit_with_fault, 2, target, 0, 1)
    (message,) = said
    assert message.endswith(f"training goes on. {where}: RuntimeError: bad luck")
    assert measured == 1
    assert others == []


def test_fault_after_the_collective_on_another_rank() -> None:
    """Rank one's own reading fails in the second step: rank zero has that step, and learns of it in the third."""
    (said, measured, _), _ = run_ranks(fit_with_fault, 2, STEP_RESULT.target, 1, 1)
    assert [message.rpartition("goes on. ")[2] for message in said] == ["rank 1: reading: RuntimeError: bad luck"]
    assert measured == 2


class Uneven(nn.Module):
    """Rank 1 goes through another layer, at another width, from its second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.act, self.extra, self.head = nn.Linear(64, 8), nn.ReLU(), nn.Linear(64, 4), nn.Linear(8, 10)
        self.later = nn.ReLU()
        self.calls, self.rank = 0, None

    def forward(self, x: Tensor) -> Tensor:
        rank = dist.get_rank() if self.rank is None else self.rank
        hidden: Tensor = self.act(self.shared(x))
        if rank == 1 and self.calls >= 2:
            hidden = hidden + self.later(self.extra(x)).mean()
        else:
            hidden = hidden + 0 * sum(p.sum() for p in self.extra.parameters())  # DDP wants every gradient
        self.calls += 1
        return self.head(hidden)


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


def test_layouts_that_differ_between_ranks_are_merged() -> None:
    """New slots on one rank, in the middle of training: agreed again, and the numbers stay the truth."""
    steps = run_ranks(fit_uneven, 2)[0]
    torch.manual_seed(0)
    slow = Uneven().double()
    pixels, classes = digits()
    assert sorted(steps) == [0, 1, 2, 3]
    for step, actual in steps.items():

        def loss(network: nn.Module, batch: Any, step: int = step) -> Tensor:
            x, y, network.rank = batch
            network.calls = step
            return nn.functional.cross_entropy(network(x), y)

        rows = [slice(100 * rank + 8 * step, 100 * rank + 8 * step + 8) for rank in range(2)]
        batches: Any = [[(pixels[row].double(), classes[row], rank)] for rank, row in enumerate(rows)]
        expected = expected_tags(slow, batches, accumulation=1, loss=loss, rectifiers=["act", "later"])
        assert_tags_close(actual, expected)
        assert ("activation_variance/network.extra" in actual) == (step >= 2)
