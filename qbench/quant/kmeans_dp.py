"""Computes exact k-means of few distinct scalars by dynamic programming. Fixed centroids are called pins.

In one dimension, clusters are intervals of the sorted values. Each row of the dynamic program's table is for one number
of clusters. If more of the sorted values are included, the best start of the last cluster never decreases. A row
therefore takes time n log n (Grønlund et al. 2017, arXiv 1701.07204, section 2). Pins divide the line into gaps. Each
gap is a separate problem. The first and last intervals of a gap belong to the pins at its ends. A second dynamic
program distributes the free centroids over the gaps.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Solution(NamedTuple):
    """The minimal cost, and the free centroids that reach this cost, ascending.

    The cost is the weighted sum of squared distances.
    """

    cost: float
    centroids: Floats


def optimal_centroids(v: Floats, w: Floats, k: int, pins: Floats) -> Floats:
    """Return the centroids with minimal cost, ascending.

    Args:
        v: (n,) distinct values, ascending.
        w: (n,) weights of the values.
        k: number of centroids, including the pins.
        pins: fixed centroids, ascending and distinct.
    """
    # Leave out values that are equal to a pin, because they cost nothing.
    loose, free = ~np.isin(v, pins), k - len(pins)
    v, w = v[loose], w[loose]
    if len(v) <= free:
        return np.union1d(v, pins)
    if not free:
        return pins
    walls: list[float | None] = [None, *pins, None]
    at = [0, *np.searchsorted(v, pins), len(v)]
    # best[m]: the solution with m free centroids for the gaps so far.
    best = [Solution(0.0, np.empty(0))]
    for (left, right), (i, j) in zip(pairwise(walls), pairwise(at), strict=True):
        best = _merge(best, _gap(v[i:j], w[i:j], left, right, free), free)
    return np.union1d(best[-1].centroids, pins)


def _merge(best: list[Solution], gap: list[Solution], free: int) -> list[Solution]:
    """Combine the best solutions for earlier gaps with those for one more gap.

    Lists of solutions are indexed by the number of free centroids.
    """
    sums = [[solution.cost + more.cost for more in gap] for solution in best]
    merged = []
    for n in range(min(free, len(best) + len(gap) - 2) + 1):
        options = range(max(0, n - len(gap) + 1), min(n, len(best) - 1) + 1)
        a = min(options, key=lambda a: sums[a][n - a])
        merged.append(Solution(sums[a][n - a], np.concatenate((best[a].centroids, gap[n - a].centroids))))
    return merged


def _gap(v: Floats, w: Floats, left: float | None, right: float | None, most: int) -> list[Solution]:
    """Return the best solutions for the values of one gap, with 0, 1, ... `most` free centroids.

    Some of the first values belong to the pin `left`, and some of the last values belong to the pin `right`. The
    function finds the best numbers of such values. None means that there is no pin.
    """
    n = len(v)
    y = v - v[n // 2] if n else v  # relative to the middle value, for precision
    weight, first, second = (prefix_sums(w * part) for part in (np.ones(n), y, y * y))
    # cost[i]: the cost of the first i values; before the loop, all of them belong to the left pin.
    # rest[i]: the cost of the other values if they belong to the right pin.
    cost = np.full(n + 1, np.inf) if left is None else np.append(0, np.cumsum(w * (v - left) ** 2))
    rest = np.full(n + 1, np.inf) if right is None else np.append(np.cumsum((w * (v - right) ** 2)[::-1])[::-1], 0)
    cost[0] = rest[n] = 0
    begins: list[NDArray[np.int32]] = []
    solutions: list[Solution] = []
    for m in range(min(most, n) + 1):
        if m:
            cost, begin = _layer(cost, weight, first, second, m, last=m == most and right is None)
            begins.append(begin)
        end = int(np.argmin(cost + rest))
        total, means = float(cost[end] + rest[end]), np.empty(m)
        # Follow the starts of the clusters back from the last cluster.
        for layer in range(m if np.isfinite(total) else 0, 0, -1):
            start = int(begins[layer - 1][end])
            part, share = v[start:end], w[start:end]
            means[layer - 1] = part[0] + share @ (part - part[0]) / share.sum()
            end = start
        solutions.append(Solution(total, means))
    return solutions


def prefix_sums(a: Floats) -> Floats:
    """Return n + 1 sums. The difference between two of these sums is the sum over an interval of `a`.

    The sums are accumulated outward from the middle, so that large values at the ends do not reduce
    the precision in the middle.
    """
    m = len(a) // 2
    return np.concatenate((-np.cumsum(a[:m][::-1])[::-1], [0], np.cumsum(a[m:])))


def _layer(
    before: Floats, weight: Floats, first: Floats, second: Floats, m: int, last: bool
) -> tuple[Floats, NDArray[np.int32]]:
    """Return, for every i, the minimal cost of the first i values with one more cluster, and its best start.

    For the first i values, the best start of the cluster is one of m - 1, ..., i - 1. The best start never decreases
    with i. If the best starts for i1 and i2 are known, only starts between these two are searched for every i between
    i1 and i2. One pass handles many values of i at once, and reads every start only a few times.

    Args:
        before: (n + 1,) minimal costs with m - 1 clusters.
        weight, first, second: (n + 1,) prefix sums of w, w y, w y².
        m: number of clusters, including the new one.
        last: whether to compute only the result for all n values.
    """
    n = len(before) - 1
    rows = n - m + 1
    known = before - second
    cost, begin = np.full(n + 1, np.inf), np.zeros(n + 1, np.int32)
    single = np.isinf(before[m])  # only the first start is possible
    # at[r]: the best start of row i = r + m - 1; the first and the last entry are the smallest and the largest possible
    # start.
    at = np.full(rows + 2, m - 1 if single else n - 1)
    at[0] = m - 1
    # Steps between the rows of a pass, from wide to narrow. Fewer passes need more reads, which
    # are fast as long as the data stays in the cache.
    bits = 3 if rows < 2_500 else 2 if rows < 6_000 else 1
    steps = [1 << s for s in range((rows.bit_length() - 1) // bits * bits, -1, -bits)]
    wide = rows + 1
    for step in [rows] if last else [1] if single else steps:
        # The rows of this pass, without the rows of wider passes, and the range of starts for each row.
        r = np.arange(step, rows + 1, step)
        r = r[r % wide > 0]
        i, lower = r + m - 1, r - r % wide
        low, high = at[lower], np.minimum(at[np.minimum(lower + wide, rows + 1)], i - 1)
        # All cluster starts j of all rows, one row after the other; row number q has the starts from
        # start[q] to end[q].
        size = high - low + 1
        end = np.cumsum(size)
        start = end - size
        j = np.arange(end[-1]) + np.repeat(low - start, size)
        # Cost = before[j] + squares of the cluster about its mean
        #      = known[j] - (sum)² / weight + second[i].
        trial = np.repeat(first[i], size) - first[j]
        trial *= trial
        trial /= np.repeat(weight[i], size) - weight[j]
        np.subtract(known[j], trial, out=trial)
        # Find the first start of least cost in each row.
        least = np.minimum.reduceat(trial, start)
        hits = np.flatnonzero(trial == np.repeat(least, size))
        at[r] = j[hits[np.searchsorted(hits, start)]]
        cost[i] = least + second[i]
        begin[i] = at[r]
        wide = step
    return cost, begin
