"""Executes the runs of a sweep in jobs of submitit, with the keys of Hydra's launcher."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.config.schema import Node
from qbench.distributed.launch import refuse_processes
from qbench.errors import ConfigError
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.run_queue import POLL_SECONDS, RunQueue, baselines_first
from qbench.experiment.submitted_run import SubmittedRun
from qbench.system.gpus import TakenGpus, take

if TYPE_CHECKING:
    from submitit import Job
    from submitit.core.core import Executor

COMMON = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout",
)  # fmt: skip
"""The launcher's keys that jobs on every kind of cluster have."""
FOLDER = ".submitit"
"""The folder below `out` that contains the jobs' files. Every node of a cluster must be able to read it."""
YEAR_MINUTES = 60 * 24 * 365
"""Default time limit of jobs on this machine."""
LOCAL = ("timeout_min", "tasks_per_node", "stderr_to_stdout")
"""The keys that jobs on this machine use."""


@dataclass(frozen=True)
class JobSettings:
    """The settings of a job.

    Args:
        cluster: `local` or `slurm`.
        keys: the keys of Hydra's launcher, except the keys for `folder` and `timeouts`.
        folder: the folder of the jobs' files.
        timeouts: how often a job is queued again after it has reached its time limit.
    """

    cluster: str
    keys: Node
    folder: Path
    timeouts: int

    @property
    def processes(self) -> int:
        """The number of processes of a job."""
        return int(self.keys["nodes"]) * int(self.keys["tasks_per_node"])

    def executor(self, **more: object) -> "Executor":
        """Return submitit's executor with these settings. `more` contains additional settings.

        Raises:
            ConfigError: a key or value is not valid, or this machine cannot submit jobs.
        """
        import submitit

        keys = {key: value for key, value in (self.keys | more).items() if value is not None}
        executor: Executor
        try:
            if self.cluster == "local":
                executor = submitit.LocalExecutor(self.folder, max_num_timeout=self.timeouts)
                executor.update_parameters(**{key: keys[key] for key in LOCAL if key in keys})
                return executor
            timeouts = {f"{self.cluster}_max_num_timeout": self.timeouts}
            executor = submitit.AutoExecutor(self.folder, self.cluster, **timeouts)
            prefixes = {key: "" if key in COMMON else f"{self.cluster}_" for key in keys}
            executor.update_parameters(**{prefixes[key] + key: value for key, value in keys.items()})
            return executor
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"hydra.launcher: {str(error).partition(chr(10))[0]}") from None


def job_settings(cluster: str, keys: Node, runs: Sequence[PlannedRun]) -> JobSettings:
    """Return the settings of jobs from the keys of Hydra's launcher.

    If jobs run on this machine, a run with several GPUs gets one process per GPU.

    Raises:
        ConfigError: the number of processes does not divide the number of shards of a run.
    """
    rest = {key: value for key, value in keys.items() if key not in ("_target_", "submitit_folder", "max_num_timeout")}
    if cluster == "local":
        per_run = max(planned.config.runtime.gpus_per_run for planned in runs)
        rest["tasks_per_node"] = max(int(rest["tasks_per_node"]), round(per_run))
    settings = JobSettings(cluster, rest, Path(keys["submitit_folder"]), int(keys.get("max_num_timeout") or 0))
    for shards in {planned.config.batch_shards for planned in runs}:
        refuse_processes(settings.processes, shards)
    return settings


@dataclass(frozen=True)
class _LocalJob:
    job: "Job[Path | None]"
    planned: PlannedRun
    gpus: TakenGpus | None


def run_in_local_jobs(
    runs: Sequence[PlannedRun], settings: JobSettings, workers: int, gpus: Sequence[str], stop: Callable[[], int],
    began: int | None = None,
) -> None:  # fmt: skip
    """Execute the runs in processes that submitit starts on this machine.

    A run whose process is killed is repeated once.

    Args:
        workers: the largest number of runs at a time.
        gpus: names of the GPUs to share among the runs. Without names, every run uses its `runtime.device`.
        began: when the sweep began; see `RunQueue`.
    """
    queue, working, repeated = RunQueue(baselines_first(runs), began), list[_LocalJob](), set[Path]()
    with tempfile.TemporaryDirectory(prefix="qbench-") as scratch:
        folder = Path(scratch) if settings.folder.name == FOLDER else settings.folder
        while working or (queue and not stop()):
            while len(working) < workers and not stop() and (planned := queue.take()):
                taken = take(gpus, planned.config.runtime.gpus_per_run) if gpus else None
                if gpus and not taken:  # another sweep uses the GPUs
                    queue.put_back(planned)
                    break
                working.append(_LocalJob(_start(planned, settings, folder, taken), planned, taken))
            time.sleep(POLL_SECONDS)
            for ended in [each for each in working if each.job.done()]:
                working.remove(ended)
                if ended.gpus:
                    ended.gpus.release()
                busy, killed = job_outcome(ended.job, ended.planned)
                if busy:
                    queue.put_off(ended.planned, busy)
                elif killed and not stop():
                    print(f"warning: the process of {ended.planned.path} was killed", file=sys.stderr)
                    if ended.planned.path not in repeated:
                        repeated.add(ended.planned.path)
                        queue.put_off(ended.planned, ended.planned.path)
            for each in working if stop() else ():
                os.kill(int(each.job.job_id), signal.SIGTERM)  # the run gets the signal, and first saves its state


def _start(planned: PlannedRun, settings: JobSettings, folder: Path, gpus: TakenGpus | None) -> "Job[Path | None]":
    """Start a run in a job. submitit's process ignores Ctrl-C, which reaches all processes of the terminal."""
    job = SubmittedRun(waits=False, gpus=gpus.names if gpus else ())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return replace(settings, folder=folder).executor().submit(job, planned)
    finally:
        signal.signal(signal.SIGINT, before)


def job_outcome(job: "Job[Path | None]", planned: PlannedRun) -> tuple[Path | None, bool]:
    """Return the directory that another process works on, if any, and whether the job was killed.

    Print a warning if the run failed before it had a directory.
    """
    import submitit

    first = job.task(0) if job.num_tasks > 1 else job
    if not first.paths.result_pickle.exists():
        return None, True
    try:
        return first.results()[0], False
    except submitit.core.utils.FailedJobError as error:
        lines = [line for line in str(error).splitlines() if line and line[0] not in " -("]
        reason = next((line for line in reversed(lines) if ": " in line), "failed")
        print(f"warning: {planned.path}: {reason}; see {first.paths.stderr}", file=sys.stderr)
        return None, False
