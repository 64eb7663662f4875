"""What every test gets: no network, a directory and an environment of its own, known warnings silenced.

A test that starts processes has to say so by the marker ``processes``, or by a file name that ends in ``_on_ranks``.
"""

from __future__ import annotations

import ipaddress
import multiprocessing.process
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

# Lightning and torch say these about a test's tiny data or a CPU; none is about the code under test.
HARMLESS_WARNINGS = [
    r"ignore:.*does not have many workers:UserWarning",  # advice on speed
    r"ignore:The number of training batches \(\d+\) is smaller than the logging interval:UserWarning",
    r"ignore:Checkpoint directory .* exists and is not empty:UserWarning",  # a second fit into it
    r"ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning",  # our loggers are explicit
    r"ignore:Using `DistributedSampler` with the dataloaders. During:UserWarning",  # a few samples count twice
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # Lightning 2.6 on torch 2.13
    r"ignore:DTensor random operators may not have complete support on cpu:UserWarning",  # reset_parameters
]


def pytest_configure(config: pytest.Config) -> None:
    for line in HARMLESS_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)  # the tests' tensors are too small for more, and tests share the machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes come first: at the end, one worker would wait long for the other."""
    for item in items:
        if item.path.stem.endswith("_on_ranks"):
            item.add_marker("processes")
    first = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in first)  # stable: the order within a file is kept


@pytest.fixture(autouse=True)
def _no_unannounced_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make quick`` must not meet a test that starts processes and does not say so."""
    if request.node.get_closest_marker("processes"):
        return

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a test that starts processes needs the marker `processes`")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes under the working directory unless told otherwise."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """`seed_everything` and cluster environments set variables that would reach the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def connect_to_this_machine(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
            self.close()
            raise RuntimeError(f"a test must not use the network: it tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_this_machine)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
