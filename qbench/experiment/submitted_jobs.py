"""Executes the runs of a sweep in jobs of submitit: on this machine, or on a SLURM cluster."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qbench.config.schema import Node, baseline_config
from qbench.distributed.launch import refuse_processes
from qbench.errors import ConfigError
from qbench.experiment.builders import build_method
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.experiment.run_queue import POLL_SECONDS, RunQueue, baselines_first
from qbench.experiment.submitted_run import SubmittedRun
from qbench.quant.method import Unsupported
from qbench.system import files
from qbench.system.gpus import TakenGpus, take

COMMON = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout",
)  # fmt: skip
"""The launcher's keys that all kinds of jobs have."""
CLUSTER_POLL_SECONDS = 1.0
FOLDER = ".submitit"
"""The folder, below `out`, of the jobs' files. Every node of a cluster must be able to read it."""
YEAR_MINUTES = 60 * 24 * 365
"""Default time limit of jobs on this machine."""
LOCAL = ("timeout_min", "tasks_per_node", "stderr_to_stdout")
"""The keys that jobs on this machine use."""


@dataclass(frozen=True)
class JobSettings:
    """What a job gets.

    Args:
        cluster: `local` or `slurm`.
        keys: the keys of Hydra's launcher, without the two that follow.
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

    def executor(self, **more: Any) -> Any:
        """Return submitit's executor with these settings. `more` are further keys of its kind of jobs.

        Raises:
            ConfigError: a key or value is not valid, or this machine cannot submit jobs.
        """
        import submitit

        keys = {key: value for key, value in (self.keys | more).items() if value is not None}
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


def job_settings(cluster: str, keys: Mapping[str, Any], runs: Sequence[PlannedRun]) -> JobSettings:
    """Return the settings of jobs from the keys of Hydra's launcher.

    On this machine, a run with several GPUs gets a process for each of them.

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


# Jobs on this machine.


@dataclass(frozen=True)
class _LocalJob:
    job: Any
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
        gpus: names of the GPUs to share among the runs. Without them, the runs use no GPU.
        began: when the sweep began; see `RunQueue`.
    """
    queue, working, repeated = RunQueue(baselines_first(runs), began), list[_LocalJob](), set[Path]()
    with tempfile.TemporaryDirectory(prefix="qbench-") as scratch:
        folder = Path(scratch) if settings.folder.name == FOLDER else settings.folder
        while working or (queue and not stop()):
            while len(working) < workers and not stop() and (planned := queue.take()):
                taken = take(gpus, planned.config.runtime.gpus_per_run) if gpus else None
                if gpus and not taken:  # another sweep uses them
                    queue.put_back(planned)
                    break
                working.append(_LocalJob(_start(planned, settings, folder, taken), planned, taken))
            time.sleep(POLL_SECONDS)
            for ended in [each for each in working if each.job.done()]:
                working.remove(ended)
                if ended.gpus:
                    ended.gpus.release()
                busy, killed = _outcome(ended.job, ended.planned)
                if busy:
                    queue.put_off(ended.planned, busy)
                elif killed and not stop():
                    print(f"warning: the process of {ended.planned.path} was killed", file=sys.stderr)
                    if ended.planned.path not in repeated:
                        repeated.add(ended.planned.path)
                        queue.put_off(ended.planned, ended.planned.path)
            for each in working if stop() else ():
                os.kill(int(each.job.job_id), signal.SIGTERM)  # submitit passes it on; the run first saves its state


def _start(planned: PlannedRun, settings: JobSettings, folder: Path, gpus: TakenGpus | None) -> Any:
    """Start a run in a job. Ctrl-C in the terminal reaches all processes, and submitit's own would kill the run."""
    job = SubmittedRun(waits=False, gpus=gpus.names if gpus else ())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return replace(settings, folder=folder).executor().submit(job, planned)
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(job: Any, planned: PlannedRun) -> tuple[Path | None, bool]:
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


# Jobs on a cluster.


def run_on_cluster(runs: Sequence[PlannedRun], settings: JobSettings, stop: Callable[[], int]) -> None:
    """Execute the runs in jobs of SLURM. Each missing float baseline has a job, for which the jobs of its runs wait.

    A job that ends without a result is submitted once more, unless it was cancelled. After a signal to this process,
    the jobs stay in the queue.
    """
    jobs, missing = _ClusterJobs(settings), [planned for planned in runs if not planned.directory.stored()]
    dependents: dict[Path, list[PlannedRun]] = {}
    baselines = {planned.path: baseline for planned in missing if (baseline := _missing_baseline(planned))}
    for planned in missing:
        if baseline := baselines.get(planned.path):
            dependents.setdefault(baseline.path, []).append(planned)
    jobs.find([*baselines.values(), *missing])
    jobs.submit(list({baseline.path: baseline for baseline in baselines.values()}.values()))
    for path, waiting in dependents.items():
        jobs.submit(waiting, after=jobs.jobs[path])
    jobs.submit([planned for planned in missing if planned.path not in baselines])
    left, repeated = {planned.path: planned for planned in missing}, set[Path]()
    while left and not stop():
        time.sleep(CLUSTER_POLL_SECONDS)
        for path in [path for path in left if jobs.jobs[path].done()]:
            job = jobs.jobs[path]
            _, killed = _outcome(job, left[path])
            if killed:
                print(f"warning: the job {job.job_id} of {path} has ended early: {job.state}", file=sys.stderr)
            if killed and path not in repeated and not job.state.startswith("CANCELLED"):
                repeated.add(path)
                del jobs.jobs[path]
                jobs.submit([left[path]])
            else:
                del left[path]
    if left:
        numbers = " ".join(sorted({jobs.jobs[path].job_id for path in left}))
        print(f"qbench: {len(left)} jobs stay in the queue; to end them, type: scancel {numbers}", file=sys.stderr)


def _missing_baseline(planned: PlannedRun) -> PlannedRun | None:
    """Return the float baseline that a run needs, if it has no result yet."""
    config = planned.config
    if not config.needs_baseline:
        return None
    with suppress(Unsupported):
        method = build_method(config.method, config.activation, config.bits.resolved())
        baseline = planned_run(baseline_config(config, method.requires.norm))
        return None if baseline.directory.stored() else baseline
    return None


@dataclass
class _ClusterJobs:
    """Submits jobs to SLURM, and finds those that an earlier command has submitted."""

    settings: JobSettings
    jobs: dict[Path, Any] = field(default_factory=dict)

    def find(self, runs: Sequence[PlannedRun]) -> None:
        """Take over the jobs that still are in the queue."""
        import submitit

        for planned in runs:
            stored = files.read_json(self._record(planned)) or {}
            if stored.get("processes") == self.settings.processes:
                tasks = list(range(self.settings.processes))
                job = submitit.SlurmJob(self.settings.folder, str(stored["job"]), tasks)
                if not job.done(force_check=True) and job.state != "UNKNOWN":
                    self.jobs[planned.path] = job

    def submit(self, runs: Sequence[PlannedRun], after: Any = None) -> None:
        """Submit a job for each run that has none. With `after`, they begin when this job has ended."""
        new = [planned for planned in runs if planned.path not in self.jobs]
        if not new:
            return
        executor = self.settings.executor(**({"dependency": f"afterany:{after.job_id}"} if after else {}))
        submitted = executor.map_array(SubmittedRun(waits=True), new)
        for planned, job in zip(new, submitted, strict=True):
            self.jobs[planned.path] = job
            files.write_json(self._record(planned), {"job": job.job_id, "processes": self.settings.processes})

    def _record(self, planned: PlannedRun) -> Path:
        return self.settings.folder / f"{planned.identity.digest[:16]}.json"
