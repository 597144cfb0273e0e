"""Executes the runs of a sweep in jobs of a SLURM cluster, through submitit."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.config.schema import baseline_config
from qbench.experiment.builders import build_method
from qbench.experiment.planned_run import PlannedRun, planned_run
from qbench.experiment.submitted_jobs import JobSettings, job_outcome
from qbench.experiment.submitted_run import SubmittedRun
from qbench.quant.method import Unsupported
from qbench.system import files

if TYPE_CHECKING:
    from submitit import Job

POLL_SECONDS = 1.0


def run_on_cluster(runs: Sequence[PlannedRun], settings: JobSettings, stop: Callable[[], int]) -> None:
    """Execute the runs in jobs of SLURM.

    Each missing float baseline gets its own job. The jobs of runs that need this baseline wait for it.

    If a job ends without a result and was not cancelled, it is submitted once more. After a signal to this process, the
    jobs stay in the queue.
    """
    jobs = _ClusterJobs(settings)
    missing = [planned for planned in runs if planned.config.rerun or not planned.directory.stored()]
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
        time.sleep(POLL_SECONDS)
        for path in [path for path in left if jobs.jobs[path].done()]:
            job = jobs.jobs[path]
            _, killed = job_outcome(job, left[path])
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
    """Return the float baseline that a run needs, or None if the baseline has a result or is not needed."""
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
    """Submits jobs to SLURM, and finds jobs that an earlier command has submitted."""

    settings: JobSettings
    jobs: dict[Path, "Job[Path | None]"] = field(default_factory=dict)

    def find(self, runs: Sequence[PlannedRun]) -> None:
        """Use jobs of an earlier command that are still in the queue."""
        import submitit

        for planned in runs:
            stored = files.read_json(self._record(planned)) or {}
            if stored.get("processes") == self.settings.processes:
                tasks = list(range(self.settings.processes))
                job: Job[Path | None] = submitit.SlurmJob(self.settings.folder, str(stored["job"]), tasks)
                if not job.done(force_check=True) and job.state != "UNKNOWN":
                    self.jobs[planned.path] = job

    def submit(self, runs: Sequence[PlannedRun], after: "Job[Path | None] | None" = None) -> None:
        """Submit a job for each run that has none. With `after`, the jobs begin when the job `after` has ended."""
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
