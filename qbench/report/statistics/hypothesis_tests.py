"""Hypothesis tests on differences: McNemar, equivalence (TOST), one-sided claims, Holm's adjustment."""

from collections.abc import Sequence
from typing import NamedTuple

from qbench.report.statistics.differences import Array, Difference, one_sided_p, swapped

TESTS = ("better", "at_least", "equal")


class Evidence(NamedTuple):
    """`p` for the verdict that the data lean to, both directions being tried; `holds`: whether that is the claim."""

    p: float
    holds: bool


def mcnemar(first_hits: Array, second_hits: Array) -> float:
    """Return the exact two-sided p of two networks' hits (N,) on the same test images (McNemar 1947): of the images
    that one has right and the other wrong, each has half.

    It is about these two networks, not about what other seeds of the same methods would give.
    """
    import numpy as np
    from scipy import special

    first, second = np.asarray(first_hits, dtype=bool), np.asarray(second_hits, dtype=bool)
    mine, other = int((first & ~second).sum()), int((second & ~first).sum())
    return min(1.0, 2 * float(special.bdtr(min(mine, other), mine + other, 0.5)))


def noninferior(difference: Difference, margin: float) -> float:
    """Return the one-sided p of "the first arm is worse than the second by `margin` or more"; small: it is not."""
    return one_sided_p(difference, -margin)


def equivalent(difference: Difference, margin: float) -> float:
    """Return the p of "the arms differ by `margin` or more": two one-sided tests, the larger p (Schuirmann 1987)."""
    return max(one_sided_p(difference, -margin), one_sided_p(swapped(difference), -margin))


def evidence(difference: Difference, test: str, margin: float) -> Evidence:
    """Return how strongly the data speak for a claim or against it.

    better: first - second > margin. at_least: first - second > -margin. equal: within +-margin. The smaller of the
    one-sided p of both directions is doubled, so that p < 0.05 says the same as the 95 % interval: it lies wholly on
    one side of the border (of `equal`, wholly within the margins or wholly outside).

    Raises:
        ValueError: no such test.
    """
    if test not in TESTS:
        raise ValueError(f"test={test}: allowed are {', '.join(TESTS)}")
    mirrored = swapped(difference)
    if test == "equal":
        speaks_for = equivalent(difference, margin)
        against = min(one_sided_p(difference, margin), one_sided_p(mirrored, margin))
    else:
        border = margin if test == "better" else -margin
        speaks_for, against = one_sided_p(difference, border), one_sided_p(mirrored, -border)
    return Evidence(min(1.0, 2 * min(speaks_for, against)), speaks_for <= against)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number, in the order given (Holm 1979): step-down, monotone, at most 1."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
