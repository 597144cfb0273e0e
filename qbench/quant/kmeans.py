"""Clusters scalars by globally optimal k-means. Some centroids may be fixed. Fixed centroids are called pinned.

The algorithm uses no random numbers. For few distinct values, the solution is exact (`kmeans_dp`). For many distinct
values, the algorithm first clusters bins of values. It then searches for better splits between clusters, near the
splits between the clusters of bins. Each round of this search divides the bins further.

Other packages with exact solutions (kmeans1d, ckwrap) cannot fix centroids. For n values and k centroids, these
packages also need tables of size n k.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbench.quant.kmeans_dp import Floats, optimal_centroids, prefix_sums

EXACT = 10_000
"""Maximum number of distinct values for which all splits between clusters are considered.

With more values, only splits between bins are considered first.
"""

BINS = 128
"""Number of bins per centroid."""

RANGE = (2_000, 100_000)
"""Minimum and maximum of the total number of bins."""

ZOOMS, REACH, PARTS = 3, 8, 4
"""Numbers of refinement rounds, of bins to search on each side of a split, and of parts into which a bin is divided."""

CHUNK = 1 << 16
"""Number of elements that are processed at a time. These elements fit into the processor's cache."""

Ints = NDArray[np.int64]


class Clustering(NamedTuple):
    """The centroids and labels that `kmeans` returns, and their inertia."""

    centroids: Tensor  #: c distinct centroids in ascending order, with the type and device of the values
    labels: Tensor  #: index of the nearest centroid (the lower one in a tie), int64 with the shape of the values
    inertia: float  #: sum of the squared distances of the values from their nearest centroids


def kmeans(values: Tensor, k: int, pinned: Sequence[float] | Tensor = ()) -> Clustering:
    """Cluster all elements of `values` with minimal inertia. The result has no gradient.

    The inertia is the sum of squared distances between values and their centroids.

    If the number of distinct values is at most `EXACT` or at most the number of bins, the inertia is the global minimum
    up to rounding errors. These errors of float64 sums are 1e-15 times the inertia with k = 1. Centroids are rounded to
    the type of `values`.

    If there are more distinct values, the inertia is minimal among all splits within a few bins of the best splits
    between bins. The inertia then usually exceeds the global minimum by a fraction of at most 1e-7. If splits that are
    far apart are almost equally good, the fraction is at most about (k / bins)². This bound is 6e-5 for k up to 781.

    The computation runs on the CPU. For n values, the time is proportional to n log n. In addition to the result, the
    computation needs 16 bytes of memory per value and 4 (k + 100) bytes per bin. If all distinct values are used, it
    needs 4 (k + 100) bytes per distinct value instead of per bin. If `values` has half precision, is not contiguous or
    is not on the CPU, another 4 bytes per value are needed.

    Args:
        values: finite floating-point values of any shape.
        k: number of centroids, including pinned centroids. Fewer centroids are returned if there are fewer distinct
            values.
        pinned: centroids that the result must contain, converted to the type of `values`. Equal pinned centroids count
            once.

    Raises:
        ValueError: `values` is empty, some values are not finite or not floating-point, or k is below 1 or below the
            number of pinned centroids.
    """
    pins = _check(values, k, pinned)
    half = values.dtype in (torch.float16, torch.bfloat16)
    given = (values.detach().float() if half else values.detach()).contiguous()
    native = np.sort(given.cpu().numpy(), axis=None)
    ends = np.concatenate((native[:1], native[-1:], pins)).astype(np.float64)  # sorting puts NaN at the end
    if not np.isfinite(ends).all():
        raise ValueError("values and pinned must be finite, but contain NaN or infinity")

    # Scale to a magnitude of about 1, so that no square overflows or underflows. A power of two makes this exact.
    power = int(np.frexp(np.abs(ends).max())[1]) - 1
    x = np.ldexp(native, -power, dtype=np.float64)
    del native  # frees its memory
    scaled = np.ldexp(_centroids(x, k, np.ldexp(pins, -power)), power)
    # Round the centroids to the values' type. Two centroids may become equal.
    centroids = torch.from_numpy(scaled).to(values.dtype)
    c = np.unique(centroids.double().numpy())
    inertia = _inertia(x, np.ldexp(c, -power)) * 2.0**power * 2.0**power
    labels = _assign_labels(given, c).reshape(values.shape).to(values.device)
    return Clustering(torch.from_numpy(c).to(values.dtype).to(values.device), labels, inertia)


def _check(values: Tensor, k: int, pinned: Sequence[float] | Tensor) -> Floats:
    """Check the arguments. Return the distinct pinned centroids, ascending and rounded to the type of the values."""
    if not values.is_floating_point():
        raise ValueError(f"values have type {values.dtype}; k-means needs a floating-point tensor")
    if not values.numel():
        raise ValueError("values must not be empty")
    pins = np.unique(torch.as_tensor(pinned, dtype=values.dtype).detach().cpu().double().numpy())
    if k < max(1, len(pins)):
        raise ValueError(f"k={k}: must be an integer of at least {max(1, len(pins))}, including pinned centroids")
    return pins


def _assign_labels(given: Tensor, c: Floats) -> Tensor:
    """Return the index of the nearest centroid in c for every value. In a tie, the lower centroid is chosen."""
    edges = torch.from_numpy(_edges(c))
    # Round the edges down to the values' type. Comparisons in this type then have the same results as in float64.
    below = edges.to(given.dtype)
    below = torch.where(below.double() > edges, torch.nextafter(below, torch.full_like(below, -torch.inf)), below)
    if given.device.type == "cpu" and len(below) < 256:
        return torch.from_numpy(_count_below(given.numpy().reshape(-1), below.numpy()))
    return torch.bucketize(given, below.to(given.device))


def _edges(c: Floats) -> Floats:
    """Return, for each pair of neighbouring centroids in c, the largest float that is not above their midpoint."""
    a, b = c[:-1] / 2, c[1:] / 2
    middle = a + b
    # Compute the exact rounding error of the sum (Knuth's two-sum).
    rounded = middle - a
    error = (a - (middle - rounded)) + (b - rounded)
    return np.where(error < 0, np.nextafter(middle, -np.inf), middle)


def _bounds(x: Floats, c: Floats) -> Ints:
    """Return the index at which each centroid's cluster begins in the ascending values x, and the length of x."""
    return np.concatenate(([0], np.searchsorted(x, _edges(c), side="right"), [len(x)]))


def _inertia(x: Floats, c: Floats) -> float:
    """Return the sum of squared distances between the ascending values x and their nearest centroids in c."""
    total, bounds = 0.0, _bounds(x, c)
    for m, (begin, end) in zip(c, pairwise(bounds), strict=True):
        for i in range(begin, end, CHUNK):
            distance = x[i : min(i + CHUNK, end)] - m
            total += float(np.square(distance, out=distance).sum())
    return total


def _count_below(x: NDArray[np.floating], edges: NDArray[np.floating]) -> Ints:
    """Return the number of edges that are below each value in x.

    If there are few edges, comparing each value with all edges is faster than a search.
    """
    labels = np.empty(x.shape, np.int64)
    less, count = np.empty(min(x.size, CHUNK), np.bool_), np.empty(min(x.size, CHUNK), np.uint8)
    for i in range(0, x.size, CHUNK):
        part = x[i : i + CHUNK]
        n = len(part)
        count[:n] = 0
        for edge in edges:
            np.greater(part, edge, out=less[:n])
            np.add(count[:n], less[:n].view(np.uint8), out=count[:n])
        labels[i : i + n] = count[:n]
    return labels


def _centroids(x: Floats, k: int, pins: Floats) -> Floats:
    """Return the best centroids for the ascending values x, in ascending order."""
    bins = min(max(RANGE[0], BINS * k), RANGE[1])
    new = x[1:] != x[:-1]
    if np.count_nonzero(new) < max(EXACT, bins):
        # Few distinct values: use each of them, with its count as weight.
        first = np.append(0, np.flatnonzero(new) + 1)
        return optimal_centroids(x[first], np.diff(first, append=len(x)).astype(np.float64), k, pins)
    del new  # frees its memory
    # Many distinct values: use the mean of each bin. For precision, compute the means relative to the median, and clip
    # them to the range of the bin.
    centre = x[len(x) // 2]
    y = x - centre
    cut = _bins(x, bins)
    begin, size = cut[:-1], np.diff(cut).astype(np.float64)
    mean = np.clip(centre + np.add.reduceat(y, begin) / size, x[begin], x[cut[1:] - 1])
    return _refine_splits(x, y, cut, optimal_centroids(mean, size, k, pins), pins)


def _bins(x: Floats, n: int) -> Ints:
    """Divide the ascending values x into about n bins. Return the index at which each bin begins, and the length of x.

    The measure of an interval is the cube root of (number of values) x (width)². In optimal quantization, all intervals
    have the same measure (Panter and Dite 1951). The function starts with bins that contain equal numbers of values. It
    then adds cuts at equal fractions of the total measure, three times, and keeps all earlier cuts.
    """
    cut = np.linspace(0, len(x), n // 4, dtype=np.int64)
    for _ in range(3):
        # Accumulate the measure at both ends of every bin, and collect the values at these ends.
        low, high = x[cut[:-1]], x[cut[1:] - 1]
        share = np.append(0, np.cumsum(np.cbrt(np.diff(cut) * (high - low) ** 2)))
        ends = np.stack((low, high), 1).ravel()
        # Find the values at which the measure reaches equal fractions of its total.
        edges = np.interp(np.linspace(0, share[-1], n // 4), np.repeat(share, 2)[1:-1], ends)
        cut = np.union1d(cut, np.searchsorted(x, edges))
    return cut


def _refine_splits(x: Floats, y: Floats, cut: Ints, c: Floats, pins: Floats) -> Floats:
    """Improve centroids by a search for better splits near the current splits, and return the new centroids.

    Args:
        x: n values in ascending order, of shape (n,).
        y: x minus a constant, of shape (n,).
        cut: the indices in x at which bins begin, followed by the length of x.
        c: the centroids, including pinned centroids.
        pins: the pinned centroids.
    """
    centre, fixed = x[0] - y[0], np.isin(c, pins)
    near = np.arange(-REACH * PARTS, REACH * PARTS + 1)[:, None] / PARTS
    for _ in range(ZOOMS):
        bounds = _bounds(x, c)
        if not np.diff(bounds)[~fixed].all():  # some centroid that is not fixed has no values
            break
        # Collect indices in x near each split, one part of a bin apart. The ends of x are always bounds.
        options = np.interp(np.searchsorted(cut, bounds[1:-1]) + near, np.arange(len(cut)), cut).astype(np.int64)
        options = np.pad(options, ((0, 0), (1, 1)), constant_values=(0, len(x)))
        options = np.concatenate((bounds[None], options))
        c = np.unique(np.where(fixed, c, centre + _best_of(options, y, c - centre, fixed)))
        cut = np.unique(options)
    return c


def _best_of(options: Ints, y: Floats, c: Floats, fixed: NDArray[np.bool_]) -> Floats:
    """Return the means of the best clusters of y whose bounds are among `options`.

    The cost of a cluster is the sum of squared distances between its values and their mean. This cost equals the sum of
    squared distances from the centroid in c, minus size x (mean - centroid)². If the centroid of a cluster is pinned,
    the cost of the cluster is the sum of squared distances from the centroid. Let d be the distance between two
    neighbouring centroids, and let m be the amount by which a value exceeds their midpoint. If this value moves to the
    lower centroid's cluster, the sum of squared distances from the centroids grows by 2 d m.

    Args:
        options: possible bounds of the k clusters, of shape (number of options, k + 1). The first row contains the
            bounds of the current clusters, whose centroids are in c.
        y: the values in ascending order.
        c: the k centroids.
        fixed: whether each centroid is pinned, of shape (k,).
    """
    # Compute the number and the sum of the values of y before every option.
    spots = np.unique(options)
    where = np.searchsorted(spots, options)
    n, s = spots[where].astype(np.float64), prefix_sums(np.add.reduceat(y, spots[:-1]))[where]
    # Compute how much the sum of squares about c grows if a bound moves away from the first option.
    moved = np.zeros(n.shape)
    moved[:, 1:-1] = np.diff(c) * (2 * (s - s[0])[:, 1:-1] - (c[1:] + c[:-1]) * (n - n[0])[:, 1:-1])
    # Add one cluster after the other. cost[o] is the least cost if the upper bound of the added cluster is at option o.
    cost, begins = np.zeros(len(n)), []
    for i, m in enumerate(c):
        size = n[:, i + 1] - n[:, i, None]
        gain = 0 if fixed[i] else (s[:, i + 1] - s[:, i, None] - m * size) ** 2 / np.maximum(size, 1)
        trial = np.where(size < (0 if fixed[i] else 1), np.inf, cost[:, None] - gain)
        begins.append(trial.argmin(0))
        cost = trial.min(0) + moved[:, i + 1]
    # Follow the best bounds back from the last cluster, and compute the means.
    row, means = 0, np.empty(len(c))
    for i in reversed(range(len(c))):
        end, row = row, begins[i][row]
        means[i] = (s[end, i + 1] - s[row, i]) / max(n[end, i + 1] - n[row, i], 1)
    return means
