"""What metrics.jsonl tells of the runs of a table: learning curves, and what was seen of each layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from qbench.quant.sqnr import sqnr_db
from qbench.runs.result import Result
from qbench.system import files

Cell = dict[str, Any]

MEASURES = {"val_top1": "validation top-1 (%)", "train_top1": "training top-1 (%)"}
PARENT = "float"
DRAWN_CEILING = 60.0
"""SQNR in dB at which plots clip: the stored cosines resolve no more. Reported values use `quant.sqnr.CEILING`."""


class Line(NamedTuple):
    """The mean over seeds at each place, the lowest seed and the highest."""

    x: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


Lines = dict[str, dict[str, Line]]
"""By method, then by widths."""


def is_float(cell: Cell) -> bool:
    """Whether a cell is of float networks, parents or fine-tuned ones."""
    return bool(cell["name"] == PARENT)


def widths(cell: Cell) -> str:
    """Return W4 A4 G8, without what is float; W32 where all is."""
    return " ".join(f"{key.upper()}{n}" for key in "wag" if (n := cell["bits"][key]) != 32) or "W32"


def epochs(run: Path) -> dict[int, dict[str, Any]]:
    """Return the numbers of each epoch of a run, from 0; a line that cannot be read is passed over."""
    return {values["epoch"]: values for values in _records(run) if values.get("kind") == "epoch"}


def observed(run: Path) -> dict[str, dict[str, Any]]:
    """Return what the last look at each layer of a run has told, by layer; nothing where nobody looked."""
    looks = [values["layers"] for values in _records(run) if isinstance(values.get("layers"), dict)]
    return {name: told for name, told in looks[-1].items() if isinstance(told, dict)} if looks else {}


def _records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run that name their epoch: not those of single steps, which are many."""
    try:
        lines = files.read(run / "metrics.jsonl").split(b"\n")
    except OSError:
        return []
    parsed = [files.parse_json(line) for line in lines if b'"epoch"' in line]
    return [values for values in parsed if values and isinstance(values.get("epoch"), int)]


def parent(result: Result) -> Path | None:
    """Return where the float parent of a run lies: beside it, wherever the folder was moved, else where it lay."""
    if not result.baseline:
        return None
    recorded = Path(result.baseline.run)
    beside = Path(result.run).parent / recorded.name
    return beside if beside.is_dir() else recorded


def learning(cells: Sequence[Cell], results: Mapping[str, Result | None]) -> tuple[Lines, str]:
    """Return the curves of cells, those of their float parents under "float", and the measure: top-1 on validation, or
    in training where no run has the former.

    Epochs of the quantized stage count from 1, those of the float stage end with 0.
    """
    origins = {run: parent(r) for cell in cells for run in cell["runs"] if (r := results.get(run))}
    paths = {Path(run) for cell in cells for run in cell["runs"]} | {p for p in origins.values() if p}
    read = {path: epochs(path) for path in paths}
    named = {key for found in read.values() for values in found.values() for key in values}
    measure = "val_top1" if "val_top1" in named else "train_top1"

    def curve(path: Path, ending: bool = False) -> dict[int, float]:
        own = {e: values[measure] for e, values in read[path].items() if isinstance(values.get(measure), int | float)}
        shift = -max(own, default=0) if ending else 1
        return {epoch + shift: value for epoch, value in own.items()}

    lines: Lines = {}
    for name in dict.fromkeys(cell["method"] for cell in cells):
        members = [cell for cell in cells if cell["method"] == name]
        parents = {p for cell in members for run in cell["runs"] if (p := origins.get(run))}
        drawn = {PARENT: line([curve(path, ending=True) for path in parents])}
        drawn |= {widths(cell): line([curve(Path(run)) for run in cell["runs"]]) for cell in members}
        if kept := {key: found for key, found in drawn.items() if found}:
            lines[name] = kept
    return lines, measure


def layer_errors(cells: Sequence[Cell]) -> tuple[Lines, list[str]]:
    """Return the last `fitted_sqnr` of each layer, and the names of the layers, in their order."""
    seen = {
        run: {name: fitted_sqnr(told) for name, told in observed(Path(run)).items()} for c in cells for run in c["runs"]
    }
    layers = list(dict.fromkeys(name for told in seen.values() for name, sqnr in told.items() if sqnr is not None))
    lines: Lines = {}
    for cell in cells:
        at = [{layers.index(n): sqnr for n, sqnr in seen[run].items() if sqnr is not None} for run in cell["runs"]]
        if found := line(at):
            lines.setdefault(cell["method"], {})[widths(cell)] = found
    return lines, layers


def fitted_sqnr(told: Mapping[str, Any]) -> float | None:
    """Return the SQNR in dB of a layer's output at the best scale, at most `DRAWN_CEILING`; None if its cosine with the
    float output was not recorded.

    Normalization undoes the scale, and some methods' weights are on another one than the latent weights: DoReFa's
    output may be all error and still point where it should. Of a signal, 1 - cosine^2 is error at the best scale.
    """
    cosine = told.get("cosine")
    if not isinstance(cosine, int | float):
        return None
    error = 1 - min(max(cosine, 0), 1) ** 2
    return min(DRAWN_CEILING, sqnr_db(1, error))


def line(seeds: Sequence[Mapping[int, float]]) -> Line | None:
    """Return the line over seeds, at each place over those that have it; None where none has any."""
    places = sorted(set().union(*seeds))
    at = [[seed[x] for seed in seeds if x in seed] for x in places]
    return Line(places, [mean(v) for v in at], [min(v) for v in at], [max(v) for v in at]) if places else None
