"""Collects the data that the plots of one table show."""

from collections.abc import Sequence
from dataclasses import dataclass

from qbench.report.comparison.setting import Setting
from qbench.report.comparison.setting_table import settings_of
from qbench.report.plots.style import COLOURS, DASHES, MARKERS, Style
from qbench.report.plots.training_curves import Curves, layer_errors, learning_curves
from qbench.report.tables.table import Table
from qbench.runs.reader import RunRecord


@dataclass(frozen=True, kw_only=True)
class PlotData:
    """The settings of one table, and their curves.

    Args:
        title: the table's title.
        quantized: the settings with quantized networks.
        floats: the settings with float networks.
        styles: maps a method's label to the colour and shape of its points.
        curves: learning curves.
        measure: the measure that the learning curves show, a key of `MEASURES`.
        errors: curves of the SQNR of layer outputs over the layers.
        layers: the names of the layers.
    """

    title: str
    quantized: list[Setting]
    floats: list[Setting]
    styles: dict[str, Style]
    curves: Curves
    measure: str
    errors: Curves
    layers: list[str]


def read_plot_data(tables: Sequence[Table], runs: Sequence[RunRecord], *, curves: bool, layers: bool) -> list[PlotData]:
    """Return the data of every table that has quantized settings.

    The files metrics.jsonl are read only if `curves` or `layers` is true.
    """
    results = {str(run.path): run.result for run in runs if run.result}
    labels = sorted({s.label for table in tables for s in settings_of(table) if not s.is_float})
    styles = {
        label: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, label in enumerate(labels)
    }
    data = []
    for table in tables:
        quantized = [s for s in settings_of(table) if not s.is_float]
        if not quantized:
            continue
        lines, measure = learning_curves(quantized, results) if curves else ({}, "")
        errors, names = layer_errors(quantized) if layers else ({}, [])
        data.append(
            PlotData(
                title=table.title,
                quantized=quantized,
                floats=[s for s in settings_of(table) if s.is_float],
                styles={label: style for label, style in styles.items() if any(s.label == label for s in quantized)},
                curves=lines,
                measure=measure,
                errors=errors,
                layers=names,
            )
        )
    return data
