"""Reads the state of a sweep from the directories of its runs. This works with every launcher."""

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qbench.errors import QbenchError
from qbench.experiment.planned_run import PlannedRun
from qbench.runs.directory import FINAL
from qbench.runs.result import Result, load_result
from qbench.system import files
from qbench.system.locks import is_locked

TAIL_BYTES = 4096
"""Number of bytes to read at the end of metrics.jsonl.

These bytes include the record of the newest epoch, which is the last line of the file.
"""


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """Some metrics of an epoch, as in metrics.jsonl. Epochs count from 0, and accuracies are in percent."""

    epoch: int
    train_loss: float
    train_top1: float
    seconds: float
    images: int
    val_top1: float | None = None

    @property
    def images_per_second(self) -> float:
        """The speed of training in this epoch, without evaluation."""
        return self.images / max(self.seconds, 1e-9)


@dataclass(kw_only=True)
class RunInWork:
    """A run that some process is working on.

    Args:
        path: the run's directory.
        name: the run's name in the display.
        epochs: number of epochs of training.
        since: when the run was first seen, in seconds.
        first: the newest epoch when the run was first seen, or None if the run had no epoch yet.
        latest: the newest epoch, or None before the end of the first epoch.
        recorded: when the newest epoch was first seen, in seconds.
    """

    path: Path
    name: str
    epochs: int
    since: float
    first: EpochMetrics | None = None
    latest: EpochMetrics | None = None
    recorded: float = 0.0

    @property
    def done(self) -> int:
        """The number of epochs done."""
        return self.latest.epoch + 1 if self.latest else 0

    @property
    def seconds_left(self) -> float | None:
        """The estimated seconds of training that are left, or None before the end of the first epoch."""
        if not self.latest:
            return None
        seen = self.latest.epoch - (self.first.epoch if self.first else -1)
        per_epoch = (self.recorded - self.since) / seen if seen else self.latest.seconds
        return max(per_epoch * (self.epochs - self.done) - (time.monotonic() - self.recorded), 0.0)

    def update(self) -> bool:
        """Read the record of the newest epoch. Return whether this record is new."""
        newest = read_epoch(self.path)
        if newest is None or newest == self.latest:
            return False
        self.latest, self.recorded = newest, time.monotonic()
        return True


@dataclass(frozen=True, kw_only=True)
class Events:
    """The events since the previous call of `SweepStatus.look`: runs that began, recorded epochs, and finished runs."""

    started: list[RunInWork]
    epochs: list[RunInWork]
    finished: list[tuple[str, Result]]


class SweepStatus:
    """The state of the runs of a sweep, and of the float baselines that these runs need.

    Args:
        runs: the runs of the sweep.

    Attributes:
        total: number of runs.
        done: directories of the runs that have a result, from this sweep or an earlier one.
        in_work: the runs that a process is working on, by directory.
    """

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._planned = {planned.path: planned for planned in runs}
        self._names = run_names(list(self._planned.values()))
        self._began = time.time()
        self.total = len(self._planned)
        self.done = {
            path for path, planned in self._planned.items() if not planned.config.rerun and planned.directory.stored()
        }
        self.in_work: dict[Path, RunInWork] = {}

    @property
    def names(self) -> list[str]:
        """The names of all runs."""
        return list(self._names.values())

    @property
    def completed(self) -> float:
        """The number of finished runs, plus the completed fraction of each run in progress."""
        own = [run for path, run in self.in_work.items() if path in self._planned and run.epochs]
        return len(self.done) + sum(run.done / run.epochs for run in own)

    def look(self) -> Events:
        """Read the directories, and return the events since the previous call."""
        finished = list(self._finished())
        waiting = [path for path in self._planned if path not in self.done]
        locked = {path for path in (*waiting, *self._baselines()) if _is_in_work(path)}
        self.in_work = {path: run for path, run in self.in_work.items() if path in locked}
        started = [self._run_in_work(path) for path in sorted(locked - set(self.in_work))]
        self.in_work |= {run.path: run for run in started}
        epochs = [run for run in self.in_work.values() if run not in started and run.update()]
        return Events(started=started, epochs=epochs, finished=finished)

    def _finished(self) -> Iterator[tuple[str, Result]]:
        """Yield the name and result of each run whose result was written since the sweep began."""
        for path in [path for path in self._planned if path not in self.done]:
            result = load_result(path)
            if result and (path / "result.json").stat().st_mtime >= self._began - 1:
                self.done.add(path)
                yield self._names[path], result

    def _baselines(self) -> Iterator[Path]:
        """Yield the directories of float baselines next to the runs."""
        for folder in {path.parent for path in self._planned}:
            yield from (path for path in folder.glob("float-w32a32g32-s*") if path not in self._planned)

    def _run_in_work(self, path: Path) -> RunInWork:
        planned, latest = self._planned.get(path), read_epoch(path)
        epochs = planned.config.epochs if planned else _stored_epochs(path)
        name = self._names[path] if planned else f"float baseline {path.name.split('-')[2]}"
        now = time.monotonic()
        return RunInWork(path=path, name=name, epochs=epochs, since=now, first=latest, latest=latest, recorded=now)


def run_names(runs: Sequence[PlannedRun]) -> dict[Path, str]:
    """Return a name for each run, made of the options and folders that differ within the sweep."""
    options: dict[tuple[str, str], set[str]] = defaultdict(set)
    for planned in runs:
        for key, value in planned.identity.options.items():
            options[planned.identity.method, key].add(json.dumps(value))
    folders = {planned.path.parent for planned in runs}

    def name(planned: PlannedRun) -> str:
        i = planned.identity
        varied = [f"{key}={value}" for key, value in i.options.items() if len(options[i.method, key]) > 1]
        folder = [planned.path.parent.name] if len(folders) > 1 else []
        return " ".join([i.method, *varied, str(i.bits), *folder, f"s{i.seed}"])

    counts = Counter(map(name, runs))
    return {p.path: name(p) if counts[name(p)] == 1 else f"{name(p)} {p.path.name[-8:]}" for p in runs}


def read_epoch(path: Path) -> EpochMetrics | None:
    """Return the record of the newest epoch in a run's metrics.jsonl, or None if there is no such record."""
    try:
        with open(path / "metrics.jsonl", "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        values = files.parse_json(line) or {}
        if values.get("kind") == "epoch":
            with suppress(msgspec.ValidationError):
                return msgspec.convert(values, EpochMetrics)
    return None


def _is_in_work(path: Path) -> bool:
    """Return whether a run is in progress: its directory is locked and has a configuration, but no final result."""
    if not (path / "config.yaml").exists() or not is_locked(path / ".lock"):
        return False
    result = load_result(path)
    return result is None or result.status not in FINAL


def _stored_epochs(path: Path) -> int:
    """Return the number of epochs in a run's config.yaml, or 0 if this file cannot be read."""
    with suppress(OSError, QbenchError, AttributeError):
        epochs = files.read_yaml(path / "config.yaml").get("epochs")
        return epochs if isinstance(epochs, int) else 0
    return 0
