"""Stops a process on a signal: after the current training step or, if no step is in progress, within a time limit."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from qbench.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that SLURM and submitit send before a job is preempted. They have precedence over the other signals."""
GRACE_SECONDS = 10.0
"""Default time limit in seconds. The process ends at most this long after a signal.

If a training step is in progress, the time counts from the end of this step.
"""

_step = threading.RLock()


@contextmanager
def step_in_progress() -> Iterator[None]:
    """Enclose a training step. If a signal arrives in the `with` block, its time limit starts when the block ends."""
    with _step:
        yield


@contextmanager
def stop_on_signals(grace: float | None = None) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the last signal received, or 0. A signal in `WARNINGS` has precedence.

    The process is expected to stop soon after a signal. If it is still inside the `with` block `grace` seconds
    after the current step, it is ended at once. A SIGINT after an earlier signal also ends the process at once. This is
    safe, because files are written atomically, and locks are released when the process ends. If SIGHUP is ignored, as
    under nohup, it has no effect.
    """
    number = 0
    left = threading.Event()

    def end_late() -> None:
        with _step:
            pass
        if not left.wait(GRACE_SECONDS if grace is None else grace):
            message = f"qbench: stopped by signal {number}; the same command continues from the last checkpoint\n"
            with suppress(OSError):
                os.write(2, message.encode())
            os._exit(Interrupted.status)

    def note(received: int, frame: FrameType | None) -> None:
        nonlocal number
        if received == signal.SIGINT and number:
            os._exit(Interrupted.status)
        if not number:
            threading.Thread(target=end_late, daemon=True).start()
        if number not in WARNINGS:  # at a preemption, SIGTERM may come together with a warning, in any order
            number = received

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    kinds = [kind for kind in STOP_SIGNALS if kind != signal.SIGHUP or not ignored]
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield lambda: number
    finally:
        left.set()
        for kind, handler in before.items():
            signal.signal(kind, handler)


def ignore_stop_signals() -> None:
    """Ignore the signals that stop a run. Call this when the process is about to exit with its status.

    Python restores the default actions while it exits. A late signal would then replace the status of a finished run.
    """
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], int]]:
    """Yield a function that returns SIGINT after Ctrl-C, and 0 before. This is for runs in a user's own process.

    Unlike `stop_on_signals`, this function never ends the process. After Ctrl-C, the code in the `with` block is
    expected to stop soon, and the end of the block raises `KeyboardInterrupt`. A second Ctrl-C raises
    `KeyboardInterrupt` at once. Python allows signal handlers only in the main thread. In other threads, the yielded
    function always returns 0.
    """
    number = 0

    def note(received: int, frame: FrameType | None) -> None:
        nonlocal number
        if number:
            raise KeyboardInterrupt
        number = received

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield lambda: 0
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: number
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from None
    finally:
        signal.signal(signal.SIGINT, before)
    if number:
        raise KeyboardInterrupt


def end_with_parent(parent: int) -> None:
    """Start a thread that ends this process as soon as the parent process with the number `parent` has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(Interrupted.status)

    threading.Thread(target=watch, daemon=True).start()
