#!/usr/bin/env python3
"""Writes docs/papers.md, a survey, from the methods' cards, the ledger, the claims and deviations, docs/papers.yaml.

    .venv/bin/python scripts/papers.py [--check]

--check writes nothing and says what is not as it would be written.
"""

import argparse
import ast
import difflib
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from qbench.papers.claims import Claim

from qbench.config import registry
from qbench.config.fields import parse_bits
from qbench.papers import claims as kept
from qbench.papers import published as ledger
from qbench.papers.rows import PAPER, PROVENANCES, REPOSITORY, THIRD, Paper, Row, names
from qbench.report.tables.table import Table, markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "papers.md"
WIDTH = 118
MOST = 6
"""Published rows that a paper's section shows."""
MEMORY = "from memory"
KINDS = {"w": "weights", "a": "activations", "g": "gradients"}
METRICS = {
    "top1": "top-1", "top5": "top-5", "top1_error": "top-1 error", "top5_error": "top-5 error",
    "top1_error_increase": "more top-1 error", "top5_error_increase": "more top-5 error",
}  # fmt: skip
VERDICTS = ("holds", "does not hold", "not separable")
Rows = list[dict[str, str]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/papers.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    wanted, there = page(), PAGE.read_text("utf-8") if PAGE.is_file() else ""
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != there:
        stale = difflib.unified_diff(there.splitlines(), wanted.splitlines(), "docs/papers.md", "now", n=0, lineterm="")
        print("docs/papers.md is not as its sources have it; run scripts/papers.py", *stale, sep="\n", file=sys.stderr)
    print(f"{len(wanted.splitlines())} lines, {'changed' if wanted != there else 'as they were'}")
    return 1 if check and wanted != there else 0


def page() -> str:
    """Return the whole page."""
    papers = sorted(ledger.papers(), key=lambda paper: (paper.year, paper.name.lower()))
    parts = [texts()["head"].format(most=MOST), overview(papers), *map(section, papers), controls(), *related()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


@cache
def texts() -> dict[str, Any]:
    """Return what docs/papers.yaml holds."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "papers.yaml").read_text(encoding="utf-8"))
    return found


# --- what belongs to a paper


def methods_of(paper: Paper) -> list[str]:
    """Return the methods whose cards name the paper's number at arXiv, those with most rows in the ledger first."""
    number, rows = paper.link.rpartition("/")[2], Counter(row.method for row in paper.rows)
    found = [name for name in registry.names("method") if number in cards()[name].get("Paper", "")]
    return sorted(found, key=lambda name: (-rows[name], name))


@cache
def cards() -> dict[str, dict[str, str]]:
    """Return every method's card: section -> text on one line, and its first line under `is`."""
    found = {}
    for name in registry.names("method"):
        card = registry.card(name)
        found[name] = {"is": card.partition("\n")[0]} | {k: flat(v) for k, v in registry.sections(card).items()}
    return found


@cache
def claims() -> list[Claim]:
    return kept.read_claims(ROOT / "conf" / "experiment" / "claims")


def claims_of(paper: Paper) -> list[Claim]:
    """Return the claims whose files name the paper."""
    return [claim for claim in claims() if paper.name in f"{claim.says} {claim.source}"]


@cache
def outcomes() -> dict[str, Rows]:
    """Return the rows of docs/claims.md's table by claim; `name` is that of the comparison, empty for a sole one."""
    found: dict[str, Rows] = {}
    for row in rows_of(ROOT / "docs" / "claims.md", "claim"):
        claim, _, name = row["claim"].partition(": ")
        found.setdefault(claim, []).append(row | {"name": name})
    return found


def rows_of(document: Path, first: str) -> Rows:
    """Return the rows, by their heads, of a document's tables whose first column is headed `first`."""
    head: list[str] = []
    found: Rows = []
    for line in document.read_text(encoding="utf-8").splitlines():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ") if line.startswith("| ") else []
        if cells and cells[0] == first:
            head = cells
        elif not cells or len(cells) != len(head):
            head = []
        elif not set(line) <= set("|-: "):
            found.append(dict(zip(head, cells, strict=True)))
    return found


def quantized(method: str) -> str:
    """Return the letters of what a method quantizes: all that its card does not hold at 32 bits."""
    held = "".join(re.findall(r"\b([wag](?:(?:, | and )[wag])*) (?:are )?32\b", cards()[method]["Bits"]))
    return "".join(letter for letter in KINDS if letter not in held)


def formulas(method: str) -> str:
    """Return the public functions of a method's module that take a tensor, or make one of numbers; where there are
    none, the methods whose functions it takes.
    """
    tree = ast.parse((ROOT / "qbench" / "methods" / f"{method}.py").read_text(encoding="utf-8"))
    found, taken = [], []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.args.args:
            first, made = (ast.unparse(it) if it else "" for it in (node.args.args[0].annotation, node.returns))
            if first == "Tensor" or (first in ("int", "float") and "Tensor" in made):
                found.append(f"`{node.name}`")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qbench.methods"):
            last = (node.module or "").rpartition(".")[2]
            taken += [last] if last != "methods" else [it.name for it in node.names]
    return ", ".join(found) or f"those of {' and '.join(map(linked, unique(taken)))}"


def own_bits(method: str) -> dict[str, int]:
    """Return the widths that a method's name stands for."""
    text = (ROOT / "conf" / "method" / f"{method}.yaml").read_text(encoding="utf-8")
    return dict.fromkeys(KINDS, 32) | {k: v or 32 for k, v in parse_bits(yaml.safe_load(text)["bits"]).items()}


def telling(paper: Paper) -> list[Row]:
    """Return the rows to show, by the rule that the page's head states."""
    mine = [r for r in paper.rows if r.method in methods_of(paper) and r.value is not None and not r.of]
    chosen: dict[tuple[str, str, str], Row] = {}
    for row in sorted(mine, key=rank):
        chosen.setdefault((row.method, row.dataset, row.net), row)
    return list(chosen.values())[:MOST]


def rank(row: Row) -> tuple[Any, ...]:
    widths = {"w": row.bits.w, "a": row.bits.a, "g": row.bits.g}
    who = next(i for i, kind in enumerate((PAPER, REPOSITORY, THIRD)) if row.ran_by.startswith(kind))
    known, second = PROVENANCES.index(row.provenance), "top5" in row.metric
    other, better = widths != own_bits(row.method), -row.accuracy(row.value or 0)
    return known, who, bool(ledger.missing_requirements(row)), second, other, sum(widths.values()), better


# --- parts of the page


def overview(papers: Sequence[Paper]) -> str:
    """Return the table of all papers."""
    head = ("paper", "year", "what is quantized", "methods", "verified", "second-hand", "~", "?", "run here")
    made = Table((*head, "comparisons: hold / opposite / open"))
    for paper in papers:
        known = Counter(told(row.provenance) for row in paper.rows)
        letters = {letter for method in methods_of(paper) for letter in quantized(method)}
        tested = [row["outcome"] for claim in claims_of(paper) for row in outcomes().get(claim.name, ())]
        verdicts = " / ".join(str(sum(one.startswith(verdict) for one in tested)) for verdict in VERDICTS)
        ran = sum(bool(row.measured) for row in paper.rows)
        cells = (str(known[key] or "") for key in ("verified", "second-hand", MEMORY, "unknown"))
        what = ", ".join(word for letter, word in KINDS.items() if letter in letters)
        name, methods = f"[{paper.name}](#{slug(paper.name)})", ", ".join(map(linked, methods_of(paper)))
        row = (name, str(paper.year), what, methods, *cells, f"{ran} of {len(paper.rows)}")
        made.rows.append((*row, verdicts if tested else "none"))
    return markdown([made]) + "\n\n" + texts()["columns"]


def section(paper: Paper) -> str:
    """Return a paper's section."""
    number, known = paper.link.rpartition("arxiv.org/abs/")[2], told(paper.affiliation_provenance)
    where = "Affiliation not known here" if known == "unknown" else f"{paper.affiliation} ({known})"
    authors = ", ".join(paper.authors)
    parts = [
        f"## {paper.name}",
        wrapped(f"**{paper.title}.** {authors}; {paper.year}; [arXiv {number}]({paper.link}). {where}."),
        wrapped(flat(paper.idea), "> ", "> "),
        "\n".join(map(of_method, methods_of(paper))),
        *(claimed(paper), measured(paper), deviations(paper), left_open(paper)),
    ]
    return "\n\n".join(part for part in parts if part)


def of_method(name: str) -> str:
    """Return what a method is, its idea and its formulas' home."""
    card = cards()[name]
    widths = card["Bits"].partition(". ")[0].removesuffix(".")
    home = f"Formulas: {formulas(name)}; the whole card: `qbench describe {name}`; [picture](pictures/{name}.png)."
    return "\n".join([bullet(f"{linked(name)}: {card['Idea']}"), inner(f"Widths: {widths}."), inner(home)])


def claimed(paper: Paper) -> str:
    """Return the telling rows, with our figures where there are any, and how many more rows there are."""
    shown = telling(paper)
    ours = any(row.measured for row in shown)
    head = ("row", "network, data", "widths", "measure", "claimed", "float", "to float", "ran by", "provenance")
    made = Table((*head, "ours") if ours else head)
    for row in shown:
        net, dataset = names().nets[row.net]["title"], names().datasets[row.dataset]["title"]
        mark, less = ledger.baseline_mark(row), ledger.to_float(row)
        remembered = "~" if row.provenance.startswith("memory") else mark
        cells = [row_link(paper, row), f"{net}, {dataset}"]
        cells += [f"{row.bits}" + (f", {row.levels} levels" if row.levels else ""), METRICS[row.metric]]
        cells += [ledger.claimed(row), "-" if row.baseline is None else f"{mark}{ledger.number(row.baseline)}"]
        cells += ["-" if less is None else f"{remembered}{less:+.2f}", row.ran_by, row.provenance]
        cells += [ledger.number(row.measured[-1].value) if row.measured else "-"] if ours else []
        made.rows.append(tuple(cells))
    ran = sum(bool(row.measured) for row in paper.rows)
    runnable = sum(not ledger.missing_requirements(row) for row in paper.rows)
    many = len(paper.rows)
    said = f"{len(shown)} of {many} rows" if shown else f"No figure of its {many} rows is known here"
    said += f"; `qbench published --paper {paper.key}` has all. "
    said += f"Run here: {ran}; ready to run where the data are at hand: {runnable}."
    absent = [s for n in paper.no_result if (s := ledger.absent(paper.key, n.get("net"), n["dataset"]))]
    said += "".join(f" {sentence[0].upper()}{sentence[1:]}." for sentence in absent)
    return "\n\n".join(["**Claimed**", *([markdown([made])] if shown else []), wrapped(said)])


def row_link(paper: Paper, row: Row) -> str:
    return row.id if ledger.missing_requirements(row) else f"[{row.id}](../conf/experiment/{paper.key}/{row.id}.yaml)"


def measured(paper: Paper) -> str:
    """Return the claims put to a test here, a bullet each."""
    lines = []
    for claim in claims_of(paper):
        unit = " (in cosine)" if claim.measure == "gradient_mismatch" else ""
        by_outcome: dict[str, list[str]] = {}
        for row in sorted(outcomes().get(claim.name, ()), key=order):
            by_outcome.setdefault(row["outcome"], []).append(f"{row['name']} {row['effect']}{border(row)}".strip())
        said = "; ".join(f"*{key}:* {', '.join(values)}" for key, values in by_outcome.items()) or "Not run"
        lines.append(bullet(f"[{claim.name}](claims.md#{claim.name}): {claim.says} {said}{unit}."))
    none = "No claim of this paper has been put to a test; the [README](../README.md) has it on digits beside others."
    return "**Measured here**\n\n" + ("\n".join(lines) or wrapped(none))


def order(row: dict[str, str]) -> list[bool]:
    return [not row["outcome"].startswith(verdict) for verdict in VERDICTS]


def border(row: dict[str, str]) -> str:
    """Return what a comparison claims where it is not simply that the first arm is better."""
    found = re.search(r"(> -?[\d.]+|within [\d.]+)$", row["arms"])
    return "" if found is None or found[0] == "> 0" else f" (claimed {found[0].replace('>', 'above')})"


def deviations(paper: Paper) -> str:
    """Return where qbench departs from the paper, and known departures of public code with their cost here."""
    lines = [bullet(f"`{name}`: {cards()[name]['Deviations']}") for name in methods_of(paper)]
    departs = of_recipes(paper, "departs")
    lines += [bullet(f"Recipes of experiments: {' '.join(departs)}")] if departs else []
    cost = {(row["method"], row["deviation"]): row for row in rows_of(ROOT / "docs" / "deviations.md", "method")}
    seen = []
    for name in methods_of(paper):
        for deviation, (what, _) in registry.known_deviations(name).items():
            row = cost.get((name, deviation))
            lost = f"{row['widths']}: {row['points lost']}, {row['95 % interval']}" if row else "not measured"
            lost = f"{row['widths']}: never acted" if row and row["p (Holm)"] == "-" else lost
            seen.append(bullet(f"`{deviation}` ({lost}): {what}"))
    return "\n".join(["**Deviations**", "", *lines, *(["", texts()["deviations"], "", *seen] if seen else [])])


def left_open(paper: Paper) -> str:
    """Return what the sources at hand leave open, and what cannot be run."""
    found = of_recipes(paper, "open")
    found += [flat(paper.scope)] if paper.scope else []
    reasons = Counter(reason.replace("; ", ", ") for row in paper.rows if (reason := ledger.missing_requirements(row)))
    lacks = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
    found += [f"Rows that cannot be run: {lacks}."] if lacks else []
    return "\n".join(["**Open**", "", *map(bullet, found)]) if found else ""


def of_recipes(paper: Paper, key: str) -> list[str]:
    """Return, as sentences, what recipes leave open or do otherwise."""
    found = [(text, recipe) for recipe in paper.recipes.values() for text in getattr(recipe, key)]
    return unique(marked(text[:1].upper() + text[1:], recipe.provenance) for text, recipe in found)


def controls() -> str:
    """Return the section of methods that are no paper's of the ledger."""
    owned = {name for paper in ledger.papers() for name in methods_of(paper)}
    lines = []
    for name in (name for name in registry.names("method") if name not in owned):
        card = cards()[name]
        is_a = card["is"].partition(": ")[2]
        lines.append(bullet(f"{linked(name)}: {is_a} {card['Idea']} Paper: {card['Paper']}"))
    return "## Controls\n\nMethods that stand beside the papers, to be measured against.\n\n" + "\n".join(lines)


def related() -> Iterable[str]:
    """Yield the part on papers that are not implemented."""
    yield texts()["related"].format(memory=MEMORY)
    for group, title in texts()["groups"].items():
        yield f"### {title}\n\n" + "\n".join(entry(paper) for paper in texts()["papers"] if paper["group"] == group)


def entry(paper: dict[str, Any]) -> str:
    """Return the bullet of a paper that is not implemented."""
    known, number = paper["provenance"], paper["link"].partition("arxiv.org/abs/")[2]
    link = f"[{f'arXiv {number}' if number else 'proceedings'}]({paper['link']})"
    title = f"{', '.join(paper['authors'])}: {paper['title'].rstrip('?')}; {paper['venue']}; {link}"
    idea = " ".join(marked(fact["says"].removesuffix("."), fact["provenance"]) for fact in paper["facts"])
    nearest = re.sub(r"`(\w+)`", lambda it: linked(it[1]) if it[1] in cards() else it[0], paper["nearest"])
    sure = next(fact["provenance"] for fact in paper["facts"] if told(fact["provenance"]) != MEMORY)
    parts = {"title and authors": known["paper"], "link": known["link"], "idea": sure}
    how = ", ".join(f"{part} {word}" for part, word in parts.items()) if len(set(parts.values())) > 1 else sure
    said = f"{title}. {idea} *Nearest here:* {nearest} *Known:* {how} ({paper['source']})."
    return bullet(f"**{paper['name']}**, *{paper['status']}*. {said}")


def marked(sentence: str, provenance: str) -> str:
    """Return a sentence that ends in its mark where it is remembered and does not say so."""
    silent = told(provenance) == MEMORY and not re.search("memory|remember", sentence)
    return f"{sentence} ({MEMORY})." if silent else f"{sentence}."


# --- words


def told(provenance: str) -> str:
    return MEMORY if provenance.startswith("memory") else provenance


def linked(method: str) -> str:
    return f"[`{method}`](../qbench/methods/{method}.py)"


def slug(heading: str) -> str:
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def flat(text: str) -> str:
    return " ".join(text.split())


def unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def bullet(text: str) -> str:
    return wrapped(text, "- ", "  ")


def inner(text: str) -> str:
    return wrapped(text, "  - ", "    ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
