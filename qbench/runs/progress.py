"""Shows the progress of a run: as a live bar on a terminal, else as lines of text."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.runs.metrics_logger import append_text

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_LINES = 10
"""Approximate number of lines that are printed per stage if stderr is not a terminal."""

REFRESH_SECONDS = 0.25
"""Time in seconds between two updates of the live bar. An update delays training by some milliseconds."""


@dataclass
class _Stage:
    """A stage of training: `total` steps of `images` images each. `first` steps were done before the start."""

    title: str
    total: int
    first: int
    images: int
    since: float = field(default_factory=time.perf_counter)
    note: str = ""
    shown_at: float = 0.0
    printed: int = -1

    def speed(self, done: int) -> float:
        """Return the images per second since the start of the stage. `done` is the number of completed steps."""
        return (done - self.first) * self.images / max(time.perf_counter() - self.since, 1e-9)


class ProgressReporter:
    """Shows progress and messages of one process on stderr.

    Args:
        live: whether to show a live bar if stderr is a terminal.
        quiet: whether to show nothing. This is true in a sweep, which shows all runs in one view.

    Attributes:
        log: the file to which messages are written, or None as long as the run has no log file.
    """

    def __init__(self, *, live: bool = True, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = live and not quiet and sys.stderr.isatty()
        if self._live:
            import rich.style  # noqa: F401  its import draws random numbers, so it must precede the seeding of a run
        self._bar: Progress | None = None
        self._stage = _Stage("", 1, 0, 1)
        self.log: Path | None = None

    def say(self, text: str) -> None:
        """Print a message, above the bar if there is one, and write the message to log.txt."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Write a message to log.txt without printing it."""
        if self.log:
            append_text(self.log, text)

    def start(self, title: str, total: int, done: int, images: int) -> None:
        """Start a stage of `total` steps of `images` images each. `done` steps are already completed."""
        self.stop()
        self._stage = _Stage(title, total, done, images)
        if self._live:
            self._bar = live_bar()
            self._bar.start()
            self._bar.add_task(title.partition("  ")[0], total=total, completed=done, text="")

    def step(self, done: int, loss: Callable[[], float]) -> None:
        """Show that `done` steps are completed. `loss` is called only if the loss is shown."""
        stage, now = self._stage, time.perf_counter()
        if self._bar and now - stage.shown_at > REFRESH_SECONDS:
            stage.shown_at = now
            text = f"loss {loss():.3f}  {stage.speed(done):,.0f} images/s  {stage.note}"
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)

    def epoch(self, done: int, record: Mapping[str, float]) -> None:
        """Show the record of an epoch. `done` is the number of completed steps."""
        stage = self._stage
        stage.note = f"train {record['train_top1']:.1f} %  "
        if "val_top1" in record:
            stage.note += f"val {record['val_top1']:.1f} %  "
        line = f"{stage.title}: epoch {record['epoch'] + 1}, step {done} of {stage.total}  loss "
        line += f"{record['train_loss']:.4f}  {stage.note}{stage.speed(done):,.0f} images/s"
        slot = done * PLAIN_LINES // stage.total
        if not self._bar and not self._quiet and slot != stage.printed:
            print(line, file=sys.stderr, flush=True)
        stage.printed = slot
        self.keep(line)

    def stop(self) -> None:
        """Remove the live bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def live_bar() -> "Progress":
    """Return a rich progress bar on stderr, with a field `text` for each task."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    whole, short = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (  # on a narrow terminal, the text is cut, but not the bar and the remaining time
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f} %", table_column=whole),
        TimeRemainingColumn(compact=True, table_column=whole),
        TextColumn("{task.fields[text]}", table_column=short),
    )
    return Progress(
        *columns, console=Console(stderr=True), transient=True, expand=True, refresh_per_second=1 / REFRESH_SECONDS
    )
