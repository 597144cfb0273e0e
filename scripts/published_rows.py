#!/usr/bin/env python3
"""Measure published rows with their own recipes, and write qbench/papers/measured.yaml.

    .venv/bin/python scripts/published_rows.py --root DATA [ROW ...]    # runs what is missing, then writes the file
    .venv/bin/python scripts/published_rows.py --from-records [--check]  # writes the file, and runs nothing

ROW is a name of `qbench published`, such as gupta/mnist_cnn_float. By default, the rows in ROWS are run. The results
are stored in docs/records/published.json after every run, and stored runs are not repeated. If the script was stopped,
the same command therefore continues it.

A row also gets the result of scripts/cifar10.py (docs/records/cifar10.json) with the row's method, widths, data set and
network, unless an option differs that distinguishes rows of the paper. The recipe of these runs differs from the row's
recipe, and measured.yaml lists the differences. If there are runs with the row's own recipe, only these count.
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import yaml
from cifar10 import stored_results, train

from qbench.config import compose
from qbench.errors import QbenchError
from qbench.experiment.planned_run import planned_runs
from qbench.papers.published_figures import MEASURED, names, published_rows
from qbench.papers.published_table import missing_requirements
from qbench.papers.recipe_differences import departures
from qbench.papers.row_types import PublishedRow
from qbench.runs.reader import DONE, RunRecord
from qbench.runs.result import Result

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "records"
OWN_RECIPES, ONE_RECIPE = RECORDS / "published.json", RECORDS / "cifar10.json"
ROWS = (
    "gupta/mnist_mlp_float", "gupta/mnist_mlp_nearest_fl14", "gupta/mnist_mlp_nearest_fl10",
    "gupta/mnist_mlp_nearest_fl8", "gupta/mnist_mlp_stochastic_fl14", "gupta/mnist_mlp_stochastic_fl10",
    "gupta/mnist_mlp_stochastic_fl8", "gupta/mnist_cnn_float", "gupta/mnist_cnn_stochastic_fl14",
    "gupta/mnist_cnn_stochastic_fl12", "gupta/mnist_cnn_nearest_fl12",
)  # fmt: skip
"""The rows that are run by default. Their recipes are short enough for one core."""
HEAD = (
    "# Measurements of published rows. scripts/published_rows.py writes this file from the records in docs/records/.\n"
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/published_rows.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="ROW", help="the rows to run")
    parser.add_argument("--root", default="data", help="the folder that contains the data sets")
    parser.add_argument("--out", default="outputs/published", help="folder of all runs")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--record", type=Path, default=OWN_RECIPES, metavar="FILE", help="store the results in FILE")
    parser.add_argument("--from-records", action="store_true", help="run nothing")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and say whether measured.yaml would change"
    )
    options = parser.parse_args(arguments)
    try:
        if not (options.from_records or options.check):
            run(options)
        text = measured_text([ONE_RECIPE, options.record])
    except QbenchError as error:
        print(f"scripts/published_rows.py: {error}", file=sys.stderr)
        return error.status
    changed = text != MEASURED.read_text("utf-8")
    if not options.check:
        MEASURED.write_text(text, encoding="utf-8")
    elif changed:
        print(
            "qbench/papers/measured.yaml is out of date: run scripts/published_rows.py --from-records", file=sys.stderr
        )
    print(f"{len(yaml.safe_load(text))} rows, {'changed' if changed else 'unchanged'}")
    return 1 if options.check and changed else 0


def run(options: argparse.Namespace) -> None:
    """Do the runs that are not stored yet: all rows of the first seed, then of the second, and so on."""
    shared = [f"dataset.root={options.root}", f"out={options.out}", "runtime.tensorboard=false"]
    configs = [
        config
        for seed in options.seeds.split(",")
        for row in options.rows
        for config in compose.configurations([f"experiment={row}", f"seed={seed}", *shared])
    ]
    train(planned_runs(configs), options.record, [Path(options.out).parent], note_on)


def note_on(records: Sequence[RunRecord]) -> str:
    """Return a sentence that says how the runs were trained."""
    return (
        f"{sum(run.status == DONE for run in records)} runs of published recipes, which scripts/published_rows.py "
        f"trained ({platform.machine()}, {platform.system()}, torch {version('torch')})."
    )


def measured_text(records: Iterable[Path]) -> str:
    """Return the content of measured.yaml. If a row is in several records, the runs of the last record count."""
    content: dict[str, dict[str, object]] = {}
    for record in records:
        results = [run.result for run in stored_results(record)[0] if run.status == DONE and run.result]
        for row in published_rows():
            if not (row.top5_of or missing_requirements(row)) and (entry := measurement(row, results)):
                content[f"{row.paper}/{row.id}"] = entry | {"source": str(record.relative_to(ROOT))}
    return HEAD + yaml.safe_dump(content, sort_keys=True, width=1000)


def measurement(row: PublishedRow, results: Iterable[Result]) -> dict[str, object] | None:
    """Return the mean over the runs of a row, or None if there are no such runs.

    If the runs have several recipes, the recipe with the fewest differences from the row's recipe is selected.
    """
    others = [each for each in published_rows(row.paper) if (each.method, each.net) == (row.method, row.net)]
    distinguishing = {word.partition("=")[0] for each in others for word in each.words}
    by_recipe: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if _has_setting(result, row):
            differences = tuple(departures(result, row))
            keys = {text.partition("=")[0] for text in differences}
            if not any(key.startswith("method.") and key in distinguishing for key in keys):
                by_recipe.setdefault(differences, []).append(result)
    if not by_recipe:
        return None
    departs = min(by_recipe, key=len)
    values = [_in_metric(row, result.top1, result.baseline_top1) for result in by_recipe[departs]]
    baselines = [b for r in by_recipe[departs] if (b := r.baseline_top1) is not None and row.method != "float"]
    return {
        "value": round(statistics.mean(values), 3),
        "n": len(values),
        "spread": round(statistics.stdev(values), 3) if len(values) > 1 else None,
        "baseline": round(_in_metric(row, statistics.mean(baselines), None), 3) if baselines else None,
        "departs": list(departs),
    }


def _has_setting(result: Result, row: PublishedRow) -> bool:
    """Return whether a run has the method, widths, data set and network of a row."""
    return (
        result.method == row.method
        and tuple(result.bits[key] for key in "wag") == (row.bits.w, row.bits.a, row.bits.g)
        and f"dataset={result.dataset}" in names().datasets[row.dataset].words
        and f"model={result.model}" in names().nets[row.net].words
    )


def _in_metric(row: PublishedRow, top1: float | None, baseline: float | None) -> float:
    """Return a top-1 accuracy in the row's metric. `baseline` is needed only if the metric is an increase in error."""
    assert top1 is not None
    if not row.metric.endswith("increase"):
        return row.accuracy(top1)  # 100 - error and 100 - accuracy are the same function
    return 0.0 if baseline is None else baseline - top1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
