"""Tests hypotheses about differences: McNemar's test, equivalence (TOST), claims, Holm's adjustment.

The distributions come from `scipy.special`. The module `differences` explains why.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qbench.report.statistics.differences import Difference, one_sided_p, swapped

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TESTS = ("better", "at_least", "equal")
EXACT_FLIPS = 16
"""Up to this number of differences, the sign-flip test tries all signs."""
OUTLYING = 5
"""A value farther from the median than this number of robust standard deviations is outlying."""


class Evidence(NamedTuple):
    """The evidence for or against a claim.

    `p` is the p-value for the direction that the data favour. It is doubled because both directions are tested. `holds`
    is true if this direction supports the claim.
    """

    p: float
    holds: bool


def mcnemar(first_hits: "ArrayLike", second_hits: "ArrayLike") -> float:
    """Return the exact two-sided p-value of two networks' hits (N,) (McNemar 1947).

    The test uses only images that exactly one of the networks classifies correctly. If the networks are equally good,
    each is correct on such an image with probability 1/2. The number of images that only the first network classifies
    correctly then follows a binomial distribution. p is twice the lower tail at the smaller count. The test applies to
    these two networks, not to other seeds of the same methods.
    """
    import numpy as np
    from scipy import special

    first, second = np.asarray(first_hits, dtype=bool), np.asarray(second_hits, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    lower_tail = float(special.bdtr(min(only_first, only_second), only_first + only_second, 0.5))
    return min(1.0, 2 * lower_tail)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the sign-flip test of paired differences (Fisher 1935).

    Under the null hypothesis, every difference is as likely as its negative. p is the share of all
    2^n choices of signs whose sum is at least as far from 0 as the observed one. Unlike Student's
    test, it needs no normal distribution. With n differences, p is at least 2^(1 - n). Above 16
    differences, the share of 2^16 random choices is returned. They have a fixed seed and include the
    observed signs.
    """
    import numpy as np

    d = np.asarray(differences, dtype=float)
    if len(d) <= EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (2**EXACT_FLIPS, len(d)))
        signs[0] = 1
    sums, tolerance = np.abs(signs @ d), 1e-9 * np.abs(d).sum()
    return float((sums >= abs(d.sum()) - tolerance).mean())


def outlying(values: Sequence[float]) -> list[int]:
    """Return the indices of values that are far from the others.

    A value is far if its distance from the median is more than 5 standard deviations, estimated as
    1.4826 times the median distance from the median (Hampel 1974).
    """
    import numpy as np

    distance = np.abs(np.asarray(values, dtype=float) - np.median(values))
    return [int(i) for i in np.flatnonzero(distance > OUTLYING * 1.4826 * np.median(distance) + 1e-9)]


def equivalent(difference: Difference, margin: float) -> float:
    """Return the p-value of "the means differ by `margin` or more" (TOST, Schuirmann 1987).

    It is the larger p-value of the hypotheses "at most -margin" and "at least margin".
    """
    return max(one_sided_p(difference, -margin), one_sided_p(swapped(difference), -margin))


def evidence(difference: Difference, test: str, margin: float) -> Evidence:
    """Return how strongly the data support or contradict a claim.

    The claims are:

    - better: first - second > margin.
    - at_least: first - second > -margin.
    - equal: first - second is within ±margin.

    The smaller of the one-sided p-values of both directions is doubled. Then p < 0.05 means that
    the 95 % confidence interval lies wholly on one side of the border (for `equal`, wholly within
    the margins or wholly outside).

    Raises:
        ValueError: there is no such test.
    """
    if test not in TESTS:
        raise ValueError(f"test={test}: must be one of {', '.join(TESTS)}")
    mirrored = swapped(difference)
    if test == "equal":
        p_for = equivalent(difference, margin)
        p_against = min(one_sided_p(difference, margin), one_sided_p(mirrored, margin))
    else:
        border = margin if test == "better" else -margin
        p_for, p_against = one_sided_p(difference, border), one_sided_p(mirrored, -border)
    return Evidence(min(1.0, 2 * min(p_for, p_against)), p_for <= p_against)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of tests, in the given order (Holm 1979).

    The step-down procedure keeps adjusted p-values monotone and at most 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
