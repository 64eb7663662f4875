"""The values of one parameter: its slices, its blocks, what is measured of them, and the plain way beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from lightning_init import Constant, Distribution, Normal, Orthogonal, Role, TruncatedNormal, Uniform, plan
from lightning_init.distributed.shards import local_shard_of
from lightning_init.initialization.draw import (
    GENERIC_ROLE,
    DrawChunk,
    Measured,
    block_jobs,
    draw_chunk,
    make_tasks,
    matrix_of,
    measure,
    stream_fingerprint,
)
from lightning_init.initialization.streams import BLOCK, Key, draw_all
from lightning_init.introspect.roles import role_of
from lightning_init.schemes.structured import Matrix


def part(values: Distribution | Orthogonal, count: int, start: int = 0, key: Key = Key(0, "w")) -> DrawChunk:  # noqa: B008
    return DrawChunk(start, start + count, values, 1.0, key)


def filled_by_blocks(piece: DrawChunk, out: Tensor) -> Measured:
    """Fill a plain tensor block by block, last block first."""
    shard = local_shard_of(out)
    measured = Measured()
    for job in reversed(list(block_jobs(piece, shard, shard.local.view(-1)))):
        measured += job()
    return measured


DISTRIBUTIONS = [Normal(0.02), Uniform(-0.1, 0.3), TruncatedNormal(mean=1.0), Constant(0.3)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize("count", [1, 15, 17, BLOCK, BLOCK + 1, 2 * BLOCK + 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_drawing_block_by_block_equals_drawing_at_once(
    distribution: Distribution, count: int, dtype: torch.dtype
) -> None:
    piece = part(distribution, count)
    out = torch.full((count,), math.nan, dtype=dtype)
    measured = filled_by_blocks(piece, out)
    expected = draw_chunk(piece, (count,), GENERIC_ROLE, dtype)
    assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, expected.to(dtype))
    reference = measure(expected.to(dtype), distribution.target_mean)
    assert (measured.count, measured.checksum) == (reference.count, reference.checksum)
    assert measured.squares == pytest.approx(reference.squares, rel=1e-6)


@pytest.mark.parametrize("start", [1, 7, BLOCK - 1])
def test_chunk_is_the_same_wherever_it_starts(start: int) -> None:
    """A gate of odd size leaves the next one at an odd place in memory."""
    count = 2 * BLOCK + 5
    memory = torch.full((start + count + 3,), math.nan)
    measured = filled_by_blocks(part(Normal(), count, start), memory)
    alone = torch.empty(count)
    assert filled_by_blocks(part(Normal(), count), alone).checksum == measured.checksum
    assert torch.equal(memory[start : start + count], alone)
    assert memory[:start].isnan().all()
    assert memory[start + count :].isnan().all()


def test_gates_have_chunks_and_streams_of_their_own() -> None:
    lstm = nn.LSTM(3, 5)
    parts = next(task.chunks for task in make_tasks(plan(lstm), 9) if task.assignment.name == "weight_hh_l0")
    assert [(p.start, p.stop) for p in parts] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    assert [p.key for p in parts] == [Key(9, "weight_hh_l0", gate) for gate in "ifgo"]
    assert len({stream_fingerprint(p) for p in parts}) == 4


def test_chunk_of_an_undivided_parameter_has_no_name() -> None:
    (step,) = plan(nn.Linear(4, 6, bias=False))
    (task,) = make_tasks([step], 1)
    assert task.chunks == (DrawChunk(0, 24, step.initializers[0], step.gain, Key(1, "weight", "")),)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_double_precision_is_used(distribution: Distribution) -> None:
    """A float64 parameter holds numbers that float32 does not, constants exactly."""
    values = draw_chunk(part(distribution, 100), (100,), GENERIC_ROLE, torch.float64)
    assert (values.float().double() != values).double().mean() > 0.9
    if isinstance(distribution, Constant):
        assert (values == distribution.value).all()


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    st.integers(0, 49),
    st.sampled_from([0.0, 1.5, -1000.0]),
)
def test_measured_sums_add_up_wherever_they_are_split(numbers: list[float], cut: int, mean: float) -> None:
    cut = min(cut, len(numbers)) // 2 * 2  # blocks are split at even places only
    values, distribution = torch.tensor(numbers), Normal(mean=mean)
    at_once = measure(values, distribution.target_mean)
    split = measure(values[:cut], distribution.target_mean)
    split += measure(values[cut:], distribution.target_mean)
    assert (split.count, split.checksum) == (at_once.count, at_once.checksum) == (len(numbers), at_once.checksum)
    assert split.squares == pytest.approx(at_once.squares, rel=1e-5)
    reference = ((np.array(numbers, dtype=np.float64) - mean) ** 2).mean() ** 0.5
    assert at_once.std == pytest.approx(reference, rel=1e-5, abs=1e-21)


def test_measured_of_no_elements() -> None:
    nothing = measure(torch.empty(0), 0.0)
    assert (nothing.squares, nothing.count, nothing.checksum, nothing.std) == (0.0, 0, 0, 0.0)


def test_measured_is_accurate_for_large_tensors() -> None:
    """Summed in one go in float32, the squares of 2²⁴ elements would be off by 6e-5."""
    values = torch.rand(1 << 24, generator=torch.Generator().manual_seed(0))
    assert float(torch.dot(values, values)) != pytest.approx(float(values.double().square().sum()), rel=1e-5)
    assert measure(values, 0.0).squares == pytest.approx(float(values.double().square().sum()), rel=1e-6)


def test_checksum_depends_on_every_bit() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    checksums = set()
    for index in range(1001):  # the last bit of any one element
        changed = values.clone()
        changed.view(torch.int32)[index] ^= 1
        checksums.add(measure(changed, 0.0).checksum)
    assert measure(values, 0.0).checksum not in checksums
    assert measure(values.double(), 0.0).checksum == measure(values, 0.0).checksum
    assert measure(-torch.zeros(3), 0.0).checksum != measure(torch.zeros(3), 0.0).checksum


def test_checksum_is_a_signed_64_bit_integer() -> None:
    largest = Measured(checksum=2**63 - 1)
    largest += Measured(checksum=1)
    assert largest.checksum == -(2**63)


def test_measured_stays_transformed() -> None:
    measured = Measured()
    measured += Measured(is_transformed=True)
    measured += Measured()
    assert measured.is_transformed


@pytest.mark.parametrize("distribution", [Normal(0.5), Uniform(-1.0, 3.0), TruncatedNormal(0.1, mean=2.0)], ids=repr)
def test_complex_numbers_have_the_std_around_the_mean(distribution: Distribution) -> None:
    count = 1 << 16
    values = draw_chunk(part(distribution, count), (count,), GENERIC_ROLE, torch.complex64)
    assert values.dtype == torch.complex64
    around = values.numpy().astype(np.complex128) - distribution.target_mean
    std = distribution.target_std
    # |z|² of two independent halves: a relative standard error of √((kurtosis - 1) / 8n) for its root, five of them.
    error = 5 * math.sqrt((distribution.kurtosis - 1) / (8 * count))
    assert np.sqrt((np.abs(around) ** 2).mean()) == pytest.approx(std, rel=error)
    assert measure(values, distribution.target_mean).std == pytest.approx(std, rel=error)
    assert measure(values, distribution.target_mean).count == count
    for half in (around.real, around.imag):
        assert half.std() == pytest.approx(std / math.sqrt(2), rel=error * math.sqrt(2))
        assert abs(half.mean()) < 5 * std / math.sqrt(2 * count)
    assert abs(np.corrcoef(around.real, around.imag)[0, 1]) < 5 / math.sqrt(count)


def test_complex_halves_keep_the_shape() -> None:
    values = draw_chunk(part(Normal(), 1 << 14), (1 << 14,), GENERIC_ROLE, torch.complex64)
    for half in (values.real, values.imag):
        assert stats.kstest(half.numpy() * math.sqrt(2), "norm").pvalue > 1e-6


def test_complex_constant_is_real() -> None:
    assert torch.equal(
        draw_chunk(part(Constant(2.0), 4), (2, 2), GENERIC_ROLE, torch.complex64), torch.full((2, 2), 2 + 0j)
    )


@pytest.mark.parametrize(
    ("module", "attribute", "expected"),
    [
        (nn.Linear(3, 5), "weight", Matrix(5, 3)),
        (nn.Conv2d(4, 6, (3, 5), groups=2), "weight", Matrix(3, 2, (3, 5))),
        (nn.ConvTranspose2d(4, 6, (3, 5), groups=2), "weight", Matrix(3, 2, (3, 5))),
        (nn.ConvTranspose1d(4, 6, 3), "weight", Matrix(6, 4, (3,))),
        (nn.Bilinear(2, 3, 5), "weight", Matrix(5, 2, (3,))),
    ],
)
def test_matrix_rows_are_outputs_and_columns_inputs(module: nn.Module, attribute: str, expected: Matrix) -> None:
    role = role_of(module, attribute)
    assert role is not None
    assert matrix_of(tuple(module.get_parameter(attribute).shape), role) == expected


@pytest.mark.parametrize("shape", [(), (4,)])
def test_matrix_of_refuses_a_vector(shape: tuple[int, ...]) -> None:
    message = rf"^a structured scheme needs a weight of two or more dimensions, got shape {shape}$".replace("(", r"\(")
    with pytest.raises(ValueError, match=message.replace(")", r"\)")):
        matrix_of(shape, GENERIC_ROLE)


def test_matrix_of_an_unknown_parameter_is_all_of_it() -> None:
    assert matrix_of((4, 3), GENERIC_ROLE) == Matrix(4, 3)
    assert draw_chunk(part(Orthogonal(), 12), (4, 3), GENERIC_ROLE, torch.float32).shape == (4, 3)


def test_groups_have_streams_of_their_own() -> None:
    role = role_of(nn.Conv1d(4, 8, 3, groups=2), "weight")
    both = draw_chunk(part(Orthogonal(), 48), (8, 2, 3), role, torch.float32)
    first, second = both.chunk(2)
    assert not torch.equal(first, second)
    alone = Role("weight", Normal(), role.fans) if role else None
    assert torch.equal(
        first, draw_chunk(part(Orthogonal(), 24, key=Key(0, "w", "/0")), (4, 2, 3), alone, torch.float32)
    )


@pytest.mark.parametrize("values", [Normal(), Uniform(0, 1), Orthogonal()], ids=repr)
def test_stream_fingerprint_depends_on_the_stream(values: Distribution | Orthogonal) -> None:
    songs = [
        stream_fingerprint(part(values, 100, key=key))
        for key in (Key(0, "w"), Key(1, "w"), Key(0, "v"), Key(0, "w", "q"))
    ]
    assert len(set(songs)) == 4
    assert stream_fingerprint(part(values, 7)) == songs[0]  # whatever the size


def test_stream_fingerprint_depends_on_the_distribution() -> None:
    make: list[Callable[[], Distribution]] = [lambda: Normal(), lambda: Normal(2.0), lambda: Uniform(0, 1)]
    assert len({stream_fingerprint(part(distribution(), 100)) for distribution in make}) == 3
    assert stream_fingerprint(part(Normal(), 100)) == measure(draw_all(Normal(), Key(0, "w"), 16), 0.0).checksum
