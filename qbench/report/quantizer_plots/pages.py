"""Draws figures of quantizers: of one method, or of all methods.

A figure has separate panels for weights, inputs and outputs. Tensors that a method does not quantize have no panels.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qbench.bits import FLOAT
from qbench.quant.method import Method
from qbench.report.quantizer_plots.measurement import measure_quantizers
from qbench.report.quantizer_plots.panels import (
    LARGE,
    SMALL,
    PlotSizes,
    draw_codewords,
    draw_curve,
    draw_slope,
    draw_zoom,
    format_number,
    legend_handles,
)  # fmt: skip
from qbench.report.quantizer_plots.transfer_curves import Codewords, QuantizerCurves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 10, 120
"""Width of a figure in inches, and number of dots per inch."""
COLUMNS, LISTED_THRESHOLDS = 3, 7
"""Number of tiles per row of the poster, and maximum number of thresholds in the text below a curve."""
TITLE = "Quantizers of all methods"
SUBTITLE = (
    "Left: forward; right: backward; both measured on the quantizers before training. Weights follow N(0, 1); "
    "inputs come from batch normalization,\nwith ReLU if the method keeps it. Widths are the method's defaults up to 5 "
    "bits, otherwise 2 bits (gradients 4), or the smallest supported width."
)
LETTERS = {"weights": "W", "inputs": "A", "outputs": "G"}


def method_figure(method: Method, title: str, command: str) -> "Figure":
    """Return the figure of one method. Forward curves are at the left, and backward curves at the right."""
    measured = measure_quantizers(method)
    height = 2.55 * len(measured) + 1.15
    figure = _figure(height)
    panels = figure.subplots(len(measured), 2, squeeze=False)
    figure.subplots_adjust(0.075, 0.95 / height, 0.985, 1 - 0.85 / height, 0.19, 0.46)
    for (left, right), curves in zip(panels, measured, strict=True):
        _draw_pair(left, right, curves, LARGE)
        if isinstance(curves, QuantizerCurves):
            draw_zoom(left, curves.forward, LARGE)
            if curves.backward is not None:
                draw_zoom(right, curves.backward, LARGE)
        for panel, heading, (x, y) in zip((left, right), _titles(curves), _axes(curves), strict=True):
            panel.set_title(heading, loc="left", fontsize=LARGE.text)
            panel.set_xlabel(x, fontsize=LARGE.text)
            panel.set_ylabel(y, fontsize=LARGE.text)
    figure.text(0.015, 1 - 0.12 / height, title, va="top", fontsize=11, weight="bold")
    figure.text(0.015, 1 - 0.36 / height, command, va="top", fontsize=8, family="monospace")
    figure.legend(handles=legend_handles(measured), loc="lower center", ncols=9, fontsize=8, frameon=False)
    return figure


def poster_figure(methods: Mapping[str, Method]) -> "Figure":
    """Return the figure of all methods.

    Each tensor (weights, inputs or outputs) that a method quantizes has one tile.
    """
    tiles = [(name, curves) for name, method in methods.items() for curves in measure_quantizers(method)]
    tall, wide, top, bottom = 1.36, WIDTH / COLUMNS, 0.78, 0.5
    total_height = tall * -(-len(tiles) // COLUMNS) + top + bottom
    figure = _figure(total_height)
    size = (wide / 2 - 0.42) / WIDTH, (tall - 0.5) / total_height
    for place, (name, curves) in enumerate(tiles):
        row, column = divmod(place, COLUMNS)
        low = (total_height - top - tall * (row + 1) + 0.2) / total_height
        left, right = (figure.add_axes(((column * wide + x) / WIDTH, low, *size)) for x in (0.36, wide / 2 + 0.28))
        _draw_pair(left, right, curves, SMALL)
        bold = f"$\\bf{{{name}}}$".replace("_", r"\_")
        left.set_title(f"{bold}  {_heading(curves)}", loc="left", fontsize=SMALL.text + 0.5, pad=3)
    figure.text(0.01, 1 - 0.1 / total_height, TITLE, va="top", fontsize=13, weight="bold")
    figure.text(0.01, 1 - 0.38 / total_height, SUBTITLE, va="top", fontsize=8.5)
    handles = legend_handles([curves for _, curves in tiles])
    figure.legend(handles=handles, loc="lower center", ncols=-(-len(handles) // 2), fontsize=8, frameon=False)
    return figure


def _figure(height: float) -> "Figure":
    os.environ["MPLBACKEND"] = "agg"  # matplotlib's import fails if this names a backend that is not installed
    from matplotlib.figure import Figure as MatplotlibFigure

    return MatplotlibFigure(figsize=(WIDTH, height), dpi=DPI)


def _draw_pair(left: "Axes", right: "Axes", curves: QuantizerCurves | Codewords, sizes: PlotSizes) -> None:
    """Draw the forward curve into the left panel and the backward curve into the right panel."""
    if not isinstance(curves, QuantizerCurves):
        draw_codewords(left, right, curves, sizes)
        return
    draw_curve(left, curves.forward, sizes, curves.frozen, curves.picks)
    if curves.backward is not None:
        draw_curve(right, curves.backward, sizes)
    else:
        draw_slope(right, curves, sizes)


def _heading(curves: QuantizerCurves | Codewords) -> str:
    """Return a heading that names the quantized tensor, its width and its number of levels."""
    if not isinstance(curves, QuantizerCurves):
        return f"weights, W{curves.bits}: {len(curves.points)} codewords of {curves.points.shape[1]} weights"
    if curves.bits == FLOAT:
        return "weights: nothing quantized"
    levels = (curves.backward or curves.forward).levels
    what = "gradients of outputs" if curves.backward is not None else curves.what
    counted = f"{what}, {LETTERS[curves.what]}{curves.bits}: {len(levels):,} levels"
    return f"{counted}, {curves.when}" if curves.when else counted


def _titles(curves: QuantizerCurves | Codewords) -> tuple[str, str]:
    """Return the titles of the left and the right panel."""
    if not isinstance(curves, QuantizerCurves):
        no_gradient = "no gradient reaches the weights: codes are fixed"
        return _heading(curves), no_gradient if curves.fixed else "one weight of each"
    if curves.backward is not None:
        return "; ".join(("outputs", *curves.notes)), _heading(curves)
    reached = curves.slope is not None and curves.slope.any()
    back = "backward" if reached else f"backward: no gradient reaches the {curves.what}"
    return "; ".join((_heading(curves), *curves.notes)), back


def _axes(curves: QuantizerCurves | Codewords) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the axis labels (x, y) of the left and the right panel.

    The x label of the left panel also contains a few thresholds.
    """
    if not isinstance(curves, QuantizerCurves):
        rank = f"of {curves.points.shape[1]} weights"
        return (f"the first {rank}", "the second"), (f"float w, the first {rank}", r"quantized $\hat{w}$")
    if curves.backward is not None:
        back = ("incoming gradient, dL/d$\\hat{y}$", "outgoing gradient, dL/dy")
        return ("float output y", r"$\hat{y}$"), back
    letter = "w" if curves.what == "weights" else "x"
    jumps = curves.forward.thresholds.tolist() if curves.frozen is None else []
    listed = ", ".join(format_number(jump, ".2f") for jump in jumps)
    where = f"    \u25b2 {listed}" if 0 < len(jumps) <= LISTED_THRESHOLDS else ""
    name = f"float {curves.what.removesuffix('s')} {letter}"
    return (name + where, rf"quantized $\hat{{{letter}}}$"), (name, rf"$d\hat{{{letter}}}\,/\,d{letter}$")
