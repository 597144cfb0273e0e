#!/usr/bin/env python3
"""Writes conf/experiment/<paper>/<row>.yaml for every row of the ledger that has a recipe and a network in qbench.

    .venv/bin/python scripts/experiments.py [--check]

Files that no row stands for any more are removed; --check writes nothing and lists what is not as it would be written.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from qbench.papers import published as ledger
from qbench.papers.lint import lint
from qbench.papers.rows import PAPER, PROVENANCES, REPOSITORY, THIRD, Paper, Recipe, Row, names, rows

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
WIDTH = 118
KNOWN = dict(zip(PROVENANCES, (
    "read in the source", "read in another's quotation", "remembered with high confidence, not checked",
    "remembered with medium confidence, not checked", "remembered with low confidence, not checked",
    "the figure is not known here",
), strict=True))  # fmt: skip
RAN = {PAPER: "the authors, in their paper", REPOSITORY: "the authors, in their repository"}
METRICS = {
    "top1": "% top-1 accuracy", "top5": "% top-5 accuracy", "top1_error": "% top-1 error",
    "top5_error": "% top-5 error", "top1_error_increase": "points more top-1 error than float",
    "top5_error_increase": "points more top-5 error than float",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/experiments.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    wanted = experiments()
    stale = [path for path in written() if path not in wanted]
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in [] if check else changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    for path in [] if check else stale:
        path.unlink()
    for path in (*changed, *stale) if check else ():
        print(f"{path.relative_to(ROOT)}: not as the ledger has it; run scripts/experiments.py", file=sys.stderr)
    for finding in (unsound := lint(rows(), names())):
        print(finding, file=sys.stderr)
    print(f"{len(wanted)} experiments, {len(changed)} changed, {len(stale)} removed")
    return 1 if unsound or (check and (changed or stale)) else 0


def written() -> list[Path]:
    """Return the experiment files there are of the ledger's papers."""
    return sorted(path for paper in ledger.papers() for path in (CONF / "experiment" / paper.key).glob("*.yaml"))


def experiments() -> dict[Path, str]:
    """Return the text of every experiment file by its path; a top-5 figure stands in its row's file."""
    found = {}
    for paper in ledger.papers():
        for row in paper.rows:
            if not row.of and not ledger.missing_requirements(row):
                second = [other for other in paper.rows if other.of == row.id]
                found[CONF / "experiment" / paper.key / f"{row.id}.yaml"] = experiment(paper, row, second)
    return found


def experiment(paper: Paper, row: Row, second: Iterable[Row]) -> str:
    """Return the text of a row's file."""
    recipe = paper.recipes[row.recipe]
    said = [
        line
        for text in said_of(paper, row, second, recipe)
        for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False)
    ]
    head = ["# @package _global_", *(f"# {line}" for line in said)]
    head.append(f"#   qbench experiment={paper.key}/{row.id}")
    choices, keys = parted(ledger.words(row))
    body = ["defaults:", *(f"  - override /{group}: {name}" for group, name in choices.items())]
    body.append(yaml.safe_dump(keys, sort_keys=False, width=WIDTH, default_flow_style=None).rstrip())
    return "\n".join(["\n".join(head), *body]) + "\n"


def said_of(paper: Paper, row: Row, second: Iterable[Row], recipe: Recipe) -> list[str]:
    """Return what is claimed, by whom, how well it is known, and what the recipe takes or leaves."""
    known = names()
    widths = f"W{row.bits.w} A{row.bits.a} G{row.bits.g}" + (f", {row.levels} levels" if row.levels else "")
    where = f"{known.nets[row.net]['title']} on {known.datasets[row.dataset]['title']}"
    method = "" if row.method == paper.key else f", {known.methods[row.method]}"
    figures = "; ".join(figure(each) for each in (row, *second))
    ran = RAN.get(row.ran_by) or row.ran_by.replace(THIRD, "a third party, ")
    note = [f"{sentence(row.note)}."] if row.note else []
    opened = [f"Left open, and what is taken: {'; '.join(recipe.open)}."] if recipe.open else []
    departs = [f"Otherwise than there: {'; '.join(recipe.departs)}."] if recipe.departs else []
    return [
        f"{paper.name}, {row.table}: {where}{method}, {widths}: {figures}.",
        f"Ran by: {ran}. Provenance: {row.provenance} ({KNOWN[row.provenance]}); source: {row.source}.",
        *note,
        f"Layers: {row.policy}. Recipe: {recipe.provenance}; source: {recipe.source}.",
        *opened,
        *departs,
    ]


def figure(row: Row) -> str:
    claim = "not known" if row.value is None else f"{ledger.claimed(row)} {METRICS[row.metric]}"
    if row.baseline is None or row.method == "float":
        return claim
    return f"{claim} (float {ledger.baseline_mark(row)}{ledger.number(row.baseline)})"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def parted(words: Iterable[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Part words of a command line into choices of groups and nested keys; of two that say the same the last counts."""
    choices: dict[str, str] = {}
    keys: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if is_group(key):
            choices[key] = text
            continue
        *way, leaf = key.split(".")
        node = keys
        for part in way:
            node = node.setdefault(part, {})
        node[leaf] = value(text)
    return choices, keys


def is_group(key: str) -> bool:
    return (CONF / key.partition("@")[0]).is_dir()


def value(text: str) -> Any:
    """Read a word's value as YAML does, and 1e-5 as the number it is on a command line."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else yaml.safe_load(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
