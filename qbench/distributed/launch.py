"""Reads the rank of this process from environment variables that torchrun sets.

This module does not import torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import ConfigError

STATUS_FOLDER = "QBENCH_STATUS_FOLDER"
"""Environment variable: a folder in which each process writes its exit status, in a file named by its rank."""

STARTED_BY = "QBENCH_STARTED_BY"
"""Environment variable: the process id of `qbench.distributed.torchrun`, which started this process."""

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The rank of this process among the processes of a run.

    Args:
        rank, size: index of this process, counted from 0, and number of processes.
        local_rank, local_size: the same numbers, counted among the processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def launch() -> Launch | None:
    """Return the ranks of this process, or None if torchrun did not start it."""
    if any(name not in os.environ for name in VARIABLES) or int(os.environ["WORLD_SIZE"]) == 1:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Launch(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def refuse_processes(size: int, shards: int) -> None:
    """Refuse a number of processes that cannot share the shards of a batch.

    Args:
        size: number of processes.
        shards: number of shards of a batch.
    """
    if shards % size:
        enough = 1 << (size - 1).bit_length()
        raise ConfigError(
            f"batch_shards={shards} cannot be shared by {size} processes, because {size} does not divide {shards}\n"
            f"type batch_shards={enough}, and start {enough} processes or a smaller power of two"
        )


def passed_on(status: int) -> int:
    """Pass this process's exit status on to `qbench.distributed.torchrun`, if that program started the process.

    In this case, the status is written to a file, and the function returns 0. If another program started the process,
    the function returns the status.

    A process must end with status 0, because torchrun otherwise stops all processes and prints its own messages.
    """
    folder = os.environ.get(STATUS_FOLDER)
    if not folder:
        return status
    (Path(folder) / os.environ.get("RANK", "0")).write_text(str(status))
    return 0
