"""Pages made of panels: one method, a row for all that it quantizes; or all methods, tile beside tile."""

import os
from typing import Any

from qbench.bits import FLOAT
from qbench.quant.method import Method
from qbench.report.quantizer_plots.curves import read
from qbench.report.quantizer_plots.panels import LARGE, SMALL, PlotSizes, curve, handles, number, slope, vectors, zoom
from qbench.report.quantizer_plots.readings import Codewords, QuantizerCurves

WIDTH, DPI = 10, 120
COLUMNS, NAMED = 3, 7
"""Tiles side by side on the poster; thresholds that are written out."""
TITLE = "What each method does to single values"
SUBTITLE = (
    "Left forward, right backward; read from the quantizers themselves, before training. Weights are from N(0, 1), "
    "inputs come from batch normalization, with\nReLU where the method keeps it. Widths are the method's own up to 5 "
    "bits, else 2 (of gradients 4), or the fewest that it knows."
)
LETTERS = {"weights": "W", "inputs": "A", "outputs": "G"}


def page(method: Method, title: str, command: str) -> Any:
    """Return the picture of one method: forward beside backward."""
    readings = read(method)
    height = 2.55 * len(readings) + 1.15
    figure = _figure(height)
    panels = figure.subplots(len(readings), 2, squeeze=False)
    figure.subplots_adjust(0.075, 0.95 / height, 0.985, 1 - 0.85 / height, 0.19, 0.46)
    for (left, right), reading in zip(panels, readings, strict=True):
        _pair(left, right, reading, LARGE)
        if isinstance(reading, QuantizerCurves):
            zoom(left, reading.forward, LARGE)
            if reading.backward is not None:
                zoom(right, reading.backward, LARGE)
        for panel, heading, (x, y) in zip((left, right), _titles(reading), _axes(reading), strict=True):
            panel.set_title(heading, loc="left", fontsize=LARGE.text)
            panel.set_xlabel(x, fontsize=LARGE.text)
            panel.set_ylabel(y, fontsize=LARGE.text)
    figure.text(0.015, 1 - 0.12 / height, title, va="top", fontsize=11, weight="bold")
    figure.text(0.015, 1 - 0.36 / height, command, va="top", fontsize=8, family="monospace")
    figure.legend(handles=handles(readings), loc="lower center", ncols=9, fontsize=8, frameon=False)
    return figure


def poster(methods: dict[str, Method]) -> Any:
    """Return the picture of all methods, by name: a tile for all that each quantizes, forward beside backward."""
    tiles = [(name, reading) for name, method in methods.items() for reading in read(method)]
    tall, wide, top, bottom = 1.36, WIDTH / COLUMNS, 0.78, 0.5
    whole = tall * -(-len(tiles) // COLUMNS) + top + bottom
    figure = _figure(whole)
    size = (wide / 2 - 0.42) / WIDTH, (tall - 0.5) / whole
    for place, (name, reading) in enumerate(tiles):
        row, column = divmod(place, COLUMNS)
        low = (whole - top - tall * (row + 1) + 0.2) / whole
        left, right = (figure.add_axes(((column * wide + x) / WIDTH, low, *size)) for x in (0.36, wide / 2 + 0.28))
        _pair(left, right, reading, SMALL)
        bold = f"$\\bf{{{name}}}$".replace("_", r"\_")
        left.set_title(f"{bold}  {_heading(reading)}", loc="left", fontsize=SMALL.text + 0.5, pad=3)
    figure.text(0.01, 1 - 0.1 / whole, TITLE, va="top", fontsize=13, weight="bold")
    figure.text(0.01, 1 - 0.38 / whole, SUBTITLE, va="top", fontsize=8.5)
    shown = handles([reading for _, reading in tiles])
    figure.legend(handles=shown, loc="lower center", ncols=-(-len(shown) // 2), fontsize=8, frameon=False)
    return figure


def _figure(height: float) -> Any:
    os.environ["MPLBACKEND"] = "agg"  # a backend that is set but not there would end the import
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI)


def _pair(left: Any, right: Any, reading: QuantizerCurves | Codewords, look: PlotSizes) -> None:
    """Draw one reading into two panels, forward and backward."""
    if not isinstance(reading, QuantizerCurves):
        vectors(left, right, reading, look)
        return
    curve(left, reading.forward, look, reading.frozen, reading.picks)
    if reading.backward is not None:
        curve(right, reading.backward, look)
    else:
        slope(right, reading, look)


def _heading(reading: QuantizerCurves | Codewords) -> str:
    """Return what was quantized, with its width and number of levels."""
    if not isinstance(reading, QuantizerCurves):
        return f"weights, W{reading.bits}: {len(reading.points)} codewords of {reading.points.shape[1]} weights"
    if reading.bits == FLOAT:
        return "weights: nothing quantized"
    levels = (reading.backward or reading.forward).levels
    what = "gradients of outputs" if reading.backward is not None else reading.what
    counted = f"{what}, {LETTERS[reading.what]}{reading.bits}: {len(levels):,} levels"
    return f"{counted}, {reading.when}" if reading.when else counted


def _titles(reading: QuantizerCurves | Codewords) -> tuple[str, str]:
    """Return titles of both panels."""
    if not isinstance(reading, QuantizerCurves):
        return _heading(reading), "no gradient reaches the weights: codes are fixed" if reading.fixed else "the same"
    if reading.backward is not None:
        return "; ".join(("outputs", *reading.notes)), _heading(reading)
    reached = reading.slope is not None and reading.slope.any()
    back = "backward" if reached else f"backward: no gradient reaches the {reading.what}"
    return "; ".join((_heading(reading), *reading.notes)), back


def _axes(reading: QuantizerCurves | Codewords) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return names of the axes of both panels, with the thresholds where these are few."""
    if not isinstance(reading, QuantizerCurves):
        rank = f"of {reading.points.shape[1]} weights side by side"
        return (f"the first {rank}", "the second"), (f"float w, the first {rank}", r"quantized $\hat{w}$")
    if reading.backward is not None:
        back = ("gradient that arrives, dL/d$\\hat{y}$", "gradient that leaves, dL/dy")
        return ("float output y", r"$\hat{y}$"), back
    letter = "w" if reading.what == "weights" else "x"
    jumps = reading.forward.thresholds.tolist() if reading.frozen is None else []
    where = f"    \u25b2 {', '.join(number(jump, '.2f') for jump in jumps)}" if 0 < len(jumps) <= NAMED else ""
    name = f"float {reading.what.removesuffix('s')} {letter}"
    return (name + where, rf"quantized $\hat{{{letter}}}$"), (name, rf"$d\hat{{{letter}}}\,/\,d{letter}$")
