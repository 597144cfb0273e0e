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
"""Maximum number of differences for which the sign-flip test tries all choices of signs."""
OUTLYING = 5
"""Number of robust standard deviations from the median above which a value is outlying."""


class Evidence(NamedTuple):
    """The evidence for or against a claim.

    `p` is the p-value of the direction that the data favour, doubled because both directions are tested. `holds` is
    true if this direction supports the claim.
    """

    p: float
    holds: bool


def mcnemar(first_hits: "ArrayLike", second_hits: "ArrayLike") -> float:
    """Return the exact two-sided p-value for the hits of two networks on N images, each of shape (N,) (McNemar 1947).

    The test uses only images that exactly one of the two networks classifies correctly. If the networks are equally
    good, each network is correct on such an image with probability 1/2. The number of images that only the first
    network classifies correctly then follows a binomial distribution. Let k be the smaller of the two networks' numbers
    of such images. p is twice the probability of k or fewer such images, but at most 1. The result applies to these two
    networks, not to other seeds of the same methods.
    """
    import numpy as np
    from scipy import special

    first, second = np.asarray(first_hits, dtype=bool), np.asarray(second_hits, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    lower_tail = float(special.bdtr(min(only_first, only_second), only_first + only_second, 0.5))
    return min(1.0, 2 * lower_tail)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the sign-flip test of paired differences (Fisher 1935).

    Under the null hypothesis, every difference is as likely as its negative. Each choice of signs for the n differences
    gives a sum. p is the share of all 2^n choices whose sum is at least as far from 0 as the observed sum, so p is at
    least 2^(1 - n). Unlike Student's test, the sign-flip test does not assume a normal distribution. For more than 16
    differences, p is the share among 2^16 random choices, which are drawn with a fixed seed and include the observed
    signs.
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
    """Return the indices of values, in points, that are far from all other values.

    A value is far if its distance from the median is more than 5 robust standard deviations and more than a point. A
    robust standard deviation is 1.4826 times the median of all distances from the median (Hampel 1974). It is 0 if more
    than half of the values are equal, which can happen if accuracies differ by only a few test images.
    """
    import numpy as np

    distance = np.abs(np.asarray(values, dtype=float) - np.median(values))
    return [int(i) for i in np.flatnonzero(distance > max(OUTLYING * 1.4826 * np.median(distance), 1.0))]


def equivalent(difference: Difference, margin: float) -> float:
    """Return the p-value of "the means differ by `margin` or more" (TOST, Schuirmann 1987).

    The result is the larger of the p-values of the two hypotheses "at most -margin" and "at least margin".
    """
    return max(one_sided_p(difference, -margin), one_sided_p(swapped(difference), -margin))


def evidence(difference: Difference, test: str, margin: float) -> Evidence:
    """Return whether the data support or contradict a claim, with the p-value.

    The claims are:

    - better: first - second > margin.
    - at_least: first - second > -margin.
    - equal: first - second is within ±margin.

    p is twice the smaller of the one-sided p-values of both directions. p < 0.05 therefore means that the 95 %
    confidence interval is completely on one side of the border. For `equal`, p < 0.05 means that the interval is
    completely inside or completely outside ±margin.

    Raises:
        ValueError: `test` is none of these claims.
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
    """Adjust p-values for the number of tests, and return them in the same order (Holm 1979).

    The step-down procedure keeps adjusted p-values monotone and at most 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
