"""Counts the cores of this machine, and divides them among the processes that share it."""

import os

SHARING = "QBENCH_PROCESSES"
"""Environment variable: number of processes of a sweep that share the cores of this machine."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """Return this process's share of the cores, at least 1.

    The runs of a sweep share the cores. The processes of a run (`LOCAL_WORLD_SIZE`, set by torchrun) also share them.
    SLURM itself gives each process its cores.
    """
    if os.environ.get("SLURM_PROCID"):
        given = os.environ.get("SLURM_CPUS_PER_TASK", "")
        return min(cores(), int(given)) if given.isdecimal() and int(given) else cores()
    counts = [os.environ.get(name, "") for name in (SHARING, "LOCAL_WORLD_SIZE")]
    sharing = [int(count) for count in counts if count.isdecimal() and int(count)]
    return max(1, cores() // max(1, *sharing, 1))
