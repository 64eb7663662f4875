"""The harness fails loudly, in time, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, RankTimeout, run_ranks

pytestmark = pytest.mark.processes

children: list[subprocess.Popen[bytes]] = []  # keeps them referenced: Popen warns when dropped alive


def rank_and_sum(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def pid_then(action: str, directory: str) -> torch.Tensor:
    rank = dist.get_rank()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    children.append(child)
    Path(directory, str(rank)).write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    print("said by rank", rank)
    if action == "return":
        return torch.full((3,), float(rank))
    if rank == 1:
        fail_by(action)
    dist.barrier()
    raise AssertionError("rank 0 passed a barrier that rank 1 never reached")


def fail_by(action: str) -> None:
    if action == "raise":
        raise ValueError("the reason")
    if action == "raise unpicklable":
        raise Unpicklable("one", "two")
    if action == "abort":
        os.abort()
    if action == "hang":
        a_function_that_hangs()


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def a_function_that_hangs() -> None:
    time.sleep(600)


def process_environment() -> tuple[str | None, int, str]:
    return os.environ.get("SET_BY_THE_TEST"), torch.get_num_threads(), os.getcwd()


def warn() -> None:
    warnings.warn("careful", stacklevel=1)


def pids(directory: Path) -> list[int]:
    return [int(pid) for rank in "01" for pid in (directory / rank).read_text().split()]


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


def assert_gone(processes: list[int]) -> None:
    assert len(processes) == 4
    end = time.monotonic() + 10
    while any(is_alive(pid) for pid in processes):
        assert time.monotonic() < end, f"still running: {[pid for pid in processes if is_alive(pid)]}"
        time.sleep(0.02)


def test_ranks_return_results_in_rank_order() -> None:
    assert run_ranks(rank_and_sum, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_ranks_return_tensors_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_ranks(pid_then, 2, "return", str(tmp_path))
    assert torch.equal(torch.stack(results), torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert_gone(pids(tmp_path))
    assert "[rank 0] said by rank 0\n[rank 1] said by rank 1\n" in capsys.readouterr().out


def test_rank_that_raises_stops_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the reason") as caught:
        run_ranks(pid_then, 2, "raise", str(tmp_path))
    assert isinstance(caught.value.__cause__, RankError)
    assert "in fail_by\n" in str(caught.value.__cause__)
    assert "said by rank 1" in str(caught.value.__cause__)
    assert_gone(pids(tmp_path))


def test_rank_exception_that_does_not_pickle_is_text(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="Unpicklable: one and two"):
        run_ranks(pid_then, 2, "raise unpicklable", str(tmp_path))


def test_rank_that_dies_is_named_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(
        RankError, match=r"rank 1 died \(exit code -6\)(.|\n)*Fatal Python error: Aborted(.|\n)*in fail_by"
    ):
        run_ranks(pid_then, 2, "abort", str(tmp_path))
    assert_gone(pids(tmp_path))


def test_rank_that_hangs_shows_where(tmp_path: Path) -> None:
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] had not finished after 4 s") as caught:
        run_ranks(pid_then, 2, "hang", str(tmp_path), timeout=4)
    said_by_0, said_by_1 = str(caught.value).split("rank 1 printed:")
    assert "in a_function_that_hangs" in said_by_1
    assert "in barrier" in said_by_0
    assert_gone(pids(tmp_path))


def test_interrupt_stops_all_ranks(tmp_path: Path) -> None:
    script = (  # a process started in the background inherits an ignored SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.support.ranks import run_ranks\n"
        "from tests.meta.test_harness import pid_then\n"
        f"run_ranks(pid_then, 2, 'hang', {str(tmp_path)!r})\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 150  # two fresh Pythons import Lightning, one after the other, perhaps on a busy machine
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    parent.send_signal(2)
    _, errors = parent.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert_gone(pids(tmp_path))


def test_ranks_have_the_tests_environment_threads_and_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SET_BY_THE_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(process_environment, 1, threads=2) == [("yes", 2, str(tmp_path))]


def test_warnings_are_errors_in_ranks() -> None:
    with pytest.raises(UserWarning, match="careful"):
        run_ranks(warn, 1)
