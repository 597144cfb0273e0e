"""A run's directory and its result: where a run lives, what was stored, what an interrupted one left.

The path follows from the configuration alone, so the same line finds the same run again, from a single run, a sweep
or a launcher. `result.json` is written last; until then the directory holds checkpoints to go on from.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from qbench.config.identity import digest
from qbench.config.schema import Config, to_dict
from qbench.runs.result import Protocol, Result, load_result, store_result
from qbench.system import files

FINAL = ("done", "unsupported")
KEPT_STATES = 2
KEPT = ("metrics.jsonl", "last.pt", "best.pt", "predictions.npy", "log.txt")


class RunDirectory:
    """The directory of one run; nothing is created before `lock`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.identity = config.identity()
        self.path = Path(config.out) / config.directory()

    def stored(self) -> Result | None:
        """Return the stored result that a repeat need not compute again: done or unsupported."""
        result = load_result(self.path)
        if result is None or result.status not in FINAL or result.identity != digest(self.identity):
            return None
        return result

    @contextmanager
    def lock(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Make the directory and hold its lock; `waiting` is called every half second while another process has it."""
        files.make_directory(self.path)
        lock = FileLock(self.path / ".lock")
        while True:
            try:
                lock.acquire(timeout=0.5)
                break
            except Timeout:
                waiting()
            except OSError as error:
                raise files.resource_error(error, self.path / ".lock") from error
        try:
            self._sweep_up()
            yield
        finally:
            lock.release()

    def write_config(self) -> None:
        """Write config.yaml: the resolved configuration, which `qbench` would run again."""
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True)
        files.write(self.path / "config.yaml", text.encode())

    def new_result(self, status: str, **values: Any) -> Result:
        """Return a result with what the configuration says filled in."""
        config = self.config
        protocol = config.protocol()
        return Result(
            status=status, method=config.method_name, options=config.options(),
            bits=asdict(config.bits), seed=config.seed,
            dataset=config.dataset["name"], model=config.model["name"], run=str(self.path),
            identity=digest(self.identity), protocol=Protocol(hash=digest(protocol), keys=protocol), **values,
        )  # fmt: skip

    def finish(self, result: Result) -> Result:
        """Write result.json and clear the checkpoints that only an unfinished run needs."""
        store_result(self.path, result)
        if result.status in FINAL:
            for path in self.checkpoints():
                path.unlink()
        return result

    def remove_checkpoints(self) -> None:
        """Remove checkpoints beside a stored result: a process was killed before it could.

        Quietly does nothing where another process has the directory, or it is not to be written to.
        """
        if self.checkpoints():
            with suppress(OSError), FileLock(self.path / ".lock", timeout=0):
                for path in self.checkpoints() if self.stored() else ():
                    path.unlink()

    def save_state(self, step: int, data: bytes) -> None:
        """Write the checkpoint of a step; keep the newest two."""
        files.write(self.path / f"state-{step}.pt", data)
        for path in self.checkpoints()[KEPT_STATES:]:
            path.unlink()

    def write_artifact(self, name: str, data: bytes) -> None:
        """Write a file that outlives the run, such as last.pt."""
        files.write(self.path / name, data)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of an unfinished run, newest first."""
        found = [
            (int(m[1]), p)
            for p in self.path.glob("state-*.pt")
            if (m := re.fullmatch(r"state-(\d+)\.pt", p.name)) and p.is_file()
        ]
        return [path for _, path in sorted(found, reverse=True)]

    def has_result(self) -> bool:
        """Whether a result stands here, of whatever status."""
        return (self.path / "result.json").exists()

    def reset(self, *, whole: bool) -> None:
        """Remove what a former try left, its result first; without `whole` only the result, so that it goes on."""
        paths = [self.path / "result.json"]
        if whole:
            paths += [*self.checkpoints(), *self.path.glob("events.out.tfevents.*")]
            paths += [self.path / name for name in KEPT]
        for path in paths:
            files.convert_os_errors(partial(path.unlink, missing_ok=True), path)

    def _sweep_up(self) -> None:
        """Remove temporary files of a process that was killed while it wrote."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)
