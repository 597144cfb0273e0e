"""Executes the runs of a sweep in parallel, in worker processes."""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import active_children
from pathlib import Path

from qbench.experiment.jobs import check, work
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.run_queue import RunQueue, baselines_first
from qbench.experiment.sweep_progress import POLL_SECONDS
from qbench.system.cores import SHARING, cores
from qbench.system.gpus import TakenGpus, most_runs, pin_process
from qbench.system.signals import STOP_SIGNALS, end_with_parent, step_in_progress
from qbench.system.streams import keep_running_without_reader

_taken: TakenGpus | None = None
"""The GPUs of this worker process. The process keeps the locks of these GPUs until it ends."""
CHECKS = 3
"""Maximum number of attempts to check a sweep, if the process that checks it is killed."""


def worker_count(
    runs: Sequence[PlannedRun], limit: Sequence[str] = (), *, gpus: Sequence[str] = (), processes: int = 1
) -> int:
    """Return how many runs can be executed at a time with the available cores and GPUs.

    Args:
        runs: the runs. Their configurations state how many threads and GPUs a run needs.
        limit: the maximum number of runs at a time, as typed. No text, 0 and text that is not a number mean no limit.
        gpus: names of the GPUs that the runs share, or empty if GPUs do not limit the number of runs.
        processes: number of processes per run.
    """
    threads = max(planned.config.runtime.threads for planned in runs)
    most = max(1, cores() // (threads * processes))
    if gpus:
        most = max(1, min(most, min(most_runs(gpus, planned.config.runtime.gpus_per_run) for planned in runs)))
    typed = "".join(limit)
    return min(int(typed) if typed.isdecimal() else most, most) or most


def run_in_processes(
    runs: Sequence[PlannedRun], workers: int, stop: Callable[[], int], began: int | None = None,
    gpus: Sequence[str] = (),
) -> None:  # fmt: skip
    """Execute the runs in joblib's processes.

    If a process is killed, the runs in progress are repeated at the end, one after another, each in its own process. If
    the process of a run is then killed again, no other run is affected.

    Args:
        began: when the sweep began; see `RunQueue`.
        gpus: names of the GPUs. Each process takes its own GPUs from them. Without names, the processes see all GPUs.
    """
    per_run = max(planned.config.runtime.gpus_per_run for planned in runs)
    pool_of = partial(_pool, gpus=tuple(gpus), per_run=per_run)
    waiting, suspects = RunQueue(baselines_first(runs), began), list[PlannedRun]()
    checks = CHECKS
    while waiting and not stop():
        with pool_of(workers) as pool:
            if checks and not _checked(pool, runs, stop):
                checks -= 1
                continue
            checks = 0
            if interrupted := _finish(pool, waiting, workers, stop):
                print(
                    f"warning: a worker was killed; {len(interrupted)} runs in progress will be repeated at the end",
                    file=sys.stderr,
                )
                suspects += interrupted
    for planned in suspects:
        left = RunQueue([planned], began)
        with pool_of(1) as pool:
            if _finish(pool, left, 1, stop) or (left and not stop()):
                print(f"warning: the process of {planned.path} was killed again", file=sys.stderr)


@contextmanager
def _pool(workers: int, gpus: Sequence[str], per_run: float) -> Iterator[Executor]:
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    settings = (os.getpid(), workers, gpus, per_run)
    pool = ProcessPoolExecutor(workers, initializer=_prepare_worker, initargs=settings)
    try:
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


def _prepare_worker(parent: int, workers: int, gpus: Sequence[str], per_run: float) -> None:
    """Import the modules that every run needs. Ignore signals between runs. End this process when its parent ends.

    Take GPUs first, because CUDA sees only the GPUs that are visible when torch is imported.
    """
    global _taken
    end_with_parent(parent)
    os.environ[SHARING] = str(workers)
    if gpus:
        _taken = pin_process(gpus, per_run)
    keep_running_without_reader()
    for kind in STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)
    for module in ("qbench.experiment.run", "torch.utils.tensorboard"):
        import_module(module)
    import torch

    torch.optim.SGD([torch.zeros(1)])  # the first optimizer makes torch import many modules
    gc.freeze()  # joblib's workers collect garbage every second; leave out these objects


def _checked(pool: Executor, runs: Sequence[PlannedRun], stop: Callable[[], int]) -> bool:
    """Check the runs in a separate process. Return False if the separate process was killed or a signal arrived.

    Raises:
        ConfigError: a key or value of a run is not valid.
    """
    from joblib.externals.loky.process_executor import BrokenProcessPool

    try:
        job = pool.submit(check, runs)
        while not stop() and not wait([job], POLL_SECONDS).done:
            pass
        if job.done():
            job.result()
        return job.done()
    except BrokenProcessPool:
        print("warning: the process that checks the runs was killed", file=sys.stderr)
        return False


def _finish(pool: Executor, waiting: RunQueue, workers: int, stop: Callable[[], int]) -> list[PlannedRun]:
    """Execute the waiting runs in a pool. If a process was killed, return the runs that were in progress.

    After a process was killed, runs that had not begun remain in `waiting`.
    """
    from joblib.externals.loky.process_executor import BrokenProcessPool

    working: dict[Future[Path | None], PlannedRun] = {}
    with step_in_progress():  # no time limit here: each worker has its own
        while working or (waiting and not stop()):
            while len(working) < workers and not stop() and (planned := waiting.take()):
                try:
                    working[pool.submit(work, planned)] = planned
                except BrokenProcessPool:  # a process was killed between two runs
                    waiting.put_back(planned)
                    return _interrupted(working, waiting)
            if not working:  # other processes work on all runs
                time.sleep(POLL_SECONDS if waiting else 0)
                continue
            ended, _ = wait(working, POLL_SECONDS, FIRST_COMPLETED)
            if any(isinstance(job.exception(), BrokenProcessPool) for job in ended):
                return _interrupted(working, waiting)
            for job in ended:
                busy, planned = job.result(), working.pop(job)
                if busy:
                    waiting.put_off(planned, busy)
            for process in active_children() if stop() else ():
                process.terminate()  # the process first saves its run
    return []


def _interrupted(working: Mapping[Future[Path | None], PlannedRun], waiting: RunQueue) -> list[PlannedRun]:
    """Return the runs whose process was killed. Put runs that another process works on back into the queue."""
    found = []
    for job, planned in working.items():
        if not job.done() or job.exception():
            found.append(planned)
        elif busy := job.result():
            waiting.put_off(planned, busy)
    return found
