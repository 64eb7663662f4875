"""On any number of ranks the monitor says what one process says about all their batches, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_init import ActivationVarianceMonitor, observe
from tests.support.models import DigitsConvNet, DigitsLSTM, DigitsTransformer, digits
from tests.support.modules import Checkpointed
from tests.support.namespaces import LIGHTNING, PYTORCH_LIGHTNING, Namespace, module_class
from tests.support.oracle import (
    DEFAULT_STATS,
    Batch,
    Batches,
    BatchModule,
    MemoryLogger,
    assert_tags_close,
    expected_tags,
)
from tests.support.ranks import run_ranks
from tests.support.trainers import make_ddp_trainer


def batches_of(rank: int, sizes: list[int], offset: int = 0) -> list[Batch]:
    """Micro-batches of the given sizes, cut from the digits; no two ranks share one."""
    pixels, classes = digits()
    starts = [offset + 400 * rank + sum(sizes[:i]) for i in range(len(sizes))]
    return [(pixels[a : a + n], classes[a : a + n]) for a, n in zip(starts, sizes, strict=True)]


ON_REQUEST = (
    *("activation_mean", "activation_rms", "activation_max", "saturation", "kurtosis", "weight_norm"),
    *("gradient_rms", "near_zero"),
)


def network() -> nn.Sequential:
    """A ReLU with a dead unit, a tanh that saturates, and outputs far from zero."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10))
    with torch.no_grad():
        layers[0].bias[3] = -1e3
        layers[2].weight.mul_(8)
        layers[4].bias.add_(100)
    return layers


def monitored(
    network: nn.Module, sizes: list[list[int]], accumulation: int, namespace: Namespace = LIGHTNING
) -> dict[int, dict[str, float]]:
    rank = dist.get_rank()
    memory, monitor = MemoryLogger(), ActivationVarianceMonitor(1, stats=["default", *ON_REQUEST])
    trainer = make_ddp_trainer(
        namespace=namespace,
        max_epochs=1,
        callbacks=[monitor],
        logger=memory,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
    )
    trainer.fit(module_class(Batches, namespace)(network, batches_of(rank, sizes[rank])))
    return memory.steps


@pytest.mark.parametrize(
    ("world_size", "sizes", "accumulation", "namespace"),
    [
        (1, [[16, 16, 16]], 1, LIGHTNING),
        (2, [[16, 16], [16, 16]], 1, LIGHTNING),
        (2, [[24, 3, 8, 11, 5], [1, 17, 8, 2, 30]], 4, LIGHTNING),  # unequal batches, and a short last window
        (2, [[24, 3, 8, 11, 5], [1, 17, 8, 2, 30]], 4, PYTORCH_LIGHTNING),
        (4, [[8, 9], [5, 8], [8, 1], [30, 8]], 2, LIGHTNING),
    ],
)
def test_logged_numbers_on_ranks_equal_one_process(
    world_size: int, sizes: list[list[int]], accumulation: int, namespace: Namespace
) -> None:
    reference = network().double()
    steps = run_ranks(monitored, world_size, network(), sizes, accumulation, namespace)[0]
    ranks = [[(x.double(), y) for x, y in batches_of(rank, sizes[rank])] for rank in range(world_size)]
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in sorted(steps):
        window = slice(step * accumulation, (step + 1) * accumulation)
        expected = expected_tags(
            reference,
            [batches[window] for batches in ranks],
            accumulation=accumulation,
            rectifiers=["1"],
            bounded={"3": (-1.0, 1.0)},
            stats=(*DEFAULT_STATS, *ON_REQUEST),
        )
        assert expected["dead_units/network.1"] > 0
        assert 0.1 < expected["saturation/network.3"] < 1
        assert_tags_close(steps[step], expected)
        optimizer.step()
    assert len(steps) == -(-len(sizes[0]) // accumulation)


def far_network() -> nn.Module:
    """Outputs of mean 10000 and standard deviation 1, and a gradient that is nearly the same everywhere."""
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(64))
        network[0].bias.fill_(1e4)
    return network


def far_loss(network: nn.Module, batch: Batch) -> Tensor:
    outputs = network[0](batch[0])
    return outputs.mean() + 1e-4 * (outputs - 1e4).square().mean() + 0 * network[1](outputs).sum()


def monitored_far() -> dict[int, dict[str, float]]:
    memory = MemoryLogger()
    trainer = make_ddp_trainer(
        max_epochs=1, callbacks=[ActivationVarianceMonitor(1)], logger=memory, use_distributed_sampler=False
    )
    trainer.fit(BatchModule(far_network(), batches_of(dist.get_rank(), [40]), far_loss))
    return memory.steps


def test_variance_far_from_zero_on_ranks() -> None:
    """The oracle has the very same float32 outputs: only the arithmetic on them is compared."""
    actual = run_ranks(monitored_far, 2)[0][0]
    batches = [batches_of(rank, [40]) for rank in range(2)]
    expected = expected_tags(far_network(), batches, accumulation=1, loss=far_loss)
    assert expected["activation_variance/network.0"] == pytest.approx(1.0, rel=0.2)
    assert 1e-8 < expected["gradient_variance/network.0"] * (40 * 64 * 2) ** 2 < 1e-7  # of a mean square of 1
    assert_tags_close(actual, expected)


def checkpointed(reentrant: bool) -> Checkpointed:
    torch.manual_seed(0)
    return Checkpointed(nn.Linear(64, 16), [mlp_block(), mlp_block()], nn.Linear(16, 10), reentrant=reentrant)


def mlp_block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpointed_blocks_are_recorded_once(reentrant: bool, accumulation: int) -> None:
    sizes = [[8, 5], [3, 9]]
    steps = run_ranks(monitored, 2, checkpointed(reentrant), sizes, accumulation)[0]
    ranks = [[(x.double(), y) for x, y in batches_of(rank, sizes[rank])] for rank in range(2)]
    plain = checkpointed(reentrant).double()
    plain.recompute = False
    expected = expected_tags(
        plain,
        [batches[:accumulation] for batches in ranks],
        accumulation=accumulation,
        rectifiers=["blocks.0.3", "blocks.1.3"],
    )
    assert_tags_close({tag: steps[0][tag] for tag in expected}, expected)


def observed(sizes: list[list[int]]) -> dict[str, float]:
    """Plain DistributedDataParallel, without Lightning."""
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(network())
    with observe(model) as watching:
        for x, y in batches_of(rank, sizes[rank]):
            nn.functional.cross_entropy(model(x), y).backward()
    return watching.compute().tags


def test_observe_on_ranks() -> None:
    sizes = [[8], [5]]
    tags, same = run_ranks(observed, 2, sizes)
    assert tags == same
    ranks = [[(x.double(), y) for x, y in batches_of(rank, sizes[rank])] for rank in range(2)]
    expected = expected_tags(network().double(), ranks, accumulation=1, prefix="", rectifiers=["1"])
    assert_tags_close(tags, expected)


def neutral(kind: str, monitor: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and random state after an epoch of DDP with dropout."""
    seed_everything(3, verbose=False)
    module = {"conv": DigitsConvNet, "lstm": DigitsLSTM, "transformer": partial(DigitsTransformer, dropout=0.1)}[kind]()
    callbacks = [ActivationVarianceMonitor(1, stats=["default", *ON_REQUEST])] if monitor else []
    make_ddp_trainer(max_epochs=1, callbacks=callbacks, logger=MemoryLogger()).fit(module)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}, torch.get_rng_state()


@pytest.mark.parametrize("kind", ["conv", "lstm", "transformer"])
def test_training_on_ranks_with_the_monitor_is_bit_identical(kind: str) -> None:
    for plain, watched in zip(run_ranks(neutral, 2, kind, False), run_ranks(neutral, 2, kind, True), strict=True):
        assert torch.equal(plain[1], watched[1])
        assert plain[0].keys() == watched[0].keys()
        assert all(torch.equal(tensor, watched[0][name]) for name, tensor in plain[0].items())
