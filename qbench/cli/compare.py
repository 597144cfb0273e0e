"""What a command line of `qbench compare` asks for, and the answer: filters, columns, order, format."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.comparison import columns
from qbench.report.comparison.compare import compare
from qbench.report.comparison.filters import select_runs
from qbench.report.comparison.pairs import conclude
from qbench.report.comparison.setting_table import sorted_by, with_columns
from qbench.report.comparison.verdicts import MARGIN
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.reader import RunRecord, dump_records, read

VALUED = ("--by", "--sort", "--columns", "--margin", "--format", "--plot", "--html")
FLAGS = (*VALUED, "--published")
RECORD = "record"
"""A format beside those of tables: the runs themselves in one small file, which `qbench compare` reads again."""


@dataclass(kw_only=True)
class CompareOptions:
    """A command line, read. `where`: key -> the values allowed, as typed."""

    directories: list[str] = field(default_factory=list)
    where: dict[str, list[str]] = field(default_factory=dict)
    by: list[str] = field(default_factory=list)
    sort: str = ""
    columns: list[str] = field(default_factory=lambda: list(columns.DEFAULT))
    margin: float = MARGIN
    published: bool = False
    form: str = "text"
    plots: list[Path] = field(default_factory=list)
    pages: list[Path] = field(default_factory=list)


def run_compare(arguments: Iterable[str]) -> str:
    """Return what `qbench compare DIR... [flags] [KEY=VALUE ...]` prints.

    Raises:
        ConfigError: a flag, key or value that does not exist, or no directory.
    """
    asked = parse(arguments)
    made, found = build_tables(asked)
    for path in asked.plots:
        from qbench.report.plots.plots import plot

        plot(made, found, path)
    for path in asked.pages:
        from qbench.report.html.page import page

        page(made, found, path)
    if asked.form == RECORD:
        return dump_records(found)
    return "no runs there" if asked.form == "text" and not made else FORMATS[asked.form](made)


def parse(arguments: Iterable[str]) -> CompareOptions:
    """Read a command line; keys are held against the runs by `tables`."""
    asked, words = CompareOptions(), iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if word == "--published":
            asked.published = True
        elif flag in VALUED:
            _put(asked, flag, value if equals else next(words, ""))
        elif word.startswith("-"):
            raise ConfigError(f"compare: no such flag: {word}{did_you_mean(flag, FLAGS)}\nallowed: {', '.join(FLAGS)}")
        elif equals and not os.path.exists(word):
            asked.where.setdefault(flag, []).extend(_split(value))
        else:
            asked.directories.append(word)
    if not asked.directories:
        raise ConfigError("compare wants directories of runs: qbench compare outputs")
    return asked


def _put(asked: CompareOptions, flag: str, value: str) -> None:
    """Read a flag's value."""
    known: dict[str, Sequence[str]] = {"--columns": columns.SETS, "--format": (*FORMATS, RECORD)}
    listed = [part for part in value.split(",") if part]
    if not listed:
        raise ConfigError(f"compare {flag} wants a value")
    for part in listed if flag == "--columns" else [value]:
        if flag in known and part not in known[flag]:
            hint = did_you_mean(part, known[flag])
            raise ConfigError(f"compare {flag} {part}{hint}\nallowed: {', '.join(known[flag])}")
    if flag == "--margin":
        asked.margin = margin_of("compare", value)
    elif flag == "--format":
        asked.form = value
    elif flag == "--sort":
        asked.sort = value
        sorted_by(Table(()), value)
    elif flag == "--by":
        asked.by = listed
    elif flag in ("--plot", "--html"):
        (asked.plots if flag == "--plot" else asked.pages).append(Path(value))
    else:
        asked.columns = listed


def margin_of(verb: str, value: str) -> float:
    """Return the points that a `--margin` names."""
    try:
        margin = float(value)
    except ValueError:
        margin = 0.0
    if not 0 < margin <= 100:
        raise ConfigError(f"{verb} --margin {value}: allowed is a number of points of top-1 above 0, such as 0.5")
    return margin


def _split(value: str) -> list[str]:
    """Return the parts of a comma list; commas in brackets part nothing."""
    return re.split(r",(?![^\[]*\])", value)


def tables(asked: CompareOptions) -> list[Table]:
    """Return the tables that a command line asks for, with conclusions."""
    return build_tables(asked)[0]


def build_tables(options: CompareOptions) -> tuple[list[Table], list[RunRecord]]:
    """Return the tables for these options, with conclusions, and the runs that they were made from."""
    runs, notes = select_runs(read(options.directories), options.where, options.by)
    made = conclude(compare(runs, options.by), options.margin)
    if options.published:
        from qbench.papers.matching import with_published

        made = with_published(made)
    made = [_arranged(table, options) for table in made]
    if made and notes:
        made[-1] = replace(made[-1], notes=[*made[-1].notes, *notes])
    return made, runs


def _arranged(table: Table, options: CompareOptions) -> Table:
    """Return a table with its rows sorted and its columns chosen."""
    groups = [*options.columns, *([columns.PUBLISHED] if options.published else [])]
    groups += [columns.EQUAL_BYTES] if options.sort == columns.EQUAL_BYTES else []
    ordered = sorted_by(table, options.sort) if options.sort else table
    return with_columns(ordered, columns.columns_in(groups))
