"""Checks and executes the runs of a sweep. Failed runs have results too."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from qbench.distributed.group import Group
from qbench.errors import Busy, CheckpointError, DataError, Interrupted, QbenchError, ResourceError
from qbench.experiment.planned_run import PlannedRun
from qbench.runs.reader import RunRecord, read_run
from qbench.runs.result import Result, load_result
from qbench.system.signals import stop_on_signals
from qbench.system.tracebacks import error_text


def run_catching(
    planned: PlannedRun, stop: Callable[[], int], group: Group | None = None, *, waits: bool = True
) -> Result:
    """Execute a run and return its result. If the run fails, the result has the status `failed`.

    Args:
        group: the processes that share the run. None means that there is only one process.
        waits: whether to wait while another process works on the run or on its float baseline.

    Raises:
        Busy: another process works on the run or on its float baseline, and `waits` is false.
        Interrupted: a signal asked the run to stop. The same command continues the run later.
    """
    from qbench.experiment.context import RunContext
    from qbench.experiment.run import run
    from qbench.runs.progress import ProgressReporter

    try:
        return run(planned, RunContext(ProgressReporter(quiet=True), stop, group or Group(), waits))
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit or a lack of memory in one run must not end other runs
        stored = load_result(planned.path)
        reason = str(error) if isinstance(error, QbenchError) else error_text(error)
        return stored if stored and stored.status != "done" else planned.directory.new_result("failed", reason)


def work(planned: PlannedRun) -> Path | None:
    """Execute a run in a worker process. The outcome is written to the run's directory.

    Return None. If another process works on the run or on its float baseline, return the directory of that run or
    baseline.
    """
    with stop_on_signals() as stop:
        try:
            run_catching(planned, stop, waits=False)
        except Busy as busy:
            return busy.path
        except Interrupted:
            pass
    return None


def outcome(planned: PlannedRun) -> RunRecord:
    """Return the current record of a run, read from the run's directory."""
    return read_run(planned.path) if planned.path.is_dir() else RunRecord(path=planned.path, status="not begun")


CHECKED_PARTS = ("model", "dataset", "method", "activation", "bits", "layers", "distill")
"""Parts of a configuration that define the kind of a run. `check` assembles only one run of each kind."""


def check(runs: Sequence[PlannedRun]) -> None:
    """Assemble one run of each kind, so that an error in a configuration stops the sweep before its first run.

    Raises:
        ConfigError: a key or value of a run is not valid. The first bad run is reported.
    """
    from qbench.experiment.setup import assemble
    from qbench.quant.method import Unsupported

    seen = set()
    for planned in runs:
        config = planned.identity.config
        key = json.dumps([{k: config[k] for k in CHECKED_PARTS}, config["runtime"]["device"]], sort_keys=True)
        if key not in seen and not planned.directory.stored():
            seen.add(key)
            try:
                assemble(planned.config)
            except (Unsupported, DataError, CheckpointError, ResourceError):
                continue  # the run itself reports the error, and the table lists it
