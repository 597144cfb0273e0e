"""Make one page per method for the documentation site, with the card, picture, options, results and published rows.

docs/conf.py calls `write` before each build. The pages are made from the method cards, conf/method, docs/records and
the published figures, so the repository does not contain the pages.
"""

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from configuration_reference import node_keys, table
from papers import methods_of, rows_table, slug

from qbench.config import groups, registry
from qbench.papers.published_figures import papers
from qbench.report.comparison.columns import DEFAULT, columns_in
from qbench.report.comparison.compare import compare
from qbench.report.comparison.setting_table import settings_of, with_columns
from qbench.report.tables.table import Table, markdown
from qbench.runs.reader import load_records

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ("cifar10", "digits", "methods", "others", "methods-glyphs", "unified")
CARD_WIDTH = 100
"""Maximum length of a line in a method card. A paragraph ends after a line into which the next word would fit."""


def write(folder: Path) -> None:
    """Write the pages and their index into a folder."""
    folder.mkdir(exist_ok=True)
    names = groups.option_names("method")
    texts = {f"{name}.md": page(name) for name in names} | {"index.md": index(names)}
    for name, text in texts.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # Sphinx rebuilds pages by their date
            path.write_text(text, encoding="utf-8")


def index(names: list[str]) -> str:
    """Return the page that lists all methods."""
    rows = [(f"[`{name}`]({name}.md)", escaped(registry.card(name).partition("\n")[0])) for name in names]
    text = "Each page has the method card, a picture of the quantizers, results and published rows."
    poster = "![All methods: quantizer values, and the gradient that training uses](../pictures/poster.png)"
    tree = "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])
    return f"# Methods\n\n{text}\n\n{table(('method', 'what'), rows)}\n\n{poster}\n\n{tree}\n"


def page(name: str) -> str:
    """Return the page of one method."""
    card = registry.card(name)
    parts = [f"# {name}", escaped(card.partition("\n")[0]), f"    qbench method={name}"]
    parts += [f"![Quantizers of {name}: values and gradients](../pictures/{name}.png)"]
    options = [(f"`{key.name}`", key.type, key.default, key.meaning) for key in node_keys("method", [name])]
    parts += ["## Options", table(("key", "type", "default", "meaning"), options)] if options else []
    parts.append("## Method card")
    for section, text in registry.sections(card).items():
        if section != "Results":
            parts += [f"### {section}", *map(escaped, paragraphs(text))]
    parts += ["## Deviations in public code", DEVIATIONS, *known] if (known := deviations(name)) else []
    found = results(name)
    parts += (
        ["## Results", PROTOCOLS, *found] if found else ["## Results", "There are no stored results of this method."]
    )
    parts += published(name)
    return "\n\n".join(parts) + "\n"


PROTOCOLS = (
    "All methods of a table are trained with the same recipe, in far fewer epochs than in the papers. "
    "[Results](../results.md) states the recipes."
)
DEVIATIONS = "`method.deviation=NAME` trains with one of them. [Deviations](../deviations.md) has the measured cost."


def deviations(name: str) -> list[str]:
    """Return the known deviations of public code as one list."""
    known = registry.known_deviations(name).items()
    return ["\n".join(f"- `{key}`: {escaped(what)} Source: {escaped(source)}" for key, (what, source) in known)] * bool(
        known
    )


def results(name: str) -> list[str]:
    """Return the rows of a method in the stored records, with the command that prints these rows."""
    parts = []
    for record in RECORDS:
        for made in recorded(record):
            settings = [one for one in settings_of(made) if one.method == name]
            if settings:
                notes = [note for note in made.notes if note.startswith((f"{name}: ", "synthetic data"))]
                shown = with_columns(replace(made, values=settings, notes=notes), columns_in(DEFAULT))
                parts += [f"    qbench compare docs/records/{record}.json method={name}", markdown([shown])]
    return parts


@cache
def recorded(record: str) -> list[Table]:
    """Return the tables of a stored record."""
    return compare(load_records(ROOT / "docs" / "records" / f"{record}.json"))


def published(name: str) -> list[str]:
    """Return the published rows of a method, by paper."""
    parts = []
    for paper in papers():
        rows = [row for row in paper.rows if row.method == name]
        if rows or name in methods_of(paper):
            link = f"[{paper.name}](../papers.md#{slug(paper.name)}) explains the columns."
            text = f"{len(rows)} rows of {paper.title} ({paper.year}) are recorded. {link}"
            parts += ["## Published rows", text, *([rows_table(rows)] if rows else [])]
    return [part.replace("](../conf/", "](../../conf/") for part in parts]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a section of a card. Lines of the same paragraph are joined."""
    lines = text.splitlines()
    parts = lines[:1]
    for before, line in pairwise(lines):
        wrapped = 4 + len(before) + 1 + len(line.split(" ")[0]) > CARD_WIDTH
        labelled = before.endswith(".") and re.match(r"[A-Z][\w ,>=]*: ", line)
        if wrapped and not labelled and line.strip() and before.strip():
            parts[-1] += f" {line.strip()}"
        else:
            parts.append(line.strip())
    return [part for part in parts if part]


def escaped(text: str) -> str:
    """Return plain text for Markdown. Text between single backquotes stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#|~$])", r"\\\1", part) for part in parts)
