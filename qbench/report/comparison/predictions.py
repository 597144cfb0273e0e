"""Reads the test accuracy and the hits of single runs. Hits say which test images a run classified correctly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.report.statistics.differences import Difference, paired, two_way
from qbench.runs.hits import Hits, load_hits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RunAccuracy:
    """The test accuracy of one run, or the difference of two runs.

    Args:
        top1: test top-1 in percent, or the difference in points.
        images: sha256 of the labels of the test images, or None if no predictions are stored.
        hits: whether each of the N test images was classified correctly, (N,). For a difference of two runs, the
            entries are 1, 0 or -1. None if no predictions are stored.
    """

    top1: float
    images: str | None = None
    hits: "NDArray[np.bool_] | NDArray[np.float64] | None" = None


def load_run_accuracy(run: str, top1: float, hits: Hits | None = None) -> RunAccuracy:
    """Return the accuracy and hits of a run.

    If `hits` is None, the function reads predictions.npy. If this file is missing or damaged, the result has no hits.
    """
    found = hits or load_hits(Path(run), top1)
    return RunAccuracy(top1, found.labels_sha256, found.correct) if found else RunAccuracy(top1)


def same_test_images(runs: Sequence[RunAccuracy]) -> bool:
    """Return whether all runs have hits, and all hits are on the same test images."""
    return runs[0].images is not None and len({run.images for run in runs}) == 1


def run_difference(first: RunAccuracy, second: RunAccuracy) -> RunAccuracy:
    """Return the first accuracy minus the second. The result has hits if both runs have hits on the same images."""
    import numpy as np

    points = first.top1 - second.top1
    if first.hits is None or second.hits is None or not same_test_images([first, second]):
        return RunAccuracy(points)
    return RunAccuracy(points, first.images, np.subtract(first.hits, second.hits, dtype=float))


def paired_difference(first: Sequence[RunAccuracy], second: Sequence[RunAccuracy]) -> Difference:
    """Return the difference of two groups of runs, paired by seed and, if possible, by test image."""
    import numpy as np

    if same_test_images([*first, *second]):
        hits = [np.stack([run.hits for run in runs if run.hits is not None]) for runs in (first, second)]
        return two_way(*hits)
    return paired([run.top1 for run in first], [run.top1 for run in second])
