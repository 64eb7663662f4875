"""Writing, against the slow plain way: every layout, dtype, shard and parametrization holds the same values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.utils import parametrizations

from lightning_init import Normal, Rule, Scheme, initialize
from lightning_init.initialization import streams
from lightning_init.initialization.draw import Measured, draw_chunk, make_tasks
from lightning_init.initialization.plan import make_plan
from lightning_init.initialization.rules import Request
from lightning_init.initialization.streams import Block
from lightning_init.initialization.write import write_all
from tests.support.sharded import as_rank

SCHEMES = ["he_normal", "xavier_uniform", "lecun_normal_truncated", "orthogonal", "sparse", "identity"]


def plain(model: nn.Module, scheme: str | Scheme, seed: int = 3) -> Mapping[str, Tensor]:
    """The slow way: all values of all slices of each parameter, one after the other, in float32 or complex64."""
    expected = {}
    for task in make_tasks(make_plan(model, Request.of(scheme)), seed):
        parameter = task.assignment.site.parameter
        shape, count = parameter.shape, len(task.chunks)
        of_chunk = (shape[0] // count, *shape[1:]) if shape else ()
        chunks = [draw_chunk(chunk, of_chunk, task.role, parameter.dtype) for chunk in task.chunks]
        expected[task.assignment.name] = torch.cat(chunks) if shape else chunks[0]
    return expected


def write(model: nn.Module, scheme: str | Scheme = "he_normal", seed: int = 3) -> list[Measured]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    return write_all(make_tasks(make_plan(model, Request.of(scheme)), seed))


def assert_plain(model: nn.Module, scheme: str | Scheme) -> None:
    expected = plain(model, scheme)
    write(model, scheme)
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(7, 5),
    "Conv2d grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "ConvTranspose2d grouped": lambda: nn.ConvTranspose2d(6, 9, 3, groups=3),
    "LSTM of odd size": lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=3),
    "GRU": lambda: nn.GRU(3, 5),
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 2),
    "MultiheadAttention apart": lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5),
    "channels last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "channels last 3d": lambda: nn.Conv3d(4, 6, 3).to(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize(("model", "scheme"), [*product(MODELS, SCHEMES), ("longer than a block", "he_normal")])
def test_layouts_hold_the_plain_values(model: str, scheme: str) -> None:
    assert_plain(MODELS[model]() if model in MODELS else nn.Linear(521, 1024, bias=False), scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_dtypes_hold_the_plain_values(dtype: torch.dtype, scheme: str) -> None:
    assert_plain(nn.Linear(30, 20).to(dtype), scheme)


class Holder(nn.Module):
    """A Linear by its attributes, with a weight of any layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(7, 5).t(),
        lambda: torch.zeros(10, 14)[::2, ::2],
        lambda: torch.zeros(36)[1:].view(5, 7),
    ],
    ids=["transposed", "every other", "at an odd place"],
)
def test_strides_hold_the_plain_values(make: Callable[[], Tensor], scheme: str) -> None:
    with torch.no_grad():
        contiguous, strided = Holder(torch.zeros(make().shape)), Holder(make())
    write(contiguous, scheme)
    before = strided.layer.weight.stride()
    write(strided, scheme)
    assert torch.equal(strided.layer.weight, contiguous.layer.weight)
    assert strided.layer.weight.stride() == before


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [(0, 7), (5, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_empty_parameter_is_left_out(sizes: tuple[int, int], scheme: str) -> None:
    model = nn.Sequential(nn.Linear(*sizes), nn.Linear(3, 3))
    report = initialize(model, scheme)
    assert report["0.weight"].reason == "no elements"
    assert report["1.weight"].reason == ""
    report.check()


def test_scalar_is_drawn() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    report = initialize(model, rules=[Rule("scale", Normal(1.0))])
    assert model.scale.item() not in (0.0, 1.0)
    assert report["scale"].measured_std == pytest.approx(abs(model.scale.item()))


LAYOUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((4,), [Replicate()]),
    ((2, 2), [Shard(0), Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 2), [_StridedShard(1, split_factor=2), Shard(1)]),
]


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block", [4, 16, 50])
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), scheme=st.sampled_from(SCHEMES), bf16=st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_hold_their_elements_of_the_plain_values(
    rank: int,
    layout: tuple[tuple[int, ...], list[Placement]],
    block: int,
    rows: int,
    columns: int,
    scheme: str,
    bf16: bool,
) -> None:
    """Uneven and empty shards included; with small blocks, so that shards begin and end inside of them."""
    mesh_shape, placements = layout
    zeros = torch.full((rows, columns), math.nan, dtype=torch.bfloat16 if bf16 else torch.float32)
    with pytest.MonkeyPatch.context() as patch, as_rank(rank, mesh_shape) as mesh:
        patch.setattr(streams, "BLOCK", block)
        one, many = Holder(zeros), Holder(distribute_tensor(zeros.clone(), mesh, placements, src_data_rank=None))
        write(one, scheme)
        (measured,) = write_all(make_tasks(make_plan(many, Request.of(scheme)), 3))
        expected = distribute_tensor(one.layer.weight.detach(), mesh, placements, src_data_rank=None).to_local()
        held = many.layer.weight.to_local()
        assert torch.equal(held, expected)
        assert measured.count == expected.numel()
        assert measured.squares == pytest.approx(float(expected.double().square().sum()), rel=1e-5, abs=1e-12)


def test_checksums_of_shards_and_replicas_agree_between_ranks() -> None:
    checksums = []
    for rank in range(4):
        with as_rank(rank, (4,)) as mesh:
            model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False))
            weight = distribute_tensor(torch.zeros(3, 5), mesh, [Shard(0)], src_data_rank=None)
            model[0].weight = nn.Parameter(weight)
            checksums.append(
                [part.checksum for part in write_all(make_tasks(make_plan(model, Request.of("he_normal")), rank // 2))]
            )
    assert checksums[0] == checksums[1]
    assert checksums[2] == checksums[3]
    assert all(first != second for first, second in zip(checksums[0], checksums[2], strict=True))  # another seed


def blocks_drawn(monkeypatch: pytest.MonkeyPatch, rank: int, placements: list[Placement]) -> set[int]:
    drawn: list[int] = []
    original = Block.draw

    def counted(self: Block, *args: object, **options: object) -> Tensor:
        drawn.append(self.number)
        return original(self, *args, **options)

    with monkeypatch.context() as patch, as_rank(rank, (4,)) as mesh:
        patch.setattr(streams, "BLOCK", 64)
        patch.setattr(Block, "draw", counted)
        weight = distribute_tensor(torch.zeros(64, 20), mesh, placements, src_data_rank=None)  # 20 blocks
        write_all(make_tasks(make_plan(Holder(weight), Request.of("he_normal")), 3))
    return set(drawn)


def test_blocks_drawn_by_a_rank_are_those_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    per_rank = [blocks_drawn(monkeypatch, rank, [Shard(0)]) for rank in range(4)]
    assert per_rank == [
        set(range(5 * rank, 5 * rank + 5)) | {0} for rank in range(4)
    ]  # block 0 also is the fingerprint
    assert [len(blocks_drawn(monkeypatch, rank, [Shard(1)])) for rank in range(4)] == [20] * 4
    assert len(blocks_drawn(monkeypatch, 2, [Replicate()])) == 20


@pytest.mark.parametrize("row", [0, 3, -1])
def test_padding_row_is_set_to_zero(row: int) -> None:
    for layer in (nn.Embedding(5, 8, padding_idx=row), nn.EmbeddingBag(5, 8, padding_idx=row)):
        initialize(layer)
        assert (layer.weight[row] == 0).all()
        assert layer.weight.count_nonzero() == 4 * 8


def test_padding_row_of_a_transposed_table() -> None:
    layer = nn.Embedding(5, 8, padding_idx=2)
    layer.weight = nn.Parameter(torch.zeros(8, 5).t())
    initialize(layer)
    assert (layer.weight[2] == 0).all()
    assert layer.weight.count_nonzero() == 4 * 8


@pytest.mark.parametrize(
    ("rank", "placements"), list(product(range(4), [[Shard(0)], [Shard(1)], [Replicate()]])), ids=str
)
def test_padding_row_of_a_sharded_table(rank: int, placements: list[Placement]) -> None:
    table = nn.Embedding(6, 9, padding_idx=4)
    write_all(make_tasks(make_plan(table, Request.of("he_normal")), 0))
    with as_rank(rank, (4,)) as mesh:
        layer = nn.Embedding(6, 9, padding_idx=4)
        layer.weight = nn.Parameter(distribute_tensor(torch.ones(6, 9), mesh, placements, src_data_rank=None))
        write_all(make_tasks(make_plan(layer, Request.of("he_normal")), 0))
        expected = distribute_tensor(table.weight.detach(), mesh, placements, src_data_rank=None)
        assert torch.equal(layer.weight.to_local(), expected.to_local())


def test_padding_row_of_a_table_tied_to_an_output_layer() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 6, padding_idx=2), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["table"].weight
    initialize(model)
    assert (model["head"].weight[2] == 0).all()
    assert model["head"].weight.count_nonzero() == 9 * 6


def test_write_is_in_place() -> None:
    """The optimizer already holds these very tensors."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), parametrizations.weight_norm(nn.Linear(4, 3)), nn.LSTM(3, 2))
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    initialize(model)
    for (held, pointer), parameter in zip(before, model.parameters(), strict=True):
        assert held is parameter
        assert parameter.data_ptr() == pointer
        assert parameter.requires_grad
        assert parameter.grad is None
        assert parameter.is_leaf
