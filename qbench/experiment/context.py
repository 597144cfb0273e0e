"""Defines what the caller of a run provides: progress display and stop requests."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qbench.errors import Interrupted
from qbench.runs.progress import ProgressReporter

T = TypeVar("T")


@dataclass
class RunContext:
    """Objects that the caller of a run provides.

    Args:
        reporter: shows progress and messages.
        stop: function that returns the number of the signal that asks the run to stop, or 0.
    """

    reporter: ProgressReporter = field(default_factory=ProgressReporter)
    stop: Callable[[], int] = lambda: 0

    def check(self) -> None:
        """Raise `Interrupted` if a signal asks the run to stop."""
        if number := self.stop():
            raise Interrupted(f"stopped by signal {number}; to continue, repeat the command")

    def checked(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches. Before each batch, raise `Interrupted` if a signal asks the run to stop."""
        for batch in batches:
            self.check()
            yield batch

    def waiting(self, path: Path) -> Callable[[], None]:
        """Return the function to call while another process holds a run's directory.

        The function reports the wait once. It raises `Interrupted` if a signal asks the run to
        stop.
        """
        announced = False

        def wait() -> None:
            nonlocal announced
            if not announced:
                self.reporter.say(f"waiting: another process is working on {path}")
                announced = True
            self.check()

        return wait
