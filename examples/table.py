"""The demo's last word: two runs side by side, layer by layer, at the first and the last logged step.

python -m examples.table runs/digits/torch_default runs/digits/he_normal
"""

from __future__ import annotations

import sys
from itertools import chain

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.digits import Digits, DigitsMLP
from examples.runs import Run

STATS = {"activation_variance": "variance", "gradient_norm": "gradient"}


def comparison(runs: list[Run], accuracies: list[float]) -> Table:
    """One row per layer with parameters; per run the variance of its output and the norm of its gradient."""
    layers = runs[0].layers("gradient_norm")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", no_wrap=True)
    for run in runs:
        for stat, title in STATS.items():
            steps = list(run.series(stat, layers[0]))
            for step in (steps[0], steps[-1]):
                table.add_column(f"{run.name}\n{title}\nstep {step}", justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(layer.rpartition(".")[2], *chain.from_iterable(cells(run, layer, layers) for run in runs))
    table.add_section()
    marks = [["", "", "", f"[bold]{accuracy:.3f}[/]"] for accuracy in accuracies]
    table.add_row("[bold]test accuracy[/]", *chain.from_iterable(marks))
    return table


def cells(run: Run, layer: str, layers: list[str]) -> list[Text]:
    """First and last value of each statistic, coloured by its ratio to the same value in the last hidden layer."""
    row = []
    for stat in STATS:
        values = [list(run.series(stat, name).values()) for name in layers]
        own = list(run.series(stat, layer).values())
        for index in (0, -1):
            largest = max(series[index] for series in values)
            row.append(Text(f"{own[index]:.2g}", style=style(own[index] / largest if largest else 0.0)))
    return row


def style(ratio: float) -> str:
    """Green within a factor 30 of the largest layer, yellow within 1000, red below."""
    return "green" if ratio > 1 / 30 else "yellow" if ratio > 1e-3 else "red"


def test_accuracy(run: Run) -> float:
    """Share of the 360 held-out digits that the run's last checkpoint reads correctly."""
    model = DigitsMLP.load_from_checkpoint(run.checkpoint)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, barebones=False
    )
    return trainer.test(model, Digits(), verbose=False)[0]["test_accuracy"]


def main(directories: list[str]) -> None:
    runs = [Run.read(directory) for directory in directories]
    console = Console()
    console.print(comparison(runs, [test_accuracy(run) for run in runs]))
    console.print(f"\nEvery layer in one chart: [bold]tensorboard --logdir {runs[0].directory.parts[0]}[/]")


if __name__ == "__main__":
    main(sys.argv[1:])
