"""What TensorBoard shows of the demo, as one picture: every layer's curve, both runs, on a logarithmic scale.

python -m examples.picture runs/digits/torch_default runs/digits/he_normal --out docs/tensorboard.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import colormaps, rc_context
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from numpy import linspace

from examples.digits import held_out_accuracy
from examples.runs import Run

STATS = {
    "activation_variance": "activation variance",
    "signal_variance": "signal variance",
    "gradient_norm": "gradient norm",
}
COLORS = ListedColormap(colormaps["viridis"](linspace(0.0, 0.9, 256)))  # its yellow end is too light on white
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.edgecolor": "0.6",
    "xtick.color": "0.35",
    "ytick.color": "0.35",
}


def picture(runs: list[Run], accuracies: list[float]) -> Figure:
    """One row of charts per run, one column per statistic, one curve per layer with parameters."""
    layers = runs[0].layers("gradient_norm")
    figure, grid = plt.subplots(
        len(runs), len(STATS), figsize=(11.5, 2.75 * len(runs)), sharex=True, sharey="col", layout="constrained"
    )
    for run, accuracy, row in zip(runs, accuracies, grid, strict=True):
        for stat, axes in zip(STATS, row, strict=True):
            draw(axes, run, stat, layers)
        row[0].set_ylabel(f"{run.name}\ntest accuracy {accuracy:.2f}", fontweight="bold", fontsize=11)
    for title, axes in zip(STATS.values(), grid[0], strict=True):
        axes.set_title(title, fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("step", color="0.35")
    numbers = BoundaryNorm(range(1, len(layers) + 2), COLORS.N)
    bar = figure.colorbar(ScalarMappable(numbers, COLORS), ax=grid, aspect=40, pad=0.015, ticks=[])
    bar.outline.set_visible(False)
    bar.set_ticks([1.5, len(layers) + 0.5], labels=["first\nlayer", "last\nlayer"])
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.ax.invert_yaxis()
    return figure


def draw(axes: Axes, run: Run, stat: str, layers: list[str]) -> None:
    """One chart, the colour of a curve telling the layer's depth."""
    for index, layer in enumerate(layers):
        series = run.series(stat, layer)
        color = COLORS(index / (len(layers) - 1))
        axes.semilogy(list(series), list(series.values()), color=color, linewidth=1.2)
    axes.minorticks_off()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    runs = [Run.read(directory) for directory in given.runs]
    with rc_context(STYLE):
        picture(runs, [held_out_accuracy(run.checkpoint) for run in runs]).savefig(given.out, dpi=130)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
