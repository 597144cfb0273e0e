"""Computes differences between two methods: means, confidence intervals and p-values.

Two groups of runs are paired by seed. If predictions are stored, the runs are also paired by test image.

Student's distribution comes from `scipy.special` (`stdtr`, `stdtrit`). `t.cdf` and `t.ppf` of `scipy.stats` return the
same numbers but are slower: the import takes 0.7 s instead of 0.2 s, and each call takes about 35 times as long. The
time of a call matters with thousands of pairs. Tests compare the results with `scipy.stats`. scipy and numpy are
imported inside the functions that use them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05
"""Significance level. The confidence level of intervals is 1 - ALPHA = 95 %."""
MOST_FEW = 7
"""Up to this number of values, NumPy adds them one after another."""
NORMAL_QUANTILE = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Difference:
    """A mean difference, first group minus second group, with the values that significance tests need.

    Args:
        mean: the estimated difference.
        low, high: ends of the 95 % confidence interval.
        n: number of seeds.
        p: two-sided p-value of "there is no difference".
        standard_error: standard error of the mean. It is infinite with one seed, and 0 if all seeds have the same
            difference.
        dof: degrees of freedom of Student's distribution.
        seed_variance: the part of the squared standard error that decreases as 1 / (number of seeds).
        item_variance: the part of the squared standard error that only more test images can decrease.
        items: number of test images, or None if only the accuracies of the seeds were compared.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float
    standard_error: float
    dof: float
    seed_variance: float
    item_variance: float = 0.0
    items: int | None = None


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean difference of values paired by seed, with Student's interval (1908).

    With one pair, the interval is infinite and p is 1. If all differences are equal, the interval is a single point,
    and Student's test would give p = 0. The sign-flip test then gives the p-value, 2^(1 - n) for n pairs (Fisher 1935).

    Raises:
        ValueError: the groups are empty or have different lengths.
    """
    if not len(first) or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: paired groups must have one value per seed")
    n = len(first)
    mean, variance = (_few if n <= MOST_FEW else _many)([float(a - b) for a, b in zip(first, second, strict=True)])
    return _difference(mean, n, variance / n if n > 1 else math.inf, 0.0, n - 1.0, None)


def _few(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and variance of up to `MOST_FEW` values, as `_many` does. NumPy would take ten times as long."""
    mean = _sum(values) / len(values)
    tolerance = 1e-12 * (1 + max(map(abs, values)))
    if max(values) - min(values) <= tolerance:
        return mean, 0.0
    return mean, _sum([(value - mean) * (value - mean) for value in values]) / (len(values) - 1)


def _many(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and unbiased variance of values."""
    import numpy as np

    array = np.asarray(values, dtype=float)
    return float(array.mean()), _variance(array)


def _sum(values: Sequence[float]) -> float:
    """Return the sum, rounded after each addition as in NumPy.

    Python's `sum` is not used, because it compensates rounding errors since version 3.12.
    """
    total = 0.0
    for value in values:
        total += value
    return total


def two_way(first_hits: "ArrayLike", second_hits: "ArrayLike") -> Difference:
    """Return the difference of two groups in points, with a standard error that covers seeds and test items.

    Seeds and items are both random samples, and all seeds are tested on the same items. The model is d = 100 (first -
    second) = mean + seed + item + rest. The mean squares (MS) of the two-way table without replication give the
    variance of the mean: (MS_seeds + MS_items - MS_rest) / (seeds * items) (Scheffé 1959, chapter 7). This is the
    two-way cluster-robust variance of Cameron, Gelbach and Miller 2011 with unbiased components. Negative components
    are set to zero. The degrees of freedom follow Satterthwaite (1946). A bootstrap over seeds and items (Owen 2007) is
    not used, because it overestimates the variance with few seeds and needs random numbers.

    Args:
        first_hits, second_hits: 1 if an item was classified correctly, else 0, of shape (seeds, items).

    Raises:
        ValueError: the shapes differ, or a group is empty.
    """
    import numpy as np

    first, second = np.asarray(first_hits), np.asarray(second_hits)
    if first.ndim != 2 or not first.size or first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape}: both must be (seeds, items), with equal sizes")
    booleans = bool(first.dtype == second.dtype == np.bool_)  # int8 uses one byte per value, and its sums are exact
    d = np.subtract(first, second, dtype=np.int8 if booleans else float)
    seeds, items = d.shape
    mean = 100 * float(d.mean())
    if seeds == 1 or items == 1:
        return _difference(mean, seeds, math.inf, 0.0, 0.0, items)
    ms_seeds, ms_items, ms_rest = _mean_squares(d, mean, booleans)
    # components of the variance of the mean, each at least 0
    seed_variance = max(ms_seeds, ms_rest) / d.size
    item_variance = max(ms_items - ms_rest, 0.0) / d.size
    # Satterthwaite: dof = (sum of mean squares)^2 / sum of (mean square^2 / its own dof)
    terms = ms_seeds**2 / (seeds - 1) + ms_items**2 / (items - 1) + ms_rest**2 / ((seeds - 1) * (items - 1))
    total = (seed_variance + item_variance) * d.size
    dof = max(total**2 / terms, 1.0) if terms > 0 else seeds - 1.0
    return _difference(mean, seeds, seed_variance, item_variance, dof, items)


def _mean_squares(
    d: "NDArray[np.int8] | NDArray[np.float64]", mean: float, booleans: bool
) -> tuple[float, float, float]:
    """Return the mean squares of seeds, items and rest.

    The table of differences is 100 d, of shape (seeds, items). `mean` is the mean of this table.
    """
    import numpy as np

    seeds, items = d.shape
    ms_seeds = items * _variance(100 * d.mean(1))
    ms_items = seeds * _variance(100 * d.mean(0))
    squares = 1e4 * float(np.count_nonzero(d) if booleans else (d * d).sum())
    rest = squares - d.size * mean**2 - ms_seeds * (seeds - 1) - ms_items * (items - 1)
    rest = rest if rest > 1e-12 * squares else 0.0  # smaller values are rounding errors of large sums
    return ms_seeds, ms_items, rest / ((seeds - 1) * (items - 1))


def unpaired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean difference of two groups with different seeds, with Welch's interval (1947).

    Raises:
        ValueError: a group has fewer than two values.
    """
    import numpy as np

    groups = [np.asarray(group, dtype=float) for group in (first, second)]
    if min(map(len, groups)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} values: each group needs two or more")
    parts = [_variance(group) / len(group) for group in groups]  # squared standard errors of both means
    total = sum(parts)
    # Welch-Satterthwaite: dof = total^2 / sum of (part^2 / (its group's size - 1))
    terms = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    n = min(map(len, groups))
    dof = total**2 / terms if terms > 0 else n - 1.0
    return _difference(float(groups[0].mean() - groups[1].mean()), n, total, 0.0, dof, None)


def with_seed_dof(d: Difference) -> Difference:
    """Return the difference with at most n - 1 degrees of freedom, where n is the number of seeds.

    The degrees of freedom in `two_way` are an estimate. With two to five seeds and equal settings, `two_way` gives
    p-values below 0.01 in several times 1 % of all cases. Such small p-values decide if many pairs are tested, or if
    the same pair is tested again after each new seed. With at most n - 1
    degrees of freedom, the p-value is never below the p-value of `paired` on the same seeds. There is one exception: if
    all seeds have the same difference, `paired` returns a larger p-value.
    """
    dof = min(d.dof, d.n - 1.0)
    return d if dof == d.dof else _difference(d.mean, d.n, d.seed_variance, d.item_variance, dof, d.items)


def half_width(d: Difference, alpha: float) -> float:
    """Return the half-width of the confidence interval of level 1 - alpha: t(1 - alpha / 2, dof) standard errors."""
    return math.inf if math.isinf(d.standard_error) else _quantile(1 - alpha / 2, d.dof) * d.standard_error


def sample_error(percent: float, items: int) -> float:
    """Return the half-width, in points, of the 95 % confidence interval of a test accuracy.

    The interval uses the normal approximation of the binomial distribution. At an accuracy of 0 %, half an image is
    counted as correct. At 100 %, half an image is counted as wrong. The half-width is therefore never 0.

    Args:
        percent: percentage of test images classified correctly.
        items: number of test images.
    """
    p = min(max(percent / 100, 0.5 / items), 1 - 0.5 / items)
    return 100 * NORMAL_QUANTILE * math.sqrt(p * (1 - p) / items)


def one_sided_p(d: Difference, border: float) -> float:
    """Return the p-value of "the true difference is at most `border`" (Student 1908).

    A small p-value is evidence that the true difference is above the border.

    1. t = (mean - border) / standard error.
    2. p = P(T >= t) = P(T <= -t) for Student's T with `dof` degrees of freedom.

    If all n seeds have the same difference, t is infinite. The sign-flip test is then used: p is 2^-n if the difference
    is above the border, else 1. With one seed, p is 1.
    """
    return _upper_tail(d.mean - border, d.standard_error, d.dof, d.n)


def _upper_tail(distance: float, error: float, dof: float, n: int) -> float:
    """Return the p-value of a mean that is `distance` above the border; see `one_sided_p`."""
    from scipy import special

    if math.isinf(error):
        return 1.0
    if error == 0:
        return 0.5**n if distance > 0 else 1.0
    return float(special.stdtr(dof, -distance / error))


def swapped(d: Difference) -> Difference:
    """Return the difference with both groups swapped: second group minus first group."""
    return Difference(
        -d.mean, -d.high, -d.low, d.n, d.p, d.standard_error, d.dof, d.seed_variance, d.item_variance, d.items
    )


def _difference(
    mean: float, n: int, seed_variance: float, item_variance: float, dof: float, items: int | None
) -> Difference:
    """Return a difference with its interval and p-value, computed from the parts of the squared standard error."""
    error = math.sqrt(seed_variance + item_variance)
    half = math.inf if math.isinf(error) else _quantile(1 - ALPHA / 2, dof) * error
    low, high = mean - half, mean + half
    # the two-sided p-value is twice the smaller of both one-sided p-values
    p = min(1.0, 2 * _upper_tail(abs(mean), error, dof, n))
    return Difference(mean, low, high, n, p, error, dof, seed_variance, item_variance, items)


def _variance(values: "NDArray[np.generic]") -> float:
    """Return the unbiased variance (division by n - 1). It is exactly 0 if all values are equal up to rounding."""
    tolerance = 1e-12 * (1 + abs(values).max())
    return 0.0 if values.max() - values.min() <= tolerance else float(values.var(ddof=1))


def _quantile(p: float, dof: float) -> float:
    """Return the quantile of Student's distribution."""
    from scipy import special

    return float(special.stdtrit(dof, p))
