"""Sums of squares against float64, of tensors of every size and kind at once."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_init import native
from lightning_init.monitor import parameter_norms
from lightning_init.monitor.parameter_norms import sums_of_squares


@pytest.fixture(params=["compiled", "torch alone"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: as installed with a C compiler and without."""
    if request.param == "torch alone":
        monkeypatch.setattr(native, "sums", None)


SIZES = [0, 1, 3, 100, parameter_norms._SMALL, parameter_norms._SMALL + 1, 3 * parameter_norms._SMALL]


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(["f4", "f8", "bf16"])), max_size=40))
@settings(deadline=None, max_examples=30)
def test_sums_of_squares_one_per_tensor(kinds: list[tuple[int, str]]) -> None:
    """Small ones are summed together, and every one gets its own sum back, in its place."""
    dtypes = {"f4": torch.float32, "f8": torch.float64, "bf16": torch.bfloat16}
    generator = torch.Generator().manual_seed(len(kinds))
    tensors = [torch.randn(size, generator=generator).to(dtypes[dtype]) for size, dtype in kinds]
    sums = sums_of_squares(tensors)
    assert len(sums) == len(tensors)
    for found, tensor in zip(sums, tensors, strict=True):
        # what is large may be summed in float32, whose squares are each rounded by 6e-8
        assert found == pytest.approx(tensor.double().square().sum().item(), rel=1e-6)


def test_sums_of_squares_in_several_groups() -> None:
    """As many small tensors as make three groups: none is lost at the edges."""
    count = 3 * parameter_norms._GROUP // parameter_norms._SMALL + 1
    sums = sums_of_squares([torch.full((parameter_norms._SMALL,), float(i)) for i in range(count)])
    assert sums == [i * i * parameter_norms._SMALL for i in range(count)]


@pytest.mark.parametrize("size", [10, 2 * parameter_norms._SMALL])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1.0, 1e18])
def test_sums_of_squares_at_any_magnitude(size: int, magnitude: float) -> None:
    tensor = torch.linspace(0.5, 1, size) * magnitude
    (found,) = sums_of_squares([tensor])
    assert found == pytest.approx(tensor.double().square().sum().item(), rel=1e-6, abs=0)


def test_sums_of_squares_of_any_strides() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    for same in (tensor.T, tensor.requires_grad_(), tensor.detach().T.contiguous().T):
        (found,) = sums_of_squares([same])
        assert found == 506.0


def test_sums_of_squares_of_sparse_gradients_with_repeated_rows() -> None:
    sparse = nn.Embedding(10, 4, sparse=True)
    dense = copy.deepcopy(sparse)
    dense.sparse = False
    for embedding in (sparse, dense):
        embedding(torch.tensor([1, 1, 7])).square().sum().backward()
    assert sparse.weight.grad is not None
    assert dense.weight.grad is not None
    assert sparse.weight.grad.is_sparse
    of_sparse, of_dense = sums_of_squares([sparse.weight.grad, dense.weight.grad])
    assert of_sparse == pytest.approx(of_dense, rel=1e-6)


def test_sums_of_squares_of_complex_gradients() -> None:
    """A Fourier layer's weights are complex; a conversion to float64 would drop the imaginary part."""
    gradient = torch.randn(5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    exact = gradient.to(torch.complex128).abs().square().sum().item()
    for found in sums_of_squares([gradient, gradient.conj()]):
        assert found == pytest.approx(exact, rel=1e-12)


def test_sums_of_squares_of_replicas_are_shared() -> None:
    (quarter,) = sums_of_squares([torch.arange(6.0)], world_size=4)
    assert quarter * 4 == 55.0
