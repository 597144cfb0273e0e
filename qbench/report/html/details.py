"""What a page tells of one cell of a comparison: runs, curve, layers, configuration, and how it stands to others."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from qbench.runs.history import BASELINE, SeedCurve, SettingValues, is_float, observed, width_label
from qbench.runs.result import Result
from qbench.system import files

PARTS = {"w": "weights", "a": "inputs", "g": "gradients"}
BOX = (380, 150, 34, 18)
"""Of a cell's curve: width, height, room for the numbers at the left and below, in pixels."""


def details(
    name: str,
    cell: SettingValues,
    lines: Mapping[str, SeedCurve],
    results: Mapping[str, Result],
    methods: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that is told of one cell."""
    runs = [results[run] for run in cell["runs"] if run in results]
    own = {key: line for key, line in lines.items() if key in (BASELINE, width_label(cell))}
    texts = {name for run in runs if isinstance(run.card, dict) for name in run.card}
    return {
        "id": name,
        "title": cell["method"] if is_float(cell) else f"{cell['method']} {width_label(cell)}",
        "value": cell,
        "pairs": cell.get("pairs") or [],
        "tuned": (cell.get("tuned") or {}).get("grid") or [],
        "runs": [_run(run, results.get(run), seed, top1) for run, seed, top1 in _by_seed(cell)],
        "folders": list(dict.fromkeys(str(Path(run).parent) for run in cell["runs"])),
        "curve": _curve(own),
        "layers": _layers(runs),
        "options": _options(runs[:1]),
        "config": _config(cell["runs"]),
        "cards": [(key, card["name"]) for key, card in methods.items() if card["name"] in texts],
        "notes": list(dict.fromkeys(note for run in runs for note in (run.reason, *run.notes) if note)),
    }


def _by_seed(cell: SettingValues) -> list[tuple[str, int, float]]:
    return list(zip(cell["runs"], cell["seeds"], cell["top1"], strict=True))


def _run(path: str, result: Result | None, seed: int, top1: float) -> dict[str, Any]:
    """Return what stands in a run's line; of a parent that was not read, only what its children tell."""
    final, best = (result.final, result.best) if result else (None, None)
    epoch, seconds = _at(best, "epoch"), result.wall_seconds if result else None
    return {
        "seed": seed,
        "top1": f"{top1:.2f}",
        "val": _figure(_at(final, "val", "top1")),
        "best": _figure(_at(best, "test", "top1")) + (f" ({epoch + 1})" if isinstance(epoch, int) else ""),
        "seconds": f"{seconds:,.0f} s" if isinstance(seconds, int | float) else "-",
        "name": Path(path).name,
    }


def _at(values: Any, *keys: str) -> Any:
    """Return what stands in nested values, None where any part is missing or something else."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _figure(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


def _options(runs: Iterable[Result]) -> list[tuple[str, str]]:
    """Return a method's options and what it asks of a network, as typed; deviations from the paper are said to be."""
    told = []
    for run in runs:
        for key, value in run.options.items():
            odd = key.endswith("deviation") and value not in (None, "none")
            told.append((f"method.{key}={value}", "not the paper's method" if odd else ""))
        told += [(f"model.{key}={value}", "as the method asks") for key, value in run.network.items()]
        told += [("asks", ask) for ask in run.protocol_changes]
    return told


def _config(runs: Iterable[str]) -> str:
    """Return the first config.yaml of some runs that can be read, as it is."""
    for run in runs:
        try:
            return files.read(Path(run) / "config.yaml").decode(errors="replace")
        except OSError:
            continue
    return ""


def _layers(runs: Sequence[Result]) -> dict[str, Any]:
    """Return what is known of each layer: levels found of those allowed, what its quantizer tells, the last SQNR."""
    verified = [run.verified for run in runs if isinstance(run.verified, dict)]
    looks = [observed(Path(run.run)) for run in runs]
    names = list(dict.fromkeys(name for layers in verified for name in layers))
    parts = [key for key in PARTS if any(_at(layers, name, key) for layers in verified for name in names)]
    rows = []
    for name in names:
        levels = {key: _span([_at(layers, name, key) for layers in verified]) for key in parts}
        sqnr = [value for look in looks if isinstance(value := _at(look, name, "sqnr"), int | float)]
        error = f"{mean(sqnr):.1f}" if sqnr else ""
        rows.append({"name": name, "levels": levels, "sqnr": error, "more": _told(runs, name)})
    return {
        "rows": rows,
        "parts": {key: PARTS[key] for key in parts},
        "sqnr": any(row["sqnr"] for row in rows),
        "more": any(row["more"] for row in rows),
    }


def _span(levels: Sequence[Any]) -> str:
    """Write `3-4 of 4` over runs."""
    ends = []
    for key in ("found", "allowed"):
        own = sorted(count for level in levels if isinstance(count := _at(level, key), int))
        ends += ["-".join(map(str, dict.fromkeys((own[0], own[-1]))))] if own else []
    return " of ".join(ends)


def _told(runs: Sequence[Result], name: str) -> str:
    """Write what a layer's quantizers tell of themselves, of the first run that has it."""
    own: dict[str, Any] = next((told for run in runs if isinstance(told := _at(run.quantizers, name), dict)), {})
    parts = [(slot, values) for slot, values in own.items() if isinstance(values, dict)]
    return ", ".join(
        f"{slot}.{key} {value:.4g}" if isinstance(value, float) else f"{slot}.{key} {value}"
        for slot, values in parts
        for key, value in values.items()
    )


def _curve(lines: Mapping[str, SeedCurve]) -> dict[str, Any] | None:
    """Return a cell's learning curve as points of a small picture; None where there is none."""
    if not lines:
        return None
    width, height, left, below = BOX
    xs = [x for line in lines.values() for x in line.x]
    first, last = min(*xs, 0 if BASELINE in lines else 1), max(*xs, 1)
    low, high = (
        min(y for line in lines.values() for y in line.low),
        max(y for line in lines.values() for y in line.high),
    )
    span = (high - low) or 1.0

    def at(x: float, y: float) -> str:
        right = left + (width - left - 8) * (x - first) / ((last - first) or 1)
        return f"{right:.1f},{6 + (height - below - 12) * (high - y) / span:.1f}"

    drawn = []
    for key, line in lines.items():
        ends = [at(x, y) for x, y in zip(line.x, line.high, strict=True)]
        ends += [at(x, y) for x, y in reversed(list(zip(line.x, line.low, strict=True)))]
        middle = " ".join(at(x, y) for x, y in zip(line.x, line.mean, strict=True))
        drawn.append({"kind": "float" if key == BASELINE else "own", "line": middle, "band": " ".join(ends)})
    ends = [f"{key}: {line.mean[0]:.1f} to {line.mean[-1]:.1f} in {len(line.x)}" for key, line in lines.items()]
    border = at(0.5, low).partition(",")[0] if first < 1 else None
    marks = {"low": f"{low:.0f}", "high": f"{high:.0f}", "first": str(1), "last": str(last)}
    return {"lines": drawn, "told": "; ".join(ends), "border": border, "box": BOX, "marks": marks, "stages": 1 - first}
