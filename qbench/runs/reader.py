"""Reads runs from their results or logs, or from records of many runs."""

import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from qbench.config.identity import run_identity
from qbench.config.validate import from_dict
from qbench.errors import ConfigError
from qbench.runs import event_files
from qbench.runs.directory import packed_bytes
from qbench.runs.hits import Hits, load_hits, pack_hits, unpack_hits
from qbench.runs.index import RunIndex
from qbench.runs.result import Evaluation, Protocol, Result, load_result, parse_result
from qbench.system import files
from qbench.system.locks import is_locked

DONE = "done"
FROM_LOGS = "from the logs"
LEFT_OUT = ("run", "card", "quantizers", "verified", "speed", "best", "state_sha256")
"""Fields of a result that `dump_records` omits, because they are large or describe the machine."""

NAMED = re.compile(r".*-([0-9a-f]{8})")
"""Pattern of the name of a run's directory. The name ends with the first digits of the run's identity."""

RUN_FILES = frozenset({"result.json", "config.yaml", "metrics.jsonl"})
EVENT_FILES = "events.out.tfevents."
"""A directory contains a run if it has a file whose name is in `RUN_FILES` or begins with `EVENT_FILES`."""

Line = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(kw_only=True)
class RunRecord:
    """A run directory with its result, or with the reason why there is no result.

    `status` is the status of the result. If there is no result, `status` is running, unfinished, corrupt or not begun.
    `unread` names damaged parts of the run's files. `recorded` is true if the run was read from a record of many runs.
    Such a record may also contain the `hits` of the run, the correctly classified test images. `file_bytes` is the size
    of an exported packed file in the run's directory.
    """

    path: Path
    status: str
    reason: str = ""
    result: Result | None = None
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    recorded: bool = False
    hits: Hits | None = None
    file_bytes: int | None = None

    def __str__(self) -> str:
        top1 = self.result.top1 if self.status == DONE and self.result else None
        return f"{self.status:<12}{self.path}" + ("" if top1 is None else f"  {top1:.2f} %")


def read(names: Iterable[str]) -> list[RunRecord]:
    """Return all runs in directories and in records that `dump_records` made, sorted by path.

    Runs with debug=true are left out.

    Raises:
        ConfigError: a path does not exist, or a file is not a record that `dump_records` made.
    """
    found: dict[Path, RunRecord] = {}
    records: dict[str, list[RunRecord]] = {}
    for name in names:  # os.path does not raise an error for a name that is empty or too long
        if os.path.isfile(name):
            records[name] = load_records(Path(name))
        elif os.path.isdir(name):
            found |= _read_directory(Path(name))
        else:
            raise ConfigError(f"{name}: no such directory or file\ntype a directory of runs, such as outputs")
    found = {path: run for path, run in found.items() if not _is_debug(run)}
    for name, runs in records.items():
        found |= {run.path: run for run in (_renamed(run, name, found) for run in runs)}
    return sorted(found.values(), key=lambda run: str(run.path).replace(os.sep, "\0"))  # folder by folder


def _renamed(run: RunRecord, file: str, others: Mapping[Path, RunRecord]) -> RunRecord:
    """Return a recorded run. If another run has its path, the file of the record becomes part of the path.

    Different machines may use the same relative paths, and a record may be older than the directory.
    """
    other = others.get(run.path)
    if other is None or (other.recorded and replace(other, hits=None) == replace(run, hits=None)):
        return run
    path = Path(f"{file}/{run.path}")
    return replace(run, path=path, result=run.result and replace(run.result, run=str(path)))


def _read_directory(root: Path) -> dict[Path, RunRecord]:
    """Return the runs below a directory. If there are many runs, their results are stored in an index file."""
    with _garbage_collection_paused():
        index = RunIndex(root)
        runs = {path: read_run(path, index.load) for path in _run_directories(root)}
    index.save()
    return runs


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause the search for reference cycles. Results have none, so every search among them is in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_debug(run: RunRecord) -> bool:
    """Return whether a run has debug=true.

    If there is no result, the function reads the run's config.yaml.
    """
    return bool(run.result.protocol.keys.get("debug")) if run.result else has_debug_config(run.path)


def has_debug_config(path: Path) -> bool:
    """Return whether the config.yaml of a directory has debug=true. The result is False if there is no such file."""
    try:
        return re.search(rb"^debug: true$", files.read(path / "config.yaml"), re.MULTILINE) is not None
    except OSError:
        return False


def with_baselines(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs, followed by their float baselines that are in the same folders."""
    known = {run.path for run in runs}
    starts = [(run.path.parent, run.result.baseline) for run in runs if run.result and run.result.baseline]
    baselines = {folder / Path(start.run).name for folder, start in starts if not start.pretrained}
    return [*runs, *(read_run(path) for path in sorted(baselines - known) if path.is_dir())]


def dump_records(runs: Sequence[RunRecord]) -> str:
    """Return a record of runs as JSON, which `load_records` reads. The fields in `LEFT_OUT` are omitted.

    Each protocol is written only once. If predictions of a run are stored, the record contains the run's hits, one bit
    per test image, so that a comparison can pair runs by image.
    """
    protocols: dict[str, object] = {}
    records = []
    for run in runs:
        record: dict[str, object] = {"path": str(run.path), "status": run.status, "reason": run.reason}
        record |= {"notes": run.notes} if FROM_LOGS in run.notes else {}
        if run.result:
            result = {key: value for key, value in asdict(run.result).items() if key not in LEFT_OUT}
            if result["protocol"]["hash"]:  # without a hash, the protocol is only known in part
                protocols[result["protocol"]["hash"]] = result["protocol"]["keys"]
                result["protocol"] = result["protocol"] | {"keys": None}
            record["result"] = result
            top1 = run.result.top1
            if top1 is not None and (hits := run.hits or load_hits(run.path, top1)):
                record["hits"] = pack_hits(hits)
        records.append(record)
    return json.dumps({"protocols": protocols, "runs": records}, separators=(",", ":"), sort_keys=True, allow_nan=False)


def load_records(file: Path) -> list[RunRecord]:
    """Return the runs in a record that `dump_records` made.

    Raises:
        ConfigError: the file is corrupt or is not a record of runs.
    """
    try:
        values = json.loads(files.read(file))
        return [_load_record(record, values["protocols"]) for record in values["runs"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        made_by = "qbench compare DIR --format record"
        raise ConfigError(f"{file}: not a record of runs\ntype a directory, or a file that {made_by} wrote") from None


def _load_record(record: dict[str, Any], protocols: Mapping[str, Any]) -> RunRecord:
    path, status, reason = Path(record["path"]), record["status"], record["reason"]
    notes = record.get("notes", [])
    if not isinstance(status, str) or not isinstance(reason, str) or not isinstance(notes, list):
        raise ValueError(path)
    run = RunRecord(path=path, status=status, reason=reason, notes=notes, recorded=True)
    if values := record.get("result"):
        protocol = values["protocol"]
        if protocol["keys"] is None:
            protocol = protocol | {"keys": protocols[protocol["hash"]]}
        run.result = parse_result(values | {"run": str(path), "protocol": protocol})
        if run.result.status != status:
            raise ValueError(path)
        if (packed := record.get("hits")) and run.result.top1 is not None:
            run.hits = unpack_hits(packed, run.result.top1)
    return run


def read_run(path: Path, load: Callable[[Path], Result | None] = load_result) -> RunRecord:
    """Return the run in a directory. If there is no intact result, the logs are read.

    Args:
        load: function that returns the intact result in the directory, or None.
    """
    if is_locked(f"{path}/.lock"):
        return RunRecord(path=path, status="running", reason=_progress(_metrics(path)[0]))
    if result := load(path):
        if not _is_named(path, result.identity):
            reason = f"result.json belongs to another run: {result.method} {result.widths}, seed {result.seed}"
            return RunRecord(path=path, status="corrupt", reason=reason)
        return RunRecord(
            path=path, status=result.status, reason=result.reason or "", result=result, notes=result.notes,
            file_bytes=packed_bytes(path, result.identity),
        )  # fmt: skip
    reasons = ["result.json is corrupt or has another version of the format"] if (path / "result.json").exists() else []
    lines, damage = _metrics(path)
    unread = [f"metrics.jsonl: {damage}"] if damage else []
    readers: list[Callable[[], Result | None]]
    readers = [lambda: _result_from_metrics(path, lines), lambda: _result_from_events(path, unread)]
    for read_logs in readers:
        try:
            logged = read_logs()
        except Exception as error:  # a damaged log can make its readers fail in any way
            reasons.append(f"the logs cannot be read: {str(error).partition(chr(10))[0] or type(error).__name__}")
            continue
        if logged:
            return RunRecord(path=path, status=DONE, result=logged, notes=[FROM_LOGS], unread=[*reasons, *unread])
    status, reason = ("corrupt", "; ".join(reasons)) if reasons else ("unfinished", _progress(lines))
    return RunRecord(path=path, status=status, reason=reason, unread=unread)


def _is_named(path: Path, identity: str) -> bool:
    """Return whether the name of a directory fits an identity.

    The name fits if it ends with the first digits of the identity's digest. A name that does not end with digits of a
    digest fits any identity.
    """
    named = NAMED.fullmatch(path.name)
    return not named or not identity or identity.startswith(named[1])


def _run_directories(root: Path) -> Iterator[Path]:
    """Yield the directories that contain a run's files. A link is followed if its target is not searched anyway."""
    waiting, links = [str(root)], list[str]()  # strings, because a Path for each folder and file would take longer
    searched = [os.path.realpath(root)]
    while waiting or links:
        if not waiting:
            path = links.pop()
            target = os.path.realpath(path)
            if any(_is_below(target, folder) or _is_below(folder, target) for folder in searched):
                continue  # also prevents endless loops
            searched.append(target)
            waiting.append(path)
        path = waiting.pop()
        is_run = False
        with suppress(PermissionError), os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name in RUN_FILES or name.startswith(EVENT_FILES):
                    is_run = True
                elif entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
        if is_run:
            yield Path(path)


def _is_below(path: str, folder: str) -> bool:
    """Return whether an absolute path is a folder or lies below it."""
    return os.path.commonpath((path, folder)) == folder


def _progress(lines: list[Line]) -> str:
    epochs = sum(line.get("kind") == "epoch" for line in lines)
    return f"{epochs} epochs done" if epochs else "no epoch done"


def _metrics(path: Path) -> tuple[list[Line], str]:
    """Return the intact lines of metrics.jsonl, and a message if lines are damaged."""
    file = path / "metrics.jsonl"
    try:
        texts = [text for text in files.read(file).split(b"\n") if text] if file.exists() else []
    except OSError as error:
        return [], error.strerror or str(error)
    lines = [line for text in texts if (line := files.parse_json(text)) is not None]
    lost = len(texts) - len(lines)
    return lines, f"{lost} line{'s' * (lost > 1)} cannot be read" if lost else ""


def _result_from_metrics(path: Path, lines: list[Line]) -> Result | None:
    """Return a result that is made from config.yaml and the lines of metrics.jsonl.

    The result is None if config.yaml or the final line is missing.

    Raises:
        ValueError: config.yaml and the name of the directory belong to different runs.
    """
    final = next((line for line in reversed(lines) if line.get("kind") == "final"), None)
    file = path / "config.yaml"
    measured = _final_evaluation(final) if final else None
    if measured is None or not file.exists():
        return None
    identity = run_identity(from_dict(files.read_yaml(file)))
    if not _is_named(path, identity.digest):
        raise ValueError("config.yaml was edited after the run: the directory's name belongs to other settings")
    trained = [line["epoch"] for line in lines if line.get("kind") == "epoch" and isinstance(line.get("epoch"), int)]
    return Result(
        status=DONE,
        method=identity.method,
        options=identity.options,
        bits=identity.bits._asdict(),
        seed=identity.seed,
        dataset=identity.dataset,
        model=identity.model,
        run=str(path),
        protocol=Protocol(hash=identity.protocol_hash, keys=identity.protocol),
        final=replace(measured, epoch=max(trained, default=None)),
    )


def _result_from_events(path: Path, unread: list[str]) -> Result | None:
    """Return a result that is made from TensorBoard event files, or None. The protocol of the result is not known.

    Messages about parts that cannot be read are appended to `unread`.
    """
    summary = event_files.read_summary(path)
    unread += summary.unread
    measured = _final_evaluation(summary.final)
    if not summary.hyperparameters or measured is None:
        return None
    values = summary.hyperparameters
    return Result(
        status=DONE,
        method=str(values["method"]),
        bits={key: int(values[key]) for key in "wag"},
        seed=int(values["seed"]),
        dataset=str(values["dataset"]),
        model=str(values["model"]),
        run=str(path),
        protocol=Protocol(hash="", keys={"epochs": int(values["epochs"])}),
        final=measured,
    )


def _final_evaluation(record: Mapping[str, object]) -> Evaluation | None:
    """Return the accuracies under keys such as `val_top1`, or None if an accuracy on the test split is missing.

    Raises:
        ValueError: a value is not a number or out of range.
    """
    splits: dict[str, dict[str, object]] = {"val": {}, "test": {}}
    for key, value in record.items():
        if match := re.fullmatch(r"(val|test)_(\w+)", key):
            splits[match[1]][match[2]] = value
    complete = {split: values for split, values in splits.items() if {"top1", "top5", "loss"} <= set(values)}
    return msgspec.convert(complete, Evaluation) if "test" in complete else None
