"""Reads records of epochs and the last statistics of each layer from the metrics.jsonl of a run."""

from pathlib import Path
from typing import Any

from qbench.runs.result import Result, load_result
from qbench.system import files

Record = dict[str, Any]
"""One line of metrics.jsonl, or the statistics of one layer in such a line."""


def epochs(run: Path) -> dict[int, Record]:
    """Return a map from epochs, counted from 0, to their records. Lines that cannot be read are skipped."""
    return {values["epoch"]: values for values in _epoch_records(run) if values.get("kind") == "epoch"}


def observed(run: Path) -> dict[str, Record]:
    """Return a map from layers to the statistics that were recorded last.

    The map is empty if there are no statistics.
    """
    records = [values["layers"] for values in _epoch_records(run) if isinstance(values.get("layers"), dict)]
    return {name: layer for name, layer in records[-1].items() if isinstance(layer, dict)} if records else {}


def _epoch_records(run: Path) -> list[Record]:
    """Return the records of complete epochs. Records of single steps are left out, because they contain no epoch."""
    try:
        lines = files.read(run / "metrics.jsonl").split(b"\n")
    except OSError:
        return []
    parsed = [files.parse_json(line) for line in lines if b'"epoch"' in line]
    return [values for values in parsed if values and isinstance(values.get("epoch"), int)]


def baseline_directory(result: Result) -> Path | None:
    """Return the directory of a run's float baseline.

    If a directory with the baseline's name is next to the run's directory, it is used instead of the recorded path.
    The result is None if there is no baseline, or if the directory belongs to a run on other images.
    """
    if not result.baseline:
        return None
    recorded = Path(result.baseline.run)
    sibling = Path(result.run).parent / recorded.name  # the whole folder may have been moved
    path = sibling if sibling.is_dir() else recorded
    baseline = load_result(path)
    return path if baseline is None or baseline.same_data(result) else None
