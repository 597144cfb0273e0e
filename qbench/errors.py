"""Errors a user can meet. Each class carries the exit status of the command line; anything else is a bug (1).

A message holds at most three lines: what was found, what is allowed, what to type instead.
"""


class QbenchError(Exception):
    """An error with a message for the user; `status` is the process's exit status."""

    status = 1


class ConfigError(QbenchError):
    """The command line or a configuration file is wrong."""

    status = 2


class DataError(QbenchError):
    """A data set is missing or damaged."""

    status = 3


class CheckpointError(QbenchError):
    """A checkpoint or a stored result is damaged or does not fit."""

    status = 4


class ResourceError(QbenchError):
    """Disk, memory or permissions do not suffice."""

    status = 5


class Diverged(QbenchError):
    """Training met a number that is not finite, or weights or scales that have run away."""

    status = 6


class Interrupted(QbenchError):
    """A signal asked the run to stop; the same command goes on where it stopped."""

    status = 75
