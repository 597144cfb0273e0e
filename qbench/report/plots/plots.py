"""Plots a comparison: accuracy over bits, size and BitOps, learning curves, and output errors over layers.

Methods have different colours (of Okabe and Ito), markers and dashes. In plots of curves, widths have different colours
and dashes. Float networks are black. Bars are Student's 95 % confidence intervals over seeds. With one seed, there is
no bar. The band of a curve extends from the lowest seed to the highest seed. If accuracies differ much, the accuracy
axis is logarithmic in the error, so that settings with high accuracy can be distinguished.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from qbench.errors import ConfigError
from qbench.report.plots import style as styling
from qbench.report.plots.accuracy_plots import COSTS, bit_series, bits, front_names, pareto, series_label
from qbench.report.plots.curve_plots import curves, layers
from qbench.report.plots.plot_data import PlotData, read_plot_data
from qbench.report.plots.style import ACROSS, DPI, INK, LINE, WIDTH
from qbench.report.tables.escape import printable
from qbench.report.tables.table import Table
from qbench.runs.reader import RunRecord
from qbench.system import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
TITLES = {
    "bits": "Accuracy over bit width; bars: 95 % confidence intervals over seeds; arrows: intervals that are cut",
    "pareto": "Accuracy over cost; bars: 95 % confidence intervals over seeds; arrows: intervals that are cut; rings "
    "with numbers: Pareto front",
    "curves": "Learning curves: float training at the left of the line, quantized training at the right; bands: "
    "range over seeds",
    "layers": "SQNR of layer outputs, relative to the outputs with the float (latent) weights, after scaling for the "
    "smallest error; bands: range over seeds",
}
KINDS: dict[str, Callable[["Figure", PlotData], None]] = {
    "bits": bits, "pareto": pareto, "curves": curves, "layers": layers,
}  # fmt: skip
NEEDED = {"layers": "runs with stored layer metrics"}
"""Maps a kind of plot to the runs that it needs, for plots that need more than finished quantized runs."""


def plot(tables: Sequence[Table], runs: Sequence[RunRecord], path: Path) -> None:
    """Write plots of a comparison to a PNG, PDF or SVG file.

    If the name of the file without suffix is bits, pareto, curves or layers, the file contains only the plot of this
    name. Otherwise, the file contains all plots.

    Raises:
        ConfigError: the suffix is not supported, or there is nothing to plot.
        ResourceError: the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"compare --plot {path}: unknown file format\nallowed: {', '.join(SUFFIXES)}")
    kinds = [path.stem] if path.stem in KINDS else list(KINDS)
    figure = comparison_figure(tables, runs, kinds)
    if figure is None:
        needed = NEEDED.get(kinds[0], "") if len(kinds) == 1 else ""
        needed = needed or "finished quantized runs"
        raise ConfigError(f"compare --plot {path}: nothing to plot\nthis plot needs {needed}")
    files.write(path, encoded(figure, path.suffix.lower()[1:]))


def comparison_figure(
    tables: Sequence[Table], runs: Sequence[RunRecord], kinds: Iterable[str], *, titled: bool = True
) -> "Figure | None":
    """Return a matplotlib figure with one row of panels per table and kind of plot, or None if there is no plot."""
    os.environ["MPLBACKEND"] = "agg"  # matplotlib's import fails if MPLBACKEND names a backend that is not installed
    from matplotlib import rc_context
    from matplotlib.figure import Figure as MatplotlibFigure

    kinds = list(kinds)
    parts: list[tuple[str, PlotData, list[str], float]] = []
    last_title = ""
    for data in read_plot_data(tables, runs, curves="curves" in kinds, layers="layers" in kinds):
        for kind in kinds:
            if height := _height(kind, data):
                heading = [*wrap(printable(data.title), 120)] if data.title != last_title else []
                heading = [*heading, TITLES[kind]] if titled else []
                last_title = data.title
                parts.append((kind, data, heading, height + LINE * len(heading)))
    if not parts:
        return None
    heights = [height for *_, height in parts]
    with rc_context({"text.parse_math": False, "text.usetex": False, "font.size": 8, "axes.edgecolor": INK}):
        figure = MatplotlibFigure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
        places = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for place, (kind, data, heading, _) in zip(places, parts, strict=True):
            KINDS[kind](place, data)
            if heading:
                place.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=9, weight="bold", color=INK)
    return figure


def encoded(figure: "Figure", form: str, **style: object) -> bytes:
    """Return a figure as the bytes of a file. Equal figures give equal bytes.

    Args:
        figure: a matplotlib figure.
        form: the file format, one of png, pdf and svg.
        style: matplotlib settings (rcParams) for this file.
    """
    from matplotlib import rc_context

    buffer = BytesIO()
    no_date: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with rc_context({"svg.hashsalt": "qbench", "text.usetex": False} | style):
        figure.savefig(buffer, format=form, metadata=no_date[form])
    return buffer.getvalue()


def _height(kind: str, data: PlotData) -> float:
    """Return the height in inches of a plot with its legend, or 0 if there is nothing to plot."""
    if kind in ("curves", "layers"):
        lines = data.curves if kind == "curves" else data.errors
        if not lines:
            return 0
        rows = styling.legend_rows({key for own in lines.values() for key in own})
        tick_labels = 0.0 if kind == "curves" else 0.07 * max(map(len, data.layers), default=0)
        return 0.6 + tick_labels + 1.7 * -(-len(lines) // ACROSS) + LINE * rows
    if kind == "pareto" and not any(s.cost for s in data.quantized):
        return 0
    labels = {s.label for s in data.floats}
    if kind == "bits":
        labels |= {series_label(*key) for lines in bit_series(data.quantized).values() for key in lines}
        return 3.1 + LINE * styling.legend_rows(labels)
    labels |= set(data.styles)
    below = max(len(front_names([*data.floats, *data.quantized], cost)) for *_, cost in COSTS.values())
    return 3.1 + LINE * (styling.legend_rows(labels) + below)
