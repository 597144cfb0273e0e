"""Finds published results for the settings of a comparison, and computes the differences from our results."""

from collections.abc import Sequence
from dataclasses import replace

import yaml

from qbench.papers import published_table as published
from qbench.papers.published_figures import names, papers, published_rows
from qbench.papers.recipe_differences import holds
from qbench.papers.row_types import PROVENANCES, Paper, PublishedRow
from qbench.report.comparison.naming import is_default_option
from qbench.report.comparison.setting import PublishedMatch, Setting
from qbench.report.comparison.setting_table import settings_of
from qbench.report.tables.table import Table
from qbench.system.files import read_yaml

METHOD_KEYS = ("norm", "act")
"""Network keys that a method may set. These keys are ignored when networks are matched."""


def with_published(tables: Sequence[Table]) -> list[Table]:
    """Return copies of the tables. Each setting gets the published results for its method and network.

    Notes below a table say which published values are from memory, which overrides published recipes contain, and which
    papers have no result for a setting.
    """
    return [_with_published(table) for table in tables]


def _with_published(table: Table) -> Table:
    settings = settings_of(table)
    if not settings:
        return table
    dataset = _dataset_key(settings[0].dataset)
    net = next((net for net in names().nets if _is_network(net, (), settings[0])), None)
    matched = [replace(s, published=tuple(_match(row, s) for row in rows_for(s, dataset))) for s in settings]
    return replace(table, values=[*matched], notes=[*table.notes, *_notes(matched, dataset, net)])


def rows_for(setting: Setting, dataset: str | None) -> list[PublishedRow]:
    """Return the published top-1 rows for a setting.

    A row matches only if the row and the setting have the same known deviations from the method. The rows are sorted by
    these criteria, most important first:

    1. The setting has all keys of the row's experiment, and many of them are not the method's defaults.
    2. Few options of the method differ.
    3. The row has a value.
    4. The method's authors trained the row's network.
    5. The provenance of the row.
    6. Few other keys differ.

    Args:
        setting: a setting of a comparison.
        dataset: the name of the setting's data set in the published rows, or None if no row uses this data set.
    """
    deviations = {f"method.{key}={value}" for key, value in setting.options.items() if key.endswith("deviation")}
    found = [
        row
        for row in published_rows()
        if (row.method, row.dataset) == (setting.method, dataset)
        and (row.bits.w, row.bits.a, row.bits.g) == setting.bits
        and row.metric.startswith("top1")
        and deviations == {word for word in row.words if word.startswith("method.deviation=")}
        and any(_is_network(row.net, words, setting) for words in ((), _experiment_words(row)))
    ]

    def rank(row: PublishedRow) -> tuple[int, int, bool, bool, int, int]:
        config = {**setting.keys, "method": {"name": setting.method, **setting.options}, "bits": setting.bits._asdict()}
        words = _experiment_words(row)
        pairs = [(key, value) for key, _, value in (word.partition("=") for word in words)]
        broken = sum(not holds(key, value, config) for key, value in pairs)
        own = sum(not _is_default(setting.method, key, value) for key, value in pairs)
        return (
            0 if broken else -own, _differing_options(row, setting), row.value is None, not row.by_authors,
            PROVENANCES.index(row.provenance), broken,
        )  # fmt: skip

    return sorted(found, key=rank)


def _is_default(method: str, key: str, value: str) -> bool:
    """Return whether a command-line override gives an option of a method its default value."""
    option = key.removeprefix("method.")
    return option != key and is_default_option(method, option, yaml.safe_load(value))


def _experiment_words(row: PublishedRow) -> tuple[str, ...]:
    """Return the keys and values of a row's experiment as `key=value`. The result is empty if the row cannot be run.

    Words such as `optim@pretrain.optim=sgd`, which choose the default values of a group of keys, are left out.
    """
    if published.missing_requirements(row):
        return ()
    return tuple(word for word in published.command_words(row) if "@" not in word)


def _differing_options(row: PublishedRow, setting: Setting) -> int:
    """Return the number of options of the method that differ between a row and a setting."""
    words = (word.removeprefix("method.") for word in _experiment_words(row) or row.words if word.startswith("method."))
    expected = dict(word.split("=", 1) for word in words)
    ours = setting.options
    others = [key for key in ours if key not in expected and not is_default_option(setting.method, key, ours[key])]
    return len(others) + sum(not holds(key, value, {key: ours.get(key)}) for key, value in expected.items())


def _match(row: PublishedRow, setting: Setting) -> PublishedMatch:
    """Return the published value of a row, and our accuracy minus this value."""
    mean = setting.top1.mean
    ours = {"top1": mean, "top1_error": 100 - mean}
    if setting.difference is not None:
        ours["top1_error_increase"] = -setting.difference.mean
    absolute = row.value is not None and not row.metric.endswith("increase")
    return PublishedMatch(
        row=f"{row.paper}/{row.id}",
        metric=row.metric,
        claimed=row.value,
        upper=row.upper,
        top1=row.accuracy(row.value) if absolute and row.value is not None else None,
        text=published.format_claim(row) if row.metric == "top1" else _accuracy_text(row),
        to_float=published.to_float(row),
        gap=published.gap(row, ours[row.metric]) if row.metric in ours else None,
        ran_by=row.ran_by,
        by_authors=row.by_authors,
        provenance=row.provenance,
        remembered=row.provenance.startswith("memory"),
        source=row.source,
        words=row.words,
    )


def _accuracy_text(row: PublishedRow) -> str:
    """Return the value of a row as a text in which larger is better.

    An error becomes an accuracy. An increase in error becomes the accuracy minus the accuracy of the float network.
    """
    mark = "~" if row.provenance.startswith("memory") else ""
    if row.value is None:
        return "?"
    if row.metric.endswith("increase"):
        return f"{mark}{row.accuracy(row.value):+.2f} to float"
    ends = sorted(row.accuracy(end) for end in (row.value, row.upper) if end is not None)
    return mark + "-".join(published.format_percent(end) for end in ends)


def _notes(settings: Sequence[Setting], dataset: str | None, net: str | None) -> list[str]:
    """Return the notes that `with_published` adds below a table."""
    first_matches = [(s.label, s.published[0]) for s in settings if s.published]
    notes = [published.REMEMBERED] if any(match.remembered for _, match in first_matches) else []
    if first_matches:
        notes.append(
            "gap: our top-1 minus the published top-1, in points; "
            "the published results were trained with the papers' own recipes"
        )
    typed = sorted({(label, " ".join(match.words)) for label, match in first_matches})
    notes += [f"{label}: the published result belongs to the options {words}" for label, words in typed if words]
    if dataset is None:
        return [*notes, f"no published results on {settings[0].dataset} are known"]
    unmatched = [s for s in settings if not s.is_baseline and not any(m.by_authors for m in s.published or ())]
    absent = dict.fromkeys(_absence(s, dataset, net) for s in unmatched)
    return [*notes, *(sentence for sentence in absent if sentence)]


def _absence(setting: Setting, dataset: str, net: str | None) -> str | None:
    """Return a note if no result of the method's authors is known for a setting.

    Return None if a result is known or the method has no paper.
    """
    paper = _paper_of(setting.method)
    if paper is None:
        return None
    if sentence := published.absence_note(paper.key, net, dataset):
        return sentence
    network = f"{setting.model} on {names().datasets[dataset].title}"
    return f"no published result of {paper.name} for {network} at {setting.bits} is known"


def _paper_of(method: str) -> Paper | None:
    """Return the paper with the method's name.

    If no paper has this name, return a paper whose authors ran the method, or None if there is no such paper.
    """
    if method == "float":
        return None
    same_name = [p for p in papers() if p.key == method]
    ran_it = [p for p in papers() if any(row.method == method and row.by_authors for row in p.rows)]
    return next(iter([*same_name, *ran_it]), None)


def _dataset_key(name: str) -> str | None:
    """Return the name of a data set in `figures/names.yaml`, or None if the data set is not listed."""
    return next((key for key, known in names().datasets.items() if known.words == (f"dataset={name}",)), None)


def _is_network(net: str, words: Sequence[str], setting: Setting) -> bool:
    """Return whether a setting's network is the network with this name in `figures/names.yaml`.

    Args:
        net: the name of the network.
        words: further command-line overrides. Those of other keys than the network's are ignored.
        setting: the setting of a comparison.
    """
    from qbench.config.groups import conf_directory

    own = dict(word.split("=", 1) for word in names().nets[net].words)
    if own.pop("model", None) != setting.model:
        return False
    file = conf_directory() / "model" / f"{setting.model}.yaml"
    defaults = read_yaml(file) if file.is_file() else {}
    typed = dict(word.split("=", 1) for word in words) | own
    expected = {k: str(v) for k, v in defaults.items()} | {k.removeprefix("model."): v for k, v in typed.items()}
    keys = setting.model_keys
    return all(k in expected and holds(k, expected[k], keys) for k in keys if k not in METHOD_KEYS)
