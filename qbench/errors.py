"""Defines the errors that qbench shows to users.

Each class defines the exit status of the process. An exception that is not a `QbenchError` is a bug (status 1).

A message has at most three lines. The lines say what was found, what is allowed, and what to type instead.
"""

from pathlib import Path


class QbenchError(Exception):
    """An error with a message for the user. `status` is the exit status of the process."""

    status = 1


class ConfigError(QbenchError):
    """The command line or a configuration file is not valid."""

    status = 2


class DataError(QbenchError):
    """A data set is missing or damaged, or it does not have the expected format."""

    status = 3


class CheckpointError(QbenchError):
    """A checkpoint or a stored result is damaged, or it does not fit the run."""

    status = 4


class ResourceError(QbenchError):
    """Disk space, memory or permissions are not sufficient."""

    status = 5


class Diverged(QbenchError):
    """Training produced inf or nan, exploding weights, or a scale that is not positive."""

    status = 6


class ProcessesDiffer(QbenchError):
    """A value that must be equal in all processes of a run is not equal."""


class Interrupted(QbenchError):
    """A signal stopped the run, or one of its processes ended unexpectedly. The same command continues the run."""

    status = 75


class Busy(Interrupted):
    """Another process is working on the run or on its float baseline. A sweep trains such a run later.

    Args:
        path: the directory that the other process has locked.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"another process is working on {path}")
        self.path = path

    def __reduce__(self) -> tuple[type["Busy"], tuple[Path]]:
        return Busy, (self.path,)


class ProcessLost(Interrupted):
    """One of several processes of a run ended without raising an error, for example because it was killed."""
