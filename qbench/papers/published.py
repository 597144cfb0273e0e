"""The ledger: what papers and others published, a row a number, beside what was measured here.

`qbench/papers/figures/<paper>.yaml` holds a paper's head, its recipes and its tables, whose keys all their rows share;
`names.yaml` says what nets, data sets and methods are called and which words of the command line choose them.
`ledger_rows` reads them, `ledger_lint` finds impossible rows, `scripts/experiments.py` writes the experiment files.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.papers.rows import THIRD, Paper, Row, names, papers, rows
from qbench.report.tables.table import FORMATS, Table

__all__ = ["absent", "ledger", "missing_requirements", "papers", "rows", "table", "words"]

HEAD = (
    "row", "dataset", "net", "bits", "metric", "claimed", "float", "to float", "ours", "gap", "ours to float", "n",
    "spread", "ran by", "provenance",
)  # fmt: skip
MISSING_HEAD = ("row", "dataset", "net", "bits", "metric", "claimed", "ran by", "provenance", "to run it")
REMEMBERED = "~ remembered, not checked against the source: not to be quoted as the paper's"
UNKNOWN = "? no figure: not known here, or only a curve was published"
SIGNS = "to float, gap: points of accuracy, + is better than the float network, or than claimed"


def missing_requirements(row: Row) -> str:
    """Return why a row has no experiment; empty where it has one."""
    if row.lacks:
        return row.lacks
    net, dataset = names().nets[row.net], names().datasets[row.dataset]
    missing = [what["title"] for what in (net, dataset) if "words" not in what]
    return f"qbench has no {' and no '.join(missing)}" if missing else "" if row.recipe else "its recipe is not known"


def words(row: Row) -> list[str]:
    """Return the words of the command line that make a row's run; see `missing_requirements` for rows that have
    none.
    """
    if reason := missing_requirements(row):
        raise ValueError(f"{row.paper}/{row.id}: {reason}")
    (recipe,) = (p.recipes[row.recipe] for p in papers() if p.key == row.paper)
    own = [*names().datasets[row.dataset]["words"], *names().nets[row.net]["words"], f"method={row.method}"]
    own += [f"bits.{key}={width}" for key, width in dataclasses.asdict(row.bits).items()]
    parent = [_of_parent(word) for word in recipe.words if word.startswith(("optim", "epochs="))]
    return [*own, *recipe.words, *(parent if recipe.pretrain == "same" else ()), *row.words]


def _of_parent(word: str) -> str:
    return f"optim@pretrain.{word}" if word.startswith("optim=") else f"pretrain.{word}"


def absent(paper: str, net: str | None, dataset: str) -> str | None:
    """Return what to say where a paper's authors have no result on a data set (with a net, if named); else None."""
    (own,) = (p for p in papers() if p.key == paper)
    quoted = [r for r in own.rows if r.dataset == dataset and net in (None, r.net)]
    if any(row.by_authors for row in quoted):
        return None
    title = names().datasets[dataset]["title"]
    what = title if net is None else f"{names().nets[net]['title']} on {title}"
    known = [n for n in own.no_result if n["dataset"] == dataset and n.get("net") in (None, net)]
    if known:
        what = title if "net" not in known[0] else what
        sentence = f"{own.name} has no {what} result"
        sentence += "" if known[0]["provenance"] == "verified" else f" ({known[0]['provenance']})"
    else:
        sentence = f"the ledger has no {what} result of {own.name}"
    others = dict.fromkeys(row.ran_by.removeprefix(THIRD) for row in quoted)
    return f"{sentence}; third party: {', '.join(others)}" if others else sentence


def table(chosen: Sequence[Row], title: str = "", *, missing: bool = False) -> Table:
    """Return rows as a table: claimed beside ours; with `missing` those not measured yet and the lines to run them."""
    chosen = [row for row in chosen if not (missing and row.measured)]
    known = names()
    notes = [REMEMBERED] if any(_mark(row) or baseline_mark(row) for row in chosen) else []
    notes += [UNKNOWN] if any(row.value is None for row in chosen) else []
    made = Table(MISSING_HEAD if missing else HEAD, title=title, notes=notes + ([] if missing else [SIGNS]))
    for row in chosen:
        dataset, net = known.datasets[row.dataset]["title"], known.nets[row.net]["title"]
        bits = f"{row.bits}" + (f", {row.levels} levels" if row.levels else "")
        front = (f"{row.paper}/{row.id}", dataset, net, bits, row.metric, claimed(row))
        plain = dataclasses.asdict(row) | {
            "to_float": to_float(row),
            "experiment": "",
            "missing_requirements": missing_requirements(row),
        }
        if not plain["missing_requirements"]:
            plain["experiment"] = f"{row.paper}/{row.of or row.id}"
        back = (row.ran_by, row.provenance)
        if missing:
            run = (
                f"qbench experiment={plain['experiment']}"
                if plain["experiment"]
                else f"not yet: {plain['missing_requirements']}"
            )
            made.rows.append((*front, *back, run))
        else:
            made.rows.append((*front, *_compared(row, plain), *back))
        made.values.append(plain)
    return made


def _compared(row: Row, plain: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells from `float` to `spread`; puts our figures into `plain`."""
    less, mark = to_float(row), baseline_mark(row)
    base = "-" if row.baseline is None else f"{mark}{number(row.baseline)}"
    claim = (base, "-" if less is None else f"{_mark(row) or mark}{signed(less)}")
    if not row.measured:
        return (*claim, "-", "-", "-", "-", "-")
    ours = row.measured[-1]
    own = None if ours.baseline is None else row.accuracy(ours.value) - row.accuracy(ours.baseline)
    plain |= {"gap": gap(row, ours.value), "ours_to_float": own}
    spread = "-" if ours.spread is None else f"±{ours.spread:.2f}"
    return (*claim, number(ours.value), signed(plain["gap"]), signed(own), str(ours.n), spread)


def gap(row: Row, value: float) -> float | None:
    """Return how much better a value of ours is than the one claimed, in points; 0 within a claimed range."""
    if row.value is None:
        return None
    ends = sorted(row.accuracy(end) for end in (row.value, row.upper) if end is not None)
    ours = row.accuracy(value)
    return ours - min(max(ours, ends[0]), ends[-1])


def to_float(row: Row) -> float | None:
    """Return how much better than its float baseline a row claims to be, in points; None where one is not known."""
    if row.value is None or row.upper is not None or row.method == "float":
        return None
    if row.metric.endswith("increase"):
        return row.accuracy(row.value)
    return None if row.baseline is None else row.accuracy(row.value) - row.accuracy(row.baseline)


def claimed(row: Row) -> str:
    """Return the published value as it is shown: a remembered one with ~ in front, an unknown one as ?."""
    if row.value is None:
        return "?"
    return _mark(row) + number(row.value) + ("" if row.upper is None else f"-{number(row.upper)}")


def _mark(row: Row) -> str:
    return "~" if row.provenance.startswith("memory") else ""


def baseline_mark(row: Row) -> str:
    """Return ~ where a row's float baseline is remembered."""
    remembered = (row.baseline_provenance or row.provenance).startswith("memory")
    return "~" if remembered and row.baseline is not None else ""


def number(value: float) -> str:
    """Return a percentage with one digit behind the point, or two."""
    text = f"{value:.2f}"
    return text.removesuffix("0")


def signed(value: float | None) -> str:
    """Return points with their sign."""
    return "-" if value is None else f"{value:+.2f}"


def ledger(arguments: Iterable[str]) -> str:
    """Return what `qbench published [--paper X] [--missing] [--provenance P] [--format F]` prints.

    Raises:
        ConfigError: a flag or value that does not exist.
    """
    asked = {"--paper": "", "--provenance": "", "--format": "text"}
    missing, given = False, iter(arguments)
    for word in given:
        flag, _, value = word.partition("=")
        if word == "--missing":
            missing = True
        elif flag in asked:
            asked[flag] = value or next(given, "")
            if not asked[flag]:
                raise ConfigError(f"published {flag} wants a value")
        else:
            known = (*asked, "--missing")
            raise ConfigError(
                f"published: no such flag: {word}{did_you_mean(word, known)}\nallowed: {', '.join(known)}"
            )
    if (form := asked["--format"]) not in FORMATS:
        raise ConfigError(f"published --format {form}{did_you_mean(form, FORMATS)}\nallowed: {', '.join(FORMATS)}")
    return FORMATS[form](published_tables(asked["--paper"] or None, asked["--provenance"] or None, missing))


def published_tables(paper: str | None, provenance: str | None, missing: bool) -> list[Table]:
    """Return one table per paper: the published numbers, next to what qbench measured."""
    chosen = rows(paper, provenance)
    return [
        _with_head(each, table([row for row in chosen if row.paper == each.key], missing=missing))
        for each in papers()
        if paper in (None, each.key)
    ]


def _with_head(paper: Paper, made: Table) -> Table:
    """Put a paper's name over its table, and under it what the paper has no result for."""
    name = "" if paper.title.startswith(paper.name) else f"{paper.name}: "
    made.title = f"{name}{paper.title} ({paper.year}), {paper.link}"
    made.notes = [] if not made.rows else made.notes
    sentences = [absent(paper.key, n.get("net"), n["dataset"]) for n in paper.no_result]
    made.notes += [sentence for sentence in sentences if sentence] + ([paper.scope] if paper.scope else [])
    return made
