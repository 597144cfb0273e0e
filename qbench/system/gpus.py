"""Gives each run of a sweep its own GPUs of this machine.

A process locks the GPUs that it takes. The locks also work between different sweeps of the same user. CUDA reads
`CUDA_VISIBLE_DEVICES` when it starts, so a process must take its GPUs before it imports torch. This module does not
import torch.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable of CUDA: the GPUs that a process may use, separated by commas."""
DRIVER = Path("/proc/driver/nvidia/gpus")
"""The folder that has a subfolder for each NVIDIA GPU of this machine."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TakenGpus:
    """GPUs that are locked for a run.

    Args:
        names: the names of the GPUs, as in `CUDA_VISIBLE_DEVICES`.
        locks: the locks, which this process holds.
    """

    names: tuple[str, ...]
    locks: tuple[BaseFileLock, ...]

    def release(self) -> None:
        """Let other processes take the GPUs."""
        for lock in self.locks:
            lock.release()


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use. The list is empty if torch was built without CUDA."""
    with suppress(PackageNotFoundError):
        if version("torch").endswith("+cpu"):
            return []
    typed = os.environ.get(VISIBLE)
    if typed is None:
        return [str(number) for number in range(len(list(DRIVER.glob("*"))))]
    names = [name.strip() for name in typed.split(",")]
    hidden = [i for i, name in enumerate(names) if name in ("", "-1")]  # CUDA ignores what follows such a name
    return names[: hidden[0]] if hidden else names


def most_runs(gpus: Sequence[str], per_run: float) -> int:
    """Return the number of runs that fit on some GPUs at a time.

    Args:
        per_run: number of GPUs for each run. It is a whole number, or a fraction such as 0.5 if two runs share a GPU.
    """
    return len(gpus) * _runs_per_gpu(per_run) // max(1, round(per_run))


def take(gpus: Sequence[str], per_run: float, folder: Path | None = None) -> TakenGpus | None:
    """Lock free GPUs for a run. Return None if not enough GPUs are free.

    Args:
        gpus: names of the GPUs to choose from.
        per_run: see `most_runs`.
        folder: the folder of the locks, by default one for each user of this machine.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"qbench-gpus-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted, taken = max(1, round(per_run)), TakenGpus((), ())
    for place in range(_runs_per_gpu(per_run)):  # no GPU gets a second run while another GPU has none
        for name in gpus:
            lock = FileLock(folder / f"{name}.{place}.lock", fallback_to_soft=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            taken = TakenGpus((*taken.names, name), (*taken.locks, lock))
            if len(taken.names) == wanted:
                return taken
    taken.release()
    return None


def pin_process(gpus: Sequence[str], per_run: float, folder: Path | None = None) -> TakenGpus:
    """Wait for free GPUs, and make only these visible to this process. The caller must keep the returned locks."""
    while (taken := take(gpus, per_run, folder)) is None:
        time.sleep(POLL_SECONDS)
    os.environ[VISIBLE] = ",".join(taken.names)
    return taken


def _runs_per_gpu(per_run: float) -> int:
    return max(1, round(1 / per_run))
