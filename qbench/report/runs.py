"""Reading run directories: results where there are any, else what the logs still tell."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qbench.config import digest
from qbench.errors import ConfigError
from qbench.filling import from_dict
from qbench.record import files
from qbench.record.run import Result, is_sound, load_result

DONE = "done"
FROM_LOGS = "from the logs"
AROUND = 16
"""Bytes of an event file around each record."""
TRIED = 2**16
"""Places behind damage at which a record is looked for, in a whole event file: more would take minutes."""


@dataclass(kw_only=True)
class Found:
    """A run directory: its result, or why there is none. `status` is the result's, or running, unfinished, torn.

    `unread` says what of its files is damaged.
    """

    path: Path
    status: str
    reason: str = ""
    result: Result | None = None
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def read(directories: Iterable[str]) -> list[Found]:
    """Return every run at or below the directories, in order of their paths.

    Raises:
        ConfigError: a directory that does not exist.
    """
    paths: set[Path] = set()
    for name in directories:
        root = Path(name)
        if not os.path.isdir(name):
            raise ConfigError(f"{name}: no such directory\nname a directory of runs, such as outputs")
        paths |= set(_run_directories(root))
    return [read_run(path) for path in sorted(paths)]


def read_run(path: Path) -> Found:
    """Return what one run directory tells."""
    if _is_held(path):
        return Found(path=path, status="running", reason=_progress(_records(path)[0]))
    sealed = (path / "result.json").exists()
    if sealed and (result := load_result(path)):
        return Found(path=path, status=result.status, reason=result.reason or "", result=result, notes=result.notes)
    reasons = ["result.json is torn or of another version"] if sealed else []
    records, lost = _records(path)
    unread = [f"metrics.jsonl: {lost}"] if lost else []
    readers: list[Callable[[], Result | None]]
    readers = [lambda: _from_metrics(path, records), lambda: _from_events(path, unread)]
    for read_logs in readers:
        try:
            logged = read_logs()
        except Exception as error:  # whatever a damaged log makes its readers stumble over
            reasons.append(f"the logs cannot be read: {str(error).partition(chr(10))[0] or type(error).__name__}")
            continue
        if logged and is_sound(logged):
            return Found(path=path, status=DONE, result=logged, notes=[FROM_LOGS], unread=[*reasons, *unread])
    status, reason = ("torn", "; ".join(reasons)) if reasons else ("unfinished", _progress(records))
    return Found(path=path, status=status, reason=reason, unread=unread)


def _run_directories(root: Path) -> Iterator[Path]:
    marks = ("result.json", "config.yaml", "metrics.jsonl", "events.out.tfevents.*")
    for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        if any(next(path.glob(mark), None) for mark in marks):
            yield path


def _is_held(path: Path) -> bool:
    """Whether a process works on the run now: a lock says so, a process number could lie."""
    if not (path / ".lock").exists():
        return False
    lock = FileLock(path / ".lock")
    try:
        with lock.acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _progress(records: list[dict[str, Any]]) -> str:
    epochs = sum(record.get("kind") == "epoch" for record in records)
    return f"{epochs} epochs done" if epochs else "no epoch done"


def _records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of metrics.jsonl that are whole, and what is to be said of the others."""
    file = path / "metrics.jsonl"
    try:
        lines = [line for line in files.read(file).split(b"\n") if line] if file.exists() else []
    except OSError as error:
        return [], error.strerror or str(error)
    records = [record for line in lines if (record := files.parse_json(line)) is not None]
    lost = len(lines) - len(records)
    return records, f"{lost} line{'s' * (lost > 1)} cannot be read" if lost else ""


def _from_metrics(path: Path, records: list[dict[str, Any]]) -> Result | None:
    """Return a result from config.yaml and the final one of the records, or None."""
    final = next((r for r in reversed(records) if r.get("kind") == "final"), None)
    file = path / "config.yaml"
    if final is None or "test_top1" not in final or not file.exists():
        return None
    config = from_dict(files.read_yaml(file))
    protocol = config.protocol()
    return Result(
        status=DONE,
        method=config.method_name,
        options=config.options(),
        bits={key: getattr(config.bits, key) for key in "wag"},
        seed=config.seed,
        dataset=config.dataset["name"],
        model=config.model["name"],
        run=str(path),
        protocol={"hash": digest(protocol), "keys": protocol},
        final=_final(final),
    )


def _from_events(path: Path, unread: list[str]) -> Result | None:
    """Return a result from event files alone, or None: hyper-parameters and final scalars, no protocol.

    What cannot be read is added to `unread`.
    """
    paths = sorted(path.glob("events.out.tfevents.*"))
    if not paths:
        return None
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content, final = b"", {}
    for file in paths:
        data = files.read(file)
        lost = len(data)
        for record in _event_records(data):
            lost -= len(record) + AROUND
            for value in Event.FromString(record).summary.value:
                if value.tag == "_hparams_/session_start_info":
                    content = value.metadata.plugin_data.content
                elif value.tag.startswith("final/"):
                    final[value.tag.removeprefix("final/")] = value.simple_value
        if lost:
            unread.append(f"{file.name}: {lost:,} bytes cannot be read")
    if not content or "test_top1" not in final:
        return None
    stored = HParamsPluginData.FromString(content).session_start_info.hparams
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in stored.items()}
    return Result(
        status=DONE,
        method=values["method"],
        bits={key: int(values[key]) for key in "wag"},
        seed=int(values["seed"]),
        dataset=values["dataset"],
        model=values["model"],
        run=str(path),
        protocol={"hash": "", "keys": {"epochs": int(values["epochs"])}},
        final=_final(final),
    )


def _event_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of an event file whose checksums match; TensorBoard's own reader gives up at the first other.

    A record is its length (8 bytes), the checksum of that (4), the content, the checksum of that (4). Damaged content
    is passed over by its length; where a length is damaged, the next record is looked for, up to `TRIED` times.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def matches(start: int, stop: int) -> bool:
        found: int = masked_crc32c(data[start:stop])
        return found == int.from_bytes(data[stop : stop + 4], "little")

    at = tried = 0
    while at + AROUND <= len(data) and tried < TRIED:
        end = at + AROUND + int.from_bytes(data[at : at + 8], "little")
        if end > len(data) or not matches(at, at + 8):
            at, tried = at + 1, tried + 1
            continue
        if matches(at + 12, end - 4):
            yield data[at + 12 : end - 4]
        at = end


def _final(record: dict[str, Any]) -> dict[str, Any]:
    """Return {"val": {...}, "test": {...}} from `val_top1` and so on."""
    found: dict[str, Any] = {"val": {}, "test": {}}
    for key, value in record.items():
        if match := re.fullmatch(r"(val|test)_(\w+)", key):
            found[match[1]][match[2]] = value
    return found
