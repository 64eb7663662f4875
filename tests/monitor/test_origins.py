"""What a tensor goes back to, where a model's own code stands between two layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_init.monitor.origins import origin_of

IMAGE = torch.randn(2, 3, 5, 7)
SEQUENCE = torch.randn(2, 9, 3)
conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)


def units_of(tensor: Tensor) -> int | None:
    origin = origin_of(tensor.grad_fn, lambda number, shape: None)
    return None if origin is None else origin.dim


@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (lambda: conv(IMAGE) * torch.rand(2, 1, 5, 7), 1),
        (lambda: conv(IMAGE) * conv(IMAGE).mean((2, 3), keepdim=True).sigmoid(), 1),
        (lambda: conv(IMAGE) + conv(IMAGE), 1),
        (lambda: F.batch_norm(conv(IMAGE), None, None, training=True), 1),
        (lambda: F.group_norm(conv(IMAGE), 2), 1),
        (lambda: conv(IMAGE).permute(0, 2, 3, 1), 3),
        (lambda: F.layer_norm(conv(IMAGE).permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2), 1),
        (lambda: conv(IMAGE).flatten(2), 1),
        (lambda: conv(IMAGE).flatten(2).transpose(1, 2), 2),
        (lambda: conv(IMAGE).flatten(2).transpose(-1, -2) * 2, 2),
        (lambda: conv(IMAGE[0]), 0),  # no batch dimension
        (lambda: linear(SEQUENCE) + 1, 2),
        (lambda: linear(SEQUENCE).mT, 1),
        (lambda: linear(SEQUENCE[0]).T, 0),
        (lambda: linear(SEQUENCE).unsqueeze(1), 3),
        (lambda: F.dropout(linear(SEQUENCE).clamp(-1, 1)), 2),
        (lambda: F.embedding(torch.tensor([[1, 2]]), linear.weight), 2),
        (lambda: linear(SEQUENCE)[:, 0] + 1, 1),
        (lambda: conv(IMAGE)[..., 1], 1),
        (lambda: torch.cat([torch.zeros(2, 1, 4), linear(SEQUENCE)], 1) * 2, 2),
        (lambda: linear(SEQUENCE)[:, 2:5], 2),
        (lambda: linear(SEQUENCE[0]).expand(5, 9, 4), 2),
        (lambda: linear(SEQUENCE)[..., 0], None),
        (lambda: linear(SEQUENCE).view(2, 9, 2, 2), None),  # heads: no unit stays whole
        (lambda: linear(SEQUENCE).flatten(1), None),
        (lambda: torch.bmm(linear(SEQUENCE), torch.rand(2, 4, 4)), None),
        (lambda: conv(torch.randn(2, 3, 4, 4)) + conv(torch.randn(2, 3, 4, 4)).permute(0, 2, 3, 1), None),
        (lambda: nn.Parameter(torch.ones(4, 4)) * 2, None),
    ],
)
def test_units_behind_operations(make: Callable[[], Tensor], dim: int | None) -> None:
    assert units_of(make()) == dim


def test_origin_prefers_the_layer_that_is_known() -> None:
    """A walk ends at a layer's output, so that the layer can be named."""
    known = linear(SEQUENCE[0])
    assert known.grad_fn is not None
    number = known.grad_fn._sequence_nr()
    origin = origin_of((known + 1).relu().grad_fn, lambda n, shape: ("the layer", 1) if n == number else None)
    assert origin == ("the layer", 1)


def test_origin_of_a_long_chain_ends() -> None:
    """A thousand operations are not followed: a logged step costs little, whatever the model does."""
    x = linear(SEQUENCE)
    for _ in range(1000):
        x = x + 1
    assert origin_of(x.grad_fn, lambda *_: None) is None
