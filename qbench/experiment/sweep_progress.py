"""Shows the progress of a sweep: a live view on a terminal, otherwise one line for each event."""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from qbench.config.schema import RATE
from qbench.experiment.planned_run import PlannedRun
from qbench.experiment.sweep_status import Events, RunInWork, SweepStatus
from qbench.runs.result import Result

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

POLL_SECONDS = 0.5
"""Seconds between two reads of the directories."""
EPOCH_SECONDS = 30.0
"""Without a terminal, epochs of a run are printed at most once in this many seconds."""


class Display(Protocol):
    """Interface of classes that show the events of a sweep."""

    def show(self, events: Events) -> None:
        """Show the events since the previous call."""

    def stop(self) -> None:
        """End the display."""


@contextmanager
def show_progress(runs: Sequence[PlannedRun], workers: int) -> Iterator[None]:
    """Show how many runs of a sweep are done, running and waiting, within a `with` block.

    A thread reads the progress from the directories of the runs, so the display works with every launcher.

    Args:
        workers: the largest number of runs at a time.
    """
    status = SweepStatus(runs)
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and all(p.config.runtime.progress for p in runs)
    # rich draws random numbers when it is imported, so import it before a run seeds Python's generator
    display: Display = LiveView(status, workers) if live else EventLines(status)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            display.show(status.look())
        display.show(status.look())
        display.stop()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class TimeLeft:
    """Estimates the time that a sweep still needs, from the runs and epochs that have ended since it began."""

    def __init__(self, status: SweepStatus) -> None:
        self._status, self._began, self._stored = status, time.monotonic(), status.completed

    def text(self) -> str:
        """Return a text such as `1:20 left`. It is empty before the first epoch ends, and after the last run."""
        status = self._status
        if not status.in_work and status.completed == self._stored:  # still importing or checking
            self._began = time.monotonic()
        gained, elapsed = status.completed - self._stored, time.monotonic() - self._began
        waiting = status.total - status.completed
        return f"{duration(elapsed / gained * waiting)} left" if gained > 0 and waiting > 0 else ""


class EventLines:
    """Prints one line for each event. The lines contain no control characters."""

    def __init__(self, status: SweepStatus) -> None:
        self._status, self._time = status, TimeLeft(status)
        self._printed: dict[str, float] = {}
        if status.done:
            self._print("already stored")

    def show(self, events: Events) -> None:
        """Print the events. Print an epoch of a run at most every `EPOCH_SECONDS`."""
        left = self._time.text()
        for name, result in events.finished:
            self._print(f"{name}: {', '.join(outcome(result))}{left and f'; {left} for the sweep'}")
        for run in events.started:
            self._printed[run.name] = time.monotonic()
            self._print(f"{run.name}: running, {run.done} of {run.epochs} epochs done")
        for run in events.epochs:
            if time.monotonic() - self._printed[run.name] > EPOCH_SECONDS:
                self._printed[run.name] = time.monotonic()
                self._print(f"{run.name}: {_epoch_text(run)}")

    def stop(self) -> None:
        """Do nothing, because every line is complete."""

    def _print(self, text: str) -> None:
        print(f"[{len(self._status.done)}/{self._status.total}] {text}", file=sys.stderr, flush=True)


def _epoch_text(run: RunInWork) -> str:
    epoch, loss, train, val, speed, left = cells(run)
    accuracies = f"train {train} %" + (f", val {val} %" if val else "")
    return f"epoch {epoch}, loss {loss}, {accuracies}, {speed} images/s, {left} left"


class LiveView:
    """Shows the runs in progress on the terminal, below a line for each finished run."""

    def __init__(self, status: SweepStatus, workers: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._status, self._workers = status, workers
        self._time = TimeLeft(status)
        self._width = max(map(len, status.names), default=0)
        self._live = Live(
            console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._live.start()
        if status.done:
            self._live.console.print(f"{len(status.done)} of {status.total} runs are already stored")

    def show(self, events: Events) -> None:
        """Print a line for each finished run, and draw the runs in progress again."""
        for name, result in events.finished:
            line = f"{name:<{self._width}}  {'  '.join(outcome(result))}"
            self._live.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._live.update(self._picture(), refresh=True)

    def stop(self) -> None:
        """Remove the view. The lines of finished runs stay."""
        self._live.stop()

    def _picture(self) -> "RenderableType":
        from rich.console import Group

        room = max(self._live.console.height - 4, 1)
        in_work = list(self._status.in_work.values())
        table = self._table(in_work[:room])
        hidden = [f"and {len(in_work) - room} more runs in progress"] if len(in_work) > room else []
        return Group(self._summary(len(in_work)), *([table] if in_work else []), *hidden)

    def _summary(self, in_work: int) -> "Table":
        """Return a line with a bar, the counts of runs, and the time left."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        status, done = self._status, len(self._status.done)
        running, left = min(in_work, self._workers, status.total - done), self._time.text()
        line = Table.grid(padding=(0, 1))
        waiting = status.total - done - running
        text = f"{done} of {status.total} runs done, {running} running, {waiting} waiting{left and f', {left}'}"
        line.add_row(ProgressBar(status.total, status.completed, width=12), text)
        return line

    def _table(self, runs: Sequence[RunInWork]) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("running", no_wrap=True, overflow="crop", min_width=min(self._width, 20))
        for head in ("epoch", "loss", "train %", "val %", "images/s", "left"):
            table.add_column(head, justify="right", no_wrap=True)
        for run in runs:
            table.add_row(Text(run.name), *cells(run))
        return table


def cells(run: RunInWork) -> tuple[str, ...]:
    """Return epoch, loss, training and validation top-1, images per second, and time left. Unknown cells are empty."""
    metrics, left = run.latest, run.seconds_left
    epoch = f"{run.done}/{run.epochs}"
    if not metrics or left is None:
        return (epoch, *[""] * 5)
    val = "" if metrics.val_top1 is None else f"{metrics.val_top1:.1f}"
    speed = f"{metrics.images_per_second:,.0f}"
    return epoch, f"{metrics.train_loss:.4f}", f"{metrics.train_top1:.1f}", val, speed, duration(left)


def duration(seconds: float) -> str:
    """Return a time as 0:12 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def outcome(result: Result) -> tuple[str, ...]:
    """Return a run's accuracy and time or, if it has no accuracy, the reason."""
    if result.status != "done" or result.final is None:
        reason = (result.reason or "").partition("\n")[0]
        return (f"{result.status}: {''.join(letter if letter.isprintable() else '?' for letter in reason)}",)
    seconds = f"{result.wall_seconds or 0:.1f} s"
    if RATE in result.options:  # in a learning-rate grid, test accuracy is shown only for the selected rate
        return (f"validation {result.final.val.top1 if result.final.val else float('nan'):.2f} %", seconds)
    return (f"{result.final.test.top1:.2f} %", seconds)
