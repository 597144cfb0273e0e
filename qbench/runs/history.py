"""What metrics.jsonl tells of a run: the numbers of each epoch, and what was seen of each layer."""

from pathlib import Path
from typing import Any

from qbench.system import files


def epochs(run: Path) -> dict[int, dict[str, Any]]:
    """Return the numbers of each epoch of a run, from 0; a line that cannot be read is passed over."""
    return {values["epoch"]: values for values in _records(run) if values.get("kind") == "epoch"}


def observed(run: Path) -> dict[str, dict[str, Any]]:
    """Return what the last look at each layer of a run has told, by layer; nothing where nobody looked."""
    looks = [values["layers"] for values in _records(run) if isinstance(values.get("layers"), dict)]
    return {name: told for name, told in looks[-1].items() if isinstance(told, dict)} if looks else {}


def _records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run that name their epoch: not those of single steps, which are many."""
    try:
        lines = files.read(run / "metrics.jsonl").split(b"\n")
    except OSError:
        return []
    parsed = [files.parse_json(line) for line in lines if b'"epoch"' in line]
    return [values for values in parsed if values and isinstance(values.get("epoch"), int)]
