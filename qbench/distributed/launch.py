"""Reads from the environment which of several processes this one is. torchrun sets these variables.

This module does not import torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import ConfigError

STATUS_FOLDER = "QBENCH_STATUS_FOLDER"
"""Environment variable: a folder in which each process writes its exit status, in a file named by its rank."""

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of a run.

    Args:
        rank, size: number of this process, from 0, and number of processes.
        local_rank, local_size: the same among the processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def launch() -> Launch | None:
    """Return the place of this process, or None if it is the only one."""
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
            f"batch_shards={shards} cannot be shared by {size} processes, which must divide it\n"
            f"type batch_shards={enough} and start {enough} processes, or fewer"
        )


def passed_on(status: int) -> int:
    """Write this process's exit status for `qbench.distributed.torchrun`, and return 0. Elsewhere, return the status.

    torchrun stops all processes as soon as one ends with another status than 0, with messages of its own.
    """
    folder = os.environ.get(STATUS_FOLDER)
    if not folder:
        return status
    (Path(folder) / os.environ.get("RANK", "0")).write_text(str(status))
    return 0
