"""Power analysis: the number of seeds at which a difference would be decided."""

import math

from qbench.report.statistics.differences import ALPHA, Difference

POWER = 0.8


SEEDS_LIMIT = 1000


def needed(
    difference: Difference,
    test: str = "better",
    margin: float = 0.0,
    alpha: float = ALPHA,
    power: float = POWER,
    *,
    seeds_alone: bool = False,
) -> int | None:
    """Return the number of seeds at which a difference of this size would be told from the test's border.

    That is, with this power at a two-sided `alpha`, if the observed mean and variances are the true ones; with
    `seeds_alone` by the degrees of freedom of `with_seed_dof`. None where no number up to 1000 is enough: the part
    of the
    error that comes from the test items alone is too large, the difference lies on the border, or one seed showed no
    variance.
    """
    import numpy as np
    from scipy import special

    if not math.isfinite(difference.error):
        return None
    border = {"better": margin, "at_least": -margin}.get(test, math.copysign(margin, difference.mean))
    distance = abs(difference.mean - border)
    if difference.error == 0:  # all seeds differ alike: p is 2^(1 - n)
        return math.floor(1 - math.log2(alpha)) + 1 if distance else None
    far = margin + abs(difference.mean) if test == "equal" and abs(difference.mean) < margin else math.inf
    for n in (np.arange(2, 33), np.arange(33, SEEDS_LIMIT + 1)):  # most need few: the quantiles are what takes time
        own = difference.seeds_part * difference.n / n
        variance = own + difference.items_part
        parts = own**2 / (n - 1) + difference.items_part**2 / max((difference.items or 2) - 1, 1)
        freedom = np.divide(variance**2, parts, out=n - 1.0, where=parts > 0)
        freedom = np.minimum(freedom, n - 1.0) if seeds_alone else freedom
        reach, error = special.stdtrit(freedom, 1 - alpha / 2), np.sqrt(variance)
        chances = [special.stdtr(freedom, at / error - reach) for at in (distance, far)]
        enough = (distance > 0) & (sum(chances) - 1 >= power)  # both borders of `equal` are to be told from it
        if enough.any():
            return int(n[enough.argmax()])
    return None


def seeds_to_decide(difference: Difference, margin: float, alpha: float) -> int | None:
    """Return the number of seeds at which one of two questions would be answered, by the degrees of freedom of
    `with_seed_dof`: do the arms differ, and, where they lie within the margin, are they as good? None: at none up to
    1000.
    """
    counts = [needed(difference, "better", 0.0, alpha, seeds_alone=True)]
    if abs(difference.mean) < margin:  # `equivalent` is one-sided, `needed` doubles
        counts.append(needed(difference, "equal", margin, 2 * alpha, seeds_alone=True))
    return min((n for n in counts if n is not None), default=None)
