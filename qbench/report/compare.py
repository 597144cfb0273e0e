"""Papers side by side: runs grouped into cells, cells into blocks of one protocol, blocks into tables."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qbench.config import RATE
from qbench.record.run import Result
from qbench.report import choice
from qbench.report.runs import DONE, FROM_LOGS, Found
from qbench.report.table import Table

HEAD = ("method", "W", "A", "G", "levels", "bits/weight", "top-1 %", "std", "n", "diff", "size", "BitOps")


def compare(found: Sequence[Found]) -> list[Table]:
    """Return a table for every data set, network and protocol, and last the runs that have no figure.

    A cell is one method with its options at one set of widths; its figure is the mean over seeds of test top-1 after
    the last epoch. The difference is to each run's own float parent. Runs of unlike protocol are never averaged, nor
    set in one table; the keys in which protocols differ are named. Of runs with recipe=tuned, those of the learning
    rate that is best on validation are the cell, and the test figures of the others stand nowhere.
    """
    found, copies = _without_copies(found)
    runs = [run.result for run in found if run.status == DONE and run.result is not None]
    parents = [r for r in runs if _is_parent(r)]
    children = [r for r in runs if not _is_parent(r)]
    known = {_key(Path(r.float["run"])) for r in children if r.float}
    alone = [r for r in parents if _key(Path(r.run)) not in known]
    blocks: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in [*children, *alone]:
        blocks[result.dataset, result.model, result.protocol["hash"]].append(result)
    by_place = {_key(Path(r.run)): r for r in parents}
    logged = {str(run.path) for run in found if FROM_LOGS in run.notes}
    labels = _labels(runs)
    titles = _titles(blocks)
    lost = [r.result for r in found if r.status != DONE and r.result and choice.is_candidate(r.result)]
    tables = [_block(titles[key], results, by_place, labels, logged, lost) for key, results in sorted(blocks.items())]
    if tables and copies:
        tables[-1].notes.append(f"copies of runs listed already, left out: {', '.join(copies)}")
    tables += _without_figure(found)
    for run in found:
        tables[-1].notes += [f"{run.path.name}: {what}" for what in run.unread]
    return tables


def _without_copies(found: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Return the runs with every identity once, and the paths of the copies left out."""
    kept: list[Found] = []
    copies: list[str] = []
    seen: set[str] = set()
    for run in sorted(found, key=lambda r: str(r.path)):
        identity = run.result.protocol.get("identity") if run.result and run.status == DONE else None
        if identity in seen:
            copies.append(str(run.path))
            continue
        kept.append(run)
        if identity:
            seen.add(identity)
    return kept, copies


def _block(
    title: str,
    results: list[Result],
    parents: dict[str, Result],
    labels: dict[str, str],
    logged: set[str],
    lost: list[Result],
) -> Table:
    table = Table(HEAD, title=title)
    origins: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in results:
        if result.float:
            key = _key(Path(result.float["run"]))
            origins[_network(result)][key] = parents.get(key) or _parent_of(result)
    for network, own in sorted(origins.items()):
        _add(table, f"float {network}".strip(), list(own.values()), logged)
    cells: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        bits = result.bits
        cells[labels[_method(result)], -bits["w"], -bits["a"], -bits["g"]].append(result)
    for (label, *_), members in sorted(cells.items(), key=lambda item: item[0]):
        if not choice.is_candidate(members[0]):
            _add(table, label, members, logged)
            continue
        without = [r for r in lost if _cell(r) == _cell(members[0])]
        made = choice.choose(f"{label} {members[0].widths}", members, without)
        if made.runs:
            _add(table, label, made.runs, logged)
            table.values[-1]["tuned"] = made.values
        table.notes += made.notes
    for label, network in sorted({(labels[_method(r)], _network(r)) for r in results if r.network}):
        table.notes.append(f"{label} is on a network with {network}, as its float parent is")
    for label, ask in sorted({(labels[_method(r)], ask) for r in results for ask in r.asks}):
        table.notes.append(f"{label}: {ask}")
    if any(r.made_data for r in results):
        table.notes.append("made data: not for comparison with papers' tables")
    return table


def _add(table: Table, label: str, members: list[Result], logged: set[str]) -> None:
    """Add the row of one cell."""
    members = sorted(members, key=lambda r: r.seed)
    seeds = [r.seed for r in members]
    if len(set(seeds)) < len(seeds):
        table.notes.append(f"{label} {members[0].widths}: a seed stands more than once: {_runs(members)}")
    top1 = [_top1(r) for r in members]
    diffs = [_top1(r) - r.float["final"]["test"]["top1"] for r in members if r.float]
    first, cost = members[0], next((r.cost for r in members if r.cost), None)
    values = {
        "method": label,
        "bits": first.bits,
        "levels": first.levels,
        "bits_per_weight": cost and cost["bits_per_weight"],
        "top1_mean": mean(top1),
        "top1_std": stdev(top1) if len(top1) > 1 else None,
        "n": len(top1),
        "seeds": seeds,
        "diff_mean": mean(diffs) if len(diffs) == len(top1) else None,
        "bytes": cost and cost["bytes_ideal"],
        "bitops": cost and cost["bitops"],
        "runs": [r.run for r in members],
        "source": FROM_LOGS if any(r.run in logged for r in members) else "result.json",
    }
    table.values.append(values)
    if values["source"] == FROM_LOGS:
        table.notes.append(f"{label} {first.widths}: {FROM_LOGS}: {_runs([r for r in members if r.run in logged])}")
    table.rows.append(
        (
            label,
            *(str(first.bits[key]) for key in "wag"),
            "-" if first.levels is None else str(first.levels),
            "-" if cost is None else f"{cost['bits_per_weight']:.2f}",
            f"{values['top1_mean']:.2f}",
            "-" if values["top1_std"] is None else f"{values['top1_std']:.2f}",
            str(values["n"]),
            "-" if values["diff_mean"] is None else f"{values['diff_mean']:+.2f}",
            "-" if cost is None else f"{short(cost['bytes_ideal'])}B",
            "-" if cost is None else short(cost["bitops"]).rstrip(),
        )
    )


def _without_figure(found: Sequence[Found]) -> list[Table]:
    """Return the table of the runs that failed, diverged, are unsupported, unfinished, running or torn."""
    rest = [run for run in found if run.status != DONE]
    if not rest:
        return []
    table = Table(("status", "run", "reason"), title="without a figure")
    cells: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for run in rest:  # what a method does not know is the same for all seeds: one line; all else is a run of its own
        known = run.status == "unsupported" and run.result is not None
        name = f"{run.result.method} {run.result.widths}" if known and run.result else str(run.path)
        cells[run.status, name, run.reason].append(run)
    for (status, name, reason), runs in sorted(cells.items()):
        count = f", {len(runs)} runs" if len(runs) > 1 else ""
        table.rows.append((status, name + count, reason.partition("\n")[0]))
        table.values.append({"status": status, "runs": [str(run.path) for run in runs], "reason": reason})
    return [table]


def _titles(blocks: Iterable[tuple[str, str, str]] | dict[tuple[str, str, str], list[Result]]) -> dict[Any, str]:
    """Name every block: network, data set, and, where several protocols share them, the keys that differ."""
    assert isinstance(blocks, dict)
    titles = {}
    for key in blocks:
        dataset, model, _ = key
        rivals = {k: _shown(v[0].protocol["keys"]) for k, v in blocks.items() if k[:2] == key[:2]}
        own, names = rivals[key], sorted(set().union(*rivals.values()))
        differing = [n for n in names if len({rival.get(n, "?") for rival in rivals.values()}) > 1]
        if own.get("recipe") == '"tuned"':
            differing = sorted({*differing, "grid.factors", "recipe"})
        told = [f"{n}={own.get(n, '?')}" for n in differing if n in own or not n.startswith("grid.")]
        titles[key] = f"{model} on {dataset}" + (f"; protocol with {', '.join(told)}" if told else "")
    return titles


def _shown(keys: dict[str, Any]) -> dict[str, str]:
    """Return a protocol's keys as typed; `recipe` is left out of those that have the usual one."""
    return _flat({"recipe": "unified"} | keys if "optim" in keys else keys)


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(values, dict):
        return {prefix: json.dumps(values)}
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _labels(results: Iterable[Result]) -> dict[str, str]:
    """Name each method with its options as typed, those that differ between runs of the same method only."""
    options: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        options[result.method].append(_options(result))
    labels = {}
    for name, seen in options.items():
        keys = sorted(set().union(*seen))
        differing = [k for k in keys if k.endswith("deviation") or len({json.dumps(o.get(k)) for o in seen}) > 1]
        for one in seen:
            typed = [f"{k}={one[k]}" for k in differing if k in one]
            labels[_identity(name, one)] = " ".join([name, *typed])
    return labels


def _identity(name: str, options: dict[str, Any]) -> str:
    return name + json.dumps(options, sort_keys=True)


def _method(result: Result) -> str:
    return _identity(result.method, _options(result))


def _cell(result: Result) -> tuple[str, ...]:
    """Return what the runs of one cell share."""
    return result.dataset, result.model, result.protocol["hash"], _method(result), result.widths


def _options(result: Result) -> dict[str, Any]:
    """Return a method's options, not the rate to be chosen; a fine-tuned float network says that it is no parent."""
    init = result.protocol["keys"].get("init")
    own = {key: value for key, value in result.options.items() if key != RATE}
    return own | ({"init": init} if result.method == "float" and init else {})


def _network(result: Result) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(result.network.items()))


def _is_parent(result: Result) -> bool:
    return result.method == "float" and result.protocol["keys"].get("init") == "scratch"


def _parent_of(child: Result) -> Result:
    """Return what a child tells of a float parent whose own directory is not among those read."""
    assert child.float is not None
    return Result(
        status=DONE,
        method="float",
        bits={"w": 32, "a": 32, "g": 32},
        seed=child.seed,
        dataset=child.dataset,
        model=child.model,
        run=child.float["run"],
        protocol=child.protocol,
        final=child.float["final"],
        best=child.float["best"],
        made_data=child.made_data,
    )


def _top1(result: Result) -> float:
    assert result.final is not None
    return float(result.final["test"]["top1"])


def _runs(results: Iterable[Result]) -> str:
    return ", ".join(Path(r.run).name for r in results)


def _key(path: Path) -> str:
    """Return the part of a run's path that stays when the folder around it is moved."""
    return "/".join(path.parts[-2:])


def short(number: float) -> str:
    """Write a number with three digits and a unit: 7.18 k."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError
