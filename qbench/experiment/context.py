"""Defines the objects that the caller of a run provides, such as the progress display."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qbench.distributed.group import Group
from qbench.errors import Busy, Interrupted
from qbench.runs.directory import RunDirectory
from qbench.runs.progress import ProgressReporter

if TYPE_CHECKING:
    from qbench.data.loader import Loader
    from qbench.quant.probe import Batch

T = TypeVar("T")


@dataclass
class RunContext:
    """Objects that the caller of a run provides.

    Args:
        reporter: shows progress and messages.
        stop: function that returns the number of the signal that asks this process to stop, or 0.
        group: the processes of the run. All processes call the methods of their contexts in the same order.
        waits: whether to wait for a run that another process works on. If false, `Busy` is raised instead.
    """

    reporter: ProgressReporter = field(default_factory=ProgressReporter)
    stop: Callable[[], int] = lambda: 0
    group: Group = field(default_factory=Group)
    waits: bool = True

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.group.rank == 0

    def agree(self, save: bool) -> tuple[int, bool]:
        """Share requests among the processes of the run, and return the same pair on all of them.

        The pair is the number of a signal that asks any process to stop (or 0), and whether any process wants to save.
        """
        number, saves = self.group.largest(self.stop(), int(save))
        return number, bool(saves)

    def check(self) -> None:
        """Raise `Interrupted` if a signal asks the run to stop."""
        number, _ = self.agree(save=False)
        if number:
            raise Interrupted(f"stopped by signal {number}; to continue, repeat the command")

    def checked(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches. Before each batch, raise `Interrupted` if a signal asks the run to stop."""
        for batch in batches:
            self.check()
            yield batch

    def evaluation_batches(self, loader: "Loader", split: str) -> "Iterator[Batch]":
        """Yield the batches of a split that this process evaluates.

        Before each batch, all processes raise `Interrupted` if a signal has asked one of them to
        stop.
        """
        group = self.group
        if group.size == 1:
            yield from self.checked(loader.unaugmented(split))
            return
        batches = loader.unaugmented(split, first=group.rank, every=group.size)
        for _ in range(0, loader.batch_count(split), group.size):
            self.check()
            yield from islice(batches, 1)  # in the last iteration, there may be no batch left for this process

    @contextmanager
    def lock(self, directory: RunDirectory) -> Iterator[None]:
        """Hold the lock of a run's directory within a `with` block.

        Process 0 takes the lock for all processes of the run.
        """
        group, waiting = self.group, self.waiting(directory.path)

        def wait() -> None:
            group.from_first(lambda: False)
            waiting()

        if self.writes:
            with directory.lock(wait):
                group.from_first(lambda: True)
                yield
        else:
            while not group.from_first(bool):
                self.check()
            yield

    def waiting(self, path: Path) -> Callable[[], None]:
        """Return a function to call repeatedly while another process has locked a run's directory.

        The first call reports that the run waits. Any call raises `Interrupted` if a signal asks the run to stop, and
        `Busy` if this process does not wait for runs.
        """
        announced = False

        def wait() -> None:
            nonlocal announced
            if not self.waits:
                raise Busy(path)
            if not announced:
                self.reporter.say(f"waiting: another process is working on {path}")
                announced = True
            self.check()

        return wait
