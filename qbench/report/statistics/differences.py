"""Differences between two arms of an experiment: intervals, tests, and how many seeds a decision would take.

Arms are paired: the same seeds, and where single predictions are kept, the same test images. scipy is imported where a
distribution is needed (its bare functions: `scipy.stats` takes a second to import), numpy where arrays are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Array = Any  # of numpy, which is not imported here

NORMAL = 1.959963984540054
"""The normal distribution's quantile of 97.5 %."""


@dataclass(frozen=True)
class Difference:
    """A mean difference, first arm minus second, with what a test about it needs.

    `low` and `high` are the 95 % interval, `p` is two-sided against no difference, `n` counts seeds, `items` test
    images (None where only the seeds' figures were compared). The squared standard error falls into `seeds_part`,
    which further seeds lower in proportion, and `items_part`, which only further test images lower.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float
    error: float
    freedom: float
    seeds_part: float
    items_part: float = 0.0
    items: int | None = None


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean difference of two arms' figures, paired by seed, with Student's interval (1908).

    One pair has no spread: its interval is infinite and p is 1. Where all differences are equal the interval shrinks to
    a point, which Student's p would take for certainty; p is then that of the sign-flip test, 2^(1 - n) (Fisher 1935).

    Raises:
        ValueError: no pair, or arms of unlike length.
    """
    import numpy as np

    if not len(first) or len(first) != len(second):
        raise ValueError(f"{len(first)} figures against {len(second)}: arms are paired, one figure a seed in each")
    values = np.subtract(first, second, dtype=float)
    spread = _variance(values) / len(values) if len(values) > 1 else math.inf
    return _difference(float(values.mean()), len(values), spread, 0.0, len(values) - 1.0, None)


def two_way(first_hits: Array, second_hits: Array) -> Difference:
    """Return the difference in points of two arms of shape (seeds, items), 1 where a test item was right.

    Seeds and items are both samples: other seeds would train other networks, other test images would ask other
    questions, and the images are shared by all seeds. With d = 100 (first - second) = mean + seed + item + rest, the
    variance of the mean is (MS_seeds + MS_items - MS_rest) / (seeds items), from the mean squares of the two-way table
    without replication (Scheffé 1959, chapter 7; the same sum as the two-way cluster-robust variance of Cameron,
    Gelbach and Miller 2011, here with unbiased parts). Components are cut off at zero. Degrees of freedom by
    Satterthwaite (1946). A closed form is preferred to a bootstrap over both (Owen 2007): that one overestimates the
    variance with few seeds and draws random numbers.

    Raises:
        ValueError: arms of unlike shape, or empty ones.
    """
    import numpy as np

    first, second = np.asarray(first_hits), np.asarray(second_hits)
    if first.ndim != 2 or not first.size or first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape}: allowed is (seeds, items) twice")
    whole = first.dtype == second.dtype == bool  # a byte each, and sums without rounding
    d = np.subtract(first, second, dtype=np.int8 if whole else float)
    seeds, items = d.shape
    mean = 100 * float(d.mean())
    if seeds == 1 or items == 1:
        return _difference(mean, seeds, math.inf, 0.0, 0.0, items)
    rows, columns = 100 * d.mean(1), 100 * d.mean(0)
    ms_seeds = items * _variance(rows)
    ms_items = seeds * _variance(columns)
    squares = 1e4 * float(np.count_nonzero(d) if whole else (d * d).sum())
    rest = squares - d.size * mean**2 - ms_seeds * (seeds - 1) - ms_items * (items - 1)
    ms_rest = (rest if rest > 1e-12 * squares else 0.0) / ((seeds - 1) * (items - 1))
    seeds_part = max(ms_seeds, ms_rest) / d.size
    items_part = max(ms_items - ms_rest, 0.0) / d.size
    terms = ms_seeds**2 / (seeds - 1) + ms_items**2 / (items - 1) + ms_rest**2 / ((seeds - 1) * (items - 1))
    total = (seeds_part + items_part) * d.size
    freedom = max(total**2 / terms, 1.0) if terms > 0 else seeds - 1.0
    return _difference(mean, seeds, seeds_part, items_part, freedom, items)


def unpaired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean difference of two arms of different seeds, with Welch's interval (1947).

    Raises:
        ValueError: an arm of fewer than two figures.
    """
    import numpy as np

    arms = [np.asarray(arm, dtype=float) for arm in (first, second)]
    if min(map(len, arms)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} figures: allowed are two or more in each arm")
    parts = [_variance(arm) / len(arm) for arm in arms]
    total = sum(parts)
    terms = sum(part**2 / (len(arm) - 1) for part, arm in zip(parts, arms, strict=True))
    n = min(map(len, arms))
    freedom = total**2 / terms if terms > 0 else n - 1.0
    return _difference(float(arms[0].mean() - arms[1].mean()), n, total, 0.0, freedom, None)


def with_seed_dof(d: Difference) -> Difference:
    """Return a difference with no more degrees of freedom than its seeds have, n - 1.

    Those of `two_way` are an estimate; with two to five seeds its p below 0.01 come several times too often, and
    families of many pairs and repeated looks ask for just those. With n - 1 no p is below that of `paired` on the same
    seeds, which is exact (but where all seeds differ alike, which `paired` takes with more caution still).
    """
    freedom = min(d.freedom, d.n - 1.0)
    return d if freedom == d.freedom else _difference(d.mean, d.n, d.seeds_part, d.items_part, freedom, d.items)


def half_width(d: Difference, alpha: float) -> float:
    """Return half the length of the interval that holds the true difference with probability 1 - alpha."""
    return math.inf if math.isinf(d.error) else _quantile(1 - alpha / 2, d.freedom) * d.error


def sample_error(percent: float, items: int) -> float:
    """Return half the 95 % interval, in points, of a percentage of that many test images (binomial, normal limit).

    At 0 and 100 % half an image is taken as wrong or right: no sample is without error.
    """
    p = min(max(percent / 100, 0.5 / items), 1 - 0.5 / items)
    return 100 * NORMAL * math.sqrt(p * (1 - p) / items)


def _difference(
    mean: float, n: int, seeds_part: float, items_part: float, freedom: float, items: int | None
) -> Difference:
    error = math.sqrt(seeds_part + items_part)
    reach = math.inf if math.isinf(error) else _quantile(1 - ALPHA / 2, freedom) * error
    plain = Difference(mean, mean - reach, mean + reach, n, 1.0, error, freedom, seeds_part, items_part, items)
    p = min(1.0, 2 * min(one_sided_p(plain, 0.0), one_sided_p(swapped(plain), 0.0)))
    return Difference(mean, mean - reach, mean + reach, n, p, error, freedom, seeds_part, items_part, items)


def _variance(values: Array) -> float:
    """Return the unbiased variance, exactly 0 where all values are equal but for their rounding."""
    close = 1e-12 * (1 + abs(values).max())
    return 0.0 if values.max() - values.min() <= close else float(values.var(ddof=1))


def _quantile(p: float, freedom: float) -> float:
    """Return Student's quantile."""
    from scipy import special

    return float(special.stdtrit(freedom, p))


def one_sided_p(difference: Difference, border: float) -> float:
    """Return the one-sided p of "the true difference is at most `border`"."""
    from scipy import special

    if math.isinf(difference.error):
        return 1.0
    if difference.error == 0:
        return 0.5**difference.n if difference.mean > border else 1.0
    return float(special.stdtr(difference.freedom, (border - difference.mean) / difference.error))


def swapped(d: Difference) -> Difference:
    """Return the difference with the arms exchanged."""
    return Difference(-d.mean, -d.high, -d.low, d.n, d.p, d.error, d.freedom, d.seeds_part, d.items_part, d.items)


ALPHA = 0.05
