"""Writes the warnings of settings as notes below a table."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from qbench.report.comparison.setting import Setting

MOST_WARNINGS = 3
"""Maximum number of warnings per setting below a table.

All warnings are in result.json and on the HTML page.
"""


def warning_notes(settings: Sequence[Setting]) -> Iterator[str]:
    """Yield the warnings of settings as notes. Settings with the same warning share a note."""
    names: dict[str, list[str]] = defaultdict(list)
    for setting in settings:
        for warning in setting.warnings[:MOST_WARNINGS]:
            names[warning].append(setting.name)
    for warning, having in names.items():
        everywhere = len(having) == len(settings) > 1
        yield f"warning: {'all settings' if everywhere else ', '.join(having)}: {warning}"
    for setting in settings:
        if len(setting.warnings) > MOST_WARNINGS:
            yield f"warning: {setting.name}: further warnings in result.json: {len(setting.warnings) - MOST_WARNINGS}"
