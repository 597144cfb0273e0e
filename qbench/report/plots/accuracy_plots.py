"""Plots accuracy over bit widths and over cost."""

from collections.abc import Callable, Sequence

from qbench.bits import FLOAT
from qbench.report.comparison.setting import Setting
from qbench.report.plots import style as styling
from qbench.report.plots.plot_data import PlotData
from qbench.report.plots.style import DASHES, FILLS, GREY, INK, STARS, Artist, Axes, Figure, Style
from qbench.report.tables.escape import printable

AXES = {"w": "weight bits W", "a": "activation bits A", "g": "gradient bits G"}
SeriesKey = tuple[str, str]
"""The key of one line: the method's label, and the widths that are not on the x-axis, as text."""
COSTS: dict[str, tuple[str, str, Callable[[Setting], float]]] = {
    "size": ("size (bytes, log scale)", "B", lambda s: s.cost.bytes_ideal if s.cost else 0.0),
    "bitops": ("BitOps per image (log scale)", "", lambda s: float(s.cost.bitops) if s.cost else 0.0),
}
"""Maps a cost to its axis label, its unit, and the function that returns this cost for a setting (0 if not known)."""


def bits(figure: Figure, data: PlotData) -> None:
    """Draw accuracy over bit width.

    A line shows one method. One width changes along the x-axis, and the other widths are fixed. Settings with float
    weights have a separate panel, whose x-axis is the width of activations or gradients.
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
    handles: dict[str, Artist] = {}
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
    """Return the settings of each line. The outer keys are the x-axis (w, a or g), and the inner keys are the lines.

    The key of a line contains the fixed widths as text, such as "A2 G6". If a method has several widths, and weights
    and activations have equal bits in all of them, the text is "A=W".
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
    """Return the legend text of a line. `other` are the widths that are fixed on this line."""
    return f"{label}, {other}" if other else label


def _float_lines(panel: Axes, floats: Sequence[Setting]) -> dict[str, Artist]:
    """Draw float networks as horizontal lines, with confidence intervals as bands, and return the legend's handles."""
    handles = {}
    for setting, dash in zip(floats, DASHES, strict=False):
        top1, half = setting.top1.mean, setting.top1.ci95_half
        handles[setting.label] = panel.axhline(top1, color=INK, ls=dash, lw=1, zorder=1)
        if half is not None:
            panel.axhspan(top1 - half, top1 + half, color=GREY, alpha=0.22, lw=0, zorder=0)
    return handles


def pareto(figure: Figure, data: PlotData) -> None:
    """Draw accuracy over size and accuracy over BitOps, each with its Pareto front."""
    stars = {s.label: Style(INK, STARS[i % len(STARS)], "") for i, s in enumerate(data.floats)}
    styles = stars | data.styles
    handles: dict[str, Artist] = {}
    everything = [*data.floats, *data.quantized]
    for panel, (key, (label, unit, cost)) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        settings = [s for s in everything if cost(s)]
        for name, style in styles.items():
            if members := [s for s in settings if s.label == name]:
                handles[name] = styling.points(panel, [cost(s) for s in members], members, style._replace(dash=""))
        _draw_front(panel, settings, cost)
        styling.log_axis(panel, unit)
        y_label = styling.accuracy_axis(panel, everything, room=0.3)
        styling.finish(panel, label, y_label if key == "size" else "")
    styling.legend(figure, handles)


def _draw_front(panel: Axes, settings: Sequence[Setting], cost: Callable[[Setting], float]) -> None:
    """Draw the Pareto front as a line of steps. Each point on the front gets a ring and the name of its setting."""
    best = [settings[i] for i in pareto_front([(cost(s), s.top1.mean) for s in settings])]
    x, y = [cost(s) for s in best], [s.top1.mean for s in best]
    panel.step(x, y, where="post", color=INK, lw=0.9, alpha=0.6, zorder=1)
    panel.plot(x, y, "o", ms=9, mfc="none", mec=INK, mew=0.8, zorder=4)
    for setting, at in zip(best, zip(x, y, strict=True), strict=True):
        name = setting.label if setting.is_float else f"{setting.label} {setting.short_widths}"
        turned = {"rotation": 40, "rotation_mode": "anchor", "fontsize": 7, "color": INK, "gid": styling.FRONT}
        panel.annotate(printable(name), at, (3, 6), textcoords="offset points", **turned).set_in_layout(False)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, accuracy) on the Pareto front, cheapest first.

    A point is on the front if no other point dominates it. Point p dominates point q if p is better in cost or accuracy
    and not worse in either.
    """
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1])):
        if not best or points[i][1] > points[best[-1]][1]:
            best.append(i)
    return best
