"""Errors on the terminal: at most three lines, and the exit status."""

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

BUG, SWEEP_WITH_FAILURES = 1, 8


TOO_MUCH = ("allocate memory", "out of memory", "not enough memory", "overflow")
"""What torch says of sizes that no machine has."""


WIDEST = 1000
"""Characters of a line of an error message; of what is longer, the middle is left out."""


def drop_unwritten(stream: TextIO) -> None:
    """Throw away what a stream still holds and cannot write: Python would try again when it ends."""
    if isinstance(stream, io.TextIOWrapper):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def system_refusal(error: BaseException) -> list[str]:
    """Say what the system's refusal means, where nobody nearer to it did; nothing where it refused nothing."""
    if isinstance(error, OSError):
        return [f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in TOO_MUCH)):
        return [f"out of memory: {error}".splitlines()[0], "try a smaller optim.batch_size, network or data set"]
    return []


def print_error(lines: Iterable[str]) -> None:
    """Print an error in at most three lines that do nothing to a terminal but stand there."""
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines][:3]
    short = [x if len(x) <= WIDEST else f"{x[: WIDEST // 2]} ... {x[-WIDEST // 2 :]}" for x in shown]
    with suppress(OSError):  # nobody to tell; the status says it
        print("\n".join([f"qbench: {short[0]}", *short[1:]]), file=sys.stderr)
    drop_unwritten(sys.stderr)
