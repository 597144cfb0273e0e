"""Plots learning curves over epochs and output errors over layers, with one small panel per method."""

from textwrap import wrap
from typing import TYPE_CHECKING

from qbench.report.plots import style as styling
from qbench.report.plots.plot_data import PlotData
from qbench.report.plots.style import ACROSS, COLOURS, DASHES, INK
from qbench.report.plots.training_curves import FLOAT_STAGE, MEASURES, Curves
from qbench.report.tables.escape import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves(figure: "Figure", data: PlotData) -> None:
    """Plot the learning curves of each method. Float training is at the left of quantized training."""
    every = [line for lines in data.curves.values() for line in lines.values()]
    first, last = min(line.x[0] for line in every), max(line.x[-1] for line in every)
    for panel in _small_multiples(figure, data.curves, MEASURES[data.measure], "epoch"):
        panel.axvline(0.5, color=INK, lw=0.6)
        ticks = {x: str(x - first + 1) for x in (first, 0) if first < 1} | {last: str(last)}
        panel.set_xticks(list(ticks), list(ticks.values()))


def layers(figure: "Figure", data: PlotData) -> None:
    """Plot the SQNR up to scale of all layers' outputs, with one panel per method."""
    for panel in _small_multiples(figure, data.errors, "SQNR up to scale (dB)", "layer"):
        panel.set_xticks(range(len(data.layers)), [*map(printable, data.layers)], rotation=90, fontsize=5.5)


def _small_multiples(figure: "Figure", methods: Curves, y_label: str, x_label: str) -> list["Axes"]:
    """Draw one panel per method, with one line per combination of widths, and return the panels."""
    columns = min(len(methods), ACROSS)
    grid = figure.subplots(-(-len(methods) // columns), columns, sharex=True, sharey=True, squeeze=False)
    known = sorted({key for lines in methods.values() for key in lines if key != FLOAT_STAGE}, key=_widths_key)
    looks = {key: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i, key in enumerate(known)}
    handles: dict[str, Artist] = {}
    for place, (name, lines) in enumerate(methods.items()):
        panel = grid[place // columns][place % columns]
        for key, line in lines.items():
            colour, dash = looks.get(key, (INK, "-"))
            panel.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, lw=0)
            marker = "o" if len(line.x) == 1 else ""
            (handles[key],) = panel.plot(line.x, line.mean, color=colour, ls=dash, lw=1.3, marker=marker, ms=3)
        panel.set_title("\n".join(wrap(printable(name), 36)), loc="left", fontsize=8, pad=3, color=INK)
        is_lowest = place + columns >= len(methods)
        styling.finish(panel, x_label if is_lowest else "", y_label if place % columns == 0 else "")
        panel.tick_params(labelbottom=is_lowest)
    for panel in grid.flat[len(methods) :]:
        panel.remove()
    styling.legend(figure, {key: handles[key] for key in [FLOAT_STAGE, *known] if key in handles})
    return list(grid.flat[: len(methods)])


def _widths_key(widths: str) -> list[tuple[str, int]]:
    """Return a sort key for widths as text. It sorts W2 before W10, and W2 before W2 A2."""
    return [(part[0], int(part[1:])) for part in widths.split()]
