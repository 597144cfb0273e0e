"""A run's figure, and where its predictions are kept which test images it got right; arms of such runs compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.report.statistics.differences import Difference, paired, two_way

Array = Any  # of numpy, imported where it is used


@dataclass(frozen=True)
class RunAccuracy:
    """Test top-1 in percent; labels (N,) and hits (N,), true where a test image was right, or None for both."""

    top1: float
    labels: Array = None
    hits: Array = None


def of_run(run: str, top1: float) -> RunAccuracy:
    """Return a run's figures, with hits from its predictions.npy unless that is damaged or contradicts top-1."""
    import numpy as np

    try:
        labels, predicted = np.load(Path(run) / "predictions.npy").T
    except Exception:  # whatever NumPy stumbles over in a damaged file
        return RunAccuracy(top1)
    hits = labels == predicted
    return RunAccuracy(top1, labels, hits) if hits.size and abs(100 * hits.mean() - top1) < 0.01 else RunAccuracy(top1)


def same_test_images(runs: Sequence[RunAccuracy]) -> bool:
    """Whether all have hits on the same test images."""
    import numpy as np

    labels = [run.labels for run in runs]
    return all(x is not None and (x is labels[0] or np.array_equal(x, labels[0])) for x in labels)


def paired_difference(first: Sequence[RunAccuracy], second: Sequence[RunAccuracy]) -> Difference:
    """Return the difference of two arms paired by seed, and by test image where all have hits on the same ones."""
    import numpy as np

    if same_test_images([*first, *second]):
        return two_way(np.stack([x.hits for x in first]), np.stack([x.hits for x in second]))
    return paired([x.top1 for x in first], [x.top1 for x in second])
