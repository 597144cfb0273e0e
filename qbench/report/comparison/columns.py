"""Defines the columns of `qbench compare`: how values are shown, grouped and sorted."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from qbench.report.comparison.setting import Setting
from qbench.report.tables.units import si_format

SETS = ("accuracy", "control", "cost", "speed", "verification")
DEFAULT = ("accuracy", "cost")
EQUAL_BYTES = "equal-bytes"
PUBLISHED = "published"


class Column(NamedTuple):
    """A column of a table of settings.

    `key` returns the sort value of a row, or None for a row without a value. With `descending`, the largest value comes
    first. `show` returns the text of a cell with a value. `empty` is the text of a cell without a value. An `optional`
    column is left out of a table in which no setting has a value.
    """

    name: str
    group: str
    key: Callable[[Setting], float | str | None]
    show: Callable[[Setting], str]
    descending: bool = False
    empty: str = "-"
    optional: bool = False

    def cell(self, setting: Setting) -> str:
        """Return the text of a setting's cell."""
        return self.empty if self.key(setting) is None else self.show(setting)


def _column(
    name: str,
    group: str,
    key: Callable[[Setting], float | None],
    form: str = "{}",
    *,
    descending: bool = False,
    empty: str = "-",
) -> Column:
    """Return a column of numbers with the format `form`."""
    return Column(name, group, key, lambda s: form.format(key(s)), descending, empty)


def _si_column(
    name: str, group: str, key: Callable[[Setting], float | None], unit: str = "", *, descending: bool = False
) -> Column:
    """Return a column of numbers with three digits and an SI prefix."""

    def show(setting: Setting) -> str:
        return f"{si_format(key(setting) or 0)}{unit}".rstrip()

    return Column(name, group, key, show, descending)


def _half_width(half: float | None) -> str:
    """Return the half-width of an interval as text.

    If all seeds have the same value, the result is `-`, because equal values do not show how much accuracy varies
    between seeds in general.
    """
    return f"±{half:.2f}" if half else "-"


def _levels_found(setting: Setting) -> str | None:
    """Return how many of the allowed levels the layers use, such as `w 4 of 4, a 3-16 of 4-16`."""
    if setting.verified is None or not setting.verified.found:
        return None
    return ", ".join(
        f"{key} {_span(levels.fewest, levels.most)} of {_span(levels.fewest_allowed, levels.allowed)}"
        for key, levels in setting.verified.found.items()
    )


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"


def _published_key(setting: Setting) -> float | None:
    """Return the published top-1 in percent, which is the sort value of the column.

    A published result without a known top-1 is sorted after all other published results.
    """
    if not setting.published:
        return None
    top1 = setting.published[0].top1
    return float("-inf") if top1 is None else top1


def _published_gap(setting: Setting) -> float | None:
    return setting.published[0].gap if setting.published else None


COLUMNS = (
    Column(EQUAL_BYTES, EQUAL_BYTES, lambda s: s.bytes_group, lambda s: str(s.bytes_group)),
    Column("method", "", lambda s: s.label, lambda s: s.label),
    Column("W", "", lambda s: s.bits.w, lambda s: str(s.bits.w)),
    Column("A", "", lambda s: s.bits.a, lambda s: str(s.bits.a)),
    Column("G", "", lambda s: s.bits.g, lambda s: str(s.bits.g)),
    _column("levels", "cost", lambda s: s.levels),
    _column("bits/weight", "cost", lambda s: s.cost.bits_per_weight if s.cost else None, "{:.2f}"),
    _column("top-1 %", "accuracy", lambda s: s.top1.mean, "{:.2f}", descending=True),
    _column("std", "accuracy", lambda s: s.top1.std, "{:.2f}"),
    _column("n", "accuracy", lambda s: s.top1.n, descending=True),
    Column("95 % CI", "accuracy", lambda s: s.top1.ci95_half, lambda s: _half_width(s.top1.ci95_half), empty=""),
    _column("diff", "accuracy", lambda s: s.difference.mean if s.difference else None, "{:+.2f}", descending=True),
    Column(
        "diff 95 % CI", "accuracy", lambda s: s.difference.ci95_half if s.difference else None,
        lambda s: _half_width(s.difference.ci95_half if s.difference else None), empty="",
    ),
    _column(
        "over float", "control", lambda s: s.over_control.mean if s.over_control else None, "{:+.2f}", descending=True
    ),
    Column(
        "over float 95 % CI", "control", lambda s: s.over_control.ci95_half if s.over_control else None,
        lambda s: _half_width(s.over_control.ci95_half if s.over_control else None), empty="",
    ),
    Column(PUBLISHED, PUBLISHED, _published_key, lambda s: s.published[0].text if s.published else "", True, ""),
    _column("gap", PUBLISHED, _published_gap, "{:+.2f}", descending=True, empty=""),
    Column(
        "ran by", PUBLISHED, lambda s: s.published[0].ran_by if s.published else None,
        lambda s: s.published[0].ran_by if s.published else "", empty="",
    ),
    _si_column("size", "cost", lambda s: s.cost.bytes_ideal if s.cost else None, "B"),
    _si_column("file", "cost", lambda s: s.file_bytes, "B")._replace(optional=True),
    _si_column("BitOps", "cost", lambda s: s.cost.bitops if s.cost else None),
    _si_column("images/s", "speed", lambda s: s.speed.images_per_second or None if s.speed else None, descending=True),
    _column("s/epoch", "speed", lambda s: s.speed.seconds_per_epoch or None if s.speed else None, "{:.3g}"),
    _si_column("peak memory", "speed", lambda s: s.speed.peak_bytes if s.speed else None, "B"),
    _column("verified layers", "verification", lambda s: s.verified.layers if s.verified else None, descending=True),
    Column("levels found", "verification", _levels_found, lambda s: _levels_found(s) or ""),
)  # fmt: skip


def columns_in(groups: Iterable[str]) -> list[Column]:
    """Return the columns method, W, A and G, and the columns of the given groups, in the order of `COLUMNS`."""
    return [column for column in COLUMNS if column.group in ("", *groups)]


HEAD = tuple(column.name for column in columns_in(DEFAULT) if not column.optional)
