#!/usr/bin/env python3
"""One table: every method at 2, 3 and 4 bits a weight under one recipe, and the control of equal bytes.

    .venv/bin/python scripts/unified.py [KEY=VALUE ...] [--format md]

By default CIFAR-10, ResNet-20, all methods, float activations, seeds 0 to 2; keys of qbench replace that
(dataset=glyphs method=dorefa,ttq seed=0,1,2,3,4). The control is what the same bytes buy without the method: for every
quantized network the float network and the 8-bit one (uniform, min-max) with the largest model.width whose bytes do not
exceed the quantized network's, trained by the same recipe for the same epochs. What is stored is not trained again.

`--record FILE` keeps the figures, `--from FILE` prints the tables of those kept and runs nothing.
"""

import argparse
import copy
import json
import os
import platform
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qbench.report.tables.columns import si_format

from qbench.config import compose, groups
from qbench.config.schema import Config
from qbench.errors import ConfigError, Interrupted, QbenchError
from qbench.experiment import jobs, sweep
from qbench.experiment.planned_run import planned_runs
from qbench.report.comparison.compare import compare
from qbench.report.statistics.differences import Difference, paired
from qbench.report.tables.table import FORMATS, Table
from qbench.runs.reader import DONE, RunRecord, dump_records, load_records, with_baselines
from qbench.system.signals import stop_on_signals

DEFAULTS = {"dataset": "cifar10", "model": "resnet20", "bits": "w2a32,w3a32,w4a32", "seed": "0,1,2"}
DEFAULTS |= {"out": "outputs/unified", "runtime.tensorboard": "false"}
CONTROLS = {
    "float": {"method": "float", "bits": "w32a32", "init": "float"},
    "8-bit": {"method": "uniform", "bits": "w8a32"},
}
"""What the same bytes are spent on instead. Both start from a float parent of their own width, as the methods do from
theirs, and train as long again: `init=float` makes the float network a fine-tuned one."""

HEAD = (
    *("method", "W", "A", "levels", "bits/weight", "width", "bytes", "top-1 %", "std", "n", "diff"),
    *(f"over {kind}" for kind in CONTROLS),
)
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/unified.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--from", dest="kept", type=Path, metavar="FILE")
    asked = parser.parse_args(arguments)
    try:
        with stop_on_signals() as stop:
            launcher = [key for key in asked.keys if key.startswith("hydra")]
            found = load_records(asked.kept) if asked.kept else train(words_of(asked.keys), launcher, stop)
    except QbenchError as error:
        print(f"scripts/unified.py: {error}", file=sys.stderr)
        return error.status
    note = json.loads(asked.kept.read_text())["note"] if asked.kept else footer(asked.keys, found)
    if asked.record:
        asked.record.write_text(
            json.dumps(json.loads(dump_records(found)) | {"note": note}, separators=(",", ":")) + "\n"
        )
    print(FORMATS[asked.format](tables(found)))
    if asked.format == "md":
        print(f"\n{note}")
    return 8 if any(run.status not in (DONE, "unsupported") for run in found) else 0


def words_of(typed: Iterable[str]) -> dict[str, str]:
    """Return the keys of the quantized networks, those typed in the place of the defaults."""
    keys = dict(word.partition("=")[::2] for word in typed if not word.startswith("hydra"))
    if "init" in keys:
        raise ConfigError(f"init={keys['init']}: here every network starts from its float parent\nleave init out")
    methods = [name for name in groups.option_names("method") if name != "float"]
    return {"method": ",".join(methods)} | DEFAULTS | keys


def composed(words: dict[str, str]) -> list[Config]:
    """Return the configurations of a sweep."""
    return compose.configurations(["-m", *(f"{key}={value}" for key, value in words.items())])


def train(words: dict[str, str], launcher: list[str], stop: Callable[[], int]) -> list[RunRecord]:
    """Run what is not stored, first the methods, then the controls that their bytes ask for; return all, with parents.

    Raises:
        Interrupted: a signal asked to stop.
    """
    cells = composed(words)
    controls = {kind: composed(words | keys) for kind, keys in CONTROLS.items()}
    if "width" not in controls["float"][0].model:
        raise ConfigError(f"model={words['model']} has no key `width`: its control cannot be narrowed")
    found = run([*cells, *controls["float"]], launcher, stop)
    budgets = {row["bytes"] for row in rows_of(list(found.values())) if row["role"] == "cell" and row["bytes"]}
    narrow = [at_width(config, width) for kind, width in wanted(budgets, controls) for config in controls[kind]]
    return with_baselines(list((found | run(narrow, launcher, stop)).values()))


def run(configs: list[Config], launcher: list[str], stop: Callable[[], int]) -> dict[Path, RunRecord]:
    runs = planned_runs(configs)
    if any(not planned.directory.stored() for planned in runs):
        sweep.launch_all(launcher, runs, "joblib", stop)
    if stop():
        raise Interrupted(f"stopped by signal {stop()}; the same command goes on from here")
    return {planned.path: jobs.outcome(planned) for planned in runs}


def wanted(budgets: Iterable[float], controls: dict[str, list[Config]]) -> list[tuple[str, int]]:
    """Return the controls, (kind, width), that some bytes ask for."""
    from qbench.experiment.setup import assemble

    parts = {kind: assemble(configs[0], planned=True) for kind, configs in controls.items()}
    found = {(kind, narrowed(parts[kind], budget)) for kind in parts for budget in budgets}
    return sorted((kind, width) for kind, width in found if width)


def narrowed(parts: Any, budget: float) -> int:
    """Return the largest `model.width`, up to the network's own, whose bytes are not above a budget; 0: none is."""
    widths = range(1, parts.config.model["width"] + 1)
    return bisect_right(widths, budget, key=lambda width: bytes_at(parts, width))


def bytes_at(parts: Any, width: int) -> float:
    """Return the ideal bytes of a run's network at a width, built without memory (meta tensors)."""
    from qbench.cost.count import count_cost

    narrow = replace(parts, config=at_width(parts.config, width))
    return float(count_cost(narrow.install(narrow.float_model("meta")), {})["bytes_ideal"])


def at_width(config: Config, width: int) -> Config:
    return replace(copy.deepcopy(config), model=config.model | {"width": width})


def rows_of(found: Sequence[RunRecord]) -> list[Row]:
    """Return the rows of `qbench compare`, each with its network's width, its figure for every seed, and its role:
    cell, parent or a kind of control; cells with their controls and the differences, paired by seed.
    """
    results = {run.result.run: run.result for run in found if run.status == DONE and run.result}
    rows: list[Row] = []
    for values in (v for table in compare(found) for v in table.values if "top1_mean" in v):
        own = [results[name] for name in values["runs"] if name in results]
        if not own:  # a parent whose directory is gone
            continue
        first, keys = own[0], own[0].protocol.keys
        role = "8-bit" if (first.method, first.bits["w"]) == ("uniform", 8) else "cell"
        if first.method == "float":
            role = "parent" if keys["init"] == "scratch" else "float"
        figures = {r.seed: r.final.test.top1 for r in own if r.final}
        rows.append(values | {"role": role, "width": keys["model"]["width"], "by_seed": figures})
    for row in rows:
        row["against"] = {kind: against(row, kind, rows) for kind in CONTROLS} if row["role"] == "cell" else {}
    return rows


def against(row: Row, kind: str, rows: Iterable[Row]) -> tuple[Row, Difference] | None:
    """Return the widest control of a kind whose bytes are not above a row's, and by how much the row is above it."""
    fitting = [r for r in rows if r["role"] == kind and (r["bytes"] or 0) <= (row["bytes"] or -1)]
    for control in sorted(fitting, key=lambda r: -r["width"])[:1]:
        if seeds := sorted(row["by_seed"].keys() & control["by_seed"].keys()):
            return control, paired(*([r["by_seed"][seed] for seed in seeds] for r in (row, control)))
    return None


def tables(found: Sequence[RunRecord]) -> list[Table]:
    """Return a table of the float network, one for every width of weights with its controls below, and one of the runs
    without a figure.
    """
    rows, compared = rows_of(found), compare(found)
    full = max((row["width"] for row in rows), default=0)
    whole = [row for row in rows if row["role"] in ("parent", "float") and row["width"] == full]
    made = [table_of("Float", whole, full)]
    for bits in sorted({row["bits"]["w"] for row in rows if row["role"] == "cell"}):
        block = [row for row in rows if row["role"] == "cell" and row["bits"]["w"] == bits]
        pairs = [row["against"][kind] for kind in CONTROLS for row in block]
        used = {id(pair[0]): pair[0] for pair in pairs if pair}
        title = f"{bits} bits a weight, and below what else the same bytes buy"
        made.append(table_of(title, [*block, *used.values()], full))
        made[-1].notes = [sentence(kind, block) for kind in CONTROLS]
    made[-1].notes += dict.fromkeys(note for table in compared for note in table.notes)
    return made + [table for table in compared if any("status" in values for values in table.values)]


def table_of(title: str, rows: list[Row], full: int) -> Table:
    return Table(HEAD, [shown(row, full) for row in rows], [plain(row) for row in rows], title)


def sentence(kind: str, block: list[Row]) -> str:
    """Say which methods of a width are above their controls of one kind, which below, and which cannot be told."""
    told: dict[str, list[str]] = {"above": [], "below": [], "not told apart": []}
    pairs = [(row, *row["against"][kind]) for row in block if row["against"][kind]]
    if not pairs:
        return f"W{block[0]['bits']['w']}: no {kind} network within these bytes"
    for row, _, d in pairs:
        told["above" if d.low > 0 else "below" if d.high < 0 else "not told apart"].append(row["method"])
    parts = sorted(round(100 * control["bytes"] / row["bytes"]) for row, control, _ in pairs)
    between = f"{parts[0]} % to {parts[-1]} %" if parts[0] < parts[-1] else f"{parts[0]} %"
    said = "; ".join(f"{side}: {', '.join(names) or 'none'}" for side, names in told.items())
    return f"W{block[0]['bits']['w']} against the {kind} network within their bytes ({between} of them): {said}"


def shown(row: Row, full: int) -> tuple[str, ...]:
    """Return a row's cells, as HEAD names them."""
    names = {"float": "float, fine-tuned", "8-bit": "8-bit (uniform)"}
    label: str = names.get(row["role"]) or row["method"]
    pairs = [row["against"].get(kind) for kind in CONTROLS]
    return (
        label + (", narrowed" if row["width"] < full else ""),
        *(str(row["bits"][key]) for key in "wa"),
        str(row["levels"] or "-"),
        "-" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}",
        str(row["width"]),
        "-" if row["bytes"] is None else f"{si_format(row['bytes'])}B",
        f"{row['top1_mean']:.2f}",
        "-" if row["top1_std"] is None else f"{row['top1_std']:.2f}",
        str(row["n"]),
        "-" if row["diff_mean"] is None else f"{row['diff_mean']:+.2f}",
        *("-" if pair is None else distance(pair[1]) for pair in pairs),
    )


def distance(d: Difference) -> str:
    return f"{d.mean:+.2f}" + (f" ±{d.high - d.mean:.2f}" if d.n > 1 else "")


def plain(row: Row) -> Row:
    """Return a row's values for JSON."""
    found = {key: value for key, value in row.items() if key != "against"}
    for kind, pair in row["against"].items():
        found[f"over {kind}"] = pair and {
            "width": pair[0]["width"],
            "mean": pair[1].mean,
            "interval": [pair[1].low, pair[1].high] if pair[1].n > 1 else None,
        }
    return found


def footer(typed: Sequence[str], found: Sequence[RunRecord]) -> str:
    """Say what was run and how long it took; where runs lie and how many work at a time decides nothing: left out."""
    seconds = [run.result.wall_seconds or 0 for run in found if run.result and run.status == DONE]
    times = [file.stat().st_mtime for run in found for file in run.path.glob("*.json")]
    command = " ".join(["scripts/unified.py", *(word for word in typed if not word.startswith(("out=", "hydra")))])
    return (
        f"`{command}`: {len(seconds)} runs with a figure, float parents included; {max(times) - min(times):.0f} s from "
        f"first to last and {sum(seconds):.0f} s of work, one thread a run ({os.cpu_count()} cores, "
        f"{platform.machine()}, {platform.system()}, torch {version('torch')})."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
