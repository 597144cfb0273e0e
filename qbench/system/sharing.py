"""Tests whether file locks work between processes that share a folder, perhaps on several hosts.

On some file systems, a lock holds only on the host that took it, for example on NFS mounted with `nolock`. Each process
therefore announces itself in the folder: with a locked file, and with a counter that increases every second. If another
process can lock this file although the counter increases, then locks do not work between the two processes.
"""

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qbench.errors import ResourceError
from qbench.system import files
from qbench.system.locks import is_locked, locked

FOLDER = ".processes"
"""The folder, below the shared folder, in which processes announce themselves."""
BEAT_SECONDS = 1.0
"""Seconds between two increases of the counter."""
BEATS = 3
"""The counter of a living process increases within this many intervals."""


@contextmanager
def announced(folders: Iterable[str | Path]) -> Iterator[int]:
    """Announce this process in some folders within a `with` block.

    Yield the time at which this process was announced, in nanoseconds, by the clock of the file system.

    Raises:
        ResourceError: another process works in a folder, and locks do not work between the two processes.
    """
    with ExitStack() as stack:
        yield max(stack.enter_context(_announced_in(Path(folder))) for folder in dict.fromkeys(folders))


@contextmanager
def _announced_in(shared: Path) -> Iterator[int]:
    folder = shared / FOLDER
    files.make_directory(folder)
    lock = folder / f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}.lock"
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while True:
            with suppress(OSError):  # the folder is full or unreachable for some time
                _counter(lock).write_text(str(number))
            number += 1
            if ended.wait(BEAT_SECONDS):
                return

    with locked(lock):
        began = lock.stat().st_mtime_ns
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            _refuse_unlocked(shared, [path for path in folder.glob("*.lock") if path != lock])
            yield began
        finally:
            ended.set()
            thread.join()
            _remove(lock)
    with suppress(OSError):  # not empty if other processes are still announced
        folder.rmdir()


def _refuse_unlocked(shared: Path, others: list[Path]) -> None:
    """Refuse a folder in which another process works, if locks do not work between the two processes.

    The files of ended processes are removed.

    Args:
        others: the lock files of all other processes.
    """
    before = {path: _count(path) for path in others if not is_locked(path)}
    deadline = time.monotonic() + BEATS * BEAT_SECONDS
    while before and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        for path in [path for path in before if _count(path) not in (None, before[path])]:
            if not is_locked(path):
                raise ResourceError(
                    f"{shared}: process {path.stem} also uses this folder, and file locks do not exclude it\n"
                    "mount the folder with locks (NFS: without nolock and local_lock), or wait for the other process,\n"
                    "or type another folder: out=FOLDER"
                )
            del before[path]
    for path in before:
        _remove(path)


def _counter(lock: Path) -> Path:
    return lock.with_suffix(".count")


def _count(lock: Path) -> str | None:
    """Return the counter of a process, or None if it has no counter.

    On NFS, opening a file fetches its newest content.
    """
    with suppress(OSError):
        return _counter(lock).read_text()
    return None


def _remove(lock: Path) -> None:
    for path in (_counter(lock), lock):
        path.unlink(missing_ok=True)
