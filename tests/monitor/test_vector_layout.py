"""One vector for everything, in an order all ranks share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_init.monitor.exchange import NUM_FLAGS, Slot, VectorLayout, in_one_order
from lightning_init.monitor.moments import moments_of
from lightning_init.monitor.record import LayerRecord
from tests.support.recording import slots_of

CPU = torch.device("cpu")
A, B, C = Slot("a", 2), Slot("b", 3), Slot("a", 4)


def records() -> dict[str, LayerRecord]:
    narrow, wide = moments_of(torch.tensor([[1.0, 2.0]]), 1), moments_of(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 1)
    return {
        "a": LayerRecord({2: narrow, 4: wide}, moments_of(torch.tensor([3.0, 5.0]))),
        "b": LayerRecord({3: moments_of(torch.tensor([[7.0, 8.0, 9.0]]), 1)}),
    }


def test_layout_packs_and_unpacks_every_number() -> None:
    layout = VectorLayout([A, B, C], norms=4, device=CPU)
    vector = layout.pack(records(), [10.0, 11.0, 12.0, 13.0], [0.0, 1.0])
    assert vector.dtype == torch.float64
    assert vector.shape == (layout.size,)
    assert layout.layers == ("a", "b")
    parts = {
        "flags": [0, 1],
        "counts": [2, 3, 4],
        "squares": [5, 194, 30],
        "gradient_counts": [2, 0],
        "gradient_sums": [8, 0],
        "gradient_squares": [34, 0],
        "norms": [10, 11, 12, 13],
        "sums": [1, 2, 7, 8, 9, 1, 2, 3, 4],
    }
    for part, expected in parts.items():
        assert vector[getattr(layout, part)].tolist() == expected, part
    assert layout.size == sum(len(expected) for expected in parts.values())


def test_layout_of_absent_records_is_zero_and_unknown_ones_are_left_out() -> None:
    known = VectorLayout([A, B], norms=2, device=CPU)
    assert known.has_all_slots_of({"b": LayerRecord({3: moments_of(torch.ones(1, 3), 1)})})
    assert not known.has_all_slots_of(records())
    vector = known.pack({"a": records()["a"]}, [0.0, 0.0], [0.0, 0.0])
    assert vector[known.counts].tolist() == [2, 0]
    assert vector[known.sums].tolist() == [1, 2, 0, 0, 0]


def test_layout_of_a_model_without_layers() -> None:
    layout = VectorLayout([], norms=2, device=CPU)
    vector = layout.pack({}, [0.0, 0.0], [0.0, 0.0])
    assert vector.tolist() == [0.0] * (NUM_FLAGS + 2)


def test_slots_are_in_the_order_of_their_calls() -> None:
    assert slots_of(records()) == [A, C, B]


@pytest.mark.parametrize(
    ("orders", "merged"),
    [
        ([[A, B], [A, B]], [A, B]),
        ([[A, B], [A, C, B]], [A, C, B]),
        ([[A], [B, A]], [B, A]),
        ([[], [A, B], [C]], [C, A, B]),
        ([], []),
    ],
)
def test_slot_orders_of_ranks_are_merged(orders: list[list[Slot]], merged: list[Slot]) -> None:
    assert in_one_order(orders) == merged


@given(st.lists(st.lists(st.integers(0, 8), unique=True), max_size=4))
def test_slot_orders_merged_keep_every_slot_once(numbers: list[list[int]]) -> None:
    orders = [[Slot(str(number), 1) for number in order] for order in numbers]
    merged = in_one_order(orders)
    assert sorted(merged) == sorted({slot for order in orders for slot in order})
    if orders:
        assert [slot for slot in merged if slot in orders[0]] == orders[0]
