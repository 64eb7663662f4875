"""Which tensor of an output counts, and which of its dimensions are units."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_init.introspect.unit_rules import UnitRule, unit_rule
from lightning_init.monitor.units import signal_of, unit_dim

X = torch.ones(3)
INTEGERS = torch.ones(3, dtype=torch.int64)


@dataclass
class ModelOutput:
    loss: Tensor | None
    logits: Tensor


class Registry:
    """Neither a tensor nor a container."""


@pytest.mark.parametrize(
    "output",
    [
        X,
        (INTEGERS, X, torch.zeros(1)),
        [None, [X]],
        {"mask": INTEGERS, "logits": X},
        OrderedDict(first=X, second=torch.zeros(1)),
        ModelOutput(None, X),
        ((INTEGERS, {"deep": ModelOutput(None, X)}),),
    ],
)
def test_signal_of_finds_the_tensor(output: object) -> None:
    assert signal_of(output) is X


@pytest.mark.parametrize("output", [INTEGERS, None, 3.0, (), {}, "text", Registry(), ModelOutput, X.cfloat()])
def test_signal_of_without_a_tensor(output: object) -> None:
    assert signal_of(output) is None


def test_signal_of_of_a_packed_sequence_is_its_data() -> None:
    packed = pack_sequence([torch.ones(4, 2), torch.ones(1, 2)])
    assert signal_of(packed) is packed.data
    assert signal_of((packed, INTEGERS)) is packed.data


@pytest.mark.parametrize(
    ("module", "shape", "dim"),
    [
        (nn.Linear(3, 5), (8, 5), 1),
        (nn.Linear(3, 5), (5,), 0),
        (nn.Linear(3, 5), (5, 5, 5), 2),
        (nn.Conv1d(3, 5, 1), (8, 5, 7), 1),
        (nn.Conv2d(3, 5, 1), (8, 5, 7, 7), 1),
        (nn.Conv2d(3, 5, 1), (5, 7, 7), 0),  # unbatched
        (nn.Conv2d(3, 5, 1), (5, 5, 5, 5), 1),
        (nn.ConvTranspose3d(3, 5, 1), (8, 5, 2, 2, 2), 1),
        (nn.BatchNorm1d(5), (8, 5), 1),
        (nn.BatchNorm1d(5), (8, 5, 5), 1),
        (nn.BatchNorm2d(32), (16, 32, 32, 32), 1),
        (nn.GroupNorm(1, 6), (6, 6, 6), 1),
        (nn.InstanceNorm1d(5, affine=True), (8, 5, 7), 1),
        (nn.InstanceNorm2d(5, affine=True), (5, 7, 7), 0),
        (nn.LayerNorm(5), (5, 5, 5), 2),
        (nn.Embedding(9, 5), (8, 4, 5), 2),
        (nn.MultiheadAttention(6, 2), (8, 4, 6), 2),
        (nn.LSTM(3, 4, bidirectional=True), (7, 2, 8), 2),
        (nn.LSTM(3, 4, proj_size=2), (7, 4, 2), 2),
        (nn.GRUCell(3, 4), (4, 4), 1),
        (nn.PReLU(5), (8, 5, 5), 1),
        (nn.Bilinear(3, 4, 5), (8, 5), 1),
    ],
)
def test_units_of_torch_modules(module: nn.Module, shape: tuple[int, ...], dim: int) -> None:
    assert unit_dim(shape, unit_rule(module)) == dim


class ChannelsFirstNorm(nn.Module):
    """ConvNeXt's LayerNorm: two vectors tell the channels, the output has them in front."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))


class Mixer(nn.Module):
    """Vectors of different sizes tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(8))


def test_units_of_other_modules() -> None:
    norm, mixer = unit_rule(ChannelsFirstNorm(6)), unit_rule(Mixer())
    assert unit_dim((2, 6, 4, 4), norm) == 1
    assert unit_dim((2, 4, 4, 6), norm) == 3
    assert unit_dim((2, 4, 6, 6), norm) is None  # two candidates
    assert mixer.units is None
    assert unit_dim((2, 16, 8), mixer) is None


def test_units_of_an_unlikely_rank_fall_back() -> None:
    assert unit_dim((5,), UnitRule(5, 1)) == 0
    assert unit_dim((4, 5), UnitRule(5, -3)) == 1
    assert unit_dim((4, 6), UnitRule(5, -3)) is None


def test_signal_of_skips_tensors_that_cannot_be_read() -> None:
    """Sparse and nested tensors and the inside of ``torch.func`` are passed over; a plain neighbour counts."""
    plain = torch.ones(2)
    assert signal_of((plain.to_sparse(), plain)) is plain
    assert signal_of(torch.nested.nested_tensor([plain, torch.ones(3)], layout=torch.jagged)) is None
    seen = []
    torch.func.vmap(lambda row: (seen.append(signal_of(row)), row)[1])(torch.ones(3, 2))
    assert seen == [None]
