#!/usr/bin/env python3
"""Write docs/papers.md from the method cards, the published figures, claims, deviations and docs/papers.yaml.

    .venv/bin/python scripts/papers.py [--check]

With --check, nothing is written. The script then prints the lines that would change, and exits with status 1 if there
are any.
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

from qbench.config import registry
from qbench.config.fields import parse_bits
from qbench.papers import published_table as published
from qbench.papers.claim_files import Claim, read_claims
from qbench.papers.published_figures import names, papers
from qbench.papers.row_types import CHECKPOINT, PAPER, PROVENANCES, REPOSITORY, THIRD, Paper, PublishedRow
from qbench.report.tables.table import Table, markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "papers.md"
WIDTH = 118
MAX_ROWS = 6
"""Maximum number of published rows that the table in a paper's section shows."""
MEMORY = "from memory"
KINDS = {"w": "weights", "a": "activations", "g": "gradients"}
METRICS = {
    "top1": "top-1", "top5": "top-5", "top1_error": "top-1 error", "top5_error": "top-5 error",
    "top1_error_increase": "increase of top-1 error", "top5_error_increase": "increase of top-5 error",
}  # fmt: skip
VERDICTS = ("holds", "does not hold", "undecided")
Rows = list[dict[str, str]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/papers.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and print the lines that would change")
    check = parser.parse_args(arguments).check
    wanted, existing = page(), PAGE.read_text("utf-8") if PAGE.is_file() else ""
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != existing:
        diff = difflib.unified_diff(
            existing.splitlines(), wanted.splitlines(), "docs/papers.md", "now", n=0, lineterm=""
        )
        print("docs/papers.md is out of date; run scripts/papers.py", *diff, sep="\n", file=sys.stderr)
    print(f"{len(wanted.splitlines())} lines, {'changed' if wanted != existing else 'unchanged'}")
    return 1 if check and wanted != existing else 0


def page() -> str:
    """Return the whole page."""
    by_year = sorted(papers(), key=lambda paper: (paper.year, paper.name.lower()))
    parts = [texts()["head"].format(most=MAX_ROWS), overview(by_year), *map(paper_section, by_year)]
    parts += [controls(), *related_papers()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


@cache
def texts() -> dict[str, Any]:
    """Return the content of docs/papers.yaml."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "papers.yaml").read_text(encoding="utf-8"))
    return content


# --- the data of a paper


def methods_of(paper: Paper) -> list[str]:
    """Return the methods whose cards contain the paper's arXiv number. Methods with more published rows come first."""
    number, rows = paper.link.rpartition("/")[2], Counter(row.method for row in paper.rows)
    methods = [name for name in registry.names("method") if number in cards()[name].get("Paper", "")]
    return sorted(methods, key=lambda name: (-rows[name], name))


@cache
def cards() -> dict[str, dict[str, str]]:
    """Return the card of every method, as a map from the name of a section to the section's text on one line.

    The key `is` contains the first line of the card.
    """
    by_method = {}
    for name in registry.names("method"):
        card = registry.card(name)
        sections = {key: one_line(text) for key, text in registry.sections(card).items()}
        by_method[name] = {"is": card.partition("\n")[0]} | sections
    return by_method


@cache
def claims() -> list[Claim]:
    return read_claims(ROOT / "conf" / "experiment" / "claims")


def claims_of(paper: Paper) -> list[Claim]:
    """Return the claims whose files name the paper."""
    return [claim for claim in claims() if paper.name in f"{claim.says} {claim.source}"]


@cache
def outcomes() -> dict[str, Rows]:
    """Return the rows of the table in docs/claims.md, by claim.

    The entry `name` of a row is the name of the comparison, or an empty text if the claim has only one comparison.
    """
    by_claim: dict[str, Rows] = {}
    for row in table_rows(ROOT / "docs" / "claims.md", "claim"):
        claim, _, name = row["claim"].partition(": ")
        by_claim.setdefault(claim, []).append(row | {"name": name})
    return by_claim


def table_rows(document: Path, first: str) -> Rows:
    """Return the rows of every table in a document whose first column has the head `first`.

    A row maps column heads to cells.
    """
    head: list[str] = []
    rows: Rows = []
    for line in document.read_text(encoding="utf-8").splitlines():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ") if line.startswith("| ") else []
        if cells and cells[0] == first:
            head = cells
        elif not cells or len(cells) != len(head):
            head = []
        elif not set(line) <= set("|-: "):
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def quantized_letters(method: str) -> str:
    """Return which of w, a and g a method quantizes. The method's card states 32 bits for the others."""
    kept = "".join(re.findall(r"\b([wag](?:(?:, | and )[wag])*) (?:are )?32\b", cards()[method]["Bits"]))
    return "".join(letter for letter in KINDS if letter not in kept)


def formulas(method: str) -> str:
    """Return the names of a method's public functions that accept a tensor, or make a tensor from numbers.

    If there are no such functions, return the names of the methods from which the module imports functions.
    """
    tree = ast.parse((ROOT / "qbench" / "methods" / f"{method}.py").read_text(encoding="utf-8"))
    functions, imported = [], []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.args.args:
            first, returned = (ast.unparse(it) if it else "" for it in (node.args.args[0].annotation, node.returns))
            if first == "Tensor" or (first in ("int", "float") and "Tensor" in returned):
                functions.append(f"`{node.name}`")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qbench.methods"):
            module = (node.module or "").rpartition(".")[2]
            imported += [module] if module != "methods" else [it.name for it in node.names]
    return ", ".join(functions) or f"the same as in {' and '.join(map(linked, unique(imported)))}"


def default_bits(method: str) -> dict[str, int]:
    """Return the default widths of a method."""
    text = (ROOT / "conf" / "method" / f"{method}.yaml").read_text(encoding="utf-8")
    return dict.fromkeys(KINDS, 32) | {k: v or 32 for k, v in parse_bits(yaml.safe_load(text)["bits"]).items()}


def shown_rows(paper: Paper) -> list[PublishedRow]:
    """Return the rows that the section of a paper shows. The introduction of the page states how they are chosen."""
    candidates = [r for r in paper.rows if r.method in methods_of(paper) and r.value is not None and not r.top5_of]
    chosen: dict[tuple[str, str, str], PublishedRow] = {}
    for row in sorted(candidates, key=rank):
        chosen.setdefault((row.method, row.dataset, row.net), row)
    return list(chosen.values())[:MAX_ROWS]


def rank(row: PublishedRow) -> tuple[Any, ...]:
    """Return the key by which `shown_rows` sorts rows. The rows with the smallest keys come first and are shown."""
    widths = {"w": row.bits.w, "a": row.bits.a, "g": row.bits.g}
    ran_by = next(i for i, kind in enumerate((PAPER, REPOSITORY, CHECKPOINT, THIRD)) if row.ran_by.startswith(kind))
    provenance, top5 = PROVENANCES.index(row.provenance), "top5" in row.metric
    not_default, better = widths != default_bits(row.method), -row.accuracy(row.value or 0)
    not_runnable = bool(published.missing_requirements(row))
    unmeasured = not row.measured
    return provenance, ran_by, unmeasured, not_runnable, top5, not_default, sum(widths.values()), better


# --- parts of the page


def overview(by_year: Sequence[Paper]) -> str:
    """Return the table of all papers."""
    head = ("paper", "year", "what is quantized", "methods", "verified", "second-hand", "~", "?", "run here")
    table = Table((*head, "comparisons: hold / opposite / open"))
    for paper in by_year:
        counts = Counter(provenance_text(row.provenance) for row in paper.rows)
        letters = {letter for method in methods_of(paper) for letter in quantized_letters(method)}
        tested = [row["outcome"] for claim in claims_of(paper) for row in outcomes().get(claim.name, ())]
        verdicts = " / ".join(str(sum(one.startswith(verdict) for one in tested)) for verdict in VERDICTS)
        ran = sum(bool(row.measured) for row in paper.rows)
        cells = (str(counts[key] or "") for key in ("verified", "second-hand", MEMORY, "unknown"))
        what = ", ".join(word for letter, word in KINDS.items() if letter in letters)
        name, methods = f"[{paper.name}](#{slug(paper.name)})", ", ".join(map(linked, methods_of(paper)))
        row = (name, str(paper.year), what, methods, *cells, f"{ran} of {len(paper.rows)}")
        table.rows.append((*row, verdicts if tested else "none"))
    return markdown([table], links=True) + "\n\n" + texts()["columns"]


def paper_section(paper: Paper) -> str:
    """Return a paper's section."""
    number, provenance = paper.link.rpartition("arxiv.org/abs/")[2], provenance_text(paper.affiliation_provenance)
    affiliation = "Affiliation not known here" if provenance == "unknown" else f"{paper.affiliation} ({provenance})"
    authors = ", ".join(paper.authors)
    parts = [
        f"## {paper.name}",
        wrapped(f"**{paper.title}.** {authors}; {paper.year}; [arXiv {number}]({paper.link}). {affiliation}."),
        wrapped(one_line(paper.idea), "> ", "> "),
        "\n".join(map(method_entry, methods_of(paper))),
        *(claimed_part(paper), measured_part(paper), deviations_part(paper), open_part(paper)),
    ]
    return "\n\n".join(part for part in parts if part)


def method_entry(name: str) -> str:
    """Return the bullet of a method, with its idea, its widths and the place of its formulas."""
    card = cards()[name]
    widths = card["Bits"].partition(". ")[0].removesuffix(".")
    home = f"Formulas: {formulas(name)}. Full card: `qbench describe {name}`. [Picture](pictures/{name}.png)."
    return "\n".join([bullet(f"{linked(name)}: {card['Idea']}"), inner(f"Widths: {widths}."), inner(home)])


def claimed_part(paper: Paper) -> str:
    """Return the part with the table of shown rows and the number of all rows."""
    shown = shown_rows(paper)
    total = len(paper.rows)
    measured = [row for row in paper.rows if row.measured]
    evaluated = sum(bool(published.missing_requirements(row)) for row in measured)
    reproduced = sum(row.reproduced and not published.missing_requirements(row) for row in measured)
    runnable = sum(not published.missing_requirements(row) for row in paper.rows)
    text = (
        f"The table shows {len(shown)} of {total} rows."
        if shown
        else f"qbench does not know any of the paper's {total} values."
    )
    text += f" `qbench published --paper {paper.key}` lists all rows. "
    text += f"{len(measured)} rows have been measured here, {reproduced} of them with their own recipe"
    text += f" and {evaluated} by evaluating the authors' checkpoints. " if evaluated else ". "
    text += f"{runnable} rows have an experiment file."
    text += "".join(f" {sentence}." for sentence in absence_sentences(paper))
    return "\n\n".join(["**Claimed**", *([rows_table(shown)] if shown else []), wrapped(text)])


def rows_table(shown: Sequence[PublishedRow]) -> str:
    """Return the table of published rows, with our measurements if there are any."""
    ours = any(row.measured for row in shown)
    head = ("row", "network, data", "widths", "measure", "claimed", "float", "to float", "ran by", "provenance")
    table = Table((*head, "ours") if ours else head)
    for row in shown:
        net, dataset = names().nets[row.net].title, names().datasets[row.dataset].title
        mark, difference = published.baseline_mark(row), published.to_float(row)
        baseline = "-" if row.baseline is None else f"{mark}{published.format_percent(row.baseline)}"
        to_float = "-" if difference is None else f"{published.claim_mark(row) or mark}{difference:+.2f}"
        cells = [row_link(row), f"{net}, {dataset}"]
        cells += [f"{row.bits}" + (f", {row.levels} levels" if row.levels else ""), METRICS[row.metric]]
        cells += [published.format_claim(row), baseline, to_float, row.ran_by, row.provenance]
        cells += [published.format_ours(row)] if ours else []
        table.rows.append(tuple(cells))
    return markdown([table], links=True)


def absence_sentences(paper: Paper) -> list[str]:
    """Return sentences that name the data sets for which the authors have no result.

    Data sets with equal provenance share a sentence.
    """
    notes = [note for n in paper.no_result if (note := published.absence_note(paper.key, n.net, n.dataset))]
    alike = re.compile(f"{paper.name} has no (.+) result( \\(.+\\))?")
    by_provenance: dict[str, list[str]] = {}
    for match in filter(None, map(alike.fullmatch, notes)):
        by_provenance.setdefault(match[2] or "", []).append(match[1])
    merged = [f"{paper.name} has no {listed(titles)} result{mark}" for mark, titles in by_provenance.items()]
    return merged + [capitalized(note) for note in notes if not alike.fullmatch(note)]


def listed(texts: Sequence[str]) -> str:
    """Return the texts joined by commas and a final "or"."""
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def row_link(row: PublishedRow) -> str:
    """Return a row's id, linked to its experiment file if it has one."""
    if published.missing_requirements(row):
        return row.id
    return f"[{row.id}](../conf/experiment/{row.paper}/{row.top5_of or row.id}.yaml)"


def measured_part(paper: Paper) -> str:
    """Return the part on the claims that qbench has tested, with one bullet per claim."""
    lines = []
    for claim in claims_of(paper):
        unit = " These effects are differences of cosines." if claim.measure == "gradient_mismatch" else ""
        by_outcome: dict[str, list[str]] = {}
        for row in sorted(outcomes().get(claim.name, ()), key=verdict_order):
            effect = f"{row['name']} {row['effect']}{border(row)}".strip()
            by_outcome.setdefault(row["outcome"], []).append(effect)
        results = " ".join(f"*{capitalized(key)}:* {', '.join(values)}." for key, values in by_outcome.items())
        lines.append(bullet(f"[{claim.name}](claims.md#{claim.name}): {claim.says} {results or 'Not run.'}{unit}"))
    none = "No claim of this paper has been tested; [results.md](results.md) has results of its methods on digits."
    return "**Measured here**\n\n" + ("\n".join(lines) or wrapped(none))


def verdict_order(row: dict[str, str]) -> list[bool]:
    return [not row["outcome"].startswith(verdict) for verdict in VERDICTS]


def border(row: dict[str, str]) -> str:
    """Return, as text, the difference between the two arms of a comparison that the claim requires.

    The text is empty if any difference above 0 supports the claim.
    """
    match = re.search(r"(> -?[\d.]+|within [\d.]+)$", row["arms"])
    return "" if match is None or match[0] == "> 0" else f" (claimed {match[0].replace('>', 'above')})"


def deviations_part(paper: Paper) -> str:
    """Return the part on qbench's deviations from the paper, and on known deviations of public code.

    For each deviation of public code, the part states the measured loss of accuracy.
    """
    lines = [bullet(f"`{name}`: {cards()[name]['Deviations']}") for name in methods_of(paper)]
    departs = recipe_sentences(paper, "departs")
    lines += [bullet(f"Recipes of experiments: {' '.join(departs)}")] if departs else []
    cost = {(row["method"], row["deviation"]): row for row in table_rows(ROOT / "docs" / "deviations.md", "method")}
    known = []
    for name in methods_of(paper):
        for deviation, (what, _) in registry.known_deviations(name).items():
            row = cost.get((name, deviation))
            points = f"{row['widths']}: {row['points lost']}, 95 % CI {row['95 % CI']}" if row else "not measured"
            points = f"{row['widths']}: no effect" if row and row["p (Holm)"] == "-" else points
            known.append(bullet(f"`{deviation}` ({points}): {what}"))
    return "\n".join(["**Deviations**", "", *lines, *(["", texts()["deviations"], "", *known] if known else [])])


def open_part(paper: Paper) -> str:
    """Return the part on open questions, which also lists the rows that cannot be run."""
    lines = recipe_sentences(paper, "open")
    lines += [one_line(paper.scope)] if paper.scope else []
    reasons = Counter(
        reason.replace("; ", ", ") for row in paper.rows if (reason := published.missing_requirements(row))
    )
    lacks = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
    lines += [f"Some rows cannot be run, for these reasons (number of rows in brackets): {lacks}."] if lacks else []
    return "\n".join(["**Open**", "", *map(bullet, lines)]) if lines else ""


def recipe_sentences(paper: Paper, key: str) -> list[str]:
    """Return sentences from a paper's recipes.

    With `key="open"`, the sentences say what the source leaves open. With `key="departs"`, the sentences say what
    qbench does differently.
    """
    entries = [(text, recipe) for recipe in paper.recipes.values() for text in getattr(recipe, key)]
    return unique(marked(capitalized(text), recipe.provenance) for text, recipe in entries)


def controls() -> str:
    """Return the section on methods that do not belong to a paper with published figures."""
    of_papers = {name for paper in papers() for name in methods_of(paper)}
    lines = []
    for name in (name for name in registry.names("method") if name not in of_papers):
        card = cards()[name]
        is_a = card["is"].partition(": ")[2]
        lines.append(bullet(f"{linked(name)}: {is_a} {card['Idea']} Paper: {card['Paper']}"))
    head = "## Controls\n\nThe methods of the papers above are compared with these methods, which qbench adds.\n\n"
    return head + "\n".join(lines)


def related_papers() -> Iterable[str]:
    """Yield the part on papers that are not implemented."""
    yield texts()["related"].format(memory=MEMORY)
    for group, title in texts()["groups"].items():
        entries = (related_entry(paper) for paper in texts()["papers"] if paper["group"] == group)
        yield f"### {title}\n\n" + "\n".join(entries)


def related_entry(paper: dict[str, Any]) -> str:
    """Return the bullet of a paper that is not implemented."""
    known, number = paper["provenance"], paper["link"].partition("arxiv.org/abs/")[2]
    link = f"[{f'arXiv {number}' if number else 'proceedings'}]({paper['link']})"
    title = f"{', '.join(paper['authors'])}: {paper['title'].rstrip('?')}; {paper['venue']}; {link}"
    idea = " ".join(marked(fact["says"].removesuffix("."), fact["provenance"]) for fact in paper["facts"])
    nearest = re.sub(r"`(\w+)`", lambda it: linked(it[1]) if it[1] in cards() else it[0], paper["nearest"])
    checked = next(fact["provenance"] for fact in paper["facts"] if provenance_text(fact["provenance"]) != MEMORY)
    parts = {"title and authors": known["paper"], "link": known["link"], "idea": checked}
    how = "; ".join(f"{part}: {word}" for part, word in parts.items()) if len(set(parts.values())) > 1 else checked
    text = f"{title}. {idea} *Nearest here:* {nearest} *Provenance:* {how}. *Sources:* {paper['source']}."
    return bullet(f"**{paper['name']}**, *{paper['status']}*. {text}")


def marked(sentence: str, provenance: str) -> str:
    """Return a sentence with a full stop. If it was written from memory and does not say so, add a mark."""
    needs_mark = provenance_text(provenance) == MEMORY and not re.search("memory|remember", sentence)
    return f"{sentence} ({MEMORY})." if needs_mark else f"{sentence}."


# --- text


def provenance_text(provenance: str) -> str:
    return MEMORY if provenance.startswith("memory") else provenance


def linked(method: str) -> str:
    return f"[`{method}`](../qbench/methods/{method}.py)"


def slug(heading: str) -> str:
    """Return a heading's anchor on GitHub."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def one_line(text: str) -> str:
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
