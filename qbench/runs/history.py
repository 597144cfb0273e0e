"""Reads metrics.jsonl of the runs in a table: learning curves, and the last statistics of each layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from qbench.quant.sqnr import sqnr_db
from qbench.runs.result import Result
from qbench.system import files

SettingValues = dict[str, Any]
"""The values of one setting of a table: `name`, `method`, `bits`, `runs`, ..."""
Record = dict[str, Any]
"""One line of metrics.jsonl, or the statistics of one layer in it."""

MEASURES = {"val_top1": "validation top-1 (%)", "train_top1": "training top-1 (%)"}
BASELINE = "float"
MAX_DB = 60.0
"""The SQNR in dB at which plots clip: cosines are computed in single precision. Reported values use `MAX_SQNR`."""


class SeedCurve(NamedTuple):
    """At each place x: the mean over seeds, and the lowest and highest seed."""

    x: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


Curves = dict[str, dict[str, SeedCurve]]
"""By method, then by widths."""


def is_float(setting: SettingValues) -> bool:
    """Whether a setting's networks are float: baselines or fine-tuned ones."""
    return bool(setting["name"] == BASELINE)


def width_label(setting: SettingValues) -> str:
    """Return W4 A4 G8 without the float parts, and W32 if all are float."""
    return " ".join(f"{key.upper()}{n}" for key in "wag" if (n := setting["bits"][key]) != 32) or "W32"


def epochs(run: Path) -> dict[int, Record]:
    """Return the record of each epoch of a run, from 0; lines that cannot be read are skipped."""
    return {values["epoch"]: values for values in _epoch_records(run) if values.get("kind") == "epoch"}


def observed(run: Path) -> dict[str, Record]:
    """Return layer -> its last statistics in a run; empty if none were recorded."""
    records = [values["layers"] for values in _epoch_records(run) if isinstance(values.get("layers"), dict)]
    return {name: layer for name, layer in records[-1].items() if isinstance(layer, dict)} if records else {}


def _epoch_records(run: Path) -> list[Record]:
    """Return the records of a run that name their epoch; those of single steps, which are many, do not."""
    try:
        lines = files.read(run / "metrics.jsonl").split(b"\n")
    except OSError:
        return []
    parsed = [files.parse_json(line) for line in lines if b'"epoch"' in line]
    return [values for values in parsed if values and isinstance(values.get("epoch"), int)]


def baseline_directory(result: Result) -> Path | None:
    """Return the directory of a run's float baseline: next to the run's own, else the recorded one."""
    if not result.baseline:
        return None
    recorded = Path(result.baseline.run)
    sibling = Path(result.run).parent / recorded.name  # the whole folder may have been moved
    return sibling if sibling.is_dir() else recorded


def learning(settings: Sequence[SettingValues], results: Mapping[str, Result | None]) -> tuple[Curves, str]:
    """Return the learning curves of settings, with those of their float baselines under "float", and the measure.

    The measure is top-1 on validation, or on the training images if no run has validated. Epochs of
    the quantized stage count from 1; those of the float stage end with 0.
    """
    runs = [run for setting in settings for run in setting["runs"]]
    baselines = {run: baseline_directory(r) for run in runs if (r := results.get(run))}
    records = {path: epochs(path) for path in {*map(Path, runs), *(p for p in baselines.values() if p)}}
    recorded = {key for by_epoch in records.values() for values in by_epoch.values() for key in values}
    measure = "val_top1" if "val_top1" in recorded else "train_top1"

    def curve(path: Path, ends_with_0: bool = False) -> dict[int, float]:
        points = {e: r[measure] for e, r in records[path].items() if isinstance(r.get(measure), int | float)}
        shift = -max(points, default=0) if ends_with_0 else 1
        return {epoch + shift: value for epoch, value in points.items()}

    curves: Curves = {}
    for method in dict.fromkeys(setting["method"] for setting in settings):
        members = [setting for setting in settings if setting["method"] == method]
        paths = {p for setting in members for run in setting["runs"] if (p := baselines.get(run))}
        by_widths = {BASELINE: over_seeds([curve(path, ends_with_0=True) for path in paths])}
        by_widths |= {width_label(one): over_seeds([curve(Path(run)) for run in one["runs"]]) for one in members}
        if kept := {key: line for key, line in by_widths.items() if line}:
            curves[method] = kept
    return curves, measure


def layer_errors(settings: Sequence[SettingValues]) -> tuple[Curves, list[str]]:
    """Return the last `fitted_sqnr` of each layer, by the layer's place in the list of names, and that list."""
    by_run = {
        run: {name: fitted_sqnr(layer) for name, layer in observed(Path(run)).items()}
        for setting in settings
        for run in setting["runs"]
    }
    layers = list(
        dict.fromkeys(name for by_layer in by_run.values() for name, sqnr in by_layer.items() if sqnr is not None)
    )
    curves: Curves = {}
    for setting in settings:
        seeds = [
            {layers.index(n): sqnr for n, sqnr in by_run[run].items() if sqnr is not None} for run in setting["runs"]
        ]
        if line := over_seeds(seeds):
            curves.setdefault(setting["method"], {})[width_label(setting)] = line
    return curves, layers


def fitted_sqnr(layer: Mapping[str, object]) -> float | None:
    """Return the SQNR in dB of a layer's output at the scale that fits best, at most `MAX_DB`.

    None if the cosine with the float output was not recorded. Normalization undoes the scale, and
    some methods' weights have another scale than the latent weights: DoReFa's output may differ
    from the float output everywhere and still have its direction. At the best scale, a share of
    1 - cosine^2 of the signal's power is error.
    """
    cosine = layer.get("cosine")
    if not isinstance(cosine, int | float):
        return None
    error = 1 - min(max(cosine, 0), 1) ** 2
    return min(MAX_DB, sqnr_db(1, error))


def over_seeds(seeds: Sequence[Mapping[int, float]]) -> SeedCurve | None:
    """Return the curve over seeds, at each place over the seeds that have it; None if no seed has any place."""
    places = sorted(set().union(*seeds))
    at = [[seed[x] for seed in seeds if x in seed] for x in places]
    return SeedCurve(places, [mean(v) for v in at], [min(v) for v in at], [max(v) for v in at]) if places else None
