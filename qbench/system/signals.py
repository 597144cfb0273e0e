"""Turns signals into a number that loops read, so that a run stops between two steps."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a number; a second SIGINT ends the process.

    Nothing is lost by that: files appear whole or not at all, and locks end with the process.
    """
    number = 0

    def note(received: int, frame: FrameType | None) -> None:
        nonlocal number
        if received == signal.SIGINT and number:
            os._exit(75)
        number = received

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield lambda: number
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
