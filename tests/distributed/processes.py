"""Starts several processes that share a run, as torchrun does, but with the fork server (`faults`)."""

import random
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faults

WORDS = (
    "experiment=smoke",
    "runtime.tensorboard=false",
    "runtime.progress=false",
    "optim.batch_size=192",
    "pretrain.optim.batch_size=192",
    "batch_shards=4",
    "epochs=2",
)
"""A run of 2 epochs of 6 steps, with a float baseline of 1 epoch."""


def start(
    words: Sequence[str], size: int, out: Path, wrong: Mapping[int, Mapping[str, Any]] | None = None
) -> list[faults.Job]:
    """Start a run in `size` processes.

    Args:
        wrong: rank -> the fault of this process (see `faults`).
    """
    with socket.socket() as free, faults.server() as server:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        places = ({"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size))
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            server.start(words, out, environment=shared | place if size > 1 else {}, **(wrong or {}).get(rank, {}))
            for rank, place in enumerate(places)
        ]


def run(
    words: Sequence[str], size: int, out: Path, wrong: Mapping[int, Mapping[str, Any]] | None = None
) -> tuple[list[int], str]:
    """Run in `size` processes. Return their exit statuses, and what they have printed on stderr."""
    jobs = start(words, size, out, wrong)
    statuses = [job.wait() for job in jobs]
    return statuses, "".join(job.stderr() for job in jobs)


def kill_some(jobs: Sequence[faults.Job], draw: random.Random, seconds: float) -> None:
    """After a random time, kill one process or all of them."""
    time.sleep(draw.uniform(0, seconds))
    for job in jobs if draw.random() < 0.5 else [draw.choice(jobs)]:
        job.kill()
