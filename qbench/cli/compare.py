"""`qbench compare`: options, and the text that is printed: filters, columns, order, format."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qbench.cli import parsers
from qbench.cli.parsers import RECORD
from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.comparison import naming
from qbench.report.comparison.compare import compare
from qbench.report.comparison.pairs import MARGIN, conclude
from qbench.report.tables import columns
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.reader import DONE, RunRecord, dump_records, read

MOST = 20
"""Values that a message names."""
DIRECTORY = re.compile(r"(?P<method>[^/]+)-(?P<bits>w\d+a\d+g\d+)-s(?P<seed>\d+)-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """A command line of `qbench compare`. `where`: key -> the values allowed, as typed."""

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
    """Return what `qbench compare PLACE... [flags] [KEY=VALUE ...]` prints; write its plots and pages.

    Raises:
        ConfigError: a flag, key or value that does not exist, or no directory.
    """
    options = parse(arguments)
    made, runs = build_tables(options)
    for path in options.plots:
        from qbench.report.plots.plots import plot

        plot(made, runs, path)
    for path in options.pages:
        from qbench.report.html.page import page

        page(made, runs, path)
    if options.format == RECORD:
        return dump_records(runs)
    return "no runs there" if options.format == "text" and not made else FORMATS[options.format](made)


def parse(arguments: Iterable[str]) -> CompareOptions:
    """Read a command line of `qbench compare`; `build_tables` checks keys and values against the runs."""
    words, flags = parsers.compare().parse_words(arguments)
    if "sort" in flags:
        columns.sort(Table(()), flags["sort"])
    directories, where = [], dict[str, list[str]]()
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not os.path.exists(word):
            where.setdefault(key, []).extend(_split(value))
        else:
            directories.append(word)
    if not directories:
        raise ConfigError("compare wants directories of runs: qbench compare outputs")
    return CompareOptions(directories=tuple(directories), where=where, **flags)


def _split(value: str) -> list[str]:
    """Return the parts of a comma list; commas in brackets part nothing."""
    return re.split(r",(?![^\[]*\])", value)


def tables(asked: CompareOptions) -> list[Table]:
    """Return the tables that a command line asks for, with what may be concluded."""
    return build_tables(asked)[0]


def build_tables(asked: CompareOptions) -> tuple[list[Table], list[RunRecord]]:
    """Return the tables that a command line asks for, and the runs they tell of."""
    found, notes = read(asked.directories), list[str]()
    if found and (asked.where or asked.by):
        own = {id(run): naming.facts(run.result) for run in found if run.result is not None}
        known = set().union(*own.values())
        for key in (*asked.where, *asked.by):
            if known and key not in known:
                raise ConfigError(_no_key(key, known))
        notes = _missing(asked.where, found, own)
        found = _filtered(found, asked.where, own)
    made = compare(found, asked.by)
    conclude(made, asked.margin)
    if asked.published:
        from qbench.papers.matching import publish

        publish(made)
    _arrange(made, asked)
    if made:
        made[-1].notes += notes
    return made, list(found)


def _arrange(made: Sequence[Table], asked: CompareOptions) -> None:
    groups = [*asked.columns, *(["paper"] if asked.published else [])]
    groups += [columns.EQUAL_BYTES] if asked.sort == columns.EQUAL_BYTES else []
    for table in made:
        if table.values and "top1_mean" in table.values[0]:
            if asked.sort:
                columns.sort(table, asked.sort)
            columns.show(table, columns.chosen(groups))


def _no_key(key: str, known: Iterable[str]) -> str:
    short = sorted(name for name in known if "." not in name)
    return (
        f"compare {key}: no run has this key{did_you_mean(key, known)}\nallowed: {', '.join(short)} and keys below them"
    )


def _missing(
    where: Mapping[str, Sequence[str]], found: Sequence[RunRecord], facts: Mapping[int, Mapping[str, str]]
) -> list[str]:
    """Return a note on every value that no run has.

    Raises:
        ConfigError: no run has any of those typed for a key.
    """
    every = [facts.get(id(run)) or _by_name(run) for run in found]
    notes = []
    for key, values in where.items():
        there = [own[key] for own in every if key in own]
        absent = [value for value in values if there and not any(_is(key, own, value) for own in there)]
        if absent == values:
            known = sorted({str(json.loads(own)) for own in there}, key=lambda v: (v.isdecimal() and int(v), v))
            hint = "" if values[0].isdecimal() else did_you_mean(values[0], known)
            shown = ", ".join(known[:MOST]) + (f" and {len(known) - MOST} more" if len(known) > MOST else "")
            raise ConfigError(f"compare {key}={','.join(values)}: no run has it{hint}\nthere are: {shown}")
        notes += [f"no run has {key}={value}" for value in absent]
    return notes


def _filtered(
    found: Sequence[RunRecord], where: Mapping[str, Sequence[str]], facts: Mapping[int, Mapping[str, str]]
) -> list[RunRecord]:
    """Return the runs that match, and the float parents of those: they are what differences are to.

    Of a run without a result its directory's name tells method, widths and seed; it is left out where those do not
    match, and stays where they do or the name says nothing.
    """
    kept = [run for run in found if _matches(facts.get(id(run)) or _by_name(run), where, run.result is None)]
    wanted = {_place(r.result.baseline.run) for r in kept if r.result and r.result.baseline}
    chosen = {id(run) for run in kept}
    parents = [r for r in found if r.result and r.status == DONE and naming.is_parent(r.result)]
    chosen |= {id(run) for run in parents if _place(str(run.path)) in wanted}
    return [run for run in found if id(run) in chosen]


def _place(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _by_name(run: RunRecord) -> dict[str, str]:
    match = DIRECTORY.fullmatch(run.path.name)
    if not match:
        return {}
    widths = dict(re.findall(r"([wag])(\d+)", match["bits"]))
    named = {"method": json.dumps(match["method"]), "bits": json.dumps(match["bits"]), "seed": match["seed"]}
    return named | {f"bits.{key}": width for key, width in widths.items()}


def _matches(own: Mapping[str, str], where: Mapping[str, Sequence[str]], lenient: bool) -> bool:
    """Whether a run has one of the values allowed for every key; with `lenient` one that is not known matches."""
    for key, allowed in where.items():
        if key not in own:
            if not lenient:
                return False
        elif not any(_is(key, own[key], value) for value in allowed):
            return False
    return True


def _is(key: str, own: str, typed: str) -> bool:
    """Whether a value, as JSON, is what was typed: 0.001 is 1e-3, w2a2 are widths of w2a2g32."""
    value = json.loads(own)
    if isinstance(value, str):
        return value == typed or (key == "bits" and bool(typed) and set(_widths(typed)) <= set(_widths(value)))
    if isinstance(value, bool) or value is None:
        return typed.lower() in (own, {"null": "none"}.get(own))
    try:
        return bool(json.loads(typed) == value)
    except ValueError:
        return typed == own


def _widths(text: str) -> list[str]:
    return re.findall(r"[wag]\d+", text)
