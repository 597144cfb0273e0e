"""Writes a warning if the speeds in a table were measured under different conditions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from qbench.report.comparison.setting_table import settings_of
from qbench.report.tables.table import Table
from qbench.system import files


def speed_notes(table: Table) -> list[str]:
    """Return a warning if the runs of a table were measured under different conditions, or an empty list.

    The conditions, such as the device and the threads, come from the manifests of the runs. Runs without a manifest are
    left out.
    """
    runs = [run.run for setting in settings_of(table) if setting.speed for run in setting.runs]
    found = (_conditions(files.read_json(Path(run) / "manifest.json") or {}) for run in runs)
    counts = Counter(words for words in found if words)
    if len(counts) < 2:
        return []
    listed = "; ".join(f"{words} ({count} run{'s' * (count > 1)})" for words, count in counts.most_common())
    return [f"warning: speeds and memory were measured under different conditions: {listed}"]


def _conditions(manifest: Mapping[str, object]) -> str:
    """Return a text with the device, counts and options in a manifest, or "" if the manifest names no device."""
    device, name = manifest.get("device"), manifest.get("device_name")
    if not device:
        return ""
    words = [device, name if device == "cuda" else ""]
    words += [f"{key} {manifest.get(key, 1)}" for key in ("threads", "processes")]
    words += [option for option in ("compile", "tf32") if manifest.get(option)]
    words += [] if manifest.get("deterministic", True) else ["not deterministic"]
    memory = manifest.get("activation_memory", "recompute")
    words += [] if memory == "recompute" else [f"activation_memory={memory}"]
    words += ["extra fast" if manifest.get("compiled_quantizers") else ""]
    return ", ".join(str(word) for word in words if word)
