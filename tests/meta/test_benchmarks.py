"""The benchmarks run, and print what they promise. How fast anything is, only a quiet machine can say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_init import native
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.processes  # a benchmark sets threads and filters warnings

ROOT = Path(__file__).parents[2]


def test_monitor_overhead_prints_its_table(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "growth.png"
    command = [sys.executable, "-m", "benchmarks.monitor_overhead", "--quick", "--threads", "1", "--markdown"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [*command, "--plot", str(plot)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) >= 7 or "left out" in printed  # heads, rule, watchers, nobody
    assert rows[2][0].strip() == "`ActivationVarianceMonitor`"
    assert all(re.fullmatch(r" \d+\.\d\d× · \d+\.\d{3}× ", cell) for row in rows[2:-1] for cell in row[2:])
    assert all(re.fullmatch(r" \d+\.\d ms ", cell) for cell in rows[-1][2:])
    assert re.search(r"µs a scalar", printed)
    assert re.search(r"^2 ranks: 10 layers -?\d+\.\d\d ms", printed, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")


def sums_are_back() -> list[bool]:
    """Whether the compiled sums are there again after each of two fits without them."""
    from benchmarks.monitor_overhead import timed
    from benchmarks.nets import TINY_CASES

    before = native.sums
    assert before is not None
    back = []
    for pairs in (4, 5):
        timed(TINY_CASES[0], "installed without a C compiler", 1, pairs, "sgd")
        back.append(native.sums is before)
    return back


def test_watcher_is_gone_after_its_fit() -> None:
    """Also the one that takes the compiled sums away, which the next fit would miss."""
    assert run_ranks(sums_are_back, 1) == [[True, True]]


def printed_by_init_speed() -> str:
    from benchmarks import init_speed

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        init_speed.main(["--rounds", "1", "--side", "64"])
    return printed.getvalue()


def test_init_speed_prints_its_table() -> None:
    (printed,) = run_ranks(printed_by_init_speed, 1)
    assert printed.count("nn.init") == 4
    assert "peak extra memory" in printed


def printed_by_never_worse(page: Path) -> str:
    from benchmarks import never_worse

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        never_worse.main(
            ["--models", "linear*", "--seeds", "2", "--steps-scale", "0.02", "--workers", "1", "--out", str(page)]
        )
    return printed.getvalue()


def test_never_worse_prints_a_row_for_each_model_and_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    (printed,) = run_ranks(printed_by_never_worse, 1, page)
    (row,) = [line for line in printed.splitlines() if line.startswith("| linear regression |")]
    cell = r"\d\S* \(\d\S*\)"
    assert re.fullmatch(
        rf"\| linear regression \| PyTorch's \| {cell} \|( {cell} (same|better|\*\*worse\*\*) \|)+", row
    )
    assert re.search(r"^`he_normal`: .* of 1 models\.$", printed, re.MULTILINE)
    assert row in page.read_text()


def every_model_learns() -> dict[str, str]:
    """What goes wrong in two steps of each model of the zoo as its author left it, and in a scheme's first weights."""
    from benchmarks import never_worse

    never_worse.prepare()
    troubles = {}
    for case in never_worse.CASES:
        outcome = never_worse.train(never_worse.Job(case.name, never_worse.OWN, 0, 2))
        if outcome.failure or outcome.refusal:
            troubles[case.name] = outcome.failure or outcome.refusal
    return troubles


@pytest.mark.slow
def test_never_worse_trains_every_model_of_the_zoo() -> None:
    assert run_ranks(every_model_learns, 1) == [{}]


def verdicts_of_a_model_that_is_refused_and_one_that_fails() -> list[str]:
    from benchmarks.never_worse import Arm, Outcome, verdict

    own = Arm([Outcome(first=2.0, last=loss) for loss in (0.50, 0.52, 0.48)])
    others = [
        [Outcome(first=2.0, last=loss) for loss in (0.60, 0.62, 0.61)],
        [Outcome(first=2.0, last=loss) for loss in (0.30, 0.32, 0.31)],
        [Outcome(first=2.0, last=loss) for loss in (0.30, 0.70, 0.62)],  # worse on average, but by chance
        [Outcome(first=2.0, last=0.3), Outcome(first=2.0, last=0.3), Outcome(refusal="ValueError: trained")],
        [Outcome(first=2.0, last=0.3), Outcome(first=2.0, last=0.3), Outcome(failure="the loss is nan")],
    ]
    return [verdict(own, Arm(outcomes)) for outcomes in others]


def test_never_worse_tells_a_difference_from_chance() -> None:
    expected = ["worse", "better", "same", "refused", "failed"]
    assert run_ranks(verdicts_of_a_model_that_is_refused_and_one_that_fails, 1) == [expected]
