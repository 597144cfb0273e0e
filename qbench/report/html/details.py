"""Collects the details of one setting for the HTML page: runs, layers, options and comparisons."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from qbench.bits import LevelCount
from qbench.report.comparison.naming import option_key
from qbench.report.comparison.setting import SeedAccuracy, Setting
from qbench.report.comparison.verdicts import PairConclusion
from qbench.report.html.curve import CurveDrawing, draw_curve
from qbench.report.html.quantizer import QuantizerDrawing, draw_quantizers
from qbench.report.plots.training_curves import FLOAT_STAGE, SeedCurve
from qbench.runs.history import observed
from qbench.runs.result import Result
from qbench.system import files

PARTS = {"w": "weights", "a": "inputs", "g": "gradients"}


class RunLine(NamedTuple):
    """A row of the table of runs. Accuracies are in percent, and the training time is a text."""

    seed: int
    top1: str
    val: str
    best: str
    seconds: str
    name: str


class Note(NamedTuple):
    """An override, such as `method.clip=2`, and a remark on this override."""

    text: str
    remark: str


class LayerRow(NamedTuple):
    """A row of the table of layers, as text.

    `levels` maps w, a and g (weights, activations and gradients) to the number of levels that the layer uses. `sqnr` is
    the SQNR of the layer's output in dB. `parameters` lists the values of the parameters of the quantizers.
    """

    name: str
    levels: dict[str, str]
    sqnr: str
    parameters: str


@dataclass(frozen=True)
class LayerTable:
    """The table of quantized layers.

    `parts` maps w, a and g to their full names, if levels are known.
    """

    rows: list[LayerRow]
    parts: dict[str, str]

    @property
    def has_sqnr(self) -> bool:
        """Whether any layer has an SQNR."""
        return any(row.sqnr for row in self.rows)

    @property
    def has_parameters(self) -> bool:
        """Whether any quantizer reports parameters."""
        return any(row.parameters for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class SettingDetails:
    """The details of one setting. `cards` lists links to method cards as pairs (anchor, name)."""

    id: str
    title: str
    setting: Setting
    pairs: tuple[PairConclusion, ...]
    learning_rates: list[tuple[float, float | None]]
    runs: list[RunLine]
    folders: list[str]
    curve: CurveDrawing | None
    quantizers: list[QuantizerDrawing]
    layers: LayerTable
    options: list[Note]
    config: str
    cards: list[tuple[str, str]]
    notes: list[str]


def setting_details(
    anchor: str,
    setting: Setting,
    lines: Mapping[str, SeedCurve],
    results: Mapping[str, Result],
    cards: Mapping[str, Mapping[str, str]],
) -> SettingDetails:
    """Return the details of a setting.

    Args:
        anchor: the setting's id on the page.
        setting: the setting.
        lines: learning curves of the setting's method. The keys are widths as text, or "float".
        results: results of the runs, by directory.
        cards: method cards by anchor. Each card has a `name`.
    """
    own_results = [results[run.run] for run in setting.runs if run.run in results]
    methods = {name for result in own_results for name in result.card}
    return SettingDetails(
        id=anchor,
        title=setting.label if setting.is_float else f"{setting.label} {setting.short_widths}",
        setting=setting,
        pairs=setting.conclusion.pairs if setting.conclusion else (),
        learning_rates=list(setting.learning_rate.validation.items()) if setting.learning_rate else [],
        runs=[_run_line(run, results.get(run.run)) for run in setting.runs],
        folders=list(dict.fromkeys(str(Path(run.run).parent) for run in setting.runs)),
        curve=draw_curve({k: line for k, line in lines.items() if k in (FLOAT_STAGE, setting.short_widths)}),
        quantizers=draw_quantizers(own_results[0]) if own_results else [],
        layers=_layer_table(own_results),
        options=_options(own_results[:1]),
        config=_first_config(run.run for run in setting.runs),
        cards=[(key, card["name"]) for key, card in cards.items() if card["name"] in methods],
        notes=list(dict.fromkeys(note for result in own_results for note in (result.reason, *result.notes) if note)),
    )


def _run_line(run: SeedAccuracy, result: Result | None) -> RunLine:
    """Return the row of a run in the table of runs.

    `result` is None for a float baseline whose result.json was not read. Only the top-1 of such a baseline is known.
    """
    val = best = seconds = "-"
    if result and result.final and result.final.val:
        val = f"{result.final.val.top1:.2f}"
    if result and result.best:
        epoch = "" if result.best.epoch is None else f" ({result.best.epoch + 1})"
        best = f"{result.best.test.top1:.2f}{epoch}"
    if result and result.wall_seconds is not None:
        seconds = f"{result.wall_seconds:,.0f} s"
    return RunLine(run.seed, f"{run.top1:.2f}", val, best, seconds, Path(run.run).name)


def _options(results: Iterable[Result]) -> list[Note]:
    """Return the method's options and the keys of its network, each with a remark."""
    notes = []
    for result in results:
        for key, value in result.options.items():
            deviates = key.endswith("deviation") and value not in (None, "none")
            notes.append(Note(f"{option_key(key)}={value}", "not the paper's method" if deviates else ""))
        for key, value in result.network.items():
            notes.append(Note(f"model.{key}={value}", ""))
        notes += [Note("protocol", change) for change in result.protocol_changes]
    return notes


def _first_config(runs: Iterable[str]) -> str:
    """Return the text of the first readable config.yaml in the given run directories."""
    for run in runs:
        try:
            return files.read(Path(run) / "config.yaml").decode(errors="replace")
        except OSError:
            continue
    return ""


def _layer_table(results: Sequence[Result]) -> LayerTable:
    """Return a table with one row for each layer whose levels were verified."""
    verified = [result.verified for result in results if result.verified]
    metrics = [observed(Path(result.run)) for result in results]
    names = list(dict.fromkeys(name for layers in verified for name in layers))
    parts = [key for key in PARTS if any(key in layers.get(name, {}) for layers in verified for name in names)]
    rows = []
    for name in names:
        levels = {
            key: _span([layers[name][key] for layers in verified if key in layers.get(name, {})]) for key in parts
        }
        sqnr = [v for layers in metrics if isinstance(v := layers.get(name, {}).get("sqnr"), int | float)]
        rows.append(LayerRow(name, levels, f"{mean(sqnr):.1f}" if sqnr else "", _parameters(results, name)))
    return LayerTable(rows, {key: PARTS[key] for key in parts})


def _span(counts: Sequence[LevelCount]) -> str:
    """Return the number of used levels and of allowed levels as text, such as `3-4 of 4` if runs differ."""
    if not counts:
        return ""
    ends = [sorted(c.found for c in counts), sorted(c.allowed for c in counts)]
    return " of ".join("-".join(map(str, dict.fromkeys((counts[0], counts[-1])))) for counts in ends)


def _parameters(results: Sequence[Result], layer: str) -> str:
    """Return the parameters of a layer's quantizers as text, from the first run that reports parameters."""
    reports = next((result.quantizers[layer] for result in results if layer in result.quantizers), {})
    return ", ".join(
        f"{slot}.{key} {value:.4g}" if isinstance(value, float) else f"{slot}.{key} {value}"
        for slot, values in reports.items()
        if isinstance(values, dict)
        for key, value in values.items()
    )
