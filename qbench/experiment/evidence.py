"""Warns if the accuracy of a run means little: few test images, training steps or epochs, or a weak float baseline."""

from collections.abc import Callable, Iterator, Sequence
from math import sqrt

from qbench.data.loader import batch_size_and_steps
from qbench.experiment.setup import ExperimentSetup
from qbench.runs.result import Evaluation
from qbench.training.schedule import updates_per_epoch

FEW_STEPS = 500
"""A run with fewer training steps has a warning. The default recipe of the smallest data set, digits, has 540 steps."""

COARSE_POINTS = 0.5
"""A test split has a warning if one image changes top-1 by more than this many points.

A limit of 0.5 points corresponds to 200 images.
"""

MOST_PHASES = 500
"""Number of epochs with which `skipped_phases` counts a method's phases. Methods with more phases are not checked."""

QUANTILE = 1.645
"""Number of standard errors of a one-sided 95 % bound."""


def evidence_warnings(setup: ExperimentSetup, baseline: Evaluation | None, steps: int) -> list[str]:
    """Return warnings about accuracies that mean little. For a debug run, return none: `final_result` warns about it.

    Args:
        setup: the setup of the run.
        baseline: the evaluation of the float baseline on the run's test split; None without a baseline.
        steps: number of training batches of the run; 0 if nothing was trained.
    """
    if setup.config.debug:
        return []
    labels = setup.data.test.labels
    return [
        *(weak_baseline(baseline.test.top1, labels.bincount().tolist()) if baseline else ()),
        *few_steps(updates(setup, steps), "pretrain." if setup.is_baseline else ""),
        *skipped_phases(setup.method.phases, setup.epochs),
        *coarse_test_split(len(labels)),
    ]


def updates(setup: ExperimentSetup, batches: int) -> int:
    """Return the number of updates of the weights in the given number of training batches."""
    per_epoch = batch_size_and_steps(setup.data, setup.optim.batch_size)[1]
    epochs, rest = divmod(batches, per_epoch)
    return epochs * updates_per_epoch(setup.optim, per_epoch) + updates_per_epoch(setup.optim, rest)


def weak_baseline(top1: float, images_per_class: list[int]) -> Iterator[str]:
    """Yield a warning if a float baseline is not clearly better than a constant answer.

    Chance is the share of the most frequent class in the test split. The limit is chance + min(chance, 1 - chance) / 5.
    The baseline must exceed this limit by `QUANTILE` standard errors of the accuracy on the test images.

    Args:
        top1: test top-1 of the baseline in percent.
        images_per_class: number of test images of each class.
    """
    images = sum(images_per_class)
    chance = max(images_per_class) / images
    limit = chance + min(chance, 1 - chance) / 5
    needed = 100 * min(1, limit + QUANTILE * sqrt(limit * (1 - limit) / images))
    if top1 < needed:
        yield (
            f"the float baseline is not clearly above chance: its top-1 is {top1:.2f} % on {images:,} test images, the "
            f"most frequent class alone gives {100 * chance:.2f} %, and clearly above chance means at least "
            f"{needed:.2f} %"
        )


def few_steps(steps: int, prefix: str) -> Iterator[str]:
    """Yield a warning if a run has few training steps, which are updates of the weights.

    `prefix` is `pretrain.` for a baseline, else empty.
    """
    if 0 < steps < FEW_STEPS:
        yield (
            f"the run has {steps} training steps, fewer than {FEW_STEPS}; raise {prefix}epochs, or lower "
            f"{prefix}optim.batch_size"
        )


def skipped_phases(phases: Callable[[int], Sequence[int]], epochs: int) -> Iterator[str]:
    """Yield a warning if a run has too few epochs for all phases of its method.

    Incremental methods freeze a portion of the weights at the start of each phase. If a phase has no epoch, its portion
    is frozen together with the portion of the next phase. The other weights are then not trained between these two
    portions.

    Args:
        phases: `Method.phases`.
        epochs: number of epochs of the run; 0 if nothing was trained.
    """
    most = len(phases(MOST_PHASES))
    # If a method gets more phases with more epochs, without limit, no number of epochs is enough.
    if not epochs or len(phases(epochs)) >= most or len(phases(2 * MOST_PHASES)) != most:
        return
    enough = next(count for count in range(epochs, MOST_PHASES + 1) if len(phases(count)) >= most)
    count = "1 epoch leaves" if epochs == 1 else f"{epochs} epochs leave"
    effect = "all weights are frozen before the first step" if epochs == 1 else "some portions are frozen together"
    yield (
        f"{count} out {most - len(phases(epochs))} of the {most + 1} phases of the method, in which portions of the "
        f"weights are frozen one after another; {effect}; type epochs={enough} or more"
    )


def coarse_test_split(images: int) -> Iterator[str]:
    """Yield a warning if one image of the test split changes top-1 by more than `COARSE_POINTS`."""
    if 100 / images > COARSE_POINTS:
        yield f"the test split has {images} images, so one image changes top-1 by {100 / images:.1f} points"
