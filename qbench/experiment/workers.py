"""Worker processes that run the jobs of a sweep in parallel."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import active_children
from typing import Any

from qbench.config.identity import digest
from qbench.config.schema import Config, parent
from qbench.experiment.jobs import check, work
from qbench.experiment.sweep_progress import POLL
from qbench.runs.directory import RunDirectory


def most_workers(configs: Sequence[Config], wanted: str = "") -> int:
    """Return how many processes may work at a time: as many as wanted, and never more threads than cores."""
    most = max(1, (os.cpu_count() or 1) // max(config.runtime.threads for config in configs))
    return min(int(wanted) if wanted.isdecimal() else most, most) or most


def run_in_processes(configs: Sequence[Config], workers: int, stop: Callable[[], int]) -> None:
    """Run the cells in processes of joblib's.

    Where one is killed, what was in hand waits until the end; then each gets a process to itself, one after the other:
    what kills its process then has harmed nobody else.
    """
    left, suspects = parents_first(configs), list[Config]()
    checked = False
    while left and not stop():
        with _pool(workers) as pool:
            if not checked:
                pool.submit(check, configs).result()
                checked = True
            if in_hand := _finish(pool, left, workers, stop):
                print(f"warning: a worker was killed; it had one of {len(in_hand)} runs in hand", file=sys.stderr)
                suspects += in_hand
    for config in suspects:
        with _pool(1) as pool:
            if _finish(pool, [config], 1, stop):
                print(f"warning: the process of {RunDirectory(config).path} was killed again", file=sys.stderr)


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    pool = ProcessPoolExecutor(workers, initializer=_ready)
    try:
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


def _ready() -> None:
    """Import what every run needs, out of the garbage collector's sight; leave signals between runs to the sweep."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)
    for module in ("qbench.experiment.run", "torch.utils.tensorboard"):
        import_module(module)
    import torch

    torch.optim.SGD([torch.zeros(1)])  # torch imports half of itself at its first optimizer
    gc.freeze()  # joblib's workers collect after every second of work


def _finish(pool: Any, left: list[Config], workers: int, stop: Callable[[], int]) -> list[Config]:
    """Let a pool run the cells, taking them from `left` one by one; return those in hand when a process was killed."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    working: dict[Future[None], Config] = {}
    while working or (left and not stop()):
        while left and len(working) < workers and not stop():
            config = left.pop(0)
            working[pool.submit(work, config)] = config
        ended, _ = wait(working, POLL, FIRST_COMPLETED)
        if any(isinstance(job.exception(), BrokenProcessPool) for job in ended):
            return [config for job, config in working.items() if not job.done() or job.exception()]
        for job in ended:
            job.result()
            del working[job]
        for process in active_children() if stop() else ():
            process.terminate()  # it saves what it has in hand
    return []


def parents_first(configs: Sequence[Config]) -> list[Config]:
    """Return the cells, those first that are the first to need a float parent: processes side by side train several
    parents then, where they would wait for one.
    """
    parents = [digest(parent(config).identity()) for config in configs]
    return [c for _, c in sorted(enumerate(configs), key=lambda cell: parents.index(parents[cell[0]]) != cell[0])]
