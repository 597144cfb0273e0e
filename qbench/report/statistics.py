"""Differences between two arms of an experiment: intervals, tests, and how many seeds a decision would take.

Arms are paired: the same seeds, and where single predictions are kept, the same test images. scipy is imported where a
distribution is needed, numpy where arrays are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Array = Any  # of numpy, which is not imported here

TESTS = ("better", "at_least", "equal")
ALPHA, POWER = 0.05, 0.8
SEEDS_LIMIT = 1000


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


class Evidence(NamedTuple):
    """`p` for the verdict that the data lean to, both directions being tried; `holds`: whether that is the claim."""

    p: float
    holds: bool


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

    first, second = np.asarray(first_hits, dtype=float), np.asarray(second_hits, dtype=float)
    if first.ndim != 2 or not first.size or first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape}: allowed is (seeds, items) twice")
    d = 100 * (first - second)
    seeds, items = d.shape
    mean = float(d.mean())
    if seeds == 1 or items == 1:
        return _difference(mean, seeds, math.inf, 0.0, 0.0, items)
    rows, columns = d.mean(1), d.mean(0)
    ms_seeds = items * _variance(rows)
    ms_items = seeds * _variance(columns)
    rest = d - rows[:, None] - columns[None, :] + mean
    ms_rest = float((rest * rest).sum()) / ((seeds - 1) * (items - 1))
    seeds_part = max(ms_seeds, ms_rest) / d.size
    items_part = max(ms_items - ms_rest, 0.0) / d.size
    terms = ms_seeds**2 / (seeds - 1) + ms_items**2 / (items - 1) + ms_rest**2 / ((seeds - 1) * (items - 1))
    total = (seeds_part + items_part) * d.size
    freedom = max(total**2 / terms, 1.0) if terms > 0 else seeds - 1.0
    return _difference(mean, seeds, seeds_part, items_part, freedom, items)


def noninferior(difference: Difference, margin: float) -> float:
    """Return the one-sided p of "the first arm is worse than the second by `margin` or more"; small: it is not."""
    return _above(difference, -margin)


def equivalent(difference: Difference, margin: float) -> float:
    """Return the p of "the arms differ by `margin` or more": two one-sided tests, the larger p (Schuirmann 1987)."""
    return max(_above(difference, -margin), _above(_mirrored(difference), -margin))


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
    mirrored = _mirrored(difference)
    if test == "equal":
        speaks_for = equivalent(difference, margin)
        against = min(_above(difference, margin), _above(mirrored, margin))
    else:
        border = margin if test == "better" else -margin
        speaks_for, against = _above(difference, border), _above(mirrored, -border)
    return Evidence(min(1.0, 2 * min(speaks_for, against)), speaks_for <= against)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number, in the order given (Holm 1979): step-down, monotone, at most 1."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def needed(
    difference: Difference, test: str = "better", margin: float = 0.0, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Return the number of seeds at which a difference of this size would be told from the test's border.

    That is, with this power at a two-sided `alpha`, if the observed mean and variances are the true ones. None where no
    number up to 1000 is enough: the part of the error that comes from the test items alone is too large, the difference
    lies on the border, or one seed showed no variance.
    """
    from scipy import stats

    if not math.isfinite(difference.error):
        return None
    border = {"better": margin, "at_least": -margin}.get(test, math.copysign(margin, difference.mean))
    distance = abs(difference.mean - border)
    power = power if test != "equal" else (1 + power) / 2  # both borders are to be told from it
    for n in range(2, SEEDS_LIMIT + 1):
        own = difference.seeds_part * difference.n / n
        variance = own + difference.items_part
        parts = own**2 / (n - 1) + difference.items_part**2 / max((difference.items or 2) - 1, 1)
        freedom = variance**2 / parts if parts > 0 else n - 1
        reach = stats.t.ppf(1 - alpha / 2, freedom) + stats.t.ppf(power, freedom)
        if distance > 0 and distance >= reach * math.sqrt(variance):
            return n
    return None


def _difference(
    mean: float, n: int, seeds_part: float, items_part: float, freedom: float, items: int | None
) -> Difference:
    from scipy import stats

    error = math.sqrt(seeds_part + items_part)
    reach = math.inf if math.isinf(error) else float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    plain = Difference(mean, mean - reach, mean + reach, n, 1.0, error, freedom, seeds_part, items_part, items)
    p = min(1.0, 2 * min(_above(plain, 0.0), _above(_mirrored(plain), 0.0)))
    return Difference(mean, mean - reach, mean + reach, n, p, error, freedom, seeds_part, items_part, items)


def _variance(values: Array) -> float:
    """Return the unbiased variance, exactly 0 where all values are equal."""
    return 0.0 if (values == values[0]).all() else float(values.var(ddof=1))


def _above(difference: Difference, border: float) -> float:
    """Return the one-sided p of "the true difference is at most `border`"."""
    from scipy import stats

    if math.isinf(difference.error):
        return 1.0
    if difference.error == 0:
        return 0.5**difference.n if difference.mean > border else 1.0
    return float(stats.t.sf((difference.mean - border) / difference.error, difference.freedom))


def _mirrored(d: Difference) -> Difference:
    """Return the difference with the arms exchanged."""
    return Difference(-d.mean, -d.high, -d.low, d.n, d.p, d.error, d.freedom, d.seeds_part, d.items_part, d.items)
