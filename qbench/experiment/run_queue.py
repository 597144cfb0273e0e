"""Holds the runs of a sweep that have not begun. A run that another process works on is postponed.

Several processes, also on several hosts, can therefore execute the same sweep in one folder. They share the runs of the
sweep. A process waits only if other processes work on all remaining runs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.config.identity import run_identity
from qbench.config.schema import baseline_config
from qbench.experiment.planned_run import PlannedRun
from qbench.runs.result import load_result
from qbench.system.locks import is_locked

POLL_SECONDS = 0.5
"""Seconds between two checks of whether another process still works on a run."""


@dataclass
class _Entry:
    """A run, and the directory whose lock the run has to wait for."""

    planned: PlannedRun
    blocked_by: Path


class RunQueue:
    """The runs of a sweep that have not begun, in order.

    Args:
        runs: the runs.
        began: the time at which the sweep began, in nanoseconds, by the clock of the file system. If a result was
            written after this time, another process of the same sweep has computed it, so its run is skipped.
    """

    def __init__(self, runs: Sequence[PlannedRun], began: int | None = None) -> None:
        self._entries = [_Entry(planned, planned.path) for planned in runs]
        self._began = began

    def __len__(self) -> int:
        return len(self._entries)

    def take(self) -> PlannedRun | None:
        """Remove and return the first run that no other process works on. Return None if there is no such run now.

        Runs that another process has finished since the sweep began are removed too.
        """
        locked: dict[Path, bool] = {}
        for entry in list(self._entries):
            if entry.blocked_by not in locked:
                locked[entry.blocked_by] = is_locked(entry.blocked_by / ".lock")
            if locked[entry.blocked_by]:
                continue
            self._entries.remove(entry)
            if not self._is_done(entry.planned):
                return entry.planned
        return None

    def put_off(self, planned: PlannedRun, busy: Path) -> None:
        """Put a run at the end of the queue. It waits there until no other process works on the directory `busy`.

        If `busy` is the directory of a float baseline, the other runs with this baseline wait for this directory too.
        """
        if busy != planned.path:
            baseline = _baseline_digest(planned)
            for entry in self._entries:
                if baseline and _baseline_digest(entry.planned) == baseline:
                    entry.blocked_by = busy
        self._entries.append(_Entry(planned, busy))

    def put_back(self, planned: PlannedRun) -> None:
        """Put a run that has not begun back at the head of the queue."""
        self._entries.insert(0, _Entry(planned, planned.path))

    def next_run(self, stop: Callable[[], int]) -> PlannedRun | None:
        """Remove and return the next run. While other processes work on all runs, wait.

        Return None if the queue is empty or a signal asks this process to stop.
        """
        while self._entries and not stop():
            if planned := self.take():
                return planned
            time.sleep(POLL_SECONDS if self._entries else 0)
        return None

    def _is_done(self, planned: PlannedRun) -> bool:
        """Return whether another process has written the result of a run since the sweep began."""
        if self._began is None:
            return False
        result = load_result(planned.path)
        fits = result is not None and result.identity == planned.identity.digest
        return fits and (planned.path / "result.json").stat().st_mtime_ns > self._began


def baselines_first(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs in a new order: first one run per float baseline, then the others.

    Parallel processes then train different baselines, instead of waiting for the same one.
    """
    baselines = [_baseline_digest(planned) for planned in runs]
    order = sorted(range(len(runs)), key=lambda i: bool(baselines[i]) and baselines.index(baselines[i]) != i)
    return [runs[i] for i in order]


def _baseline_digest(planned: PlannedRun) -> str:
    """Return the identity of a run's float baseline, or "" if the run needs no baseline.

    The identity does not take into account which normalization the method requires.
    """
    return run_identity(baseline_config(planned.config)).digest if planned.config.needs_baseline else ""
