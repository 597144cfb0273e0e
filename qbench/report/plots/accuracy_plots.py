"""Plots accuracy over bit widths and over cost."""

from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from qbench.bits import FLOAT
from qbench.report.comparison.setting import Setting
from qbench.report.plots import style as styling
from qbench.report.plots.plot_data import PlotData
from qbench.report.plots.style import DASHES, FILLS, GREY, INK, STARS, Style
from qbench.report.tables.escape import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

AXES = {"w": "weight bits W", "a": "activation bits A", "g": "gradient bits G"}
FRONT_LETTERS = 80
"""Number of letters that fit on a line below a panel of half the figure's width."""
SeriesKey = tuple[str, str]
"""The key of a line: the method's label, and the text of the widths that are not on the x-axis."""
COSTS: dict[str, tuple[str, str, Callable[[Setting], float]]] = {
    "size": ("size (bytes, log scale)", "B", lambda s: s.cost.bytes_ideal if s.cost else 0.0),
    "bitops": ("BitOps per image (log scale)", "", lambda s: float(s.cost.bitops) if s.cost else 0.0),
}
"""Maps a kind of cost to the axis label, the unit, and a function from a setting to its cost (0 if not known)."""


def bits(figure: "Figure", data: PlotData) -> None:
    """Plot accuracy over bit width.

    A line shows one method. One width changes along the x-axis, and the other two widths are fixed. Settings with float
    weights are in separate panels, whose x-axis is the width of activations or gradients.
    """
    series = bit_series(data.quantized)
    places = {
        key: sorted({s.bits._asdict()[key] for settings in lines.values() for s in settings})
        for key, lines in series.items()
    }
    ratios = {"width_ratios": [len(at) + 0.5 for at in places.values()]}
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False, gridspec_kw=ratios)[0]
    others = sorted({"", *(other for lines in series.values() for _, other in lines)})
    fills = dict(zip(others, FILLS * len(others), strict=False))
    handles: dict[str, Artist | ErrorbarContainer] = {}
    for panel, (key, lines) in zip(panels, series.items(), strict=True):
        handles |= _float_lines(panel, data.floats)
        for i, ((label, other), settings) in enumerate(lines.items()):
            # lines get different offsets at the same width, spread over 0.8 of the distance between two widths
            offset = 0.8 * ((i + 0.5) / len(lines) - 0.5)
            x = [places[key].index(s.bits._asdict()[key]) + offset for s in settings]
            handles[series_label(label, other)] = styling.points(
                panel, x, settings, data.styles[label], fillstyle=fills[other]
            )
        for i in range(0, len(places[key]), 2):
            panel.axvspan(i - 0.5, i + 0.5, color=GREY, alpha=0.08, lw=0, zorder=-1)
        panel.set_xlim(-0.5, len(places[key]) - 0.5)
        panel.set_xticks(range(len(places[key])), list(map(str, places[key])))
        y_label = styling.accuracy_axis(panel, [*data.quantized, *data.floats])
        styling.finish(panel, AXES[key], y_label if panel is panels[0] else "")
    styling.legend(figure, handles)


def bit_series(settings: Sequence[Setting]) -> dict[str, dict[SeriesKey, list[Setting]]]:
    """Return the settings of each line, by x-axis (w, a or g) and by line.

    The key of a line contains the fixed widths as text, such as "A2 G6". If a method has settings with several widths,
    and weights and activations always have equal widths, the text is "A=W".
    """
    lines: dict[str, dict[SeriesKey, list[Setting]]] = {}
    for label in dict.fromkeys(s.label for s in settings):
        members = sorted((s for s in settings if s.label == label), key=lambda s: s.bits)
        equal_widths = [s for s in members if s.bits.a == s.bits.w < FLOAT]
        for setting in members:
            w, a, g = setting.bits
            axis = "w" if w < FLOAT else "a" if a < FLOAT else "g"
            other = ["A=W" if a == w and len(equal_widths) > 1 else f"A{a}"] if axis == "w" and a < FLOAT else []
            other += [f"G{g}"] if axis != "g" and g < FLOAT else []
            lines.setdefault(axis, {}).setdefault((label, " ".join(other)), []).append(setting)
    return {axis: lines[axis] for axis in "wag" if axis in lines}


def series_label(label: str, other: str) -> str:
    """Return the legend text of a line. `other` is the text of the widths that are fixed on the line."""
    return f"{label}, {other}" if other else label


def _float_lines(panel: "Axes", floats: Sequence[Setting]) -> dict[str, "Artist"]:
    """Draw float networks as horizontal lines, with bands for confidence intervals. Return the legend's handles."""
    handles: dict[str, Artist] = {}
    for setting, dash in zip(floats, DASHES, strict=False):
        top1, half = setting.top1.mean, setting.top1.ci95_half
        handles[setting.label] = panel.axhline(top1, color=INK, ls=dash, lw=1, zorder=1)
        if half:
            panel.axhspan(top1 - half, top1 + half, color=GREY, alpha=0.15, lw=0, zorder=0)
    return handles


def pareto(figure: "Figure", data: PlotData) -> None:
    """Plot accuracy over size and accuracy over BitOps, each with its Pareto front."""
    stars = {s.label: Style(INK, STARS[i % len(STARS)], "") for i, s in enumerate(data.floats)}
    styles = stars | data.styles
    handles: dict[str, Artist | ErrorbarContainer] = {}
    everything = [*data.floats, *data.quantized]
    for panel, (key, (label, unit, cost)) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        settings = [s for s in everything if cost(s)]
        for name, style in styles.items():
            if members := [s for s in settings if s.label == name]:
                handles[name] = styling.points(panel, [cost(s) for s in members], members, style._replace(dash=""))
        _draw_front(panel, settings, cost)
        styling.log_axis(panel, unit)
        y_label = styling.accuracy_axis(panel, everything)
        x_label = "\n".join([label, *front_names(settings, cost)])
        styling.finish(panel, x_label, y_label if key == "size" else "")
    styling.legend(figure, handles)


def _draw_front(panel: "Axes", settings: Sequence[Setting], cost: Callable[[Setting], float]) -> None:
    """Draw the Pareto front as a line of steps. Each point on the front gets a ring and a number, counted from 1.

    Equal points share a ring, which gets all their numbers.
    """
    best = front(settings, cost)
    x, y = [cost(s) for s in best], [s.top1.mean for s in best]
    panel.step(x, y, where="post", color=INK, lw=0.9, alpha=0.6, zorder=1)
    panel.plot(x, y, "o", ms=9, mfc="none", mec=INK, mew=0.8, zorder=4)
    places: dict[tuple[float, float], list[str]] = {}
    for place, at in enumerate(zip(x, y, strict=True), 1):
        places.setdefault(at, []).append(str(place))
    for at, names in places.items():
        text = panel.annotate(
            ", ".join(names), at, (-4, 3), textcoords="offset points",
            fontsize=7, color=INK, weight="bold", ha="right", va="bottom",
        )  # fmt: skip
        text.set_in_layout(False)


def front(settings: Sequence[Setting], cost: Callable[[Setting], float]) -> list[Setting]:
    """Return the settings on the Pareto front of accuracy and cost, cheapest first."""
    known = [s for s in settings if cost(s)]
    return [known[i] for i in pareto_front([(cost(s), s.top1.mean) for s in known])]


def front_names(settings: Sequence[Setting], cost: Callable[[Setting], float]) -> list[str]:
    """Return lines of text that list the settings on the Pareto front with their numbers."""
    names = [s.label if s.is_float else f"{s.label} {s.short_widths}" for s in front(settings, cost)]
    # a no-break space keeps the parts of a name on one line
    listed = [f"{place} {printable(name)}".replace(" ", "\N{NO-BREAK SPACE}") for place, name in enumerate(names, 1)]
    return wrap(f"Pareto front: {', '.join(listed)}", FRONT_LETTERS) if names else []


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, accuracy) on the Pareto front, cheapest first.

    A point is on the front if no other point dominates it. Point p dominates point q if p is not worse than q in both
    cost and accuracy, and better in at least one of them. Equal points do not dominate each other.
    """
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1])):
        if not best or points[i][1] > points[best[-1]][1] or points[i] == points[best[-1]]:
            best.append(i)
    return best
