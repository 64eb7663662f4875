"""Event files whose checksums are computed by compiled code."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.summary.writer import record_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from lightning_init.monitor.board import Board
from lightning_init.monitor.records import QuickRecordWriter, quicken
from tests.oracle import MemoryLogger


@given(st.binary(max_size=300))
def test_the_bytes_are_tensorboards(data: bytes) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    QuickRecordWriter(ours).write(data)
    RecordWriter(theirs).write(data)
    assert ours.getvalue() == theirs.getvalue()


def test_no_checksum_is_computed_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(MemoryLogger):
        experiment = SummaryWriter(str(tmp_path))

    board = Board([Own()])
    slow: list[int] = []
    checksum = record_writer.masked_crc32c

    def counted(data: bytes) -> int:
        slow.append(len(data))
        return int(checksum(data))

    monkeypatch.setattr(record_writer, "masked_crc32c", counted)
    for writing in range(2):  # a closed SummaryWriter that is used again opens another file
        board.write({f"activation_variance/{i}": float(i) for i in range(10)}, 0)
        Own.experiment.close()
        assert len(slow) == 2 * writing  # of the version record, which opens a file
        assert max(slow, default=0) < 100


def test_other_insides_are_left_alone(tmp_path: Path) -> None:
    class Special(RecordWriter):  # type: ignore[misc]
        pass

    with SummaryWriter(str(tmp_path)) as writer:
        file_writer = writer._get_file_writer()  # type: ignore[no-untyped-call]
        worker = file_writer.event_writer._async_writer._worker
        worker._record_writer = special = Special(worker._record_writer._writer)
        quicken(file_writer)
        assert worker._record_writer is special
        del file_writer.event_writer._async_writer._worker
        quicken(file_writer)
        file_writer.event_writer._async_writer._worker = worker
