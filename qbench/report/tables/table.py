"""Formats tables for the terminal and as Markdown, CSV, JSON and LaTeX."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

from qbench.report.tables import escape

NUMBERS = frozenset("0123456789+-.±")
"""Characters with which the text of a number can begin."""


@runtime_checkable
class JsonRow(Protocol):
    """An object in `Table.values` that is converted to JSON when a table is written as JSON."""

    def to_json(self) -> dict[str, object]:
        """Return the object as values for JSON."""


@dataclass
class Table:
    """A table of text with a title, column heads, rows and notes.

    `values` contains the object behind each row, for JSON output and for sorting. The object is a value for JSON or a
    `JsonRow`.
    """

    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    values: list[object] = field(default_factory=list)
    title: str = ""
    notes: list[str] = field(default_factory=list)


def text(tables: Sequence[Table]) -> str:
    """Return tables as text for a terminal. Long rows are not wrapped."""
    lines: list[str] = []
    for i, table in enumerate(tables):
        lines += [""] if i else []
        lines += [escape.printable(table.title)] if table.title else []
        lines += _aligned(table) if table.rows else []
        lines += map(escape.printable, table.notes)
    return "\n".join(line.rstrip() for line in lines)


def _aligned(table: Table) -> list[str]:
    """Return the head and the rows of a table as lines. Columns are aligned and separated by two spaces."""
    columns = [[escape.printable(cell) for cell in column] for column in zip(table.head, *table.rows, strict=True)]
    padded = []
    for cells, numeric in zip(columns, numeric_columns(table), strict=True):
        widths = [len(cell) if cell.isascii() else _cell_width(cell) for cell in cells]
        spaces = [" " * (max(*widths, 1) - width) for width in widths]
        pairs = zip(cells, spaces, strict=True)
        padded.append([space + cell if numeric else cell + space for cell, space in pairs])
    return ["  ".join(row) for row in zip(*padded, strict=True)]


def _cell_width(text: str) -> int:
    """Return the width of a text in a terminal. Wide characters, such as Chinese ones, take two cells."""
    from rich.cells import cell_len

    return cell_len(text)


def markdown(tables: Sequence[Table], *, links: bool = False) -> str:
    """Return tables as GitHub Markdown. Links are escaped unless `links` is true."""
    parts, escaped = [], partial(escape.markdown, links=links)
    for table in tables:
        lines = [f"**{escaped(table.title)}**", ""] if table.title else []
        if table.rows:
            lines.append(_markdown_row(map(escaped, table.head)))
            lines.append(_markdown_row(["---:" if numeric else "---" for numeric in numeric_columns(table)]))
            lines += [_markdown_row(map(escaped, row)) for row in table.rows]
            lines += [""] if table.notes else []
        parts.append("\n".join([*lines, *(f"- {escaped(note)}" for note in table.notes)]))
    return "\n\n".join(parts)


def comma_separated(tables: Sequence[Table]) -> str:
    """Return all tables as one CSV text. The header contains the columns of all tables.

    The first column contains the title of the table. A row is empty in columns that its table does not have. In rows
    with a note, the first column contains `note`.
    """
    filled = [table for table in tables if table.rows]
    head = _all_columns([table.head for table in filled])
    lines = [["table", *head]]
    for table in filled:
        places = [head.index(name) for name in table.head]
        for row in table.rows:
            cells = dict(zip(places, row, strict=True))
            lines.append([table.title, *(cells.get(i, "") for i in range(len(head)))])
    lines += (["note", note] for table in tables for note in table.notes)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(escape.csv, line) for line in lines)
    return buffer.getvalue().rstrip("\n")


def _all_columns(heads: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of the columns of all tables. A column stays behind the column that precedes it in its table."""
    merged: list[str] = []
    for head in heads:
        place = 0 if set(head) & set(merged) else len(merged)
        for name in head:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged


def as_json(tables: Sequence[Table]) -> str:
    """Return JSON text with the title, rows and notes of every table. Rows contain numbers, not formatted text."""
    plain = [
        {"title": t.title, "rows": [v.to_json() if isinstance(v, JsonRow) else v for v in t.values], "notes": t.notes}
        for t in tables
    ]
    return json.dumps({"tables": plain}, indent=2, allow_nan=False)


def latex(tables: Sequence[Table]) -> str:
    """Return a LaTeX tabular environment for each table. The horizontal lines need the package booktabs."""
    parts = []
    for table in tables:
        lines = [escape.latex_comment(table.title)] if table.title else []
        if table.rows:
            columns = "".join("r" if numeric else "l" for numeric in numeric_columns(table))
            lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
            lines += [
                _latex_row(table.head),
                r"\midrule",
                *map(_latex_row, table.rows),
                r"\bottomrule",
                r"\end{tabular}",
            ]
        parts.append("\n".join([*lines, *map(escape.latex_comment, table.notes)]))
    return "\n\n".join(parts)


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "text": text,
    "md": markdown,
    "csv": comma_separated,
    "json": as_json,
    "latex": latex,
}


def numeric_columns(table: Table) -> list[bool]:
    """Return for each column whether it contains only numbers. Such columns are aligned right."""
    return [all(not cell or cell[0] in NUMBERS for cell in column) for column in zip(*table.rows, strict=True)]


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(escape.latex, cells)) + r" \\"
