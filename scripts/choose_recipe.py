#!/usr/bin/env python3
"""Choose the optimizer of the shared recipe by the mean validation accuracy of several methods.

    .venv/bin/python scripts/choose_recipe.py [KEY=VALUE ...] [--record FILE]    # trains runs that are not stored
    .venv/bin/python scripts/choose_recipe.py --from FILE                        # trains nothing

A recipe is a value of `optim`, which sets optimizer, learning rates and schedule. The score of a recipe is the mean of
validation top-1 after the last epoch, over methods and seeds. The recipe with the best score is chosen. Test accuracies
are neither read nor shown.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from qbench.report.comparison.setting import estimate
from qbench.report.tables.table import Table, markdown
from qbench.runs.reader import DONE, RunRecord, dump_records, read

RECIPES = ("unified", "adam", "adam_cosine", "sgd")
"""Values of `optim`."""
WORDS = {
    "method": "method=dorefa,lsq,ttq,hwgq,inq",
    "seed": "seed=0,1,2,3,4",
    "optim": f"optim={','.join(RECIPES)}",
    "out": "out=outputs/recipe",
    "runtime.tensorboard": "runtime.tensorboard=false",
}
"""Overrides of the sweep. An override on the command line replaces the override with the same key."""
SOME_FAILED = 8


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/choose_recipe.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="overrides of qbench, such as dataset=glyphs")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the runs")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read the runs from such a file")
    options = parser.parse_args(arguments)
    words = WORDS | {word.partition("=")[0]: word for word in options.keys}
    command = ["-m", *words.values(), "hydra/launcher=joblib"]
    if options.source is None:
        status = subprocess.run([sys.executable, "-m", "qbench", *command]).returncode
        if status not in (0, SOME_FAILED):
            return status
    runs = read([str(options.source or words["out"].partition("=")[2])])
    if options.record:
        options.record.write_text(dump_records(runs) + "\n", encoding="utf-8")
    table, chosen = recipe_table(runs)
    print(f"qbench {' '.join(command)}\n\n{markdown([table])}\n\nchosen on validation: {chosen}")
    return 0


def recipe_table(runs: Sequence[RunRecord]) -> tuple[Table, str]:
    """Return a table of mean validation top-1 by recipe and setting, and the recipe with the best mean.

    A setting is a method with its widths. Only pairs of setting and seed that have a run with every recipe are used.

    Raises:
        SystemExit: no pair of setting and seed has a run with every recipe.
    """
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    done = [run.result for run in runs if run.status == DONE and run.result and run.result.method != "float"]
    for result, name in zip(done, recipe_names([result.protocol.keys["optim"] for result in done]), strict=True):
        if result.final and result.final.val:
            found[name][f"{result.method} {result.widths}", result.seed] = result.final.val.top1
    common = set.intersection(*map(set, found.values())) if found else set()
    if not common:
        raise SystemExit("no setting and seed has a validation accuracy with each of the recipes")
    settings = sorted({setting for setting, _ in common})
    table = Table(("recipe", *settings, "mean", "95 % CI over settings"))
    means = {}
    for recipe, accuracies in sorted(found.items()):
        by_setting = [mean(accuracies[key] for key in common if key[0] == setting) for setting in settings]
        score = estimate(by_setting)
        means[recipe] = score.mean
        half = f"±{score.ci95_half:.2f}" if score.ci95_half else "-"
        table.rows.append((recipe, *(f"{x:.2f}" for x in by_setting), f"{score.mean:.2f}", half))
    return table, max(means, key=lambda recipe: means[recipe])


def recipe_names(recipes: Sequence[dict[str, object]]) -> list[str]:
    """Return a text for each recipe, with the keys that differ between recipes."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    differing = [key for key in keys if len({json.dumps(recipe.get(key)) for recipe in recipes}) > 1]
    shown = dict.fromkeys(["name", "lr", "schedule", *differing])
    return [json.dumps({k: recipe.get(k) for k in shown}, separators=(", ", "=")).strip("{}") for recipe in recipes]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
