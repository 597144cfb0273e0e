"""Computes how many seeds would make a difference significant (power analysis)."""

import math
from typing import TYPE_CHECKING

from qbench.report.statistics.differences import ALPHA, Difference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POWER = 0.8
SEEDS_LIMIT = 1000
"""Maximum number of seeds that is tried."""


def seeds_needed(
    difference: Difference,
    test: str = "better",
    margin: float = 0.0,
    alpha: float = ALPHA,
    power: float = POWER,
    *,
    seeds_alone: bool = False,
) -> int | None:
    """Return the number of seeds with which a test of a difference has the given power.

    The observed mean and variances are assumed to be the true values. `alpha` is the two-sided significance level. With
    `seeds_alone`, the degrees of freedom are limited as in `with_seed_dof`.

    The result is None if no number up to 1000 is enough. There are three possible reasons: the error from the test
    items is too large, the difference is equal to the margin of the test, or the variance is not known because there
    was only one seed.
    """
    import numpy as np

    if not math.isfinite(difference.standard_error):
        return None
    border = {"better": margin, "at_least": -margin}.get(test, math.copysign(margin, difference.mean))
    distance = abs(difference.mean - border)
    if difference.standard_error == 0:  # all seeds have the same difference: p is 2^(1 - n)
        return math.floor(1 - math.log2(alpha)) + 1 if distance else None
    inside = test == "equal" and abs(difference.mean) < margin
    other_distance = margin + abs(difference.mean) if inside else math.inf  # `equal` has two borders
    for n in (
        np.arange(2, 33),
        np.arange(33, SEEDS_LIMIT + 1),
    ):  # try small n first, because most cases need few seeds, and quantiles for all n are slow
        chances = _power(difference, n, (distance, other_distance), alpha, seeds_alone)
        enough = (distance > 0) & (chances >= power)
        if enough.any():
            return int(n[enough.argmax()])
    return None


def _power(
    difference: Difference, n: "NDArray[np.integer]", distances: tuple[float, float], alpha: float, seeds_alone: bool
) -> "NDArray[np.floating]":
    """Return the probability of a significant result (power) at each of m numbers of seeds n, of shape (m,).

    `distances` are the distances from the difference to the two borders of a test.

    1. Compute the squared standard error at n seeds. The part from seeds shrinks as 1 / n, and
       the part from items stays constant.
    2. Compute the degrees of freedom of this error by Satterthwaite's formula (n - 1 if the variance
       is 0).
    3. Compute the probability of significance against each border:
       P(T <= distance / error - t(1 - alpha / 2)).
    4. Return a lower bound of the probability that both are significant: the sum of the two
       probabilities minus 1.
    """
    import numpy as np
    from scipy import special

    seed_part = difference.seed_variance * difference.n / n
    variance = seed_part + difference.item_variance
    terms = seed_part**2 / (n - 1) + difference.item_variance**2 / max((difference.items or 2) - 1, 1)
    dof = np.divide(variance**2, terms, out=n - 1.0, where=terms > 0)
    dof = np.minimum(dof, n - 1.0) if seeds_alone else dof
    quantile, error = special.stdtrit(dof, 1 - alpha / 2), np.sqrt(variance)
    chances = [special.stdtr(dof, distance / error - quantile) for distance in distances]
    return np.asarray(sum(chances) - 1)


def seeds_to_decide(difference: Difference, margin: float, alpha: float) -> int | None:
    """Return the number of seeds with which a difference or equivalence would probably be significant.

    The degrees of freedom are limited as in `with_seed_dof`. The result is None if no number up to 1000 is enough.
    """
    counts = [seeds_needed(difference, "better", 0.0, alpha, seeds_alone=True)]
    if abs(difference.mean) < margin:  # `equivalent` is one-sided, `seeds_needed` two-sided
        counts.append(seeds_needed(difference, "equal", margin, 2 * alpha, seeds_alone=True))
    return min((n for n in counts if n is not None), default=None)
