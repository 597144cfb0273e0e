"""Writes a comparison as one self-contained HTML page with tables, plots and the details of each setting.

The file contains all styles, scripts and plots. The content security policy of the page forbids loading anything else.
Jinja escapes all text that comes from results. The policy also prevents scripts in such text from running.
"""

import hashlib
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qbench.errors import ConfigError
from qbench.report.comparison.columns import COLUMNS
from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_table import MissingRuns, settings_of
from qbench.report.comparison.summary import summary
from qbench.report.html.details import SettingDetails, setting_details
from qbench.report.html.provenance import page_provenance
from qbench.report.plots.plots import KINDS, TITLES, comparison_figure, encoded
from qbench.report.plots.style import INK
from qbench.report.plots.training_curves import MEASURES, learning_curves
from qbench.report.tables.escape import printable
from qbench.report.tables.table import Table
from qbench.runs.reader import RunRecord
from qbench.runs.result import Result
from qbench.system import files

if TYPE_CHECKING:
    from markupsafe import Markup

SUFFIXES = (".html", ".htm")
HERE = Path(__file__)
BY_NAME = {column.name: column for column in COLUMNS}

Cards = dict[str, dict[str, str]]
"""Maps an anchor to a method card, which is a dictionary with the keys `name`, `choices` and `deviations`."""


class Head(NamedTuple):
    """The head of a column.

    `numbers` says whether the column contains numbers. `descending` says whether the first click on the head puts the
    largest value first.
    """

    title: str
    numbers: bool
    descending: bool


class Cell(NamedTuple):
    """The text of a cell, and the number by which the cell is sorted, or None if the cell contains no number."""

    text: str
    number: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table on the page.

    `name_place` is the index of the cell with the setting's name. `anchor` is the HTML id of the setting's details.
    """

    anchor: str
    name_place: int
    cells: list[Cell]
    winner: bool


class Plot(NamedTuple):
    """The title and the SVG text of a plot."""

    title: str
    svg: "Markup"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table of the page with its notes, plots and settings.

    `summary` is one sentence about the differences between settings. `measure` is the label of the y-axis of learning
    curves.
    """

    id: str
    title: str
    summary: str
    head: list[Head]
    rows: list[Row]
    notes: list[str]
    plots: list[Plot]
    measure: str
    settings: list[SettingDetails]


def page(tables: Sequence[Table], runs: Sequence[RunRecord], path: Path) -> None:
    """Write a comparison as one HTML file.

    Raises:
        ConfigError: the file name does not end in .html.
        ResourceError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"compare --html {path}: must end in .html")
    files.write(path, html(tables, runs).encode(errors="backslashreplace"))


def html(tables: Sequence[Table], runs: Sequence[RunRecord]) -> str:
    """Return the HTML text of the page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    style, script = (HERE.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    results = {str(run.path): run.result for run in runs if run.result}
    cards = _method_cards(results.values())
    sections = [_section(f"t{i}", table, runs, results, cards) for i, table in enumerate(tables)]
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_finalize
    )
    environment.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    template = environment.from_string(HERE.with_suffix(".html").read_text(encoding="utf-8"))
    return template.render(
        title=_title(tables),
        sections=sections,
        methods=cards,
        made=page_provenance(runs),
        counts=_counts(sections, runs),
        style=Markup(style),
        script=Markup(script),
        digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _finalize(value: object) -> object:
    """Return a value for the template. In text, all control characters except line ends are escaped."""
    return printable(value, keep="\n\t") if type(value) is str else value


def _title(tables: Iterable[Table]) -> str:
    names = list(dict.fromkeys(table.title.partition(";")[0] for table in tables if settings_of(table)))
    return ", ".join(names) or "no finished runs"


def _counts(sections: Sequence[Section], runs: Sequence[RunRecord]) -> str:
    """Return a line with the number of settings and the number of runs on the page."""
    settings = sum(len(section.settings) for section in sections)
    statuses = Counter(run.status for run in runs)
    listed = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    return f"{settings} settings from {len(runs)} runs" + (f" ({listed})" if listed else "")


def _section(
    anchor: str, table: Table, runs: Sequence[RunRecord], results: Mapping[str, Result], cards: Cards
) -> Section:
    """Return one table with its plots and settings."""
    settings = settings_of(table)
    summed_up = summary(settings)
    lines, measure = learning_curves(settings, results)
    anchors = [f"{anchor}s{i}" for i in range(len(settings))]
    return Section(
        id=anchor,
        title=table.title or "runs",
        summary=summed_up,
        head=[_head(title, settings) for title in table.head],
        rows=[_row(table, i, anchors[i] if settings else "") for i in range(len(table.rows))],
        notes=[note for note in table.notes if note != summed_up],
        plots=_plots(table, runs) if sum(not s.is_float for s in settings) > 1 else [],
        measure=MEASURES[measure],
        settings=[
            setting_details(own, setting, lines.get(setting.label, {}), results, cards)
            for own, setting in zip(anchors, settings, strict=True)
        ],
    )


def _head(title: str, settings: Iterable[Setting]) -> Head:
    numbers = any(_number(title, setting) is not None for setting in settings)
    return Head(title, numbers, numbers and title in BY_NAME and BY_NAME[title].descending)


def _row(table: Table, i: int, anchor: str) -> Row:
    """Return a row of the page. A row for missing runs contains the full reason why the runs are missing."""
    value, texts = table.values[i] if i < len(table.values) else None, table.rows[i]
    setting = value if isinstance(value, Setting) else None
    cells = []
    for title, text in zip(table.head, texts, strict=True):
        whole = value.reason if isinstance(value, MissingRuns) and title == "reason" and value.reason else text
        cells.append(Cell(whole, _number(title, setting) if setting else None))
    return Row(
        anchor=anchor,
        name_place=table.head.index("method") if "method" in table.head else 0,
        cells=cells,
        winner=bool(setting and setting.conclusion and setting.conclusion.winner),
    )


def _number(title: str, setting: Setting) -> float | None:
    """Return the number by which a setting's cell is sorted, or None if the cell has no finite number."""
    value = BY_NAME[title].key(setting) if title in BY_NAME else None
    return value if isinstance(value, int | float) and isfinite(value) else None


def _plots(table: Table, runs: Sequence[RunRecord]) -> list[Plot]:
    """Return the plots of one table as SVG in the page's colours."""
    figures = [(TITLES[kind], comparison_figure([table], runs, [kind], titled=False)) for kind in KINDS]
    return [
        Plot(title, _inline_svg(encoded(figure, "svg", **{"svg.fonttype": "none"}), title))
        for title, figure in figures
        if figure is not None
    ]


def _inline_svg(svg: bytes, label: str) -> "Markup":
    """Return matplotlib's SVG text for use inside a page.

    Ids are made unique. The header and the global style are removed.
    """
    from markupsafe import Markup, escape

    text = svg.decode()
    text = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :])
    (box,) = re.findall(r'<svg[^>]*?viewBox="([\d. -]+)"', text)
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">', text, count=1)
    text = re.sub(r'(<(?:g|text)) id="[^"]*"', r"\1", text).replace("xlink:href", "href")
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "sans-serif", text)
    return Markup(text.replace(INK, "currentColor").replace("#ffffff", "var(--page)"))


def _method_cards(results: Iterable[Result]) -> Cards:
    """Return the method cards, each under the HTML anchor of its method.

    If runs recorded different texts for a method, for example with several versions of qbench, there is one card per
    text.
    """
    cards: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        for name, card in result.card.items():
            cards.setdefault((name, repr(sorted(card.items()))), {"name": name} | card)
    ordered = sorted(cards.items(), key=lambda item: item[0])
    return {f"m{i}": {"choices": "", "deviations": ""} | card for i, (_, card) in enumerate(ordered)}
