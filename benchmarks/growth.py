"""How the cost of a logged step grows with the number of layers and of ranks: measured, then drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.nets import CLASSES, Classifier
from benchmarks.stopwatch import clock
from benchmarks.watchers import Monitor
from lightning_init import initialize

WIDTH, BATCH = 32, 64
Growth = dict[int, dict[int, float]]
"""Seconds that watching adds to a step, by ranks and by layers."""


def narrow_net(num_layers: int) -> nn.Module:
    """So many layers, every other one a ReLU, each so small that its arithmetic costs next to nothing."""
    hidden = [layer for _ in range(num_layers // 2) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    network = nn.Sequential(*hidden[: num_layers - 1], nn.Linear(WIDTH, CLASSES))
    initialize(network)
    return network


def measure_growth(layers: Sequence[int], ranks: Sequence[int], pairs: int, optimizer: str) -> Growth:
    """Every step watched; one thread a rank, however many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    growth: Growth = {}
    for num_ranks in ranks:
        for num_layers in layers:
            with tempfile.TemporaryDirectory() as folder:
                times = clock(
                    Classifier(narrow_net(num_layers), optimizer),
                    (BATCH, WIDTH),
                    Monitor(1, Path(folder)),
                    pairs=pairs,
                    folder=Path(folder),
                    ranks=num_ranks,
                )
            growth.setdefault(num_ranks, {})[num_layers] = times.extra
    torch.set_num_threads(threads)
    return growth


def draw_growth(growth: Growth, machine: str, path: Path) -> None:
    """Left the milliseconds a logged step costs, right the same by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    colours = ["#0f4c81", "#e07a1f", "#3a8f5c", "#8e44ad"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (ranks, by_layers), colour in zip(growth.items(), colours, strict=False):
        label = f"{ranks} rank{'s' if ranks > 1 else ''}"
        layers = list(by_layers)
        left.loglog(layers, [by_layers[n] * 1e3 for n in layers], "o-", color=colour, label=label)
        right.semilogx(layers, [by_layers[n] / n * 1e6 for n in layers], "o-", color=colour, label=label)
    left.set_title("Milliseconds a logged step costs", loc="left", fontsize=11)
    right.set_title("Microseconds a layer", loc="left", fontsize=11)
    left.yaxis.set_major_formatter(ScalarFormatter())
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("layers")
        axes.set_xticks(sorted({n for row in growth.values() for n in row}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(
        f"ActivationVarianceMonitor, 5 statistics of each of n layers of {WIDTH} units; gloo ranks, one thread each\n"
        f"{machine}",
        x=0.01, ha="left", fontsize=9, color="#555555",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
