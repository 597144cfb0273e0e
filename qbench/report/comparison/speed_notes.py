"""Writes a warning if the speeds in a table were measured under different conditions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from qbench.report.comparison.setting_table import settings_of
from qbench.report.tables.table import Table
from qbench.system import files


def speed_notes(table: Table) -> list[str]:
    """Return a warning if the runs of a table differ in device or threads, or an empty list.

    Device, threads and processes come from the manifests of the runs. Runs without a manifest are left out.
    """
    runs = [run.run for setting in settings_of(table) if setting.speed for run in setting.runs]
    found = (_conditions(files.read_json(Path(run) / "manifest.json") or {}) for run in runs)
    counts = Counter(words for words in found if words)
    if len(counts) < 2:
        return []
    listed = "; ".join(f"{words} ({count} run{'s' * (count > 1)})" for words, count in counts.most_common())
    return [f"warning: speeds and memory were measured under different conditions: {listed}"]


def _conditions(manifest: Mapping[str, object]) -> str:
    """Return a text with the device and the numbers of threads and processes in a manifest."""
    device = manifest.get("device")
    if not device:
        return ""
    name = manifest.get("device_name") if device == "cuda" else ""
    words = [" ".join(str(word) for word in (device, name) if word)]
    for key, word in (("threads", "thread"), ("processes", "process")):
        if isinstance(count := manifest.get(key), int) and (key == "threads" or count > 1):
            words.append(f"{count} {word}{'' if count == 1 else 'es' if key == 'processes' else 's'}")
    return ", ".join(words)
