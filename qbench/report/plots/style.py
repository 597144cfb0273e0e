"""Defines the style of plots: colours, points with confidence intervals, axes and legends."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from qbench.report.comparison.setting import Setting
from qbench.report.tables.escape import printable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Dash = str | tuple[int, tuple[float, ...]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STARS = ("*", "H", "d", "8")
"""Markers of float networks."""
CARET_UP, CARET_DOWN = 6, 7
"""Matplotlib's numbers for the arrows that mark cut confidence intervals. Their tips are at the panel's edge."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
"""Markers of methods. Combinations of the 11 markers and 6 colours repeat only after 66 methods."""
DASHES: tuple[Dash, ...] = (
    "-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)),
)  # fmt: skip
FILLS = ("full", "none", "left", "right", "bottom", "top")
INK, GREY = "#010203", "#7f7f7f"
"""Colours of plots.

INK is a shade of black that nothing else uses, so that the HTML page can replace this colour by the page's text colour.
"""
WIDTH, ACROSS, DPI, LINE = 10.0, 4, 150, 0.17
"""Width of a plot in inches, number of small panels per row, dots per inch, and height of a text line in inches."""
FAR, GOOD = 15.0, 75.0
"""The accuracy axis is logarithmic if top-1 values span at least FAR points and the largest one is at least GOOD %."""
TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 100)


class Style(NamedTuple):
    """The colour and the shape of a method's points."""

    colour: str
    marker: str
    dash: Dash


def points(
    panel: "Axes", x: Sequence[float], settings: Sequence[Setting], style: Style, fillstyle: str = "full"
) -> "ErrorbarContainer":
    """Draw settings as points with 95 % confidence intervals."""
    y = [s.top1.mean for s in settings]
    halves = [s.top1.ci95_half or nan for s in settings]
    full = fillstyle == "full"
    return panel.errorbar(
        x, y, halves, color=style.colour, marker=style.marker, ls=style.dash, lw=0.9, elinewidth=0.8, capsize=1.8,
        capthick=0.8, zorder=3, mec="white" if full else None, mew=0.4 if full else 0.9,
        mfc=None if full else style.colour, fillstyle=fillstyle, markerfacecoloralt="white",
        ms=7 if style.marker in STARS else 5,
    )  # fmt: skip


def accuracy_axis(panel: "Axes", settings: Sequence[Setting], room: float = 0.06) -> str:
    """Scale the accuracy axis of a panel and return the label of the axis.

    The axis shows all means. Confidence intervals with a half-width of up to 30 % of the range of the means are shown
    completely. Longer intervals are cut off, because the means would otherwise be hard to distinguish.

    Args:
        panel: the panel.
        settings: the settings whose accuracies are drawn.
        room: free space above the highest point, as a fraction of the axis range.
    """
    means = [s.top1.mean for s in settings]
    longest = 0.3 * (max(means) - min(means)) or 1.0
    halves = [min(s.top1.ci95_half or 0.0, longest) for s in settings]
    low = max(0.0, min(m - half for m, half in zip(means, halves, strict=True)))
    high = min(100.0, max(m + half for m, half in zip(means, halves, strict=True)))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    label = _scale_axis(panel, low, high, room, log_error=high - low >= FAR and max(means) >= GOOD)
    _mark_cut_bars(panel)
    return label


def _scale_axis(panel: "Axes", low: float, high: float, room: float, *, log_error: bool) -> str:
    """Set the limits and the scale of the accuracy axis, and return the label of the axis."""
    if not log_error:
        panel.set_ylim(low - 0.06 * (high - low), high + room * (high - low))
        return "test top-1 (%)"
    panel.set_yscale("function", functions=(_log_error, _from_log_error))
    length = _log_error(high) - _log_error(low)
    bottom, top = _log_error(low) - 0.06 * length, _log_error(high) + room * length
    panel.set_ylim(float(_from_log_error(bottom)), float(_from_log_error(top)))
    panel.set_yticks([tick for tick in TICKS if low <= tick <= high])
    return "test top-1 (%), log scale of the error"


def _mark_cut_bars(panel: "Axes") -> None:
    """Draw an arrow at the edge of a panel where the edge cuts a confidence interval that `points` has drawn."""
    from matplotlib.container import ErrorbarContainer

    bottom, top = panel.get_ylim()
    for bars in panel.containers:
        assert isinstance(bars, ErrorbarContainer)
        for segment in bars.lines[2][0].get_segments():
            if not len(segment):  # a point without interval has no ends
                continue
            (x, low), (_, high) = segment
            look = {"color": bars.lines[0].get_color(), "ls": "", "ms": 5, "clip_on": False, "zorder": 5}
            if high > top:
                panel.plot(x, top, marker=CARET_UP, scalex=False, scaley=False, **look)
            if low < bottom:
                panel.plot(x, bottom, marker=CARET_DOWN, scalex=False, scaley=False, **look)


def _log_error(top1: "float | NDArray[np.floating]") -> "NDArray[np.floating]":
    """Return -log(101 - top1) for top-1 in percent.

    The error is increased by one point, so that the result is finite at 100 %.
    """
    import numpy as np

    return np.asarray(-np.log(np.maximum(101 - top1, 1e-9)))


def _from_log_error(value: "float | NDArray[np.floating]") -> "NDArray[np.floating]":
    import numpy as np

    return np.asarray(101 - np.exp(-value))


def log_axis(panel: "Axes", unit: str) -> None:
    """Make the x-axis logarithmic, and write its tick labels with SI prefixes and the unit."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.margins(x=0.12)
    low, high = panel.get_xlim()
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,)))
    panel.xaxis.set_major_formatter(EngFormatter(unit))
    panel.xaxis.set_minor_locator(NullLocator())


def finish(panel: "Axes", x_label: str, y_label: str) -> None:
    """Label the axes of a panel, and give light colours to its ticks, grid and frame."""
    panel.set_xlabel(x_label, color=INK)
    panel.set_ylabel(y_label, color=INK)
    panel.tick_params(colors=INK, labelsize=7.5, length=2.5)
    panel.grid(axis="y", color=GREY, alpha=0.3, lw=0.5)
    panel.set_axisbelow(True)
    panel.patch.set_visible(False)
    panel.spines[["top", "right"]].set_visible(False)


def _legend_columns(labels: Iterable[str]) -> int:
    """Return the number of legend columns that fit into a figure. It depends on the longest label."""
    return max(1, min(9, 150 // (9 + max(map(len, labels), default=0))))


def legend_rows(labels: set[str]) -> int:
    """Return the number of text lines of a legend with these labels."""
    return -(-(len(labels) + 1) // _legend_columns(labels))


def legend(figure: "Figure", handles: Mapping[str, "Artist | ErrorbarContainer"]) -> None:
    """Draw one legend for all panels, below the panels.

    A label that begins with `_` gets a leading space, because matplotlib hides labels that begin with `_`.
    """
    shown = {printable(label): handle for label, handle in handles.items()}
    # matplotlib's type hints do not contain the containers, although legends support them
    labelled: dict[str, Any] = {
        (f" {label}" if label.startswith("_") else label): handle for label, handle in shown.items()
    }
    place = {"loc": "outside lower center", "ncols": _legend_columns(labelled), "frameon": False}
    figure.legend(list(labelled.values()), list(labelled), fontsize=7.5, labelcolor=INK, handlelength=2.6, **place)
