"""Reading runs: results where a directory has any, else what its logs still tell; or records of many runs in a file."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from qbench.config.identity import digest
from qbench.config.validate import from_dict
from qbench.errors import ConfigError
from qbench.runs import event_files as events
from qbench.runs.result import Evaluation, Protocol, Result, load_result, parse_result
from qbench.system import files

DONE = "done"
FROM_LOGS = "from the logs"
LEFT_OUT = ("run", "card", "quantizers", "verified", "speed", "best", "state_sha256")
"""Fields of results that a record leaves out: they are large, or tell of the machine and its files."""


@dataclass(kw_only=True)
class RunRecord:
    """A run directory: its result, or why there is none. `status` is the result's, or running, unfinished, torn.

    `unread` says what of its files is damaged; `recorded`: it was read from a record of many runs.
    """

    path: Path
    status: str
    reason: str = ""
    result: Result | None = None
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    recorded: bool = False


def read(names: Iterable[str]) -> list[RunRecord]:
    """Return every run at or below the directories, and of the files those that `dump_records` put there, in order
    of paths.

    Raises:
        ConfigError: a name that does not exist, or a file of something else.
    """
    paths: set[Path] = set()
    recorded: dict[Path, RunRecord] = {}
    for name in names:  # os.path: a name that is empty or too long is no file and no error
        if os.path.isfile(name):
            recorded |= {run.path: run for run in load_records(Path(name))}
        elif os.path.isdir(name):
            paths |= set(_run_directories(Path(name)))
        else:
            raise ConfigError(f"{name}: no such directory or file\nname a directory of runs, such as outputs")
    found = [read_run(path) for path in sorted(paths)]
    return sorted([*found, *recorded.values()], key=lambda run: run.path) if recorded else found


def with_parents(found: Sequence[RunRecord]) -> list[RunRecord]:
    """Return runs and, behind them, their float parents: those that lie beside them and are not among them."""
    own = {run.path for run in found}
    parents = {
        run.path.parent / Path(run.result.baseline.run).name for run in found if run.result and run.result.baseline
    }
    return [*found, *(read_run(path) for path in sorted(parents - own) if path.is_dir())]


def dump_records(found: Sequence[RunRecord]) -> str:
    """Return runs as JSON that `load_records` reads: results without `LEFT_OUT`, each protocol once."""
    protocols: dict[str, Any] = {}
    runs = []
    for run in found:
        values: dict[str, Any] = {"path": str(run.path), "status": run.status, "reason": run.reason}
        values |= {"notes": run.notes} if FROM_LOGS in run.notes else {}
        if run.result:
            own = {key: value for key, value in asdict(run.result).items() if key not in LEFT_OUT}
            protocols[own["protocol"]["hash"]] = own["protocol"]["keys"]
            own["protocol"] = own["protocol"] | {"keys": None}
            values["result"] = own
        runs.append(values)
    return json.dumps({"protocols": protocols, "runs": runs}, separators=(",", ":"), sort_keys=True, allow_nan=False)


def load_records(file: Path) -> list[RunRecord]:
    """Return the runs of a file that `dump_records` filled.

    Raises:
        ConfigError: another file, or a torn one.
    """
    try:
        values = json.loads(files.read(file))
        return [_unpacked(run, values["protocols"]) for run in values["runs"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        made_by = "qbench compare DIR --format record"
        raise ConfigError(f"{file}: not a record of runs\nname a directory, or a file that {made_by} wrote") from None


def _unpacked(run: dict[str, Any], protocols: dict[str, Any]) -> RunRecord:
    path, status, reason = Path(run["path"]), run["status"], run["reason"]
    notes = run.get("notes", [])
    if not isinstance(status, str) or not isinstance(reason, str) or not isinstance(notes, list):
        raise ValueError(path)
    found = RunRecord(path=path, status=status, reason=reason, notes=notes, recorded=True)
    if own := run.get("result"):
        protocol = own["protocol"] | {"keys": protocols[own["protocol"]["hash"]]}
        result = parse_result(own | {"run": str(path), "protocol": protocol})
        if result.status != status:
            raise ValueError(path)
        found.result = result
    return found


def read_run(path: Path) -> RunRecord:
    """Return what one run directory tells."""
    if _is_held(path):
        return RunRecord(path=path, status="running", reason=_progress(_records(path)[0]))
    sealed = (path / "result.json").exists()
    if sealed and (result := load_result(path)):
        return RunRecord(path=path, status=result.status, reason=result.reason or "", result=result, notes=result.notes)
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
        if logged:
            return RunRecord(path=path, status=DONE, result=logged, notes=[FROM_LOGS], unread=[*reasons, *unread])
    status, reason = ("torn", "; ".join(reasons)) if reasons else ("unfinished", _progress(records))
    return RunRecord(path=path, status=status, reason=reason, unread=unread)


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
    measured = _final(final) if final else None
    if measured is None or not file.exists():
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
        protocol=Protocol(hash=digest(protocol), keys=protocol),
        final=measured,
    )


def _from_events(path: Path, unread: list[str]) -> Result | None:
    """Return a result from event files alone, or None: hyper-parameters and final scalars, no protocol.

    What cannot be read is added to `unread`.
    """
    told = events.summary(path)
    unread += told.unread
    measured = _final(told.final)
    if not told.hparams or measured is None:
        return None
    values = told.hparams
    return Result(
        status=DONE,
        method=values["method"],
        bits={key: int(values[key]) for key in "wag"},
        seed=int(values["seed"]),
        dataset=values["dataset"],
        model=values["model"],
        run=str(path),
        protocol=Protocol(hash="", keys={"epochs": int(values["epochs"])}),
        final=measured,
    )


def _final(record: Mapping[str, Any]) -> Evaluation | None:
    """Return the accuracies that a record holds as `val_top1`, `test_loss` and so on; None without those on test.

    Raises:
        ValueError: one of them is no number of its range.
    """
    found: dict[str, dict[str, Any]] = {"val": {}, "test": {}}
    for key, value in record.items():
        if match := re.fullmatch(r"(val|test)_(\w+)", key):
            found[match[1]][match[2]] = value
    complete = {split: values for split, values in found.items() if {"top1", "top5", "loss"} <= set(values)}
    return msgspec.convert(complete, Evaluation) if "test" in complete else None
