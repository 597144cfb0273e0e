"""Progress of a sweep on the terminal, read from the run directories."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qbench.config.schema import RATE, Config
from qbench.runs.directory import RunDirectory
from qbench.runs.result import Result, load_result

POLL = 0.5
"""Seconds between two looks at the runs' directories."""


@contextmanager
def view(configs: Sequence[Config], workers: int) -> Iterator[None]:
    """Show, while the cells are worked on, how many are done, running and left, and the time left.

    A thread looks at the directories, so that it is the same for every launcher.
    """
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(configs, workers, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(configs: Sequence[Config], workers: int, ended: threading.Event) -> None:
    directories = {d.path: d for d in map(RunDirectory, configs)}
    old = {path for path, d in directories.items() if d.stored()}
    seen = set(old)
    bar: Any = None
    if sys.stderr.isatty():
        from qbench.runs.progress import live_bar

        bar = live_bar()
        bar.start()
        bar.add_task(f"sweep of {len(directories)}", total=len(directories), completed=len(old), text="")
    elif old:
        print(f"[{len(old)}/{len(directories)}] stored already", file=sys.stderr, flush=True)
    began = time.time()
    while True:
        last = ended.wait(POLL)
        for path in [p for p in directories if p not in seen]:
            result = load_result(path)
            if result and (path / "result.json").stat().st_mtime >= began - 1:
                seen.add(path)
                if not bar:
                    print(f"[{len(seen)}/{len(directories)}] {_line(result)}", file=sys.stderr, flush=True)
        if bar:
            left = len(directories) - len(seen)
            running = sum((p / "config.yaml").exists() for p in directories if p not in seen)
            text = f"{len(seen)} done, {min(running, workers)} running, {left - min(running, workers)} left"
            bar.update(bar.task_ids[0], completed=len(seen), text=text)
        if last:
            break
    if bar:
        bar.stop()


def _line(result: Result) -> str:
    name = f"{result.method} {result.widths} s{result.seed}"
    if rate := result.options.get(RATE):
        name += f" {RATE}={rate:g}"
    if result.status != "done" or result.final is None:
        return f"{name}: {result.status}: {(result.reason or '').partition(chr(10))[0]}"
    seconds = f"{result.wall_seconds or 0:.1f} s"
    if rate:  # among those to choose from: only what is chosen shows its test figure
        return f"{name}: validation {result.final.val.top1 if result.final.val else float('nan'):.2f} %, {seconds}"
    return f"{name}: {result.final.test.top1:.2f} %, {seconds}"
