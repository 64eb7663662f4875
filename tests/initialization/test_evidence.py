"""What a parameter holds, in numbers that add up over shards."""

from __future__ import annotations

import functools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_init.distributed.shards import local_shard_of
from lightning_init.initialization.evidence import Evidence, evidence_of
from tests.support.sharded import as_rank


def held_by(values: Tensor, slices: int = 1, *, is_table: bool = False) -> Evidence:
    found = evidence_of(local_shard_of(values), slices, is_table=is_table, version=1)
    assert found is not None
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 70), columns=st.integers(1, 9), ranks=st.integers(1, 5), slices=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_evidence_of_shards_adds_up_to_that_of_the_whole(rows: int, columns: int, ranks: int, slices: int) -> None:
    values = drawn(rows * slices, columns, seed=rows)
    values[0] = 0.0
    whole = held_by(values, slices, is_table=True)
    shards = []
    for rank in range(ranks):
        with as_rank(rank, [ranks]) as mesh:
            shard = local_shard_of(distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None))
            found = evidence_of(shard, slices, is_table=True, version=1)
        if found is not None:
            shards.append(found)
    total = functools.reduce(operator.add, shards)
    assert (total.lows, total.highs, total.count) == (whole.lows, whole.highs, whole.count)
    assert total.total == pytest.approx(whole.total, rel=1e-12, abs=1e-12)
    assert total.squares == pytest.approx(whole.squares, rel=1e-12)
    assert total.column_products == pytest.approx(whole.column_products, rel=1e-9, abs=1e-12)
    exact = values.double()
    assert whole.squares == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert whole.count == (rows * slices - int((exact == 0).all(1).sum())) * columns


def test_evidence_divided_by_copies_is_that_of_one() -> None:
    one = held_by(drawn(6, 4))
    both = (one + one).divided_by(2)
    assert (both.count, both.total, both.squares) == (one.count, one.total, one.squares)
    assert both.rms == one.rms


@pytest.mark.parametrize("values", [torch.empty(0, 3), torch.empty(3, 3, device="meta"), torch.ones(2, 2) + 0j])
def test_evidence_of_nothing_to_read_is_none(values: Tensor) -> None:
    assert evidence_of(local_shard_of(values), 1, is_table=False, version=1) is None


def test_constants_are_found_by_slice() -> None:
    biases = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert held_by(biases, 4).constants == (0.0, 1.0, 0.0, 0.0)
    assert held_by(biases).constants is None
    assert held_by(torch.tensor(3.0)).constants == (3.0,)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_wherever_it_is(number: float) -> None:
    values = drawn(50, 4)
    assert held_by(values).is_finite
    for place in (0, 99, 199):
        broken = values.clone()
        broken.view(-1)[place] = number
        assert not held_by(broken).is_finite


def sinusoids() -> Tensor:
    angles = torch.arange(64)[:, None] / 10000 ** (torch.arange(16) / 16)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


STRUCTURED = {
    "identity": torch.eye(16),
    "sparse": drawn(32, 32) * (drawn(32, 32, seed=1) > 1),
    "sinusoids": sinusoids(),
    "grid of offsets": torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2)).flatten(),
    "repeated kernels": drawn(4, 8, 3, 3).repeat_interleave(4, 0),
    "Sobel filters": torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(4, 1, 3, 3),
    "orthogonal rows": nn.init.orthogonal_(torch.empty(16, 64), generator=torch.Generator().manual_seed(0)),
    "orthogonal and square": nn.init.orthogonal_(torch.empty(8, 8), generator=torch.Generator().manual_seed(0)),
    "identity in bfloat16": torch.eye(16).bfloat16(),
    "smooth filters": torch.sin(torch.linspace(0, 6, 25)).expand(8, 25) * drawn(8, 1),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structure_is_found(name: str) -> None:
    assert held_by(STRUCTURED[name]).has_structure


@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_orthogonal_columns_of_a_tall_matrix_are_found(factor: float) -> None:
    tall = nn.init.orthogonal_(torch.empty(64, 16), generator=torch.Generator().manual_seed(0)) * factor
    assert held_by(tall).columns_are_orthogonal
    assert not held_by(drawn(64, 16)).columns_are_orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(3,), (16,), (500,), (8, 8), (64, 3), (3, 64), (16, 8, 3, 3), (300, 300), (100_000, 2)]
)
def test_draws_have_no_structure(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for values in (
            torch.empty(shape).normal_(generator=generator),
            torch.empty(shape).uniform_(-0.1, 0.1, generator=generator),
            nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator),
        ):
            evidence = held_by(values.to(dtype))
            assert not evidence.has_structure
            assert not evidence.columns_are_orthogonal
            assert not evidence.mean_is_off
            assert evidence.constants is None
