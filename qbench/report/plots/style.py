"""How pictures of a comparison look: colours, points with their intervals, axes, legends."""

from collections.abc import Iterable, Sequence
from math import nan
from typing import Any, NamedTuple

from qbench.runs.history import SettingValues

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STARS = ("*", "H", "d", "8")
"""Of float networks."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
"""As many as have no divisor in common with the colours: 66 pairs."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)))
FILLS = ("full", "none", "left", "right", "bottom", "top")
INK, GREY = "#010203", "#7f7f7f"
"""INK is a black that can be told from others: the page puts its own text colour in its place."""
WIDTH, ACROSS, DPI, LINE = 10.0, 4, 150, 0.17
"""Inches, small panels side by side, dots an inch, inches of a line of text."""
FAR, GOOD = 15.0, 75.0
"""Points between figures from which on the axis is that of the error, where the best is at least good."""
TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 100)


class Style(NamedTuple):
    """How the points of a method look."""

    colour: str
    marker: str
    dash: Any


def points(
    panel: Any, x: Sequence[float], cells: Sequence[SettingValues], style: Style, fillstyle: str = "full"
) -> Any:
    """Draw cells as points with their intervals."""
    y = [cell["top1_mean"] for cell in cells]
    reach = [nan if cell["top1_half"] is None else cell["top1_half"] for cell in cells]
    look: dict[str, Any] = {"lw": 0.9, "elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8, "zorder": 3}
    look |= {"mec": "white", "mew": 0.4} if fillstyle == "full" else {"mew": 0.9, "mfc": style.colour}
    look |= {"fillstyle": fillstyle, "markerfacecoloralt": "white", "ms": 7 if style.marker in STARS else 5}
    return panel.errorbar(x, y, reach, color=style.colour, marker=style.marker, ls=style.dash, **look)


def accuracy(panel: Any, cells: Sequence[SettingValues], room: float = 0.06) -> str:
    """Scale the axis of accuracy to show all means, and intervals as far as these do not dwarf the means; name it."""
    means = [cell["top1_mean"] for cell in cells]
    most = 0.3 * (max(means) - min(means)) or 1.0
    reach = [min(cell["top1_half"] or 0.0, most) for cell in cells]
    low = max(0.0, min(m - half for m, half in zip(means, reach, strict=True)))
    high = min(100.0, max(m + half for m, half in zip(means, reach, strict=True)))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    if high - low < FAR or max(means) < GOOD:
        panel.set_ylim(low - 0.06 * (high - low), high + room * (high - low))
        return "test top-1 (%)"
    import numpy as np

    def scaled(top1: Any) -> Any:
        return -np.log(np.maximum(101 - top1, 1e-9))

    def back(value: Any) -> Any:
        return 101 - np.exp(-value)

    panel.set_yscale("function", functions=(scaled, back))
    length = scaled(high) - scaled(low)
    panel.set_ylim(back(scaled(low) - 0.06 * length), back(scaled(high) + room * length))
    panel.set_yticks([tick for tick in TICKS if low <= tick <= high])
    return "test top-1 (%), log of the error"


def log_axis(panel: Any, unit: str) -> None:
    """Make the axis of costs logarithmic."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.margins(x=0.12)
    low, high = panel.get_xlim()
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,)))
    panel.xaxis.set_major_formatter(EngFormatter(unit))
    panel.xaxis.set_minor_locator(NullLocator())


def finish(panel: Any, x: str, y: str) -> None:
    """Name the axes of a panel and make the rest of it quiet."""
    panel.set_xlabel(x, color=INK)
    panel.set_ylabel(y, color=INK)
    panel.tick_params(colors=INK, labelsize=7.5, length=2.5)
    panel.grid(axis="y", color=GREY, alpha=0.3, lw=0.5)
    panel.set_axisbelow(True)
    panel.patch.set_visible(False)
    panel.spines[["top", "right"]].set_visible(False)


def _columns(labels: Iterable[str]) -> int:
    return max(1, min(9, 150 // (9 + max(map(len, labels), default=0))))


def legend_rows(labels: set[str]) -> int:
    """Return how many lines a legend takes."""
    return -(-(len(labels) + 1) // _columns(labels))


def legend(figure: Any, handles: dict[str, Any]) -> None:
    """Put one legend under the panels, in as many columns as its longest label leaves room for."""
    shown = {(f" {label}" if label.startswith("_") else label): handle for label, handle in handles.items()}
    place = {"loc": "outside lower center", "ncols": _columns(shown), "frameon": False}
    figure.legend(list(shown.values()), list(shown), fontsize=7.5, labelcolor=INK, handlelength=2.6, **place)


def thin_out(figure: Any) -> None:
    """Remove names of front points that would touch the name of a better one."""
    figure.draw_without_rendering()
    gap = 10 * figure.dpi / 72
    for panel in (panel for place in figure.subfigs for panel in place.axes):
        kept: list[float] = []
        for text in reversed([text for text in panel.texts if text.get_gid() == "front"]):
            x = panel.transData.transform(text.xy)[0]
            if any(abs(x - other) < gap for other in kept):
                text.remove()
            else:
                kept.append(x)
