"""Stores the last received signal. Loops read it, so a run stops between two steps."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the last signal received, or 0.

    SIGINT, SIGTERM and SIGUSR1 are handled. SIGINT after an earlier signal ends the process at once. This is safe,
    because files are written atomically, and locks are released when the process ends.
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
