"""Papers side by side: runs grouped into cells, cells into blocks of one protocol, blocks into tables.

`conclude` says below them what follows, `published` what papers claim, `columns` how they look, `asked` what is wanted.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qbench.report.comparison import lr_selection as choice
from qbench.report.comparison import naming
from qbench.report.comparison.settings import values
from qbench.report.tables.columns import DEFAULT, HEAD, chosen, show
from qbench.report.tables.table import Table
from qbench.runs.reader import DONE, FROM_LOGS, RunRecord
from qbench.runs.result import Result

__all__ = ["HEAD", "compare"]


def compare(found: Sequence[RunRecord], by: Sequence[str] = ()) -> list[Table]:
    """Return a table for every data set, network and protocol, and last the runs that have no figure.

    A cell is one method with its options at one set of widths; its figure is the mean over seeds of test top-1 after
    the last epoch. The difference is to each run's own float parent. Runs of unlike protocol are never averaged, nor
    set in one table; the keys in which protocols differ are named. Of runs with lr_search=grid, those of the learning
    rate that is best on validation are the cell, and the test figures of the others stand nowhere. With `by`, keys of
    `naming.facts`, runs that differ in them stand in tables of their own.
    """
    found, copies = _without_copies(found)
    runs = [run.result for run in found if run.status == DONE and run.result is not None]
    parents = [r for r in runs if naming.is_parent(r)]
    children = [r for r in runs if not naming.is_parent(r)]
    known = {_key(r.baseline.run) for r in children if r.baseline}
    alone = [r for r in parents if _key(r.run) not in known]
    blocks: dict[naming.Block, list[Result]] = defaultdict(list)
    for result in [*children, *alone]:
        blocks[result.dataset, result.model, result.protocol.hash].append(result)
    lost = [r.result for r in found if r.status != DONE and r.result and choice.is_candidate(r.result)]
    titles = naming.titles(blocks)
    context = _Context(
        parents={_key(r.run): r for r in parents},
        labels=naming.labels(runs),
        logged={str(run.path) for run in found if FROM_LOGS in run.notes},
        lost=lost,
    )
    tables = [
        _block(titles[key] + told, own, context)
        for key, results in sorted(blocks.items())
        for told, own in _parted(results, by)
    ]
    if tables:
        tables[-1].notes += copies
    tables += _without_figure(found)
    for run in found:
        tables[-1].notes += [f"{run.path.name}: {what}" for what in run.unread]
    return tables


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What blocks share: float parents by place, names of methods, runs read from logs, candidates without a figure."""

    parents: Mapping[str, Result]
    labels: Mapping[str, str]
    logged: set[str]
    lost: Sequence[Result]


def _without_copies(found: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Return the runs with every identity once, directories before records, and what to say of the copies left out."""
    kept: dict[Any, RunRecord] = {}
    copies: list[RunRecord] = []
    for run in sorted(found, key=lambda r: (r.recorded, str(r.path))):
        final = run.result and run.status in (DONE, "unsupported")
        identity = (run.result.identity if final and run.result else None) or id(run)
        copies += [run] if identity in kept else []
        kept.setdefault(identity, run)
    return list(kept.values()), [*_of_copies(copies, kept)]


def _of_copies(copies: Sequence[RunRecord], kept: Mapping[Any, RunRecord]) -> Iterator[str]:
    """Say how many runs were left out, and which of them have another figure than the one that stands."""
    if not copies:
        return
    where = f"{copies[0].path}" + (f" and {len(copies) - 1} more" if len(copies) > 1 else "")
    yield f"copies of runs listed already, left out: {where}"
    pairs = [(run, kept[run.result.identity]) for run in copies if run.result]
    unlike = [f"{run.path} {_top1(run)}, listed {_top1(own)}" for run, own in pairs if _top1(run) != _top1(own)]
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        yield f"of these copies {len(unlike)} have another top-1, by other versions or machines: {unlike[0]}{more}"


def _top1(run: RunRecord) -> str:
    return f"{run.result.top1:.2f}" if run.result and run.result.top1 is not None else "-"


def _parted(results: list[Result], by: Sequence[str]) -> list[tuple[str, list[Result]]]:
    """Return runs parted by the values of some keys, each part with what to add to the title."""
    parts: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        own = naming.facts(result) if by else {}
        parts[tuple(own.get(key, "?") for key in by)].append(result)
    found = sorted(parts.items(), key=lambda part: [_order(value) for value in part[0]])
    return [("".join(f"; {k}={v}" for k, v in zip(by, values, strict=True)), own) for values, own in found]


def _order(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def _block(title: str, results: list[Result], context: _Context) -> Table:
    table = Table((), title=title)
    origins: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in results:
        if result.baseline:
            key = _key(result.baseline.run)
            origins[naming.network(result)][key] = context.parents.get(key) or _parent_of(result)
    for network, own in sorted(origins.items()):
        _add(table, f"float {network}".strip(), list(own.values()), context.logged)
    cells: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    names = {id(r): context.labels[naming.identity(r)] for r in results}
    for result in results:
        bits = result.bits
        cells[names[id(result)], -bits["w"], -bits["a"], -bits["g"]].append(result)
    for (label, *_), members in sorted(cells.items(), key=lambda item: item[0]):
        if not choice.is_candidate(members[0]):
            _add(table, label, members, context.logged)
            continue
        without = [r for r in context.lost if naming.cell(r) == naming.cell(members[0])]
        made = choice.choose(f"{label} {members[0].widths}", members, without)
        if made.runs:
            _add(table, label, made.runs, context.logged)
            table.values[-1]["tuned"] = made.values
        table.notes += made.notes
    for label, network in sorted({(names[id(r)], naming.network(r)) for r in results if r.network}):
        table.notes.append(f"{label} is on a network with {network}, as its float parent is")
    for label, ask in sorted({(names[id(r)], ask) for r in results for ask in r.protocol_changes}):
        table.notes.append(f"{label}: {ask}")
    if any(r.synthetic for r in results):
        table.notes.append("made data: not for comparison with papers' tables")
    show(table, chosen(DEFAULT))
    return table


def _add(table: Table, label: str, members: list[Result], logged: set[str]) -> None:
    """Add the values of one cell, and what is to be said of its runs."""
    members = sorted(members, key=lambda r: (r.seed, r.run))
    name = f"{label} {members[0].widths}"
    if len({r.seed for r in members}) < len(members):
        table.notes.append(f"{name}: a seed stands more than once: {_runs(members)}")
    read = [r for r in members if r.run in logged]
    if read:
        table.notes.append(f"{name}: {FROM_LOGS}: {_runs(read)}")
    table.values.append(values(label, members, FROM_LOGS if read else "result.json"))


def _without_figure(found: Sequence[RunRecord]) -> list[Table]:
    """Return the table of the runs that failed, diverged, are unsupported, unfinished, running or corrupt."""
    rest = [run for run in found if run.status != DONE]
    if not rest:
        return []
    table = Table(("status", "run", "reason"), title="without a figure")
    cells: dict[tuple[str, str, str], list[RunRecord]] = defaultdict(list)
    for run in rest:  # what a method does not know is the same for all seeds: one line; all else is a run of its own
        known = run.status == "unsupported" and run.result is not None
        name = f"{run.result.method} {run.result.widths}" if known and run.result else str(run.path)
        cells[run.status, name, run.reason].append(run)
    for (status, name, reason), runs in sorted(cells.items()):
        count = f", {len(runs)} runs" if len(runs) > 1 else ""
        table.rows.append((status, name + count, reason.partition("\n")[0]))
        table.values.append({"status": status, "runs": [str(run.path) for run in runs], "reason": reason})
    return [table]


def _parent_of(child: Result) -> Result:
    """Return what a child tells of a float parent whose own directory is not among those read."""
    assert child.baseline is not None
    return Result(
        status=DONE,
        method="float",
        bits={"w": 32, "a": 32, "g": 32},
        seed=child.seed,
        dataset=child.dataset,
        model=child.model,
        run=child.baseline.run,
        protocol=replace(child.protocol, keys=child.protocol.keys | {"init": "scratch"}),
        final=child.baseline.final,
        best=child.baseline.best,
        synthetic=child.synthetic,
    )


def _runs(results: Iterable[Result]) -> str:
    return ", ".join(Path(r.run).name for r in results)


def _key(run: str) -> str:
    """Return the part of a run's path that stays when the folder around it is moved: its name ends in a hash."""
    return Path(run).name
