"""Compares the configuration of a run with the most similar published row of its method."""

from collections.abc import Mapping, Sequence

from qbench.config.identity import RunIdentity, run_identity
from qbench.config.schema import Node
from qbench.papers.published_figures import names, papers
from qbench.papers.published_table import absence_note, command_words, missing_requirements
from qbench.papers.row_types import PublishedRow
from qbench.report.comparison.naming import flat
from qbench.runs.result import Result

CANDIDATES = 4
"""Number of most similar rows that are examined. The one with the fewest different keys is selected."""
KEYS_SHOWN = 12
"""Maximum number of different keys that are listed. Further keys are only counted."""
SHA256_DIGITS = 64
NODE_TITLES = {"dataset": "data set", "model": "network", "optim": "optimizer"}


def recipe_differences(run: RunIdentity) -> list[str]:
    """Return sentences that compare a run with the most similar published row.

    The sentences name the experiment of the row, the keys whose values differ between this experiment and the run, and
    training details that the paper does not state. Only keys of the protocol and the method are compared, not seeds,
    devices and paths.
    """
    if run.is_baseline:
        return []
    method = str(run.config["method"]["name"])
    rows = [
        row
        for paper in papers()
        for row in paper.rows
        if row.method == method and not row.top5_of and not missing_requirements(row)
    ]
    if not rows:
        return [f"no published row has a recipe for {method}"]
    nearest = sorted(rows, key=lambda row: _similarity(row, run), reverse=True)[:CANDIDATES]
    ours = _compared_keys(run.protocol, run.options, run.bits._asdict())
    compared = [(_differing_keys(ours, row), row) for row in nearest]
    differing, row = min(
        compared, key=lambda pair: len(pair[0])
    )  # if rows have equally many differing keys, `min` returns the first one, which is the most similar
    sentences = _absence_notes(row, run)
    experiment = f"experiment={row.paper}/{row.id}"
    if differing:
        more = f", and {len(differing) - KEYS_SHOWN} more keys" if len(differing) > KEYS_SHOWN else ""
        sentences.append(f"nearest published row: {experiment}; differences: {', '.join(differing[:KEYS_SHOWN])}{more}")
    else:
        sentences.append(f"all compared keys are identical to those of {experiment}")
    (recipe,) = (paper.recipes[row.recipe] for paper in papers() if paper.key == row.paper)
    sentences += [f"not stated in the paper: {'; '.join(recipe.open)}"] if recipe.open else []
    sentences += (
        [f"differences between {experiment} and its source: {'; '.join(recipe.departs)}"] if recipe.departs else []
    )
    return sentences


def departures(result: Result, row: PublishedRow) -> list[str]:
    """Return the differences between the recipe of a stored run and the recipe of a published row.

    Each text has the form `key=ours (published: theirs)`, and the texts are sorted. If the initial weights differ, the
    training of the float baseline is not compared, because the two runs start from different networks anyway.

    Raises:
        ValueError: the row cannot be run.
    """
    return sorted(_differing_keys(_compared_keys(result.protocol.keys, result.options, result.bits), row))


def _similarity(row: PublishedRow, run: RunIdentity) -> tuple[bool, bool, bool, int, int, bool]:
    """Return a sort key that is larger for rows that are more similar to a run.

    The criteria are, most important first:

    1. The row has the run's data set and network.
    2. The row has the run's network.
    3. The row has the run's data set.
    4. The number of equal widths is large.
    5. The number of the row's command-line overrides that the run does not have is small.
    6. The row was measured by the method's authors.
    """
    dataset = f"dataset={run.dataset}" in names().datasets[row.dataset].words
    net = _has_network(run, names().nets[row.net].words)
    equal_widths = sum(getattr(row.bits, key) == getattr(run.bits, key) for key in "wag")
    wanted = dict(word.partition("=")[::2] for word in command_words(row))
    broken = sum(not holds(key, value, run.config) for key, value in wanted.items())
    return dataset and net, net, dataset, equal_widths, -broken, row.by_authors


def _has_network(run: RunIdentity, words: Sequence[str]) -> bool:
    """Return whether a run has the network that words such as `model=resnet18 model.width=128` choose."""
    keys = (word.partition("=")[::2] for word in words)
    return f"model={run.model}" in words and all(holds(key, value, run.config) for key, value in keys)


def holds(key: str, value: str, config: Mapping[str, object]) -> bool:
    """Return whether a dotted key has the given value in a configuration of nested dictionaries."""
    node: object = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return isinstance(node, Mapping) or str(node).lower() == value or _as_number(node) == _as_number(value)


def _as_number(value: object) -> float | str:
    """Return a value as a number if possible, otherwise as text without spaces."""
    try:
        return float(str(value))
    except ValueError:
        return str(value).replace(" ", "")


def _absence_notes(row: PublishedRow, run: RunIdentity) -> list[str]:
    """Return a list with one note if the row's authors have no result for the run's network and data set, else []."""
    datasets = [key for key, name in names().datasets.items() if f"dataset={run.dataset}" in name.words]
    nets = [key for key, name in names().nets.items() if _has_network(run, name.words)]
    nets.sort(key=lambda key: len(names().nets[key].words), reverse=True)  # most specific first
    sentence = absence_note(row.paper, nets[0] if nets else None, datasets[0]) if datasets else None
    return [sentence] if sentence else []


def _compose_experiment(row: PublishedRow) -> RunIdentity:
    """Return the identity of the run that a row's experiment file describes."""
    from qbench.config import compose

    (config,) = compose.configurations([f"experiment={row.paper}/{row.id}"])
    return run_identity(config)


def _differing_keys(ours: Mapping[str, str], row: PublishedRow) -> list[str]:
    """Return a text `key=ours (published: theirs)` for every key whose values differ.

    If the data sets, networks or optimizers have different names, only the names are listed.
    """
    published = _compose_experiment(row)
    theirs: Mapping[str, str] = _compared_keys(published.protocol, published.options, published.bits._asdict())
    for node, title in NODE_TITLES.items():
        if ours.get(f"{node}.name") != theirs.get(f"{node}.name"):
            ours, theirs = (
                {key: value for key, value in keys.items() if not key.startswith(f"{node}.")}
                | {title: keys.get(f"{node}.name", "none")}
                for keys in (ours, theirs)
            )
    same_start = ours.get("init") == theirs.get("init")
    differing = []
    for key in dict.fromkeys([*ours, *theirs]):
        our_value, their_value = ours.get(key, "none"), theirs.get(key, "none")
        if our_value != their_value and (same_start or not key.startswith("pretrain.")):
            differing.append(f"{key}={our_value} (published: {their_value})")
    return differing


def _compared_keys(protocol: Node, options: Node, bits: Mapping[str, object]) -> dict[str, str]:
    """Return the keys that are compared, with their values as text: keys of the protocol, the method and the widths.

    Initial weights from a file are named by the first digits of the file's sha256.
    """
    values = flat({**protocol, "method": options, "bits": bits})
    compared = {key: value.strip('"') for key, value in values.items()}
    if len(init := compared.get("init", "")) == SHA256_DIGITS:
        compared["init"] = f"file {init[:12]}"
    return compared
