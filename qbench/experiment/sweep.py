"""Checks a sweep, then executes the runs one after the other or with a launcher."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from qbench.errors import Busy, ConfigError, Interrupted
from qbench.experiment.jobs import check, outcome, run_catching
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.run_queue import RunQueue
from qbench.experiment.sweep_progress import show_progress
from qbench.experiment.workers import run_in_processes, worker_count
from qbench.runs.reader import RunRecord
from qbench.runs.result import load_result
from qbench.system.gpus import visible_gpus
from qbench.system.sharing import announced

LAUNCHERS = {
    "joblib": "hydra.launcher.n_jobs",
    "submitit_local": "hydra.sweeper.max_batch_size",
    "submitit_slurm": "",
    "slurm_gpu": "",
    "slurm_nodes": "",
}
"""Maps a launcher to its key that limits the number of parallel runs, or to "" if the cluster limits this number."""


def run_all(runs: Sequence[PlannedRun], stop: Callable[[], int], *, progress: bool = True) -> list[RunRecord]:
    """Execute the runs one after the other. Return the current record of each run."""
    check(runs)
    failed: dict[Path, RunRecord] = {}
    with announced(_folders(runs)) as began, show_progress(runs, 1) if progress else nullcontext():
        queue = RunQueue(runs, began)
        while planned := queue.next_run(stop):
            try:
                result = run_catching(planned, stop, waits=False)
            except Busy as busy:
                queue.put_off(planned, busy.path)
                continue
            except Interrupted:
                break
            if load_result(planned.path) is None:  # the run failed before it had a directory
                failed[planned.path] = RunRecord(path=planned.path, status=result.status, reason=result.reason or "")
    return [failed.get(planned.path) or outcome(planned) for planned in runs]


def launch_all(
    arguments: list[str], runs: Sequence[PlannedRun], name: str, stop: Callable[[], int], *, progress: bool = True
) -> list[RunRecord]:
    """Let a launcher execute the runs in several processes. Return the current record of each run.

    Together, the workers have at most as many threads as there are cores. There is always at least one worker.

    Raises:
        ConfigError: the launcher does not exist or does not accept a key.
    """
    if name not in LAUNCHERS:
        raise ConfigError(f"hydra/launcher={name}: no such launcher\nallowed: basic, {', '.join(LAUNCHERS)}")
    key = LAUNCHERS[name]
    limits = [a.partition("=")[2] for a in arguments if key and a.startswith(f"{key}=")]
    for word in (w for w in arguments if name == "joblib" and w.lstrip("+").startswith("hydra.")):
        if not re.fullmatch(rf"{key}=(-1|[1-9]\d{{,5}})|hydra\.searchpath=.*", word):
            raise ConfigError(
                f"{word}: not a key of the launcher joblib\n"
                f"allowed: {key}=N for N runs at a time, or -1 for one run per core"
            )
    workers = worker_count(runs, limits[-1:]) if key else len(runs)
    if progress:
        what = f"starting worker processes for {len(runs)} runs" if key else f"submitting jobs for {len(runs)} runs"
        print(f"{name}: {what} ...", file=sys.stderr, flush=True)
    with show_progress(runs, workers) if progress else nullcontext():
        if name == "joblib":
            _run_by_joblib(runs, limits, stop)
        else:
            _run_by_submitit(arguments, runs, name, limits, stop)
    return [outcome(planned) for planned in runs]


def _run_by_joblib(runs: Sequence[PlannedRun], limits: Sequence[str], stop: Callable[[], int]) -> None:
    gpus = gpus_of(runs)
    workers = worker_count(runs, limits[-1:], gpus=gpus)
    if several := [planned for planned in runs if planned.config.runtime.gpus_per_run > 1]:
        raise ConfigError(
            f"runtime.gpus_per_run={several[0].config.runtime.gpus_per_run:g}: joblib starts one process for a run\n"
            "to start a process for each GPU, type hydra/launcher=submitit_local"
        )
    with announced(_folders(runs)) as began:
        run_in_processes(runs, workers, stop, began, gpus)


def _run_by_submitit(
    arguments: list[str], runs: Sequence[PlannedRun], name: str, limits: Sequence[str], stop: Callable[[], int]
) -> None:
    try:
        installed = find_spec("hydra_plugins.hydra_submitit_launcher") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise ConfigError(f"hydra/launcher={name} is not installed\nin a clone: pip install -e '.[slurm]'")
    from qbench.config.compose import launcher_keys
    from qbench.experiment import submitted_jobs as jobs

    local = name == "submitit_local"
    folder = os.path.abspath(os.path.join(runs[0].config.out, jobs.FOLDER))
    unlimited = [f"hydra.launcher.timeout_min={jobs.YEAR_MINUTES}"] if local else []
    keys = launcher_keys(arguments, f"hydra.launcher.submitit_folder='{folder}'", *unlimited)
    settings = jobs.job_settings("local" if local else "slurm", keys, runs)
    check(runs)
    with announced(_folders(runs)) as began:
        if settings.cluster == "slurm":
            from qbench.experiment.cluster_jobs import run_on_cluster

            run_on_cluster(runs, settings, stop)
        else:
            gpus = gpus_of(runs)
            workers = worker_count(runs, limits[-1:], gpus=gpus, processes=settings.processes)
            jobs.run_in_local_jobs(runs, settings, workers, gpus, stop, began)


def gpus_of(runs: Sequence[PlannedRun]) -> list[str]:
    """Return the names of the GPUs to share among some runs. The list is empty if a run names its own device."""
    typed = {planned.config.runtime.device for planned in runs}
    return visible_gpus() if typed <= {"auto", "cuda"} else []


def _folders(runs: Sequence[PlannedRun]) -> list[str]:
    return [planned.config.out for planned in runs]
