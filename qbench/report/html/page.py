"""One self-contained HTML page of a comparison: tables, pictures, each cell's configuration, curves, layers, notes.

Nothing is loaded from elsewhere: style, script and pictures stand in the file, and its content security policy forbids
all else. Whatever stands in results is text: Jinja escapes it, and a script that slipped through would not be run.
"""

import hashlib
import re
import shlex
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from qbench.errors import ConfigError
from qbench.report.html.details import details
from qbench.report.plots.plots import KINDS, TITLES, picture, rendered
from qbench.report.plots.style import INK
from qbench.report.tables.columns import COLUMNS
from qbench.report.tables.table import Table
from qbench.runs.history import MEASURES, SettingValues, is_float, learning
from qbench.runs.reader import RunRecord
from qbench.runs.result import Result
from qbench.system import files

SUFFIXES = (".html", ".htm")
HERE = Path(__file__)


def page(tables: Sequence[Table], found: Sequence[RunRecord], path: Path) -> None:
    """Write a comparison as one HTML file.

    Raises:
        ConfigError: another suffix.
        ResourceError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"compare --html {path}: the file is a page\nallowed: a name that ends in .html")
    files.write(path, html(tables, found).encode(errors="backslashreplace"))


def html(tables: Sequence[Table], found: Sequence[RunRecord]) -> str:
    """Return the page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    style, script = (HERE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    results = {str(run.path): run.result for run in found if run.result}
    methods = _methods(results.values())
    sections = [_section(f"t{i}", table, found, results, methods) for i, table in enumerate(tables)]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    template = environment.from_string(HERE.with_suffix(".html").read_text(encoding="utf-8"))
    return template.render(
        title=_title(tables),
        sections=sections,
        methods=methods,
        made=_made(found),
        counts=_counts(sections, found),
        style=Markup(style),
        script=Markup(script),
        digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _title(tables: Iterable[Table]) -> str:
    names = list(dict.fromkeys(t.title.partition(";")[0] for t in tables if any("top1_mean" in v for v in t.values)))
    return ", ".join(names) or "no finished runs"


def _counts(sections: Sequence[dict[str, Any]], found: Sequence[RunRecord]) -> str:
    """Return one line on what is there."""
    cells = sum(len(section["cells"]) for section in sections)
    told = Counter(run.status for run in found)
    runs = ", ".join(f"{count} {status}" for status, count in sorted(told.items()))
    return f"{cells} cells of {len(found)} runs" + (f" ({runs})" if runs else "")


def _section(
    name: str,
    table: Table,
    found: Sequence[RunRecord],
    results: Mapping[str, Result],
    methods: Mapping[str, Any],
) -> dict[str, Any]:
    """Return one table with its pictures and cells."""
    cells = [values for values in table.values if "top1_mean" in values]
    lines, measure = learning(cells, results)
    told = [
        details(f"{name}c{i}", cell, lines.get(cell["method"], {}), results, methods) for i, cell in enumerate(cells)
    ]
    return {
        "id": name,
        "title": table.title or "runs",
        "head": [_column(title, table) for title in table.head],
        "rows": [_row(table, i, f"{name}c{i}" if cells else "") for i in range(len(table.rows))],
        "notes": table.notes,
        "pictures": _pictures(table, found) if sum(not is_float(cell) for cell in cells) > 1 else [],
        "measure": MEASURES[measure],
        "cells": told,
    }


def _column(title: str, table: Table) -> dict[str, Any]:
    """Return a column's head: whether it holds numbers, and which of them come first."""
    known = {column.name: column for column in COLUMNS}
    numbers = any(_number(title, values) is not None for values in table.values)
    return {"title": title, "numbers": numbers, "down": numbers and title in known and known[title].down}


def _row(table: Table, i: int, cell: str) -> dict[str, Any]:
    """Return a row's cells, (text, number to sort by); a reason with all its lines."""
    values, texts = table.values[i] if i < len(table.values) else {}, table.rows[i]
    reason = values.get("reason")
    whole = [reason if title == "reason" and reason else text for title, text in zip(table.head, texts, strict=True)]
    named = table.head.index("method") if "method" in table.head else 0
    told = [(text, _number(title, values)) for title, text in zip(table.head, whole, strict=True)]
    return {"cell": cell, "named": named, "told": told, "winner": bool(values.get("winner"))}


def _number(title: str, values: SettingValues) -> float | None:
    """Return what a column is sorted by, where that is a number."""
    key = next((column.key for column in COLUMNS if column.name == title), None)
    value = key(values) if key and "bits" in values else None
    return value if isinstance(value, int | float) and isfinite(value) else None


def _pictures(table: Table, found: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the pictures of one table as SVG that takes the page's colours."""
    made = [(kind, picture([table], found, [kind], titled=False)) for kind in KINDS]
    return [
        {"title": TITLES[kind], "svg": _inline(rendered(figure, "svg", **{"svg.fonttype": "none"}), TITLES[kind])}
        for kind, figure in made
        if figure is not None
    ]


def _inline(svg: bytes, label: str) -> Any:
    """Return matplotlib's SVG as part of a page: no header, no style for all, no names that would stand twice."""
    from markupsafe import Markup, escape

    text = svg.decode()
    text = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :])
    (box,) = re.findall(r'<svg[^>]*?viewBox="([\d. -]+)"', text)
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">', text, count=1)
    text = re.sub(r'(<(?:g|text)) id="[^"]*"', r"\1", text).replace("xlink:href", "href")
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "sans-serif", text)
    return Markup(text.replace(INK, "currentColor").replace("#ffffff", "var(--page)"))


def _methods(results: Iterable[Result]) -> dict[str, dict[str, str]]:
    """Return every method's choices and deviations once, by anchor; a text that another version wrote is another."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        for name, card in result.card.items() if isinstance(result.card, dict) else ():
            if isinstance(card, dict):
                found.setdefault((name, repr(sorted(card.items()))), {"name": name} | card)
    ordered = sorted(found.items(), key=lambda item: item[0])
    return {f"m{i}": {"choices": "", "deviations": ""} | card for i, (_, card) in enumerate(ordered)}


def _made(found: Sequence[RunRecord]) -> dict[str, Any]:
    """Return how the page was made: command, versions, when the newest run was stored."""
    ours, kinds = [], Counter[str]()
    times = []
    for run in found:
        manifest = files.read_json(run.path / "manifest.json") or {}
        told = manifest.get("versions") if isinstance(manifest.get("versions"), dict) else {}
        words = [f"{key} {value}" for key, value in (told or {}).items()]
        words += [f"{key} {manifest[key]}" for key in ("commit", "device_name", "platform") if manifest.get(key)]
        if words:
            kinds[", ".join(words)] += 1
        for name in ("result.json", "metrics.jsonl"):
            if (run.path / name).is_file():
                times.append((run.path / name).stat().st_mtime)
                break
    try:
        ours = [f"qbench {version('qbench-papers')}"]
    except PackageNotFoundError:
        ours = ["qbench, not installed"]
    return {
        "command": shlex.join(["qbench", *sys.argv[1:]]),
        "version": ours[0],
        "kinds": kinds.most_common(),
        "newest": f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC" if times else "none",
    }
