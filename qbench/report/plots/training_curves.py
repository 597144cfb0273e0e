"""Reads curves from metrics.jsonl: learning curves over epochs, and output errors over layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from qbench.quant.sqnr import sqnr_db
from qbench.report.comparison.setting import Setting
from qbench.runs.history import baseline_directory, epochs, observed
from qbench.runs.result import Result

MEASURES = {"val_top1": "validation top-1 (%)", "train_top1": "training top-1 (%)"}
FLOAT_STAGE = "float"
"""The name of the curve of the float baselines."""
PLOT_MAX_SQNR = 60.0
"""Maximum SQNR in dB in plots. The SQNR is computed from a float32 cosine, which cannot resolve larger values."""


class SeedCurve(NamedTuple):
    """The mean, the lowest and the highest value over seeds at each position x."""

    x: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


Curves = dict[str, dict[str, SeedCurve]]
"""Maps a method's label to a map from widths (as text) to a curve."""


def learning_curves(settings: Sequence[Setting], results: Mapping[str, Result | None]) -> tuple[Curves, str]:
    """Return the learning curves of settings and their float baselines, and the name of the measure.

    The measure is validation top-1, or training top-1 if no run has a validation split. Epochs are counted so that the
    first epoch of quantized training is 1 and the last epoch of float training is 0.

    Args:
        settings: the settings to show.
        results: maps a run's directory to its result.
    """
    baselines = {
        run.run: path
        for s in settings
        for run in s.runs
        if (r := results.get(run.run)) and (path := baseline_directory(r))
    }
    paths = {Path(run.run) for s in settings for run in s.runs} | set(baselines.values())
    records = {path: epochs(path) for path in paths}
    recorded = {key for by_epoch in records.values() for values in by_epoch.values() for key in values}
    measure = "val_top1" if "val_top1" in recorded else "train_top1"

    def curve(path: Path) -> dict[int, float]:
        return {e + 1: v[measure] for e, v in records[path].items() if isinstance(v.get(measure), int | float)}

    lines: Curves = {}
    for label in dict.fromkeys(s.label for s in settings):
        members = [s for s in settings if s.label == label]
        starts = {path for s in members for run in s.runs if (path := baselines.get(run.run))}
        drawn = {FLOAT_STAGE: _before_epoch_1(line_over_seeds([curve(path) for path in starts]))}
        drawn |= {s.short_widths: line_over_seeds([curve(Path(run.run)) for run in s.runs]) for s in members}
        if present := {widths: line for widths, line in drawn.items() if line}:
            lines[label] = present
    return lines, measure


def _before_epoch_1(line: SeedCurve | None) -> SeedCurve | None:
    """Return a curve whose last epoch is 0, as the training of the float baselines precedes the epochs of a run."""
    return line and line._replace(x=[x - line.x[-1] for x in line.x])


def layer_errors(settings: Sequence[Setting]) -> tuple[Curves, list[str]]:
    """Return curves of `fitted_sqnr` over the layer index, and the names of the layers.

    The curves show the metrics that each run recorded last.
    """
    sqnr = {
        run.run: {name: fitted_sqnr(metrics) for name, metrics in observed(Path(run.run)).items()}
        for s in settings
        for run in s.runs
    }
    layers = list(dict.fromkeys(name for own in sqnr.values() for name, value in own.items() if value is not None))
    lines: Curves = {}
    for s in settings:
        by_layer = [{layers.index(n): v for n, v in sqnr[run.run].items() if v is not None} for run in s.runs]
        if line := line_over_seeds(by_layer):
            lines.setdefault(s.label, {})[s.short_widths] = line
    return lines, layers


def fitted_sqnr(metrics: Mapping[str, object]) -> float | None:
    """Return the SQNR of a layer's output in dB, with the output scaled so that the error is smallest.

    The result is at most `PLOT_MAX_SQNR`. It is None if the run did not record the cosine similarity of the layer's
    output and the float output. With the best scale, the power of the error is the fraction 1 - cosine^2 of the
    signal's power.

    The scale is fitted for two reasons. First, the quantized weights of some methods, such as DoReFa, differ in scale
    from the latent weights. Second, the next normalization layer removes the scale of the output in any case.
    """
    cosine = metrics.get("cosine")
    if not isinstance(cosine, int | float):
        return None
    error = 1 - min(max(cosine, 0), 1) ** 2
    return min(PLOT_MAX_SQNR, sqnr_db(1, error))


def line_over_seeds(seeds: Sequence[Mapping[int, float]]) -> SeedCurve | None:
    """Return the curve over seeds, or None if the seeds have no position in common.

    The curve has only the positions x at which all seeds have a value. With early stopping, a mean over the seeds that
    are still training would jump where a seed ends. Seeds without any value are left out.
    """
    recorded = [set(seed) for seed in seeds if seed]
    places = sorted(set.intersection(*recorded)) if recorded else []
    at = [[seed[x] for seed in seeds if seed] for x in places]
    return SeedCurve(places, [mean(v) for v in at], [min(v) for v in at], [max(v) for v in at]) if places else None
