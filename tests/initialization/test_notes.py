"""Weights that look like several in one, or like one in two, are named."""

from __future__ import annotations

import math

import pytest
from torch import Tensor, nn

from lightning_init import Rule, initialize
from tests.support.training import fresh


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qkv(x).chunk(3, -1)[2])


class ComplexLinear(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(32, 32))


def test_packed_query_key_and_value_are_named_where_the_fan_out_counts() -> None:
    """The rule that the note gives is Xavier's for each of the three."""
    model = fresh(Attention)
    (note,) = [note for note in initialize(model, "xavier_normal").notes if "query, key and value" in note]
    rule = eval(note.partition("for each: ")[2], {"Rule": Rule})
    report = initialize(model, "xavier_normal", rules=[rule])
    assert report["qkv.weight"].target_std == pytest.approx(math.sqrt(2 / (48 + 48)), rel=1e-3)
    assert not any("query" in note for note in initialize(fresh(Attention), "he_normal").notes)


@pytest.mark.parametrize("names", [("real", "imag"), ("fc_re", "fc_im"), ("conv_r", "conv_i")])
def test_real_and_imaginary_parts_are_named(names: tuple[str, str]) -> None:
    (note,) = initialize(fresh(lambda: ComplexLinear(names)), "he_normal").notes
    assert note.startswith(f"{names[0]}.weight and {names[1]}.weight look like the two parts of a complex weight")


def test_other_names_say_nothing() -> None:
    assert not initialize(fresh(lambda: ComplexLinear(("first", "second"))), "he_normal").notes
