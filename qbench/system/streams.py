"""Makes stdout and stderr usable after their reader or terminal is lost.

A run must not fail because nobody reads its messages. Messages to stderr are therefore dropped if they cannot be
written. Output to stdout is dropped if the reading process has ended, as in `| head -1`. If stdout is a file and the
disk is full, writing still raises an error, because the user wants this file.
"""

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READER_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET})
"""Errors of a closed pipe, a disconnected terminal, a closed descriptor and a closed socket."""


class LossyFile(io.FileIO):
    """A file descriptor that drops data if writing raises an error in `dropped` (None: any error)."""

    def __init__(self, descriptor: int, dropped: frozenset[int] | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._dropped = dropped

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write bytes, and return their number. If the descriptor is non-blocking, wait until it is writable."""
        try:
            while (count := super().write(data)) is None:
                select.select([], [self], [])
            return count
        except OSError as error:
            if self._dropped is not None and error.errno not in self._dropped:
                raise
            return memoryview(data).nbytes


def keep_running_without_reader() -> None:
    """Replace sys.stdout and sys.stderr by streams that drop data after their reader is lost.

    Characters that the encoding lacks are written as escapes. Closed descriptors (`>&-`) are opened on the null device.
    Otherwise, the next opened file, such as a log, would get the descriptor number of stdout. If a caller has already
    replaced sys.stdout or sys.stderr, the caller's stream is kept.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == descriptor:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, descriptor)
                os.close(null)
    sys.stdout = _lossy(sys.stdout, sys.__stdout__, 1, READER_GONE)
    sys.stderr = _lossy(sys.stderr, sys.__stderr__, 2, None)


def _lossy(stream: TextIO | None, original: TextIO | None, descriptor: int, dropped: frozenset[int] | None) -> TextIO:
    """Return a stream that may drop data, for a descriptor. The stream has the encoding of the current stream."""
    if stream is not original and stream is not None:
        return stream
    encoding, lines = getattr(stream, "encoding", "utf-8"), descriptor == 2 or os.isatty(descriptor)
    buffer = io.BufferedWriter(LossyFile(descriptor, dropped))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=lines)
