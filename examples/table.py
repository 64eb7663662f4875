"""The table at the end of the demo: the runs side by side, layer by layer, at the first and the last step.

python -m examples.table runs/digits/torch_default runs/digits/he_normal
"""

from __future__ import annotations

import sys

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from examples.digits import held_out_accuracy
from examples.runs import Run

FIRST, LAST = 0, -1
COLUMNS = [  # heading, statistic, which logged step
    ("signal", "signal_variance", FIRST),
    ("var.", "activation_variance", FIRST),
    ("var.", "activation_variance", LAST),
    ("grad.", "gradient_norm", FIRST),
    ("grad.", "gradient_norm", LAST),
]
LEGEND = (
    "var.: variance of the layer's output. signal: the part of it that depends on\n"
    "the input, which biases can hide. grad.: norm of its parameters' gradient.\n"
    "Green: within 10³ of the column's largest; yellow: within 10⁶; red: below."
)


def comparison(runs: list[Run], accuracies: list[float]) -> RenderableType:
    """One row per layer with parameters; per run the signal, the variance and the gradient."""
    layers = runs[0].layers("gradient_norm")
    if not layers:
        raise ValueError(f"{runs[0].directory} has no gradient_norm: did the monitor run?")
    names = Table(box=None, padding=(0, 1, 0, 0), title=" \n ")
    names.add_column("layer\n  step")
    for layer in layers:
        names.add_row(layer.rpartition(".")[2])
    side_by_side = Table.grid(padding=(0, 1, 0, 0))
    tables = [one_run(run, layers, accuracy) for run, accuracy in zip(runs, accuracies, strict=True)]
    side_by_side.add_row(names, *tables)
    return Group(side_by_side, Text(LEGEND, style="dim"))


def one_run(run: Run, layers: list[str], accuracy: float) -> Table:
    """The numbers of one run; its title says what came of it."""
    table = Table(box=None, padding=(0, 1, 0, 0), title=f"[bold]{run.name}\ntest accuracy {accuracy:.3f}[/]")
    columns = []
    for heading, stat, which in COLUMNS:
        step = list(run.series(stat, layers[0]))[which]
        table.add_column(f"{heading}\n{step}", justify="right", no_wrap=True)
        columns.append([list(run.series(stat, layer).values())[which] for layer in layers])
    for row in zip(*columns, strict=True):
        table.add_row(*(cell(value, max(column)) for value, column in zip(row, columns, strict=True)))
    return table


def cell(value: float, largest: float) -> Text:
    """A number in at most six characters, coloured by how far it lies below the largest of its column."""
    ratio = value / largest if largest else 0.0
    style = "green" if ratio > 1e-3 else "yellow" if ratio > 1e-6 else "red"
    return Text(f"{value:.2g}" if 0.01 <= value < 1000 else f"{value:.0e}", style=style)


def main(directories: list[str]) -> None:
    runs = [Run.read(directory) for directory in directories]
    console = Console()
    console.print()
    console.print(comparison(runs, [held_out_accuracy(run.checkpoint) for run in runs]))
    console.print(f"\nEvery layer in one chart: [bold]tensorboard --logdir {runs[0].directory.parts[0]}[/]")


if __name__ == "__main__":
    main(sys.argv[1:])
