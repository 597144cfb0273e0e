"""The columns of `qbench compare`: how a cell's plain values are shown, which go together, how rows are sorted."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.tables.table import Table

Values = dict[str, Any]

SETS = ("accuracy", "cost", "speed", "verification")
DEFAULT = ("accuracy", "cost")
EQUAL_BYTES, WITHIN = "equal-bytes", 0.05
"""Cells whose bytes are at most this part above the smallest one's share a group."""


class Column(NamedTuple):
    """`key` is sorted by, with `down` the larger first; `show` gives the cell where it has a value, `bare` stands for
    none.
    """

    name: str
    group: str
    key: Callable[[Values], Any]
    show: Callable[[Values], str]
    down: bool = False
    bare: str = "-"


def si_format(number: float, digits: int = 3, gap: str = " ") -> str:
    """Write a number with so many digits and a unit: 7.18 k."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.{digits}g}{gap}{unit}"
        number /= 1000
    raise AssertionError


def _plain(name: str, group: str, key: str, form: str, down: bool = False, bare: str = "-") -> Column:
    return Column(name, group, lambda v: v.get(key), lambda v: form.format(v[key]), down, bare)


def _unit(name: str, group: str, key: str, unit: str, down: bool = False) -> Column:
    return Column(name, group, lambda v: v.get(key), lambda v: f"{si_format(v[key])}{unit}".rstrip(), down)


def _width(name: str) -> Column:
    return Column(name, "", lambda v: v["bits"][name.lower()], lambda v: str(v["bits"][name.lower()]))


def _levels_found(values: Values) -> str:
    """Write how many levels the layers use of those allowed: `w 4 of 4, a 3-4 of 4`."""
    told = []
    for key, (least, most, allowed) in values["levels_found"].items():
        told.append(f"{key} {least if least == most else f'{least}-{most}'} of {allowed}")
    return ", ".join(told)


def _claim(values: Values) -> float | None:
    """Return what a claim is sorted by; one that is no top-1, or that nobody has a figure of, comes last of all."""
    if "paper_shown" not in values:
        return None
    top1: float | None = values["paper_top1"]
    return float("-inf") if top1 is None else top1


COLUMNS = (
    Column(EQUAL_BYTES, EQUAL_BYTES, lambda v: v.get("bytes_group"), lambda v: str(v["bytes_group"])),
    _plain("method", "", "method", "{}"),
    *map(_width, "WAG"),
    _plain("levels", "cost", "levels", "{}"),
    _plain("bits/weight", "cost", "bits_per_weight", "{:.2f}"),
    _plain("top-1 %", "accuracy", "top1_mean", "{:.2f}", down=True),
    _plain("std", "accuracy", "top1_std", "{:.2f}", bare="no spread"),
    _plain("n", "accuracy", "n", "{}", down=True),
    _plain("95 %", "accuracy", "top1_half", "±{:.2f}", bare=""),
    _plain("diff", "accuracy", "diff_mean", "{:+.2f}", down=True),
    _plain("diff 95 %", "accuracy", "diff_half", "±{:.2f}", bare=""),
    Column("paper", "paper", _claim, lambda v: v["paper_shown"], down=True, bare=""),
    _plain("gap", "paper", "paper_gap", "{:+.2f}", down=True, bare=""),
    _plain("ran by", "paper", "paper_ran_by", "{}", bare=""),
    _unit("size", "cost", "bytes", "B"),
    _unit("BitOps", "cost", "bitops", ""),
    _unit("images/s", "speed", "images_per_second", "", down=True),
    _plain("s/epoch", "speed", "seconds_per_epoch", "{:.3g}"),
    _unit("peak", "speed", "peak_bytes", "B"),
    _plain("verified layers", "verification", "verified_layers", "{}", down=True),
    Column("levels found", "verification", lambda v: v.get("levels_found") or None, _levels_found),
)


def chosen(groups: Iterable[str]) -> list[Column]:
    """Return the columns of some sets, with those that name a row, in their one order."""
    return [column for column in COLUMNS if column.group in ("", *groups)]


HEAD = tuple(column.name for column in chosen(DEFAULT))


def show(table: Table, columns: Sequence[Column]) -> None:
    """Write a table's head and rows anew from its values."""
    table.head = tuple(column.name for column in columns)
    table.rows = [
        tuple(c.bare if c.key(values) is None else c.show(values) for c in columns) for values in table.values
    ]


def sort(table: Table, by: str) -> None:
    """Sort a table's values by a column, the best first and what has no value last; or by accuracy at equal bytes.

    Raises:
        ConfigError: no such column.
    """
    if by == EQUAL_BYTES:
        _group_by_bytes(table.values)
        table.values.sort(key=lambda v: (v["bytes_group"] or float("inf"), -v["top1_mean"], v["method"]))
        return
    column = _named(by)
    with_value = [values for values in table.values if column.key(values) is not None]
    without = [values for values in table.values if column.key(values) is None]
    table.values = sorted(with_value, key=column.key, reverse=column.down) + without


def _named(name: str) -> Column:
    known = {column.name.lower().removesuffix(" %"): column for column in COLUMNS if column.group != EQUAL_BYTES}
    known |= {"95": known["95"], "accuracy": known["top-1"], "bytes": known["size"]}
    found = known.get(name.lower().removesuffix(" %"))
    if found is None:
        allowed = (EQUAL_BYTES, *known)
        hint = did_you_mean(name, allowed)
        raise ConfigError(f"compare --sort {name}: no such column{hint}\nallowed: {', '.join(allowed)}")
    return found


def _group_by_bytes(rows: Iterable[Values]) -> None:
    """Number groups of cells of about equal bytes, the smallest first; what has no bytes has no group."""
    group, least = 0, 0.0
    for values in sorted(rows, key=lambda v: v["bytes"] or 0):
        if values["bytes"] is not None and (not group or values["bytes"] > least * (1 + WITHIN)):
            group, least = group + 1, values["bytes"]
        values["bytes_group"] = group if values["bytes"] is not None else None
