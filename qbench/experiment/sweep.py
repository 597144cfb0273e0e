"""Checks a sweep, then executes the runs one after the other or with a launcher."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from qbench.errors import Busy, ConfigError, Interrupted, QbenchError
from qbench.experiment.jobs import check, outcome, run_catching, work_on
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.run_queue import RunQueue
from qbench.experiment.sweep_progress import show_progress
from qbench.experiment.workers import run_in_processes, worker_count
from qbench.runs.reader import RunRecord
from qbench.runs.result import load_result
from qbench.system.sharing import announced

LAUNCHERS = {"joblib": "hydra.launcher.n_jobs", "submitit_local": "hydra.sweeper.max_batch_size", "submitit_slurm": ""}
"""Maps a launcher to the key that limits parallel runs. Hydra's plugin starts submitit."""


def run_all(runs: Sequence[PlannedRun], stop: Callable[[], int], *, progress: bool = True) -> list[RunRecord]:
    """Execute the runs one after the other. Return their outcomes."""
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
    """Let a launcher execute the runs in several processes. Return their outcomes.

    There are at most as many workers as fit on the cores, each with its threads, and at least one.

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
    threads = max(planned.config.runtime.threads for planned in runs)
    workers = worker_count(threads, limits[-1] if limits else "")
    with show_progress(runs, workers) if progress else nullcontext():
        if name == "joblib":
            with announced(_folders(runs)) as began:
                run_in_processes(runs, workers, stop, began)
        else:
            limit = [f"{key}={workers}"] if key else []
            _launch_by_hydra([a for a in arguments if not key or not a.startswith(f"{key}=")] + limit, runs)
    return [outcome(planned) for planned in runs]


def _folders(runs: Sequence[PlannedRun]) -> list[str]:
    return [planned.config.out for planned in runs]


def _launch_by_hydra(arguments: list[str], runs: Sequence[PlannedRun]) -> None:
    from qbench.config import compose

    try:
        installed = find_spec("hydra_plugins.hydra_submitit_launcher") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise ConfigError("hydra/launcher=submitit_... is not installed\nin a clone: pip install -e '.[slurm]'")
    check(runs)
    try:
        compose.dispatch(arguments, work_on)
    except QbenchError:
        raise
    except Exception as error:  # a worker was killed; its run is unfinished
        print(f"warning: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
