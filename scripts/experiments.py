#!/usr/bin/env python3
"""Write conf/experiment/<paper>/<row>.yaml for every published row that qbench can run.

    .venv/bin/python scripts/experiments.py [--check]

Experiment files without a published row are removed. With --check, nothing is written. The script then lists the files
that would change, and exits with status 1 if there are any.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from qbench.papers import published_table as published
from qbench.papers.lint import lint
from qbench.papers.published_figures import names, papers, published_rows
from qbench.papers.row_types import PAPER, PROVENANCES, REPOSITORY, THIRD, Paper, PublishedRow, Recipe

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
WIDTH = 118
PROVENANCE_TEXTS = dict(zip(PROVENANCES, (
    "read in the source", "read in a quotation by others", "from memory with high confidence, not checked",
    "from memory with medium confidence, not checked", "from memory with low confidence, not checked",
    "the number is not known here",
), strict=True))  # fmt: skip
AFTER_TRAINING = "method.trained=false"
RAN_BY = {PAPER: "the authors, in their paper", REPOSITORY: "the authors, in their repository"}
METRICS = {
    "top1": "% top-1 accuracy", "top5": "% top-5 accuracy", "top1_error": "% top-1 error",
    "top5_error": "% top-5 error", "top1_error_increase": "points more top-1 error than float",
    "top5_error_increase": "points more top-5 error than float",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/experiments.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and list the files that would change")
    check = parser.parse_args(arguments).check
    wanted = experiments()
    stale = [path for path in existing_files() if path not in wanted]
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in [] if check else changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    for path in [] if check else stale:
        path.unlink()
    for path in (*changed, *stale) if check else ():
        print(f"{path.relative_to(ROOT)}: differs from the published rows; run scripts/experiments.py", file=sys.stderr)
    for finding in (findings := lint(published_rows(), names())):
        print(finding, file=sys.stderr)
    print(f"{len(wanted)} experiments, {len(changed)} changed, {len(stale)} removed")
    return 1 if findings or (check and (changed or stale)) else 0


def existing_files() -> list[Path]:
    """Return the existing experiment files of all papers that have published rows."""
    return sorted(path for paper in papers() for path in (CONF / "experiment" / paper.key).glob("*.yaml"))


def experiments() -> dict[Path, str]:
    """Return the text of every experiment file, by path. The file of a top-1 row also states the top-5 value."""
    texts = {}
    for paper in papers():
        for row in paper.rows:
            if not row.top5_of and not published.missing_requirements(row):
                top5 = [other for other in paper.rows if other.top5_of == row.id]
                texts[CONF / "experiment" / paper.key / f"{row.id}.yaml"] = experiment_text(paper, row, top5)
    return texts


def experiment_text(paper: Paper, row: PublishedRow, top5: Iterable[PublishedRow]) -> str:
    """Return the text of a row's experiment file."""
    comments = [
        line
        for text in comment_texts(paper, row, top5, paper.recipes[row.recipe])
        for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False)
    ]
    head = ["# @package _global_", *(f"# {line}" for line in comments)]
    head.append(f"#   qbench experiment={paper.key}/{row.id}")
    choices, keys = split_words(published.command_words(row))
    body = ["defaults:", *(f"  - override /{group}: {name}" for group, name in choices.items())]
    body.append(yaml.safe_dump(keys, sort_keys=False, width=WIDTH, default_flow_style=None).rstrip())
    return "\n".join(["\n".join(head), *body]) + "\n"


def comment_texts(paper: Paper, row: PublishedRow, top5: Iterable[PublishedRow], recipe: Recipe) -> list[str]:
    """Return the comments of an experiment file.

    The comments state the published value, who measured it, its provenance, and how the recipe differs from its source.
    """
    widths = f"W{row.bits.w} A{row.bits.a} G{row.bits.g}" + (f", {row.levels} levels" if row.levels else "")
    place = f"{names().nets[row.net].title} on {names().datasets[row.dataset].title}"
    method = "" if row.method == paper.key else f", {names().methods[row.method]}"
    if AFTER_TRAINING in published.command_words(row):
        method = ", quantized after training"
    layers = "" if row.method == "float" else f"Layers: {row.policy}. "
    claims = "; ".join(claim_text(each) for each in (row, *top5))
    ran_by = RAN_BY.get(row.ran_by) or row.ran_by.replace(THIRD, "a third party, ")
    note = [f"{capitalized(row.note)}."] if row.note else []
    opened = [f"Open questions and our choices: {sentences(recipe.open)}"] if recipe.open else []
    departs = [f"Differences from the source: {sentences(recipe.departs)}"] if recipe.departs else []
    provenance = f"{row.provenance} ({PROVENANCE_TEXTS[row.provenance]})"
    return [
        f"{paper.name}, {row.table}: {place}{method}, {widths}: {claims}.",
        f"Run by: {ran_by}. Provenance: {provenance}. Source: {row.source}.",
        *note,
        f"{layers}Source of the recipe: {recipe.source} ({recipe.provenance}).",
        *opened,
        *departs,
    ]


def claim_text(row: PublishedRow) -> str:
    """Return a text that states a row's value, its metric and its float baseline."""
    claim = "not known" if row.value is None else f"{published.format_claim(row)} {METRICS[row.metric]}"
    if row.baseline is None or row.method == "float":
        return claim
    return f"{claim} (float {published.baseline_mark(row)}{published.format_percent(row.baseline)})"


def sentences(texts: Iterable[str]) -> str:
    return " ".join(f"{capitalized(text)}." for text in texts)


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def split_words(words: Iterable[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Split command-line overrides into options of groups and nested keys. The last override of a key is used."""
    choices: dict[str, str] = {}
    keys: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if is_group(key):
            choices[key] = text
            continue
        *nodes, leaf = key.split(".")
        node = keys
        for name in nodes:
            node = node.setdefault(name, {})
        node[leaf] = parse_value(text)
    return choices, keys


def is_group(key: str) -> bool:
    return (CONF / key.partition("@")[0]).is_dir()


def parse_value(text: str) -> Any:
    """Return the value of an override, parsed as YAML. As on the command line, 1e-5 is a number."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else yaml.safe_load(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
