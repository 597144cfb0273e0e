"""Defines the errors that qbench shows to users.

Each class has an exit status. Any other exception is a bug (status 1).

A message has at most three lines. They say what was found, what is allowed, and what to type instead.
"""

from pathlib import Path


class QbenchError(Exception):
    """An error with a message for the user. `status` is the exit status of the process."""

    status = 1


class ConfigError(QbenchError):
    """The command line or a configuration file is not valid."""

    status = 2


class DataError(QbenchError):
    """A data set is missing or damaged, or its form is not as expected."""

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
    """The processes of a run have different values where the values must be equal."""


class Interrupted(QbenchError):
    """A signal stopped the run, or a process of the run was lost. The same command continues the run."""

    status = 75


class Busy(Interrupted):
    """Another process works on the run, or on its float baseline. A sweep then trains the run later.

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
