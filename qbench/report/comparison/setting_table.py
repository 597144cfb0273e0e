"""Selects the columns of tables of settings, sorts the rows, and groups settings of about equal size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.comparison.columns import COLUMNS, EQUAL_BYTES, Column
from qbench.report.comparison.setting import Setting
from qbench.report.tables.table import Table

BYTES_TOLERANCE = 0.05
"""Largest difference in bytes between a setting and the smallest setting of its group.

The difference is a fraction of the bytes of the smallest setting.
"""


@dataclass(frozen=True, kw_only=True)
class MissingRuns:
    """A row of the table of missing results. The row contains all runs that have no result for the same reason."""

    status: str
    runs: tuple[str, ...]
    reason: str

    def to_json(self) -> dict[str, object]:
        """Return the row as values for JSON."""
        return {"status": self.status, "runs": list(self.runs), "reason": self.reason}


def settings_of(table: Table) -> list[Setting]:
    """Return the settings of a table in the order of its rows. The list is empty if the rows are not settings."""
    return [value for value in table.values if isinstance(value, Setting)]


def with_columns(table: Table, columns: Sequence[Column]) -> Table:
    """Return a table of settings with the given columns. Other kinds of tables are returned unchanged.

    Optional columns are left out if no setting has a value.
    """
    settings = settings_of(table)
    if not settings:
        return table
    columns = [c for c in columns if not c.optional or any(c.key(setting) is not None for setting in settings)]
    rows = [tuple(column.cell(setting) for column in columns) for setting in settings]
    return replace(table, head=tuple(column.name for column in columns), rows=rows)


def sorted_by(table: Table, name: str) -> Table:
    """Return a table sorted by a column, or by accuracy within groups of equal bytes.

    The best settings come first, and settings without a value come last. The function sorts only `values` of the table.
    Call `with_columns` afterwards to update `rows`.

    Raises:
        ConfigError: no such column.
    """
    settings = settings_of(table)
    if name == EQUAL_BYTES:
        grouped = group_by_bytes(settings)
        grouped.sort(key=lambda s: (s.bytes_group or float("inf"), -s.top1.mean, s.label))
        return replace(table, values=[*grouped]) if grouped else table
    column = find_column(name)
    keyed = [(column.key(setting), setting) for setting in settings]
    present = [(key, setting) for key, setting in keyed if key is not None]
    present.sort(key=lambda pair: pair[0], reverse=column.descending)
    absent = [setting for key, setting in keyed if key is None]
    return replace(table, values=[*(setting for _, setting in present), *absent]) if settings else table


def find_column(name: str) -> Column:
    """Return the column with a typed name. Upper and lower case are equal, and the unit may be left out.

    Raises:
        ConfigError: no such column.
    """
    known = {column.name.lower().removesuffix(" %"): column for column in COLUMNS if column.group != EQUAL_BYTES}
    known |= {"95 %": known["95 % ci"], "accuracy": known["top-1"], "bytes": known["size"]}
    lowered = name.lower()
    column = known.get(lowered) or known.get(lowered.removesuffix(" %"))
    if column is None:
        allowed = (EQUAL_BYTES, *known)
        hint = did_you_mean(name, allowed)
        raise ConfigError(f"compare --sort {name}: no such column{hint}\nallowed: {', '.join(allowed)}")
    return column


def group_by_bytes(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings sorted by size. Settings of about equal size get the same group number.

    A setting without a cost has no group.
    """
    group, smallest = 0, 0.0
    grouped = []
    for setting in sorted(settings, key=lambda s: s.cost.bytes_ideal if s.cost else 0.0):
        if setting.cost is None:
            grouped.append(replace(setting, bytes_group=None))
            continue
        if not group or setting.cost.bytes_ideal > smallest * (1 + BYTES_TOLERANCE):
            group, smallest = group + 1, setting.cost.bytes_ideal
        grouped.append(replace(setting, bytes_group=group))
    return grouped
