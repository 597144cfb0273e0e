"""Makes tables that show published numbers next to qbench's measurements.

`published_figures.py` reads the published rows. `lint.py` finds errors in the rows. `scripts/experiments.py` writes an
experiment file for each row that can be run.
"""

import dataclasses
from collections.abc import Sequence

from qbench.papers.published_figures import names, papers, published_rows
from qbench.papers.row_types import THIRD, Paper, PublishedRow
from qbench.report.tables.table import Table

HEAD = (
    "row", "dataset", "net", "bits", "metric", "claimed", "float", "to float", "ours", "gap", "ours to float", "n",
    "spread", "ran by", "provenance",
)  # fmt: skip
"""The columns of a table of published rows. `claimed` is the published value, and `ours` is qbench's measurement."""
MISSING_HEAD = ("row", "dataset", "net", "bits", "metric", "claimed", "ran by", "provenance", "to run it")
REMEMBERED = "~ from memory, not checked against the source: do not quote this value as the paper's"
UNKNOWN = "? not known, or published only as a curve"
SIGNS = (
    "to float: accuracy minus the accuracy of the float network, in points, for the published values and for ours; "
    "gap: our accuracy minus the published accuracy, in points"
)
"""The note below a table of published rows that explains its columns of differences."""


def published_tables(paper: str | None, provenance: str | None, missing: bool) -> list[Table]:
    """Return one table per paper, with the published numbers next to qbench's measurements.

    Args:
        paper: the key of one paper, or None for all papers.
        provenance: the worst provenance to show, or None for all provenances.
        missing: whether to show only rows that qbench has not measured with the row's recipe. The command that runs a
            row is shown next to the row.

    Raises:
        ConfigError: the paper or provenance does not exist.
    """
    rows = published_rows(paper, provenance)
    return [
        _with_title(each, published_table([row for row in rows if row.paper == each.key], missing=missing))
        for each in papers()
        if paper in (None, each.key)
    ]


def missing_requirements(row: PublishedRow) -> str:
    """Return the reason why a row has no experiment, or an empty text if the row has an experiment."""
    if row.lacks:
        return row.lacks
    net, dataset = names().nets[row.net], names().datasets[row.dataset]
    missing = [name.title for name in (net, dataset) if not name.words]
    return f"{' and '.join(missing)} is not in qbench" if missing else "" if row.recipe else "the recipe is not known"


def command_words(row: PublishedRow) -> list[str]:
    """Return the command-line overrides of the run that reproduces a row.

    Raises:
        ValueError: the row cannot be run. `missing_requirements` returns the reason.
    """
    if reason := missing_requirements(row):
        raise ValueError(f"{row.paper}/{row.id}: {reason}")
    (recipe,) = (p.recipes[row.recipe] for p in papers() if p.key == row.paper)
    words = [*names().datasets[row.dataset].words, *names().nets[row.net].words, f"method={row.method}"]
    words += [f"bits.{key}={width}" for key, width in dataclasses.asdict(row.bits).items()]
    pretrain = [_pretrain_word(word) for word in recipe.words if word.startswith(("optim", "epochs="))]
    words += [*recipe.words, *(pretrain if recipe.pretrain == "same" else ()), *row.words]
    return list({word.partition("=")[0]: word for word in words}.values())  # a row's override replaces the recipe's


def _pretrain_word(word: str) -> str:
    """Return the override that applies `word` to the training of the float baseline."""
    return f"optim@pretrain.{word}" if word.startswith("optim=") else f"pretrain.{word}"


def absence_note(paper: str, net: str | None, dataset: str) -> str | None:
    """Return a sentence that says that a paper has no result on a data set.

    Return None if the paper's authors have a result.

    If `net` is given, results with other networks are ignored. The sentence also names the third parties that have a
    result.
    """
    (source,) = (p for p in papers() if p.key == paper)
    rows = [r for r in source.rows if r.dataset == dataset and net in (None, r.net)]
    if any(row.by_authors for row in rows):
        return None
    dataset_title = names().datasets[dataset].title
    title = dataset_title if net is None else f"{names().nets[net].title} on {dataset_title}"
    known = [n for n in source.no_result if n.dataset == dataset and n.net in (None, net)]
    if known:
        title = dataset_title if known[0].net is None else title
        sentence = f"{source.name} has no {title} result"
        sentence += "" if known[0].provenance == "verified" else f" ({known[0].provenance})"
    else:
        sentence = f"no published result of {source.name} for {title} is known"
    others = dict.fromkeys(row.ran_by.removeprefix(THIRD) for row in rows)
    return f"{sentence}; third party: {', '.join(others)}" if others else sentence


def published_table(rows: Sequence[PublishedRow], title: str = "", *, missing: bool = False) -> Table:
    """Return a table with one line per published row, which shows the published value next to our measurement.

    Args:
        rows: the published rows.
        title: the title of the table.
        missing: whether to show only rows that qbench has not measured with the row's recipe. The command that runs a
            row is shown next to the row.
    """
    rows = [row for row in rows if not (missing and row.reproduced)]
    notes = [REMEMBERED] if any(claim_mark(row) or baseline_mark(row) for row in rows) else []
    notes += [UNKNOWN] if any(row.value is None for row in rows) else []
    notes += [] if missing else [SIGNS, *_departure_notes(rows)]
    table = Table(MISSING_HEAD if missing else HEAD, title=title, notes=notes)
    for row in rows:
        dataset, net = names().datasets[row.dataset].title, names().nets[row.net].title
        bits = f"{row.bits}" + (f", {row.levels} levels" if row.levels else "")
        front = (f"{row.paper}/{row.id}", dataset, net, bits, row.metric, format_claim(row))
        back = (row.ran_by, row.provenance)
        reason = missing_requirements(row)
        experiment = "" if reason else f"{row.paper}/{row.top5_of or row.id}"
        if missing:
            command = f"qbench experiment={experiment}" if experiment else f"not yet: {reason}"
            table.rows.append((*front, *back, command))
        else:
            table.rows.append((*front, *_measured_cells(row), *back))
        plain = {"to_float": to_float(row), "experiment": experiment, "missing_requirements": reason}
        table.values.append(dataclasses.asdict(row) | plain | ({} if missing else _measured_values(row)))
    return table


def _measured_values(row: PublishedRow) -> dict[str, float | None]:
    """Return our value minus the published value, and our value minus our float baseline, both in percentage points.

    The two numbers have the keys `gap` and `ours_to_float`. The result is empty if the row has no measurement.
    """
    if not row.measured:
        return {}
    ours = row.measured[-1]
    loss = None if ours.baseline is None else row.accuracy(ours.value) - row.accuracy(ours.baseline)
    return {"gap": gap(row, ours.value), "ours_to_float": loss}


def _measured_cells(row: PublishedRow) -> tuple[str, ...]:
    """Return the cells of the columns `float` to `spread`."""
    difference, mark = to_float(row), baseline_mark(row)
    baseline = "-" if row.baseline is None else f"{mark}{format_percent(row.baseline)}"
    claim = (baseline, "-" if difference is None else f"{claim_mark(row) or mark}{format_points(difference)}")
    if not row.measured:
        return (*claim, format_ours(row), "-", "-", "-", "-")
    ours, values = row.measured[-1], _measured_values(row)
    spread = "-" if ours.spread is None else f"±{ours.spread:.2f}"
    points = (format_points(values["gap"]), format_points(values["ours_to_float"]))
    return (*claim, format_ours(row), *points, str(ours.n), spread)


def _departure_notes(rows: Sequence[PublishedRow]) -> list[str]:
    """Return notes that name the rows whose measurement has another recipe, with the differences between the recipes.

    Rows with the same differences share a note.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.measured and (departs := row.measured[-1].departs):
            groups.setdefault(departs, []).append(f"{row.paper}/{row.id}")
    return [f"* ours has another recipe than {', '.join(ids)}: {', '.join(departs)}" for departs, ids in groups.items()]


def gap(row: PublishedRow, value: float) -> float | None:
    """Return our value minus the published value, in percentage points of accuracy, or None if a value is not known.

    If the published value is a range and our value is inside it, the result is 0.
    """
    if row.value is None:
        return None
    ends = sorted(row.accuracy(end) for end in (row.value, row.upper) if end is not None)
    ours = row.accuracy(value)
    return ours - min(max(ours, ends[0]), ends[-1])


def to_float(row: PublishedRow) -> float | None:
    """Return a row's published value minus its float baseline in percentage points of accuracy.

    The result is None if one of the two numbers is not known.
    """
    if row.value is None or row.upper is not None or row.method == "float":
        return None
    if row.metric.endswith("increase"):
        return row.accuracy(row.value)
    return None if row.baseline is None else row.accuracy(row.value) - row.accuracy(row.baseline)


def format_claim(row: PublishedRow) -> str:
    """Return the published value as text. Values from memory begin with `~`. An unknown value becomes `?`."""
    if row.value is None:
        return "?"
    return claim_mark(row) + format_percent(row.value) + ("" if row.upper is None else f"-{format_percent(row.upper)}")


def format_ours(row: PublishedRow) -> str:
    """Return our value as text, or `-` if there is none. A star marks a value with another recipe than the row's."""
    return format_percent(row.measured[-1].value) + "*" * bool(row.measured[-1].departs) if row.measured else "-"


def claim_mark(row: PublishedRow) -> str:
    """Return `~` if the row's value is from memory, otherwise an empty text."""
    return "~" if row.provenance.startswith("memory") else ""


def baseline_mark(row: PublishedRow) -> str:
    """Return `~` if the row's float baseline is from memory, otherwise an empty text."""
    remembered = (row.baseline_provenance or row.provenance).startswith("memory")
    return "~" if remembered and row.baseline is not None else ""


def format_percent(value: float) -> str:
    """Return a percentage with one or two decimals."""
    return f"{value:.2f}".removesuffix("0")


def format_points(value: float | None) -> str:
    """Return percentage points as text with a sign, or `-` for None."""
    return "-" if value is None else f"{value:+.2f}"


def _with_title(paper: Paper, table: Table) -> Table:
    """Add the paper's title to its table, and notes on data sets on which the paper has no result."""
    name = "" if paper.title.startswith(paper.name) else f"{paper.name}: "
    table.title = f"{name}{paper.title} ({paper.year}), {paper.link}"
    table.notes = [] if not table.rows else table.notes
    sentences = [absence_note(paper.key, n.net, n.dataset) for n in paper.no_result]
    table.notes += [sentence for sentence in sentences if sentence] + ([paper.scope] if paper.scope else [])
    return table
