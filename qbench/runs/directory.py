"""Manages the directory of a run: lock, config.yaml, checkpoints and result.

The path is derived from the identity of the run (all keys that can change its result). The same command therefore finds
the same run again, also in a sweep or with a launcher. `result.json` is written last. Until then, the directory
contains checkpoints, so that an interrupted run can continue.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from qbench.config.identity import RunIdentity
from qbench.runs.result import Protocol, Result, load_result, store_result
from qbench.system import files
from qbench.system.locks import locked

FINAL = ("done", "unsupported")
"""Statuses of final results. If a command is repeated, a final result is not computed again."""
KEPT_CHECKPOINTS = 2
ARTIFACTS = ("metrics.jsonl", "last.pt", "best.pt", "predictions.npy", "log.txt")

PACKED_FILE = "network.qbench"
"""The packed file that `qbench export` writes into a run's directory by default."""


MAX_HEADER_BYTES = 2**24
"""Maximum size in bytes of the headers of packed files that are read."""


NOT_PACKED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error)
"""Types of errors that occur when a file of another kind is read as a packed file."""


def packed_bytes(path: Path, identity: str) -> int | None:
    """Return the size in bytes of the packed file in a run's directory, or None if there is no valid file.

    A valid file is complete, belongs to the run with the given identity, and is not older than result.json.
    """
    with suppress(OSError):
        file = os.stat(f"{path}/{PACKED_FILE}")  # faster than a Path; most runs have no such file
        fresh = file.st_mtime_ns >= (path / "result.json").stat().st_mtime_ns
        if fresh and _packed_identity(path / PACKED_FILE, file.st_size) == identity:
            return file.st_size
    return None


def _packed_identity(file: Path, size: int) -> str | None:
    """Return the identity of the run from which a packed file was exported, or None if the file is not complete.

    The function reads the safetensors header and the tensor `header`, which is compressed JSON
    (`qbench.deploy.container`). It does not read the weights.
    """
    with file.open("rb") as data, suppress(*NOT_PACKED):
        length = int.from_bytes(data.read(8), "little")
        entries = json.loads(data.read(min(length, MAX_HEADER_BYTES)))
        metadata = entries.pop("__metadata__")
        start, end = entries["header"]["data_offsets"]
        whole = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
        if metadata["format"] != "qbench packed" or size != whole or not 0 <= end - start <= MAX_HEADER_BYTES:
            return None
        data.seek(8 + length + start)
        header = json.loads(zlib.decompressobj().decompress(data.read(end - start), MAX_HEADER_BYTES))
        return str(header["about"]["identity"])
    return None


def directory_name(identity: RunIdentity) -> Path:
    """Return the folder of a run below `out`: <dataset>-<model>/<method>-w2a2g32-s0-<hash>.

    The hash is the first eight digits of the identity's digest. Folders of runs with debug=true are below `debug`.
    """
    folder = f"{path_component(identity.dataset)}-{path_component(identity.model)}"
    method = path_component(identity.method)
    return Path(
        "debug" if identity.config["debug"] else "",
        folder,
        f"{method}-{identity.bits}-s{identity.seed}-{identity.digest[:8]}",
    )


def path_component(name: str) -> str:
    """Return a name for use in a path. A dot replaces each group of characters that are unsafe in a path."""
    return re.sub(r"[^A-Za-z0-9._+]+", ".", name).strip(".")


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run. The method `lock` creates the directory."""

    identity: RunIdentity
    path: Path

    def stored(self) -> Result | None:
        """Return the stored result if it is final and belongs to this run, else None."""
        result = load_result(self.path)
        if result is None or result.status not in FINAL or result.identity != self.identity.digest:
            return None
        return result

    @contextmanager
    def lock(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Create the directory, and lock it.

        While another process holds the lock, call `waiting` every 0.5 s.
        """
        files.make_directory(self.path)
        with locked(self.path / ".lock", waiting):
            self._remove_temporary_files()
            yield

    def write_config(self) -> None:
        """Write the complete configuration to config.yaml. The file is sufficient to repeat the run."""
        text = yaml.safe_dump(self.identity.config, sort_keys=False, allow_unicode=True)
        files.write(self.path / "config.yaml", text.encode())

    def new_result(self, status: str, reason: str | None = None) -> Result:
        """Return a new result in which only the fields that identify the run are set."""
        identity = self.identity
        return Result(
            status=status, reason=reason, method=identity.method, options=identity.options,
            bits=identity.bits._asdict(), seed=identity.seed, dataset=identity.dataset, model=identity.model,
            run=str(self.path), identity=identity.digest,
            protocol=Protocol(hash=identity.protocol_hash, keys=identity.protocol),
        )  # fmt: skip

    def finish(self, result: Result) -> Result:
        """Write result.json, and remove the checkpoints if the result is final."""
        store_result(self.path, result)
        if result.status in FINAL:
            for path in self.checkpoints():
                path.unlink()
        return result

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run that was killed before it could remove them.

        The method does nothing if another process has the lock or the directory is not writable.
        """
        if self.checkpoints():
            from filelock import FileLock

            with suppress(OSError), FileLock(self.path / ".lock", timeout=0, fallback_to_soft=False):
                for path in self.checkpoints() if self.stored() else ():
                    path.unlink()

    def save_state(self, step: int, data: bytes) -> None:
        """Write the checkpoint of a training step, and remove all but the two newest checkpoints."""
        files.write(self.path / f"state-{step}.pt", data)
        for path in self.checkpoints()[KEPT_CHECKPOINTS:]:
            path.unlink()

    def write_artifact(self, name: str, data: bytes) -> None:
        """Write a file that is kept after the run, such as last.pt."""
        files.write(self.path / name, data)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of an unfinished run, newest first."""
        by_step = [
            (int(m[1]), p)
            for p in self.path.glob("state-*.pt")
            if (m := re.fullmatch(r"state-(\d+)\.pt", p.name)) and p.is_file()
        ]
        return [path for _, path in sorted(by_step, reverse=True)]

    def has_result(self) -> bool:
        """Return whether result.json exists, with any status."""
        return (self.path / "result.json").exists()

    def reset(self, *, whole: bool) -> None:
        """Remove the result of an earlier attempt. If `whole` is true, also remove all other files of the attempt."""
        paths = [self.path / "result.json"]
        if whole:
            paths += [*self.checkpoints(), *self.path.glob("events.out.tfevents.*")]
            paths += [self.path / name for name in ARTIFACTS]
        for path in paths:
            files.convert_os_errors(partial(path.unlink, missing_ok=True), path)

    def read_only(self) -> "RunDirectory":
        """Return the directory for a process that does not write, because another process of the same run writes."""
        return ReadOnlyDirectory(self.identity, self.path)

    def _remove_temporary_files(self) -> None:
        """Remove the temporary files of a process that was killed while writing."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)


class ReadOnlyDirectory(RunDirectory):
    """The directory of a run, for a process that does not write to it."""

    def write_config(self) -> None:
        """Do nothing."""

    def finish(self, result: Result) -> Result:
        """Return the result."""
        return result

    def remove_checkpoints(self) -> None:
        """Do nothing."""

    def save_state(self, step: int, data: bytes) -> None:
        """Do nothing."""

    def write_artifact(self, name: str, data: bytes) -> None:
        """Do nothing."""

    def reset(self, *, whole: bool) -> None:
        """Do nothing."""
