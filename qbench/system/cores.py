"""Counts the cores of this machine, and divides them among the processes of qbench that run on it."""

import os

SHARING = "QBENCH_PROCESSES"
"""Environment variable: number of processes of a sweep that share the cores of this machine."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """Return the number of cores that this process should use, at least 1.

    The cores are divided equally among the runs of a sweep, and among the processes of a run (`LOCAL_WORLD_SIZE`, set
    by torchrun). Under SLURM, the cores are not divided, because SLURM itself gives each process its cores.
    """
    if os.environ.get("SLURM_PROCID"):
        given = os.environ.get("SLURM_CPUS_PER_TASK", "")
        return min(cores(), int(given)) if given.isdecimal() and int(given) else cores()
    counts = [os.environ.get(name, "") for name in (SHARING, "LOCAL_WORLD_SIZE")]
    sharing = [int(count) for count in counts if count.isdecimal() and int(count)]
    return max(1, cores() // max(1, *sharing, 1))
