"""How long initialisation takes, as ratios to ``torch.nn.init`` in the same run: medians of alternating rounds.

Run it on a quiet machine: ``python -m benchmarks.init_speed``.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_init import Normal, TruncatedNormal, initialize

SIDE = 4096
STD = 0.02


def bare_linear(side: int) -> nn.Linear:
    """A layer without bias whose memory is already touched."""
    return nn.Linear(side, side, bias=False)


def model_of_25m() -> nn.Module:
    """As many parameters as a ResNet-50, with the shapes of one: 25.5 million in 161 tensors."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for cin, cout, kernel in ((width_in, width, 1), (width, width, 3), (width, 4 * width, 1)):
                layers += [nn.Conv2d(cin, cout, kernel, bias=False), nn.BatchNorm2d(cout)]
            if block == 0:
                layers += [nn.Conv2d(width_in, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)]
            width_in = 4 * width
    return nn.Sequential(*layers, nn.Linear(width_in, 1000))


def plain_loop(model: nn.Module) -> None:
    """What users write by hand."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios of neighbours, after one warm-up each."""
    ours(), theirs()
    mine, other = [], []
    for _ in range(rounds):
        for function, seconds in ((theirs, other), (ours, mine)):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
    return statistics.median(mine), statistics.median(other), ratio


def extra_memory(function: Callable[[], object], parameter_bytes: int) -> float:
    """Growth of the process's peak memory while ``function`` runs, in parameters."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / parameter_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=SIDE, help="of the square matrices")
    asked = parser.parse_args(arguments)
    rounds, side = asked.rounds, asked.side
    layer, model = bare_linear(side), model_of_25m()
    weight = layer.weight
    nbytes = weight.numel() * 4
    memory = extra_memory(lambda: initialize(layer, Normal(STD)), nbytes)
    truncated = TruncatedNormal(STD)
    bound = truncated.bound
    cases: list[tuple[str, str, Callable[[], object], Callable[[], object], int]] = [
        (f"normal, {side}²", "nn.init.normal_", lambda: initialize(layer, Normal(STD)),
         lambda: nn.init.normal_(weight, std=STD), rounds),
        (f"normal cut at ±2 std, {side}²", "nn.init.trunc_normal_", lambda: initialize(layer, truncated),
         lambda: nn.init.trunc_normal_(weight, std=bound / 2, a=-bound, b=bound), max(3, rounds // 2)),
        ("he_normal, 25.6 M parameters", "a loop of nn.init calls", lambda: initialize(model),
         lambda: plain_loop(model), rounds),
        (f"orthogonal, 2 × {side // 2}²", "nn.init.orthogonal_", lambda: initialize(pair, "orthogonal"),
         lambda: [nn.init.orthogonal_(one.weight) for one in pair], 3),
    ]  # fmt: skip
    pair = nn.ModuleList([bare_linear(side // 2), bare_linear(side // 2)])
    table = Table(
        title=f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    for column in ("what", "against", "ms", "theirs, ms", "ratio"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    for what, against, ours, theirs, count in cases:
        mine, other, ratio = compare(ours, theirs, count)
        table.add_row(what, against, f"{mine * 1e3:.1f}", f"{other * 1e3:.1f}", f"{ratio:.2f}")
    Console().print(table)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, _, _ = compare(lambda: initialize(layer, Normal(STD)), lambda: None, rounds)
    torch.set_num_threads(threads)
    together, _, _ = compare(lambda: initialize(layer, Normal(STD)), lambda: None, rounds)
    print(f"normal, {side}²: {threads} threads are {alone / together:.2f} times as fast as one")
    print(f"normal, {side}²: peak extra memory {memory:.2f} parameters")


if __name__ == "__main__":
    main()
