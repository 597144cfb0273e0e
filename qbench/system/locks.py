"""Locks files. The operating system releases a lock when the process that holds the lock ends.

Some file systems do not support locks. An error of such a file system does not mean that the file
is locked.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qbench.system import files

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
"""Errors of file systems that do not support locks."""
POLL_SECONDS = 0.5


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lock a file within a `with` block. A missing file is created. The file is not removed afterwards.

    If the file system does not support locks, print a warning and continue without a lock.

    While another process holds the lock, call `waiting` every 0.5 s.

    Raises:
        ResourceError: the file cannot be created or opened.
    """
    from filelock import FileLock, Timeout  # takes 15 ms; printing a stored result needs no lock

    lock = FileLock(path, fallback_to_soft=False)
    while True:
        try:
            lock.acquire(timeout=POLL_SECONDS)
            break
        except Timeout:
            waiting()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise files.resource_error(error, path) from error
            why = "the file system does not support locks; start no other process that writes there"
            print(f"warning: {path}: {why}", file=sys.stderr)
            break
    try:
        yield
    finally:
        lock.release()


def is_locked(path: str | Path) -> bool:
    """Return whether another process has locked a file. Return False if the file is missing or cannot be tested.

    The file is opened only for reading, because the file system may be read-only.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
