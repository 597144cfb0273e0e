"""Executes a run inside a job that submitit has started, in one process or in several."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qbench.errors import Busy, Interrupted
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import PlannedRun
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import load_result
from qbench.system.gpus import VISIBLE
from qbench.system.signals import STOP_SIGNALS, stop_on_signals

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.helpers import DelayedSubmission

GRACE_SECONDS = 90.0
"""Maximum seconds from a signal to the end of the process. SLURM sends a signal `signal_delay_s` before the limit."""
PREEMPTION_SECONDS = 600.0
"""Maximum seconds for which a stopped job waits for SLURM to end it. A job that ends by itself is not queued again."""


@dataclass(frozen=True)
class SubmittedRun:
    """The function that submitit calls in each process of a job.

    Args:
        waits: whether to wait while another process works on the run or on its float baseline.
        gpus: the names of the GPUs of the job, or empty if the cluster has chosen the GPUs.
    """

    waits: bool
    gpus: tuple[str, ...] = ()

    def __call__(self, planned: PlannedRun) -> Path | None:
        """Execute the run. The outcome is written to the run's directory.

        Return None. If another process works on the run or on its float baseline, return the directory of that run or
        baseline. If a signal stops the run, this function does not return. It writes the checkpoint, and then calls
        submitit's own handler of the signal. If the signal announces the end of the job, the handler queues the job
        again.
        """
        import submitit

        if self.gpus:
            os.environ[VISIBLE] = ",".join(self.gpus)  # must be set before torch is imported
        handlers = {kind: signal.getsignal(kind) for kind in STOP_SIGNALS}
        job = submitit.JobEnvironment()
        if job.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        from qbench.distributed.torch_group import joined_group
        from qbench.experiment.run import run

        with stop_on_signals(GRACE_SECONDS) as stop:
            try:
                with joined_group() as group:
                    run(planned, RunContext(ProgressReporter(), stop, group, self.waits))
            except Busy as busy:
                return busy.path
            except Interrupted as error:
                print(f"qbench: {error}", file=sys.stderr)
            except BaseException:
                if not job.global_rank and load_result(planned.path) is None:
                    raise  # the run has no directory yet, so submitit keeps the error
                return None
            else:
                return None
            number = stop()
        return _leave(job, number, handlers.get(signal.Signals(number) if number else signal.SIGTERM))

    def checkpoint(self, planned: PlannedRun) -> "DelayedSubmission":
        """Return the call with which submitit continues the run when the job begins again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, planned)


def _leave(job: "JobEnvironment", number: int, handler: object) -> NoReturn:
    """End this process after a signal, or after the loss of another process, without a result for submitit.

    Args:
        job: submitit's description of the job.
        number: number of the signal, or 0 without one.
        handler: submitit's handler of the signal. If the signal announces the end of the job, the handler on process 0
            queues the job again and ends the process. On other processes, the handler does nothing.
    """
    if number and callable(handler):
        handler(number, None)
    if job.global_rank:
        sys.exit(0)  # another status could end process 0 before it has queued the job again
    if number == signal.SIGTERM and job.cluster == "slurm":
        print("qbench: the checkpoint is written; waiting for SLURM to end the job", file=sys.stderr)
        time.sleep(PREEMPTION_SECONDS)  # meanwhile, the signal whose handler queues the job again may come
    sys.exit(Interrupted.status)
