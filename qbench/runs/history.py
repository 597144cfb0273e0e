"""Reads metrics.jsonl of one run: the records of epochs, and the last statistics of each layer."""

from pathlib import Path
from typing import Any

from qbench.runs.result import Result, load_result
from qbench.system import files

Record = dict[str, Any]
"""One line of metrics.jsonl, or the statistics of one layer in such a line."""


def epochs(run: Path) -> dict[int, Record]:
    """Return a map from epoch (from 0) to its record. Lines that cannot be read are skipped."""
    return {values["epoch"]: values for values in _epoch_records(run) if values.get("kind") == "epoch"}


def observed(run: Path) -> dict[str, Record]:
    """Return a map from layer to its last recorded statistics. The map is empty if no statistics were recorded."""
    records = [values["layers"] for values in _epoch_records(run) if isinstance(values.get("layers"), dict)]
    return {name: layer for name, layer in records[-1].items() if isinstance(layer, dict)} if records else {}


def _epoch_records(run: Path) -> list[Record]:
    """Return the records of whole epochs. Records of single steps contain no epoch."""
    try:
        lines = files.read(run / "metrics.jsonl").split(b"\n")
    except OSError:
        return []
    parsed = [files.parse_json(line) for line in lines if b'"epoch"' in line]
    return [values for values in parsed if values and isinstance(values.get("epoch"), int)]


def baseline_directory(result: Result) -> Path | None:
    """Return the directory of a run's float baseline, or None without a baseline or if it has other data.

    A directory of the same name next to the run's directory is preferred to the recorded path.
    """
    if not result.baseline:
        return None
    recorded = Path(result.baseline.run)
    sibling = Path(result.run).parent / recorded.name  # the whole folder may have been moved
    path = sibling if sibling.is_dir() else recorded
    baseline = load_result(path)
    return path if baseline is None or baseline.same_data(result) else None
