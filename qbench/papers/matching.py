"""What papers claim for the cells of a comparison, from the ledger: value, who ran it, how it is known, the gap."""

from collections.abc import Iterable, Sequence
from typing import Any

from qbench.papers import published as ledger
from qbench.papers.row_files import names, papers, published_rows
from qbench.papers.rows import PROVENANCES, PublishedRow
from qbench.report.tables.table import Table
from qbench.system.files import read_yaml

Values = dict[str, Any]
OWN = ("norm", "act")
"""Keys of a network that are the method's to ask for."""


def publish(tables: Sequence[Table]) -> None:
    """Put into every cell's values what was published for its method, data set, network and widths, as `published`;
    the row that is best known, authors first, as `paper_top1`, `paper_shown`, `paper_gap`, `paper_ran_by`. Notes say
    where a paper has no such result.
    """
    for table in tables:
        cells = [values for values in table.values if "top1_mean" in values]
        if not cells:
            continue
        dataset, net = _dataset(cells[0]["dataset"]), _net(cells[0]["model"], cells[0]["model_keys"] or {})
        for values in cells:
            _add(values, matching(values, dataset, net))
        table.notes += _notes(cells, dataset, net)


def matching(values: Values, dataset: str | None, net: str | None) -> list[PublishedRow]:
    """Return the ledger's top-1 rows of a cell, those of the method's authors first, then by how well they are known;
    a known deviation from the method is another method.
    """
    own = {f"method.{key}={value}" for key, value in values["options"].items() if key.endswith("deviation")}
    widths = tuple(values["bits"][key] for key in "wag")
    found = [
        row
        for row in published_rows()
        if (row.method, row.dataset, row.net) == (values["name"], dataset, net)
        and (row.bits.w, row.bits.a, row.bits.g) == widths
        and row.metric.startswith("top1")
        and own == {word for word in row.words if word.startswith("method.deviation=")}
    ]
    return sorted(found, key=lambda row: (row.value is None, not row.by_authors, PROVENANCES.index(row.provenance)))


def _add(values: Values, rows: Sequence[PublishedRow]) -> None:
    values["published"] = [_plain(row, values) for row in rows]
    if not rows:
        return
    row, plain = rows[0], values["published"][0]
    values["paper_top1"] = plain["top1"]
    values["paper_shown"] = ledger.format_claim(row) if row.metric == "top1" else _as_accuracy(row, plain)
    values["paper_gap"] = plain["gap"]
    values["paper_ran_by"] = row.ran_by


def _plain(row: PublishedRow, values: Values) -> Values:
    """Return a row as plain values: its claim as a top-1 in percent where it is one, and how far above it we are."""
    ours = {"top1": values["top1_mean"], "top1_error": 100 - values["top1_mean"]}
    if values["diff_mean"] is not None:
        ours["top1_error_increase"] = -values["diff_mean"]
    absolute = row.value is not None and not row.metric.endswith("increase")
    return {
        "row": f"{row.paper}/{row.id}",
        "metric": row.metric,
        "claimed": row.value,
        "upper": row.upper,
        "top1": row.accuracy(row.value) if absolute and row.value is not None else None,
        "to_float": ledger.to_float(row),
        "gap": ledger.gap(row, ours[row.metric]) if row.metric in ours else None,
        "ran_by": row.ran_by,
        "by_authors": row.by_authors,
        "provenance": row.provenance,
        "remembered": row.provenance.startswith("memory"),
        "source": row.source,
        "words": list(row.words),
    }


def _as_accuracy(row: PublishedRow, plain: Values) -> str:
    """Write an error as the accuracy it leaves, an increase of it as the distance to the float network."""
    mark = "~" if plain["remembered"] else ""
    if row.value is None:
        return "?"
    if plain["top1"] is None:
        return f"{mark}{row.accuracy(row.value):+.2f} to float"
    ends = sorted(row.accuracy(end) for end in (row.value, row.upper) if end is not None)
    return mark + "-".join(ledger.format_percent(end) for end in ends)


def _notes(cells: Iterable[Values], dataset: str | None, net: str | None) -> list[str]:
    """Say which figures are remembered, how published rows differ from ours, and which papers have no result here."""
    notes = []
    cells = list(cells)
    shown = [values["published"][0] for values in cells if values["published"]]
    if any(row["remembered"] for row in shown):
        notes.append(ledger.REMEMBERED)
    if shown:
        notes.append("gap: points above what the paper claims, by its own recipe")
    words = sorted({(v["method"], " ".join(v["published"][0]["words"])) for v in cells if v["published"]})
    notes += [f"{method}: published with {typed}" for method, typed in words if typed]
    if dataset is None:
        return [*notes, f"{cells[0]['dataset']} is in no paper of the ledger"]
    own = [v for v in cells if not v["is_parent"] and not any(row["by_authors"] for row in v["published"])]
    missing = dict.fromkeys(_absent(v, dataset, net) for v in own)
    return [*notes, *(sentence for sentence in missing if sentence)]


def _absent(values: Values, dataset: str, net: str | None) -> str | None:
    """Return what to say of a cell that no published row matches."""
    paper = _paper(values["name"])
    if paper is None:
        return None
    if sentence := ledger.absence_note(paper.key, net, dataset):
        return sentence
    widths = "".join(f"{key}{values['bits'][key]}" for key in "wag")
    where = f"{values['model']} on {names().datasets[dataset].title}"
    return f"the ledger has no {where} result of {paper.name} at {widths}"


def _paper(method: str) -> Any:
    """Return the paper of a method: the one of its name, else one whose authors ran it."""
    own = [p for p in papers() if p.key == method]
    own += [p for p in papers() if any(row.method == method and row.by_authors for row in p.rows)]
    return own[0] if own and method != "float" else None


def _dataset(name: str) -> str | None:
    """Return what the ledger calls a data set; None where it has none of it."""
    return next((key for key, what in names().datasets.items() if what.words == (f"dataset={name}",)), None)


def _net(model: str, keys: Values) -> str | None:
    """Return what the ledger calls a network with these keys; None where they are not those of the ledger's words."""
    from qbench.config.groups import conf_directory

    file = conf_directory() / "model" / f"{model}.yaml"
    standard = read_yaml(file) if file.is_file() else {}
    for key, what in names().nets.items():
        words = dict(word.split("=", 1) for word in what.words)
        if words.pop("model", None) != model:
            continue
        wanted = {k: str(v) for k, v in standard.items()} | {k.removeprefix("model."): v for k, v in words.items()}
        if all(str(value) == wanted.get(k) for k, value in keys.items() if k not in OWN):
            return key
    return None
