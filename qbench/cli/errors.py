"""Prints errors on the terminal, in at most three lines."""

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from qbench.report.tables.escape import printable

BUG, SWEEP_WITH_FAILURES = 1, 8

OUT_OF_MEMORY = ("allocate memory", "out of memory", "not enough memory", "overflow")
"""Texts that occur in torch's out-of-memory messages."""

WIDEST = 1000
"""Maximum line length of an error message. The middle of a longer line is left out."""


def drop_unwritten(stream: TextIO) -> None:
    """Discard the text that a stream has failed to write.

    Otherwise Python would try to write the text again at exit.
    """
    if isinstance(stream, io.TextIOWrapper):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def resource_error(error: BaseException) -> list[str]:
    """Return the lines of a message if the error means that the system refused a resource, such as memory.

    The list is empty for other errors.
    """
    if isinstance(error, OSError):
        return [f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)]
    out_of_memory = isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)
    if out_of_memory or isinstance(error, MemoryError):
        return [f"out of memory: {error}".splitlines()[0], "try a smaller optim.batch_size, model or data set"]
    return []


def print_error(lines: Iterable[str]) -> None:
    """Print at most three lines to stderr. Control characters of the terminal are escaped."""
    shown = [printable(line) for line in lines][:3]
    short = [x if len(x) <= WIDEST else f"{x[: WIDEST // 2]} ... {x[-WIDEST // 2 :]}" for x in shown]
    with suppress(OSError):  # if stderr cannot be written, only the exit status reports the error
        print("\n".join([f"qbench: {short[0]}", *short[1:]]), file=sys.stderr)
    drop_unwritten(sys.stderr)
