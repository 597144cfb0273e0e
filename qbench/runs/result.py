"""The result of a run: what `result.json` holds."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qbench.config.identity import digest
from qbench.system import files

SCHEMA = 2


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
