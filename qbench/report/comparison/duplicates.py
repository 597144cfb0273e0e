"""Duplicate runs: the same run in two directories, or in a directory and a record of many runs."""

from collections.abc import Hashable, Iterator, Mapping, Sequence

from qbench.runs.reader import DONE, RunRecord


def without_duplicates(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Return every run once, directories before records, and notes on the duplicates left out."""
    kept: dict[Hashable, RunRecord] = {}
    duplicates: list[RunRecord] = []
    for run in sorted(runs, key=lambda r: (r.recorded, str(r.path))):
        finished = run.result is not None and run.status in (DONE, "unsupported")
        identity = (run.result.identity if finished and run.result else "") or id(run)
        if identity in kept:
            duplicates.append(run)
        else:
            kept[identity] = run
    return list(kept.values()), list(_notes(duplicates, kept))


def _notes(duplicates: Sequence[RunRecord], kept: Mapping[Hashable, RunRecord]) -> Iterator[str]:
    """Yield how many runs were left out, and which of them have another accuracy than the run that was kept."""
    if not duplicates:
        return
    yield f"duplicate runs, left out: {duplicates[0].path}{_more(duplicates)}"
    pairs = [(run, kept[run.result.identity]) for run in duplicates if run.result]
    unlike = [f"{run.path} {_top1(run)}, kept {_top1(other)}" for run, other in pairs if _top1(run) != _top1(other)]
    if unlike:
        count = len(unlike)
        yield f"duplicates with another top-1 ({count}), from other versions or machines: {unlike[0]}{_more(unlike)}"


def _more(items: Sequence[object]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _top1(run: RunRecord) -> str:
    return f"{run.result.top1:.2f}" if run.result and run.result.top1 is not None else "-"
