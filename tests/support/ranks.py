"""Runs a test function on fresh processes that form a gloo group; brings back results or the first failure.

    def sum_of_ranks(offset: int) -> float:            # module level: found by name in the other process
        total = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(total)
        return total.item()

    def test_sum():
        assert run_ranks(sum_of_ranks, 2, 10) == [21.0, 21.0]

The processes come from a forkserver that has imported Lightning once, so each costs a fraction of a second.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# Imported once, by the process that all ranks are forked from. lightning_init is imported with the environment of the
# first test that starts ranks: what it reads from the environment while it is imported, only a fresh Python can test.
PRELOAD = [
    "lightning.pytorch",
    "lightning_init",
    "pytest",
    "pytorch_lightning",
    "rich.table",
    "sklearn.datasets",
    "torch.distributed._tensor",  # loading an FSDP2 checkpoint imports it, for a third of a second
    "torch._dynamo",  # optimizers import it at their first step
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.experimental",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
]
DUMP_SIGNAL = signal.SIGUSR1


class RankError(RuntimeError):
    """What a rank said before it failed: the cause of the exception raised again in the parent."""


class RankTimeout(RankError):
    """The ranks did not finish in time; the message has every thread's stack on every rank."""


@dataclass(frozen=True)
class Job:
    """What one rank is told. Pickled by hand: tensors travel as bytes, not as shared file descriptors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int
    world_size: int
    port: int
    threads: int
    timeout: float
    environment: dict[str, str]
    warning_filters: list[Any] = field(default_factory=list)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    threads: int = 1,
    timeout: float = 120.0,
    **kwargs: Any,
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on every rank of a new gloo group; the results come in rank order.

    Args:
        function: defined at module level; its arguments and its result must pickle.
        threads: torch's number of threads in each rank.
        timeout: seconds until all ranks are killed.

    Raises:
        The first failing rank's own exception, with its traceback and output as the cause.
        RankError: a rank died without one (a signal, ``os._exit``), or its exception does not pickle.
        RankTimeout: with the stacks of all ranks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: the system picks a free one
    environment = dict(os.environ)
    filters = list(warnings.filters)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = _Ranks(Path(folder))
        try:
            for rank in range(world_size):
                port = store.port
                job = Job(function, args, kwargs, rank, world_size, port, threads, timeout, environment, filters)
                ranks.start(job)
            return ranks.results(time.monotonic() + timeout, timeout)
        finally:
            ranks.kill()
            ranks.print_output()


class _Ranks:
    """The processes of one call, their pipes and the files that hold what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[ForkServerProcess] = []
        self.pipes: list[Connection] = []

    def start(self, job: Job) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = _forkserver().Process(
            target=_rank_main,
            args=(pickle.dumps(job), sender, str(self.output_file(job.rank))),
            name=f"rank {job.rank}",
        )
        process.start()
        sender.close()  # or the parent would never see the end of the pipe
        self.processes.append(process)
        self.pipes.append(receiver)

    def results(self, deadline: float, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.raise_timeout(timeout, sorted(waiting.values()))
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank] = self.receive(rank, list(waiting.values()))
        return [results[rank] for rank in range(len(self.pipes))]

    def receive(self, rank: int, others: list[int]) -> Any:
        """The result of a rank, or its exception raised here; ``others`` have not been heard of yet."""
        message = self.message_of(rank)
        if message is None:
            self.raise_death(rank)
        succeeded, payload, trace = message
        if succeeded:
            return pickle.loads(payload)
        # When a rank dies, the others fail with "connection reset", and may be heard first. Ask who died.
        for pipe in wait([self.pipes[other] for other in others], timeout=0.2):
            other = self.pipes.index(pipe)
            if self.message_of(other) is None:
                self.raise_death(other)
        cause = RankError(f"\nrank {rank} printed:\n{self.output(rank)}\nrank {rank} raised:\n{trace}")
        if payload is None:
            raise cause
        raise pickle.loads(payload) from cause

    def message_of(self, rank: int) -> tuple[bool, Any, str] | None:
        """What a rank sent; None if it died before it could."""
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            return None

    def raise_death(self, rank: int) -> NoReturn:
        self.processes[rank].join(5)
        code = self.processes[rank].exitcode
        raise RankError(f"rank {rank} died (exit code {code}) and printed:\n{self.output(rank)}")

    def raise_timeout(self, timeout: float, unfinished: list[int]) -> NoReturn:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, DUMP_SIGNAL)
        time.sleep(0.5)  # the dumps are written by C code within milliseconds
        outputs = "\n".join(f"rank {r} printed:\n{self.output(r)}" for r in range(len(self.processes)))
        raise RankTimeout(f"ranks {unfinished} had not finished after {timeout:g} s.\n{outputs}")

    def kill(self) -> None:
        """End every rank, with whatever it started. Also the normal end: all results are in by then."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()

    def output_file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def output(self, rank: int) -> str:
        file = self.output_file(rank)
        return file.read_text(errors="replace") if file.exists() else ""

    def print_output(self) -> None:
        """Hand on what the ranks printed, so that pytest shows it with a failing test."""
        for rank in range(len(self.processes)):
            for line in self.output(rank).splitlines():
                print(f"[rank {rank}] {line}")


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # no thread may exist in a process that is going to be forked
    forkserver.ensure_running()
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return context


def _rank_main(pickled_job: bytes, pipe: Connection, output_file: str) -> None:
    os.setpgid(0, 0)  # one group for the rank and all it starts, so that one kill ends them
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    output = os.open(output_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL)
    try:
        job = pickle.loads(pickled_job)
        _become_rank(job)
        message = (True, pickle.dumps(job.function(*job.args, **job.kwargs)), "")
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the parent must hear of everything
        message = (False, _pickled_exception(error), traceback.format_exc())
    sys.stdout.flush()
    pipe.send_bytes(pickle.dumps(message))
    # Leaving now would close this rank's sockets under the others' collectives and make them fail as well.
    threading.Event().wait()


def _die_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _pickled_exception(error: BaseException) -> bytes | None:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # exceptions with arguments of their own often pickle but don't come back
    except Exception:
        return None
    return pickled


def _become_rank(job: Job) -> None:
    """Set what torchrun would set, and what pytest set in the parent."""
    from lightning.pytorch.utilities import rank_zero
    from lightning_utilities.core.rank_zero import rank_zero_only

    os.environ.clear()
    os.environ.update(job.environment)
    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),  # Lightning: processes exist already, start none
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        OMP_NUM_THREADS=str(job.threads),
        GLOO_SOCKET_IFNAME=next(name for _, name in socket.if_nameindex() if name.startswith("lo")),
    )
    torch.set_num_threads(job.threads)
    warnings.resetwarnings()
    warnings.filters.extend(job.warning_filters)
    rank_zero.rank_zero_only.rank = rank_zero_only.rank = job.rank  # was set to 0 when the forkserver imported it
    store = dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=timedelta(seconds=job.timeout))
    dist.init_process_group(
        "gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=timedelta(seconds=job.timeout)
    )
