"""Shows the progress of a sweep, which is read from the directories of the runs."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.config.schema import RATE
from qbench.experiment.planned_run import PlannedRun
from qbench.runs.result import Result, load_result

if TYPE_CHECKING:
    from rich.progress import Progress

POLL_SECONDS = 0.5
"""Seconds between two readings of the directories."""


@contextmanager
def show_progress(runs: Sequence[PlannedRun], workers: int) -> Iterator[None]:
    """Show how many runs of a sweep are done, running and left. The display ends with the context.

    A thread reads the directories, so the display works with every launcher.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(runs, workers, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(runs: Sequence[PlannedRun], workers: int, ended: threading.Event) -> None:
    paths = list(dict.fromkeys(planned.path for planned in runs))
    done = {planned.path for planned in runs if planned.directory.stored()}
    bar = _start_bar(len(paths), len(done)) if sys.stderr.isatty() else None
    if done and not bar:
        print(f"[{len(done)}/{len(paths)}] already stored", file=sys.stderr, flush=True)
    began = time.time()
    while True:
        last = ended.wait(POLL_SECONDS)
        for path, result in _finished([p for p in paths if p not in done], since=began - 1):
            done.add(path)
            if not bar:
                print(f"[{len(done)}/{len(paths)}] {_line(result)}", file=sys.stderr, flush=True)
        if bar:
            left = len(paths) - len(done)
            running = min(workers, sum((p / "config.yaml").exists() for p in paths if p not in done))
            text = f"{len(done)} done, {running} running, {left - running} left"
            bar.update(bar.task_ids[0], completed=len(done), text=text)
        if last:
            break
    if bar:
        bar.stop()


def _start_bar(total: int, done: int) -> "Progress":
    from qbench.runs.progress import live_bar

    bar = live_bar()
    bar.start()
    bar.add_task(f"sweep of {total}", total=total, completed=done, text="")
    return bar


def _finished(paths: Sequence[Path], since: float) -> Iterator[tuple[Path, Result]]:
    """Yield (directory, result) for each result that was written since a time."""
    for path in paths:
        result = load_result(path)
        if result and (path / "result.json").stat().st_mtime >= since:
            yield path, result


def _line(result: Result) -> str:
    name = f"{result.method} {result.widths} s{result.seed}"
    if rate := result.options.get(RATE):
        name += f" {RATE}={rate:g}"
    if result.status != "done" or result.final is None:
        return f"{name}: {result.status}: {(result.reason or '').partition(chr(10))[0]}"
    seconds = f"{result.wall_seconds or 0:.1f} s"
    if rate:  # in a learning-rate grid, test accuracy is shown only for the selected rate
        return f"{name}: validation {result.final.val.top1 if result.final.val else float('nan'):.2f} %, {seconds}"
    return f"{name}: {result.final.test.top1:.2f} %, {seconds}"
