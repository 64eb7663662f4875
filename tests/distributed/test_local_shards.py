"""Which elements a process holds: against DTensor itself, for every rank of one- and two-dimensional meshes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_init.distributed.shards import LocalShard, _flat_positions, local_shard_of
from lightning_init.initialization.streams import Block
from tests.support.sharded import as_rank

LAYOUTS: dict[tuple[int, ...], list[list[Placement]]] = {
    (4,): [[Replicate()], *([Shard(dim)] for dim in range(3))],
    (2, 2): [
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Shard(0), Shard(0)],
        [Shard(1), Shard(1)],
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(2), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],  # FSDP2 over tensor parallel
        [_StridedShard(1, split_factor=2), Shard(1)],
    ],
    (3, 1): [[Shard(0), Replicate()], [Shard(1), Shard(1)], [_StridedShard(0, split_factor=1), Shard(0)]],
}
RANKS = [(mesh, rank) for mesh in LAYOUTS for rank in range(mesh[0] * (mesh[1] if len(mesh) > 1 else 1))]


@pytest.fixture(params=RANKS, ids=str)
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    mesh_shape, rank = request.param
    with as_rank(rank, mesh_shape) as mesh:
        yield mesh


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every element is its own flat position."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def sharded(shape: tuple[int, ...], mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    return distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)


def positions_found(shard: LocalShard, block: Block) -> tuple[Tensor, Tensor]:
    """For one block: the local elements that ``overlap`` says it fills, and with which of its own elements."""
    overlap = shard.overlap(block.start, block.stop)
    if overlap is None:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    where, which = overlap
    return shard.local.flatten()[where], torch.arange(block.start, block.stop)[which]


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(0, 20),
    st.integers(1, 30),
    st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_local_shard_is_what_dtensor_holds(
    mesh: DeviceMesh, sizes: list[int], start: int, length: int, data: st.DataObject
) -> None:
    shape = tuple(sizes)
    layouts = [
        layout for layout in LAYOUTS[tuple(mesh.shape)] if all(getattr(p, "dim", 0) < len(shape) for p in layout)
    ]
    placements = data.draw(st.sampled_from(layouts))
    whole = sharded(shape, mesh, placements)
    held = whole.to_local().flatten()

    shard = local_shard_of(whole)

    assert shard.full_shape == shape
    assert shard.is_sharded == any(not isinstance(placement, Replicate) for placement in placements)
    assert torch.equal(shard.take(numbered(shape)), held)
    local, of_block = positions_found(shard, Block(start, start + length, 0))
    assert torch.equal(local, of_block)  # elements are their own positions: what is filled is what is drawn
    assert torch.equal(local, held[(held >= start) & (held < start + length)])


def test_local_shard_of_rows_is_a_range(mesh: DeviceMesh) -> None:
    """Shard(0), the common case, holds one range: no memory for positions."""
    for layout in LAYOUTS[tuple(mesh.shape)]:
        if all(getattr(placement, "dim", 0) == 0 for placement in layout):
            assert local_shard_of(sharded((9, 5), mesh, layout)).positions is None


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (4, 3)])
def test_local_shard_of_a_plain_tensor_is_all_of_it(shape: tuple[int, ...]) -> None:
    shard = local_shard_of(numbered(shape))
    assert (shard.full_shape, shard.offset, shard.positions, shard.is_sharded) == (shape, 0, None, False)
    assert torch.equal(shard.take(numbered(shape)), numbered(shape).flatten())


def test_local_shard_of_a_scalar() -> None:
    with as_rank(1, (2,)) as mesh:
        shard = local_shard_of(distribute_tensor(torch.tensor(3.0), mesh, [Replicate()], src_data_rank=None))
    assert shard.overlap(0, 10) == (slice(0, 1), slice(0, 1))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_local_tensor_shares_the_parameters_memory(is_sharded: bool) -> None:
    with as_rank(0, (2,)) as mesh:
        weight = torch.zeros(4, 3)
        parameter = nn.Parameter(
            distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None) if is_sharded else weight
        )
        shard = local_shard_of(parameter)
        assert not shard.local.requires_grad
        shard.local.fill_(7.0)
        held = parameter.to_local() if isinstance(parameter.data, DTensor) else parameter
        assert (held == 7).all()


def test_partial_sums_are_refused() -> None:
    with as_rank(0, (2,)) as mesh:
        partial = DTensor.from_local(torch.zeros(3), mesh, [Partial()], run_check=False)
        with pytest.raises(
            ValueError, match=r"^a parameter with partial placements .*Partial.* cannot be initialised$"
        ):
            local_shard_of(partial)


def test_block_outside_of_the_local_shard_has_no_positions() -> None:
    shard = LocalShard(torch.zeros(10), torch.Size([100]), offset=20)
    assert shard.overlap(0, 20) is None
    assert shard.overlap(30, 40) is None
    assert shard.overlap(15, 25) == (slice(0, 5), slice(5, 10))


def test_positions_out_of_order_are_refused() -> None:
    """Blocks are found by bisection."""
    assert _flat_positions([torch.tensor([1, 2]), torch.tensor([0, 3])], torch.Size([3, 4])).tolist() == [4, 7, 8, 11]
    with pytest.raises(ValueError, match=r"^a shard whose elements are not in ascending order cannot be initialised$"):
        _flat_positions([torch.tensor([2, 1])], torch.Size([3]))
