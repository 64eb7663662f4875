"""What watching costs: whole training steps, watched over unwatched, by this package and by what people do without.

    python -m benchmarks.monitor_overhead                                   # the table
    python -m benchmarks.monitor_overhead --markdown                        # as it stands in the README
    python -m benchmarks.monitor_overhead --plot docs/monitor_growth.png    # and growth with layers and ranks

Every ratio is a median over neighbouring steps of one fit, one of which is watched (see ``stopwatch.py``). At the
default interval one of 50 watched steps is logged, and (ratio of a logged step + 49 · ratio of a step between) / 50
is printed, the latter the median of a fit that logs every 50th; the totals of its 50 steps on end, whose noise is
larger than what they measure, stand below the table as a check.

Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Column, Table
from torch.utils.tensorboard import SummaryWriter

from benchmarks.growth import draw_growth, measure_growth
from benchmarks.nets import CASES, OPTIMIZERS, TINY_CASES, Case, Classifier
from benchmarks.stopwatch import Times, clock
from benchmarks.watchers import WATCHERS, missing
from lightning_init import initialize
from lightning_init.monitor.statistics import DEFAULT_STATS
from lightning_init.show.loggers import StatisticsWriter

LEGEND = (
    "Whole training steps over the same steps unwatched: with every step logged · with every {}th logged.\n"
    "MLP: batch 256; conv net: with batch norm, 16×3×32×32; transformer encoder: 8×128 tokens; all with {}."
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        pairs: of steps where every watched one is logged.
        windows: of ``interval`` pairs where one is logged.
        interval: the Trainer's ``log_every_n_steps``.
        scalars: layers whose statistics are written.
        layers: of the networks whose cost is drawn.
        ranks: on which they train.
        growth_pairs: of steps for each of them.
    """

    pairs: int = 100
    windows: int = 10
    interval: int = 50
    scalars: int = 1000
    layers: Sequence[int] = (10, 30, 100, 300, 1000)
    ranks: Sequence[int] = (1, 2, 4)
    growth_pairs: int = 40


FULL = Sizes()
QUICK = Sizes(pairs=4, windows=1, interval=4, scalars=20, layers=(10,), ranks=(1, 2), growth_pairs=4)


@dataclass(frozen=True)
class Cost:
    """Of one network and one watcher: ratios, and seconds of the plain step."""

    every: float
    interval: float
    totals: list[float]
    plain: float


def cost_of(case: Case, name: str, sizes: Sizes, optimizer: str) -> Cost:
    """Two fits: every watched step logged, and one of ``interval``."""
    interval = sizes.interval
    every = timed(case, name, 1, sizes.pairs, optimizer)
    rare = timed(case, name, interval, sizes.windows * interval, optimizer)
    totals = rare.windows(interval)
    return Cost(
        every=every.ratio,
        interval=(every.ratio + (interval - 1) * rare.ratio) / interval,
        totals=[a / b for a, b in zip(totals.watched, totals.plain, strict=True)],
        plain=statistics.median(every.plain),
    )


def timed(case: Case, name: str, interval: int, pairs: int, optimizer: str) -> Times:
    torch.manual_seed(0)
    network = case.build()
    initialize(network)
    with tempfile.TemporaryDirectory() as folder:
        watcher = WATCHERS[name][1](interval, Path(folder))
        module = Classifier(network, optimizer)
        return clock(module, case.shape, watcher, pairs=pairs, folder=Path(folder), interval=interval)


def microseconds_a_scalar(num_layers: int, rounds: int = 20) -> tuple[float, float]:
    """Medians for ``StatisticsWriter.write`` and ``SummaryWriter.add_scalar``, each on a file of its own."""
    tags = {f"{stat}/layer.{i}": 0.1 * i for stat in DEFAULT_STATS for i in range(num_layers)}
    seconds: tuple[list[float], list[float]] = [], []
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        logger = TensorBoardLogger(folder)
        statistics_writer = StatisticsWriter([logger])
        for step in range(rounds):
            start = time.perf_counter()
            statistics_writer.write(tags, step)
            logger.experiment.flush()
            seconds[0].append(time.perf_counter() - start)
            start = time.perf_counter()
            for tag, value in tags.items():
                writer.add_scalar(tag, value, step)
            writer.flush()
            seconds[1].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(row) / len(tags) * 1e6 for row in seconds)
    return ours, theirs


def table_of(cases: Sequence[Case], costs: dict[str, list[Cost]]) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows, in Markdown's notation."""
    heads = ["watched by", "what is measured", *(case.name for case in cases)]
    rows = [
        [name, WATCHERS[name][0], *(f"{cost.every:.2f}× · {cost.interval:.3f}×" for cost in row)]
        for name, row in costs.items()
    ]
    plain = [statistics.median(row[i].plain for row in costs.values()) * 1e3 for i in range(len(cases))]
    rows.append(["nobody", "", *(f"{milliseconds:.1f} ms" for milliseconds in plain)])
    return heads, rows


def machine() -> str:
    """What every claim has to carry."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def show(heads: list[str], rows: list[list[str]], *, markdown: bool) -> None:
    """On a terminal without the second column, lest lines wrap."""
    if markdown:
        lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    table = Table(Column(heads[0], no_wrap=True), *(Column(head, justify="right", no_wrap=True) for head in heads[2:]))
    for name, _, *cells in rows:
        table.add_row(name.replace("`", ""), *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks, a few steps: does it run at all?")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plot", type=Path, help="also measure growth and draw it into this file")
    parser.add_argument("--only", choices=list(WATCHERS), action="append", help="only these rows of the table")
    parser.add_argument("--pairs", type=int, help=f"of steps, for each ratio (default {FULL.pairs})")
    parser.add_argument("--windows", type=int, help=f"of {FULL.interval} steps (default {FULL.windows})")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    sizes = QUICK if asked.quick else FULL
    sizes = replace(sizes, pairs=asked.pairs or sizes.pairs, windows=asked.windows or sizes.windows)
    if asked.plot:  # first: the other watchers leave threads in this process
        growth = measure_growth(sizes.layers, sizes.ranks, sizes.growth_pairs, asked.optimizer)
        for ranks, by_layers in growth.items():
            print(f"{ranks} ranks:", ", ".join(f"{n} layers {s * 1e3:.2f} ms" for n, s in by_layers.items()))
        draw_growth(growth, machine(), asked.plot)
    cases = TINY_CASES if asked.quick else CASES
    costs: dict[str, list[Cost]] = {}
    for name in asked.only or WATCHERS:
        if install := missing(name):
            print(f"{name}: left out, because it is not installed ({install})")
        else:
            costs[name] = [cost_of(case, name, sizes, asked.optimizer) for case in cases]
    print(f"{machine()}\n{LEGEND.format(sizes.interval, asked.optimizer)}")
    show(*table_of(cases, costs), markdown=asked.markdown)
    for name, row in costs.items():
        for case, cost in zip(cases, row, strict=True):
            totals = ", ".join(f"{total:.4f}" for total in sorted(cost.totals))
            print(f"{name}, {case.name}: totals of {sizes.interval} steps {totals}")
    ours, theirs = microseconds_a_scalar(sizes.scalars)
    print(
        f"{sizes.scalars} layers × {len(DEFAULT_STATS)} statistics to TensorBoard: {ours:.2f} µs a scalar "
        f"(SummaryWriter.add_scalar: {theirs:.1f})"
    )


if __name__ == "__main__":
    main()
