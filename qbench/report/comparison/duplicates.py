"""Removes duplicate runs.

The same run may be in two directories, or in a directory and in a record (a JSON file with the results of many runs).
"""

from collections.abc import Hashable, Iterator, Sequence

from qbench.runs.reader import DONE, RunRecord


def without_duplicates(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Return every run once, and notes about the duplicates that are left out.

    If a run is in a directory and in a record of many runs, the run in the directory is returned.
    """
    kept: dict[Hashable, list[RunRecord]] = {}
    duplicates: list[tuple[RunRecord, RunRecord]] = []
    for run in sorted(runs, key=lambda r: (r.recorded, str(r.path))):
        finished = run.result is not None and run.status in (DONE, "unsupported")
        alike = kept.setdefault((run.result.identity if finished and run.result else "") or id(run), [])
        if original := next((other for other in alike if _same_images(run, other)), None):
            duplicates.append((run, original))
        else:
            alike.append(run)
    return [run for alike in kept.values() for run in alike], list(_notes(duplicates))


def _same_images(run: RunRecord, other: RunRecord) -> bool:
    """Return whether two runs with the same identity used the same images.

    If the digest of a run's images is not known, the images count as the same.
    """
    digests = {r.result.data_sha256 for r in (run, other) if r.result and r.result.data_sha256}
    return len(digests) < 2


def _notes(duplicates: Sequence[tuple[RunRecord, RunRecord]]) -> Iterator[str]:
    """Yield notes on pairs of a duplicate and the run that is kept, and on pairs with different accuracies."""
    if not duplicates:
        return
    yield f"duplicate runs are left out: {duplicates[0][0].path}{_more(duplicates)}"
    pairs = [(run, other) for run, other in duplicates if _top1(run) != _top1(other)]
    different = [f"{run.path} {_top1(run)}, kept {_top1(other)}" for run, other in pairs]
    if different:
        yield (
            f"duplicates with a different top-1 ({len(different)}), because of another version or machine: "
            f"{different[0]}{_more(different)}"
        )


def _more(items: Sequence[object]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _top1(run: RunRecord) -> str:
    return f"{run.result.top1:.2f}" if run.result and run.result.top1 is not None else "-"
