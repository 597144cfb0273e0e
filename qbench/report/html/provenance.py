"""Collects the provenance of a page: the command, the version of qbench, and the environments of the runs."""

import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from qbench.runs.reader import RunRecord
from qbench.system import files


class PageProvenance(NamedTuple):
    """The command, the version of qbench, the number of runs per environment, and the time of the newest run."""

    command: str
    version: str
    environments: list[tuple[str, int]]
    newest: str


def page_provenance(runs: Sequence[RunRecord]) -> PageProvenance:
    """Return the provenance of a page that shows the given runs."""
    environments = Counter[str]()
    times = []
    for run in runs:
        if environment := _environment(files.read_json(run.path / "manifest.json") or {}):
            environments[environment] += 1
        stored = (run.path / name for name in ("result.json", "metrics.jsonl"))
        times += [path.stat().st_mtime for path in stored if path.is_file()][:1]
    newest = f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC" if times else "none"
    command = shlex.join(["qbench", *sys.argv[1:]])
    return PageProvenance(command, _own_version(), environments.most_common(), newest)


def _environment(manifest: Mapping[str, object]) -> str:
    """Return a text with the versions, commit, device and platform in a manifest."""
    versions = manifest.get("versions")
    words = [f"{key} {value}" for key, value in versions.items()] if isinstance(versions, dict) else []
    words += [f"{key} {manifest[key]}" for key in ("commit", "device_name", "platform") if manifest.get(key)]
    return ", ".join(words)


def _own_version() -> str:
    try:
        return f"qbench {version('qbench-papers')}"
    except PackageNotFoundError:
        return "qbench, not installed"
