"""Which statistics there are, and how they are named."""

from __future__ import annotations

import pytest

from lightning_init import LayerStats
from lightning_init.monitor.statistics import DEFAULT_STATS, chosen_stats


def test_tags_of_layer_stats() -> None:
    stats = LayerStats({"activation_variance": {"a.b": 1.0, "c": 2.0}, "gradient_norm": {"total": 3.0}})
    assert stats.tags == {"activation_variance/a.b": 1.0, "activation_variance/c": 2.0, "gradient_norm/total": 3.0}


def test_chosen_stats_in_order() -> None:
    assert chosen_stats(None) == DEFAULT_STATS
    assert chosen_stats(["default"]) == DEFAULT_STATS
    assert chosen_stats(["gradient_norm", "default"]) == (
        "gradient_norm",
        *(s for s in DEFAULT_STATS if s != "gradient_norm"),
    )
    assert chosen_stats([]) == ()
    with pytest.raises(ValueError, match=r"'gradient_nrom'; allowed: default, .*; did you mean 'gradient_norm'\?"):
        chosen_stats(["default", "gradient_nrom"])
