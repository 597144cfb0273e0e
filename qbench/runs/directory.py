"""A run's directory and its result: where a run lives, what was stored, what an interrupted one left.

The path follows from the configuration alone, so the same line finds the same run again, from a single run, a sweep
or a launcher. `result.json` is written last; until then the directory holds checkpoints to go on from.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from qbench.config.schema import Config, digest, to_dict
from qbench.system import files

SCHEMA = 2
FINAL = ("done", "unsupported")
KEPT_STATES = 2
KEPT = ("metrics.jsonl", "last.pt", "best.pt", "predictions.npy", "log.txt")
Seconds = float  # below, `float` is a field: the float parent


@dataclass(kw_only=True)
class Result:
    """What `result.json` holds; see the README for each field."""

    schema: int = SCHEMA
    status: str
    reason: str | None = None
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, int]
    network: dict[str, str] = field(default_factory=dict)
    levels: int | None = None
    seed: int
    dataset: str
    model: str
    made_data: bool = False
    run: str = ""
    protocol: dict[str, Any]
    float: dict[str, Any] | None = None
    final: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    verified: dict[str, Any] | None = None
    quantizers: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    weights_sha256: str | None = None
    state_sha256: str | None = None
    wall_seconds: Seconds | None = None
    protocol_changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def widths(self) -> str:
        """The widths as people write them: w2a2g32."""
        return "".join(f"{key}{self.bits[key]}" for key in "wag")


def load_result(path: Path) -> Result | None:
    """Return the result stored in a run's directory; None where it is missing, damaged or of another schema."""
    values = files.read_json(path / "result.json")
    if values is None or values.pop("sha256", None) != digest(values) or values.get("schema") != SCHEMA:
        return None
    if set(values) - {f.name for f in fields(Result)}:
        return None
    try:
        result = Result(**values | {"run": str(path)})
    except TypeError:  # fields are missing
        return None
    return result if is_sound(result) else None


def is_sound(result: Result) -> bool:
    """Whether a result that was read has the parts that readers rely on."""
    try:
        measured = [result.final] if result.status == "done" else []
        measured += [result.float["final"]] if result.float else []
        figures = [part["test"]["top1"] for part in measured if part or result.status == "done"]  # type: ignore[index]
        keys = [result.bits[key] for key in "wag"]
        names = [result.status, result.method, result.dataset, result.model, result.protocol["hash"]]
        names += [result.protocol.get("identity", ""), *([result.float["run"]] if result.float else [])]
        costs = [cost for cost in (result.cost or {}).values() if cost is not None]
        return (
            result.schema == SCHEMA
            and all(isinstance(name, str) for name in names)
            and all(_is_number(x) and 0 <= x <= 100 for x in figures)
            and all(isinstance(x, int) and not isinstance(x, bool) for x in [*keys, result.seed])
            and all(isinstance(part, dict) for part in (result.options, result.network, result.protocol["keys"]))
            and all(isinstance(part, list) for part in (result.notes, result.protocol_changes))
            and all(isinstance(said, str) for said in (*result.notes, *result.protocol_changes))
            and all(_is_number(cost) for cost in costs)
        )
    except (TypeError, KeyError, AttributeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def store_result(path: Path, result: Result) -> None:
    """Write result.json into a run's directory."""
    values = {name: value for name, value in asdict(result).items() if name != "run"}
    files.write_json(path / "result.json", with_checksum(values))


def with_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with the sha256 of what a reader of their JSON will find; one that is there is replaced."""
    found: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    found.pop("sha256", None)
    return found | {"sha256": digest(found)}


class RunDirectory:
    """The directory of one run; nothing is created before `lock`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.identity = config.identity()
        self.path = Path(config.out) / config.directory()

    def stored(self) -> Result | None:
        """Return the stored result that a repeat need not compute again: done or unsupported."""
        result = load_result(self.path)
        if result is None or result.status not in FINAL or result.protocol.get("identity") != digest(self.identity):
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
            protocol={"hash": digest(protocol), "identity": digest(self.identity), "keys": protocol}, **values,
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
