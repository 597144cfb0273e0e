"""Implements `qbench compare`: reads the options, then filters, sorts and formats the tables."""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qbench.cli import parsers
from qbench.cli.parsers import RECORD
from qbench.errors import ConfigError
from qbench.report.comparison import columns
from qbench.report.comparison.compare import compare
from qbench.report.comparison.filters import select_runs
from qbench.report.comparison.pairs import conclude
from qbench.report.comparison.setting_table import find_column, sorted_by, with_columns
from qbench.report.comparison.speed_notes import speed_notes
from qbench.report.comparison.verdicts import MARGIN
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.reader import RunRecord, dump_records, read


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """A parsed command line of `qbench compare`.

    `where` contains the filters. It maps a key to the values that are kept.
    """

    directories: tuple[str, ...]
    where: Mapping[str, list[str]] = field(default_factory=dict)
    by: tuple[str, ...] = ()
    sort: str = ""
    columns: tuple[str, ...] = columns.DEFAULT
    margin: float = MARGIN
    published: bool = False
    format: str = "text"
    plots: tuple[Path, ...] = ()
    pages: tuple[Path, ...] = ()


def run_compare(arguments: Iterable[str]) -> str:
    """Return the text that `qbench compare PLACE... [flags] [KEY=VALUE ...]` prints.

    Plots and an HTML page are written to files if flags request them.

    Raises:
        ConfigError: a flag, key or value does not exist, or no directory of runs is typed.
    """
    options = parse(arguments)
    made, runs = build_tables(options)
    write_files(options, made, runs)
    if options.format == RECORD:
        return dump_records(runs)
    return "no runs found" if options.format == "text" and not made else FORMATS[options.format](made)


def parse(arguments: Iterable[str]) -> CompareOptions:
    """Parse a command line of `qbench compare`.

    Keys and values are checked against the runs later, by `build_tables`.
    """
    words, flags = parsers.compare().parse_words(arguments)
    if "sort" in flags:
        sorted_by(Table(()), flags["sort"])
        if flags["sort"] != columns.EQUAL_BYTES and not flags.get("published"):
            column = find_column(flags["sort"])
            if column.group == columns.PUBLISHED:
                raise ConfigError(f"--sort {column.name}: only with --published are there such values; add --published")
    directories, where = [], dict[str, list[str]]()
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not os.path.exists(word):
            where.setdefault(key, []).extend(_split(value))
        else:
            directories.append(word)
    return CompareOptions(directories=tuple(directories), where=where, **flags)


def _split(value: str) -> list[str]:
    """Split a text at its commas, except at commas inside brackets."""
    return re.split(r",(?![^\[]*\])", value)


def write_files(options: CompareOptions, made: list[Table], runs: list[RunRecord]) -> None:
    """Write the plots and HTML pages that the options request."""
    for path in options.plots:
        print(f"writing {path} ...", file=sys.stderr, flush=True)
        from qbench.report.plots.plots import plot

        plot(made, runs, path)
        print(f"wrote {path}", file=sys.stderr)
    for path in options.pages:
        print(f"writing {path} ...", file=sys.stderr, flush=True)
        from qbench.report.html.page import page

        page(made, runs, path)
        print(f"wrote {path}", file=sys.stderr)


def tables(options: CompareOptions) -> list[Table]:
    """Return the tables that a command line requests, with notes on significant differences."""
    return build_tables(options)[0]


def build_tables(options: CompareOptions, others: Sequence[RunRecord] = ()) -> tuple[list[Table], list[RunRecord]]:
    """Return the tables for these options, and the compared runs. Notes of tables state significant differences.

    Args:
        others: further runs to compare, in addition to the runs in the directories.

    Raises:
        ConfigError: a key or value does not exist, or there are neither directories nor other runs.
    """
    if not options.directories and not others:
        raise ConfigError("compare needs a directory of runs, such as: qbench compare outputs")
    found = read(options.directories)
    paths = {run.path for run in found}
    found += [run for run in others if run.path not in paths]
    runs, notes = select_runs(found, options.where, options.by)
    hits = {str(run.path): run.hits for run in runs if run.hits}
    made = conclude(compare(runs, options.by), options.margin, hits)
    if options.published:
        from qbench.papers.matching import with_published

        made = with_published(made)
    if "speed" in options.columns:
        made = [replace(table, notes=[*table.notes, *speed_notes(table)]) for table in made]
    made = [_arranged(table, options) for table in made]
    if made and notes:
        made[-1] = replace(made[-1], notes=[*made[-1].notes, *notes])
    return made, runs


def _arranged(table: Table, options: CompareOptions) -> Table:
    """Return the table with its rows sorted and with only the chosen columns."""
    groups = [*options.columns, *([columns.PUBLISHED] if options.published else [])]
    groups += [columns.EQUAL_BYTES] if options.sort == columns.EQUAL_BYTES else []
    ordered = sorted_by(table, options.sort) if options.sort else table
    return with_columns(ordered, columns.columns_in(groups))
