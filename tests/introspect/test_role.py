"""A role refuses what contradicts itself, in words that help."""

from __future__ import annotations

import pytest

from lightning_init import Constant, Role


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "wieght"},
            r"kind\) is 'wieght'; allowed: weight, bias, norm, embedding, other, keep; did you mean 'weight'",
        ),
        ({"kind": "weight"}, r"Role\(kind='weight'\) needs fans=Fans\(fan_in, fan_out\)"),
        ({"kind": "bias", "groups": 0}, r"Role\(groups\) must be at least 1, got 0"),
        ({"kind": "bias", "slices": ()}, r"Role\(slices\) needs at least one name"),
        (
            {"kind": "bias", "slices": ("r", "z", "n"), "bias_values": (1.0,)},
            "needs one value for each of the 3 slices, got 1",
        ),
    ],
)
def test_role_refuses_contradictions(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Role(default=Constant(0.0), **arguments)
