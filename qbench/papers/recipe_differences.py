"""How a run departs from what its method's paper did: from the ledger's nearest row, key by key."""

from collections.abc import Mapping
from typing import Any

from qbench.config.identity import RunIdentity, run_identity
from qbench.papers.published import absent, missing_requirements, words
from qbench.papers.rows import Row, names, papers
from qbench.report.comparison.naming import flat

CANDIDATES = 4
"""Rows whose experiments are composed, to find the one that differs least."""
SHOWN = 12
"""Keys that are named; of more, the rest are counted."""
NODES = {"dataset": "data set", "model": "network", "optim": "schedule"}


def recipe_differences(run: RunIdentity) -> list[str]:
    """Return sentences: which published row is nearest, how its experiment differs, what the paper leaves open.

    Compared are the keys of the protocol and the method's own; seeds, devices and places are not.
    """
    name = str(run.config["method"]["name"])
    rows = [
        row
        for paper in papers()
        for row in paper.rows
        if row.method == name and not row.of and not missing_requirements(row)
    ]
    if not rows or run.is_baseline:
        return [] if run.is_baseline else [f"the ledger has no recipe for {name}: nothing to compare with"]
    near = sorted(rows, key=lambda row: _nearness(row, run), reverse=True)[:CANDIDATES]
    compared = [(_differing(run, _composed(row)), row) for row in near]
    differing, row = min(compared, key=lambda pair: len(pair[0]))  # of equals the nearest
    said = _without_result(row, run)
    where = f"experiment={row.paper}/{row.id}"
    if differing:
        more = f", and {len(differing) - SHOWN} keys more" if len(differing) > SHOWN else ""
        said.append(f"nearest published row: {where}; here otherwise: {', '.join(differing[:SHOWN])}{more}")
    else:
        said.append(f"as {where}, key by key")
    (recipe,) = (paper.recipes[row.recipe] for paper in papers() if paper.key == row.paper)
    said += [f"left open by the paper: {'; '.join(recipe.open)}"] if recipe.open else []
    said += [f"{where} itself departs: {'; '.join(recipe.departs)}"] if recipe.departs else []
    return said


def _nearness(row: Row, run: RunIdentity) -> tuple[bool, bool, bool, int, int, bool]:
    """Rank a row: the same data set and network, the same network, the data set, the widths that agree, few words that
    do not hold here, the authors' own.
    """
    dataset = f"dataset={run.dataset}" in names().datasets[row.dataset]["words"]
    net = f"model={run.model}" in names().nets[row.net]["words"]
    same = sum(getattr(row.bits, key) == getattr(run.bits, key) for key in "wag")
    last = dict(word.partition("=")[::2] for word in words(row))
    broken = sum(not _holds(key, value, run.config) for key, value in last.items())
    return dataset and net, net, dataset, same, -broken, row.by_authors


def _holds(key: str, value: str, here: Any) -> bool:
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return isinstance(here, Mapping) or str(here).lower() == value or _number(here) == _number(value)


def _number(value: Any) -> float | str:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).replace(" ", "")


def _without_result(row: Row, run: RunIdentity) -> list[str]:
    """Say it where the authors have no result on this data set with this network."""
    known = names()
    here = [key for key, what in known.datasets.items() if f"dataset={run.dataset}" in what["words"]]
    nets = [key for key, what in known.nets.items() if f"model={run.model}" in what.get("words", ())]
    sentence = absent(row.paper, nets[0] if nets else None, here[0]) if here else None
    return [sentence] if sentence else []


def _composed(row: Row) -> RunIdentity:
    from qbench.config import compose

    (config,) = compose.configurations([f"experiment={row.paper}/{row.id}"])
    return run_identity(config)


def _differing(here: RunIdentity, there: RunIdentity) -> list[str]:
    """Return `key=ours (paper's: theirs)` for every key that differs; a node of another name counts as one key."""
    ours, theirs = _keys(here), _keys(there)
    for node, title in NODES.items():
        names_differ = ours.get(f"{node}.name") != theirs.get(f"{node}.name")
        if names_differ:
            for keys, whose in ((ours, here), (theirs, there)):
                kept = {key: value for key, value in keys.items() if not key.startswith(f"{node}.")}
                keys.clear()
                keys |= kept | {title: str(whose.config[node]["name"])}
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(key, "not there"), theirs.get(key, "not there")
        if one != other:
            found.append(f"{key}={one} (there {other})")
    return found


def _keys(run: RunIdentity) -> dict[str, str]:
    """Return a configuration's keys that decide what is compared: protocol, method's own, widths."""
    own = {key: value for key, value in run.keys["method"].items() if key != "name"}
    found = flat(run.protocol | {"method": own, "bits": run.bits._asdict()})
    return {key: value.strip('"') for key, value in found.items()}
