"""Differences between an exported network and its run that rounding errors explain, and those that they do not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qbench.deploy.agreement import Logits, RoundingErrors, compare, rounding_errors

IMAGES = torch.arange(8.0).reshape(8, 1)
BATCHES = [(part, torch.zeros(len(part))) for part in IMAGES.split(3)]


def logits(x: Tensor) -> Tensor:
    """Return logits (N, 3). The class of image i is i % 3."""
    return torch.nn.functional.one_hot(x[:, 0].long() % 3, 3).to(x.dtype)


def differing(count: int, by: float) -> Callable[[Tensor], Tensor]:
    """Return `logits` with the logit 0 of the first `count` images changed."""

    def changed(x: Tensor) -> Tensor:
        result = logits(x)
        result[x[:, 0] < count, 0] += by
        return result

    return changed


@pytest.mark.parametrize(
    ("exported", "run", "expected"),
    [
        (differing(0, 1.0), differing(0, 1.0), (0, 0)),
        (differing(4, 0.3), differing(2, 0.3), (4, 2)),
        (differing(5, 0.3), differing(2, 0.3), (5, 2)),
        (differing(1, 0.05), differing(0, 0.3), (0, 0)),  # within the tolerance
        (differing(2, torch.nan), differing(1, 0.3), (2, 1)),
    ],
)
def test_images_that_differ_are_counted(
    exported: Callable[[Tensor], Tensor], run: Callable[[Tensor], Tensor], expected: tuple[int, int]
) -> None:
    kept: Logits = []
    compare(run, exported, BATCHES, kept)
    assert rounding_errors(kept, logits, BATCHES, 0.1) == RoundingErrors(*expected)


def test_a_class_may_differ_within_a_wide_tolerance() -> None:
    """Images 1, 2, 4, 5 and 7 have other classes than 0, and the change makes logit 0 the largest."""
    kept: Logits = []
    compare(logits, differing(8, 2.0), BATCHES, kept)
    assert rounding_errors(kept, logits, BATCHES, torch.inf) == RoundingErrors(5, 0)


@pytest.mark.parametrize(("exported", "run", "comparable"), [(0, 0, True), (1, 0, False), (4, 2, True), (5, 2, False)])
def test_at_most_twice_as_many_images_may_differ(exported: int, run: int, comparable: bool) -> None:
    assert RoundingErrors(exported, run).comparable is comparable
