"""TensorBoard's event files, with checksums from compiled code.

TensorBoard computes the checksum of every record in Python, a byte at a time, in a thread that takes the interpreter
from the training loop: 4 to 7 µs a scalar, five times what the rest of writing costs.
"""

from __future__ import annotations

import struct
import warnings
from typing import Any

from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.writer import FileWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # where it is not compiled it says so; then it is not used
    import google_crc32c


class CompiledChecksumWriter(RecordWriter):  # type: ignore[misc]
    """Writes the same bytes as its base.

    A record is: length as uint64 · its checksum · data · its checksum, little-endian (TensorFlow's TFRecord).
    """

    def write(self, data: bytes) -> None:
        """Write one record."""
        length = struct.pack("<Q", len(data))
        self._writer.write(length + checksum(length) + data + checksum(data))


def checksum(data: bytes) -> bytes:
    """CRC-32C as a TFRecord masks it: rotated right by 15 bits, plus a constant; uint32, little-endian."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def use_compiled_checksums(writer: FileWriter) -> None:
    """Have ``writer``'s thread compute checksums in compiled code from now on, if there is such code.

    What is replaced is private; where TensorBoard's insides are others than those known, they are left alone.
    """
    worker: Any = writer
    for part in ("event_writer", "_async_writer", "_worker"):
        worker = getattr(worker, part, None)
    records: Any = getattr(worker, "_record_writer", None)
    if google_crc32c.implementation == "c" and worker and type(records) is RecordWriter:
        worker._record_writer = CompiledChecksumWriter(records._writer)
