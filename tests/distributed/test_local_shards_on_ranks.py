"""Shards on real ranks: each holds its part of what one process draws, and draws only what it needs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.utils import parametrizations

from lightning_init import Normal, initialize
from lightning_init.initialization import streams
from lightning_init.initialization.streams import Block
from tests.support.ranks import run_ranks
from tests.support.weights import Weights, assert_same, weights_of

VectorLayout = tuple[tuple[int, ...], list[Placement]]
SEED = 11


class Net(nn.Module):
    """Odd sizes, slices, a table with a padding row, an output layer tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 7, padding_idx=5)
        self.first = nn.Linear(7, 11)
        self.lstm = nn.LSTM(11, 7)
        self.conv = nn.Conv1d(6, 9, 3, groups=3)
        self.words = nn.Embedding(10, 6, padding_idx=9)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.words.weight


def expected(scheme: str, dtype: torch.dtype = torch.float32) -> Weights:
    net = Net().to(dtype)
    initialize(net, scheme, seed=SEED)
    return weights_of(net)


def distributed(layout: VectorLayout, scheme: str, dtype: torch.dtype) -> Weights:
    mesh_shape, placements = layout
    mesh = init_device_mesh("cpu", mesh_shape)
    net = Net().to(dtype)
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in shared:
                fitting = [p if getattr(p, "dim", 0) < parameter.ndim else Replicate() for p in placements]
                shard = distribute_tensor(torch.zeros_like(parameter), mesh, fitting, src_data_rank=None)
                shared[parameter] = nn.Parameter(shard)
            module._parameters[name] = shared[parameter]
    initialize(net, scheme, seed=SEED).check()
    return weights_of(net)


LAYOUTS: list[VectorLayout] = [
    ((2,), [Shard(0)]),
    ((2,), [Shard(1)]),
    ((4,), [Shard(0)]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("scheme", "dtype"), [("he_normal", torch.float32), ("orthogonal", torch.bfloat16)], ids=str)
def test_local_shards_together_are_the_full_tensor(layout: VectorLayout, scheme: str, dtype: torch.dtype) -> None:
    world_size = int(torch.tensor(layout[0]).prod())
    for weights in run_ranks(distributed, world_size, layout, scheme, dtype):
        assert_same(weights, expected(scheme, dtype))


def test_expected_padding_rows_are_zero() -> None:
    weights = expected("he_normal")
    assert not weights["table.weight"][5].any()
    assert not weights["words.weight"][9].any()


def blocks_per_rank(placement: Placement) -> tuple[list[int], bool]:
    """Which of the six blocks of a weight this rank drew, and whether the ranks together hold what one would."""
    drawn = []
    original = Block.draw

    def counted(self: Block, *args: object, **options: object) -> Tensor:
        if len(self) > 16:  # the start of the stream, which ranks compare, has 16 values
            drawn.append(self.number)
        return original(self, *args, **options)

    Block.draw = counted
    streams.BLOCK = 1000  # ten rows
    layer = nn.Linear(100, 60, bias=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement], src_data_rank=None))
    initialize(layer, Normal(), seed=SEED)
    here = sorted(drawn)
    alone = streams.draw_all(Normal(), streams.Key(SEED, "weight"), 6000).view(60, 100)
    return here, torch.equal(layer.weight.full_tensor(), alone)


@pytest.mark.parametrize(
    ("world_size", "placement", "numbers"),
    [
        (2, Shard(0), [[0, 1, 2], [3, 4, 5]]),
        (4, Shard(0), [[0, 1], [1, 2], [3, 4], [4, 5]]),  # 15 rows each: a block in the middle is drawn twice
        (2, Shard(1), [[0, 1, 2, 3, 4, 5]] * 2),
        (2, Replicate(), [[0, 1, 2, 3, 4, 5]] * 2),
    ],
    ids=str,
)
def test_blocks_drawn_by_a_rank_are_those_it_holds(
    world_size: int, placement: Placement, numbers: list[list[int]]
) -> None:
    results = run_ranks(blocks_per_rank, world_size, placement)
    assert [drawn for drawn, _ in results] == numbers
    assert all(is_whole for _, is_whole in results)


def normed() -> nn.Sequential:
    return nn.Sequential(*(parametrizations.weight_norm(nn.Linear(9, 9, bias=False)) for _ in range(6)))


def fsdp2_parametrized() -> tuple[list[Tensor], list[float | None]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = fully_shard(normed(), mesh=mesh)
    report = initialize(net, "he_normal", seed=SEED)
    weights = [layer.weight.detach() for layer in net]
    whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    return whole, [entry.measured_std for entry in report.drawn]


def test_parametrized_weights_under_fsdp2() -> None:
    """Reading them is a collective: with several threads at work, all ranks need one order."""
    alone = normed()
    initialize(alone, "he_normal", seed=SEED)
    expected = [layer.weight.detach() for layer in alone]
    for weights, measured in run_ranks(fsdp2_parametrized, 2, threads=2):
        torch.testing.assert_close(weights, expected)
        assert measured == pytest.approx([weight.square().mean().sqrt().item() for weight in expected], rel=1e-5)
