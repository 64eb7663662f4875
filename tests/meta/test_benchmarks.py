"""The benchmarks run, and print what they promise. How fast anything is, only a quiet machine can say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> str:
    return run_python("-m", f"benchmarks.{module}", *arguments)


def run_python(*arguments: str) -> str:
    """In a process of its own: a benchmark sets threads and filters warnings."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_monitor_overhead(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "growth.png"
    printed = run("monitor_overhead", "--quick", "--threads", "1", "--markdown", "--plot", str(plot))
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) >= 7 or "left out" in printed  # heads, rule, watchers, nobody
    assert rows[2][0].strip() == "`ActivationVarianceMonitor`"
    assert all(re.fullmatch(r" \d+\.\d\d× · \d+\.\d{3}× ", cell) for row in rows[2:-1] for cell in row[2:])
    assert all(re.fullmatch(r" \d+\.\d ms ", cell) for cell in rows[-1][2:])
    assert re.search(r"µs a scalar", printed)
    assert re.search(r"^2 ranks: 10 layers -?\d+\.\d\d ms", printed, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_watcher_is_gone_after_its_fit() -> None:
    """Also the one that takes the compiled sums away, which the next fit would miss."""
    script = """
from benchmarks.monitor_overhead import timed
from benchmarks.nets import TINY_CASES
from lightning_init import native
from lightning_init.monitor import moments
before = native.sums
for pairs in (4, 5):
    timed(TINY_CASES[0], "installed without a C compiler", 1, pairs, "sgd")
    print(before is not None, native.sums is before)
"""
    printed = run_python("-c", script)
    assert printed.splitlines() == ["True True"] * 2


def test_init_speed() -> None:
    printed = run("init_speed", "--rounds", "1", "--side", "64")
    assert printed.count("nn.init") == 4
    assert "peak extra memory" in printed
