"""Tests are kept from the network and from each other."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def test_network_is_refused_by_address() -> None:
    with pytest.raises(RuntimeError, match=r"must not use the network: it tried to reach \('192\.0\.2\.1', 80\)"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_network_of_this_machine_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_working_directory_is_the_tests_own(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("attempt", [1, 2])
def test_environment_is_restored(attempt: int) -> None:
    assert "PL_GLOBAL_SEED" not in os.environ
    os.environ["PL_GLOBAL_SEED"] = "3"


def test_processes_need_their_marker() -> None:
    with pytest.raises(RuntimeError, match="needs the marker `processes`"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(RuntimeError, match="needs the marker `processes`"):
        multiprocessing.get_context("spawn").Process().start()


@pytest.mark.processes
def test_processes_are_allowed_with_their_marker() -> None:
    subprocess.run(["true"], check=True)
