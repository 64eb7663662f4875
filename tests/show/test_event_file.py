"""Event files whose checksums are computed by compiled code."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import record_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from lightning_init.show.event_file import CompiledChecksumWriter, use_compiled_checksums
from lightning_init.show.loggers import StatisticsWriter
from tests.support.oracle import MemoryLogger


@given(st.binary(max_size=300))
def test_event_file_bytes_are_tensorboards(data: bytes) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    CompiledChecksumWriter(ours).write(data)
    RecordWriter(theirs).write(data)
    assert ours.getvalue() == theirs.getvalue()


def test_checksums_are_not_computed_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(MemoryLogger):
        experiment = SummaryWriter(str(tmp_path))

    writer = StatisticsWriter([Own()])
    slow: list[int] = []
    checksum = record_writer.masked_crc32c

    def counted(data: bytes) -> int:
        slow.append(len(data))
        return int(checksum(data))

    monkeypatch.setattr(record_writer, "masked_crc32c", counted)
    for writing in range(2):  # a closed SummaryWriter that is used again opens another file
        writer.write({f"activation_variance/{i}": float(i) for i in range(10)}, 0)
        Own.experiment.close()
        assert len(slow) == 2 * writing  # of the version record, which opens a file
        assert max(slow, default=0) < 100


def record_writer_of(file_writer: Any) -> Any:
    return file_writer.event_writer._async_writer._worker._record_writer


def test_record_writer_of_the_user_is_left_alone(tmp_path: Path) -> None:
    class Special(RecordWriter):
        pass

    with SummaryWriter(str(tmp_path)) as writer:
        file_writer: Any = writer._get_file_writer()
        special = Special(record_writer_of(file_writer)._writer)
        file_writer.event_writer._async_writer._worker._record_writer = special
        use_compiled_checksums(file_writer)
        assert record_writer_of(file_writer) is special


@pytest.mark.parametrize("known", [0, 1, 2])
def test_file_writer_of_the_user_is_written_to(known: int, tmp_path: Path) -> None:
    """All that is asked of it is ``add_summary``."""
    *way, end = ("event_writer", "_async_writer", "_worker")[: known + 1]

    class Own(SummaryWriter):
        def _get_file_writer(self) -> Any:
            file_writer: Any = super()._get_file_writer()
            holder = copy.copy(file_writer)
            outer = holder
            for part in way:
                inner = copy.copy(getattr(outer, part))
                setattr(outer, part, inner)
                outer = inner
            delattr(outer, end)
            holder.add_summary = file_writer.add_summary
            return holder

    class Logger(MemoryLogger):
        experiment = Own(str(tmp_path))

    StatisticsWriter([Logger()]).write({"activation_variance/0": 1.0}, 0)
    Logger.experiment.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Scalars("activation_variance/0")
    assert event.value == 1.0


@pytest.mark.processes
def test_checksums_without_compiled_code_replace_nothing_silently(tmp_path: Path) -> None:
    """As where there is no wheel of google-crc32c, and warnings are errors."""
    script = f"""
import sys
sys.modules["google_crc32c._crc32c"] = None
from torch.utils.tensorboard import SummaryWriter
from lightning_init.show.event_file import google_crc32c, use_compiled_checksums
assert google_crc32c.implementation == "python"
with SummaryWriter({str(tmp_path)!r}) as writer:
    file_writer = writer._get_file_writer()
    use_compiled_checksums(file_writer)
    print(type(file_writer.event_writer._async_writer._worker._record_writer).__name__)
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "RecordWriter\n"
