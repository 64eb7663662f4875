"""Makes TensorBoard's event files cheaper to write, by computing their checksums in compiled code.

TensorBoard computes the checksum of every record in Python, a byte at a time, in a thread that competes with the
training loop for the interpreter: 4 to 7 µs a scalar, five times what the rest of writing costs.
"""

from __future__ import annotations

import struct
import warnings
from typing import Any

from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.writer import FileWriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # without its C code it warns, and is not used below
    import google_crc32c


class CompiledChecksumWriter(RecordWriter):  # type: ignore[misc]
    """Writes the same bytes as TensorBoard's own writer.

    A record is the length of the data as uint64, the checksum of these 8 bytes, the data, and the checksum of the data,
    all little-endian (the TFRecord format of TensorFlow).
    """

    def write(self, data: bytes) -> None:
        """Write one record."""
        length = struct.pack("<Q", len(data))
        self._writer.write(length + checksum(length) + data + checksum(data))


def checksum(data: bytes) -> bytes:
    """The checksum of ``data`` in a TFRecord: CRC-32C, rotated right by 15 bits, plus a constant that TensorFlow chose.

    Returns it as 4 bytes, little-endian.
    """
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def use_compiled_checksums(writer: FileWriter) -> None:
    """Make ``writer`` compute checksums in compiled code from now on, if there is any on this machine.

    This replaces a private attribute of TensorBoard. If it is not there, or not of the class expected, nothing changes.
    """
    worker: Any = writer
    for attribute in ("event_writer", "_async_writer", "_worker"):
        worker = getattr(worker, attribute, None)
    records: Any = getattr(worker, "_record_writer", None)
    if google_crc32c.implementation == "c" and worker and type(records) is RecordWriter:
        worker._record_writer = CompiledChecksumWriter(records._writer)
