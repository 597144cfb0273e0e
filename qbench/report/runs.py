"""Reading run directories: results where there are any, else what the logs still tell."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from qbench.config import digest
from qbench.errors import ConfigError
from qbench.filling import from_dict
from qbench.record import files
from qbench.record.run import Result, load_result

DONE = "done"
FROM_LOGS = "from the logs"


@dataclass(kw_only=True)
class Found:
    """A run directory: its result, or why there is none. `status` is the result's, or running, unfinished, torn."""

    path: Path
    status: str
    reason: str = ""
    result: Result | None = None
    notes: list[str] = field(default_factory=list)


def read(directories: Iterable[str]) -> list[Found]:
    """Return every run at or below the directories, in order of their paths.

    Raises:
        ConfigError: a directory that does not exist.
    """
    paths: set[Path] = set()
    for name in directories:
        root = Path(name)
        if not root.is_dir():
            raise ConfigError(f"{name}: no such directory\nname a directory of runs, such as outputs")
        paths |= set(_run_directories(root))
    return [read_run(path) for path in sorted(paths)]


def read_run(path: Path) -> Found:
    """Return what one run directory tells."""
    if _is_held(path):
        return Found(path=path, status="running", reason=_progress(path))
    if (path / "result.json").exists():
        result = load_result(path)
        if result is None:
            return Found(path=path, status="torn", reason="result.json is torn or of another version")
        return Found(path=path, status=result.status, reason=result.reason or "", result=result, notes=result.notes)
    try:
        logged = _from_metrics(path) or _from_events(path)
    except (ConfigError, yaml.YAMLError, OSError, ValueError, KeyError, TypeError) as error:
        return Found(path=path, status="torn", reason=f"the logs cannot be read: {str(error).partition(chr(10))[0]}")
    if logged:
        return Found(path=path, status=DONE, result=logged, notes=[FROM_LOGS])
    return Found(path=path, status="unfinished", reason=_progress(path))


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


def _progress(path: Path) -> str:
    epochs = [record["epoch"] for record in _records(path) if record.get("kind") == "epoch"]
    return f"{len(epochs)} epochs done" if epochs else "no epoch done"


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl; a torn tail is left out."""
    file = path / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [record for line in lines if (record := files.parse_json(line)) is not None]


def _from_metrics(path: Path) -> Result | None:
    """Return a result from config.yaml and the final record of metrics.jsonl, or None."""
    final = next((r for r in reversed(_records(path)) if r.get("kind") == "final"), None)
    file = path / "config.yaml"
    if final is None or "test_top1" not in final or not file.exists():
        return None
    config = from_dict(yaml.safe_load(file.read_text(encoding="utf-8")))
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


def _from_events(path: Path) -> Result | None:
    """Return a result from event files alone, or None: hyper-parameters and final scalars, no protocol."""
    if not next(path.glob("events.out.tfevents.*"), None):
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(path), size_guidance={"scalars": 1, "histograms": 1, "images": 1}).Reload()
    metadata = events.summary_metadata.get("_hparams_/session_start_info")
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("final/")]
    final = {tag.removeprefix("final/"): events.Scalars(tag)[-1].value for tag in tags}
    if metadata is None or "test_top1" not in final:
        return None
    stored = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
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


def _final(record: dict[str, Any]) -> dict[str, Any]:
    """Return {"val": {...}, "test": {...}} from `val_top1` and so on."""
    found: dict[str, Any] = {"val": {}, "test": {}}
    for key, value in record.items():
        if match := re.fullmatch(r"(val|test)_(\w+)", key):
            found[match[1]][match[2]] = value
    return found
