"""Clusters scalars by globally optimal k-means, without a seed. Some centroids may be fixed (pinned).

With few distinct values, the solution is exact (`kmeans_dp`). With many distinct values, bins of values are clustered
first. Then better splits are searched near the splits found, in parts of bins that become smaller and smaller.

Existing exact packages (kmeans1d, ckwrap) cannot fix centroids, and their tables are k times as long as the values.
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
"""Number of distinct values up to which all splits are considered. Above it, only splits between bins are."""

BINS = 128
"""Number of bins per centroid."""

RANGE = (2_000, 100_000)
"""Smallest and largest total number of bins."""

ZOOMS, REACH, PARTS = 3, 8, 4
"""Rounds of refinement, bins searched on either side of each split, and parts per bin."""

CHUNK = 1 << 16
"""Number of elements processed at a time: as many as stay in the cache."""

Ints = NDArray[np.int64]


class Clustering(NamedTuple):
    """The result of `kmeans`."""

    centroids: Tensor  #: (c,), ascending and distinct, of the values' type and device
    labels: Tensor  #: int64, of the values' shape: index of the nearest centroid, the lower one of two equally near
    inertia: float  #: sum of squared distances to the nearest of `centroids`


def kmeans(values: Tensor, k: int, pinned: Sequence[float] | Tensor = ()) -> Clustering:
    """Cluster all elements of `values` around k centroids with minimal inertia. No gradient.

    `values` may have any shape and must be finite.

    The centroids in `pinned` count among the k. They are always in the result, unchanged except for
    conversion to the type of `values`. Repeated ones count once. Fewer than k centroids are
    returned if every distinct value already has its own.

    With up to `EXACT` distinct values (or as many as there are bins, if that is more), the inertia
    is the global minimum. The only errors are the rounding of float64 sums (1e-15 of the inertia
    with a single centroid) and of the centroids to the type of `values`. With more distinct values,
    the inertia is minimal among splits within a few bins of the best splits between bins. It then
    exceeds the global minimum by a fraction of 1e-7 or less, unless splits that are far apart are
    almost equally good. In that case the fraction is about (k / bins)² or less: 6e-5 up to k = 781.

    The computation runs on the CPU in time n log n. Besides the result, it needs 16 bytes per value
    and 4 (k + 100) bytes per bin or per value of `EXACT`. Half precision, and a tensor that is not
    contiguous or not on the CPU, need 4 more bytes per value.

    Raises:
        ValueError: there are no values, some values are not finite or not floating-point, or k is
            below 1 or below the number of pins.
    """
    pins = _check(values, k, pinned)
    half = values.dtype in (torch.float16, torch.bfloat16)
    given = (values.detach().float() if half else values.detach()).contiguous()
    native = np.sort(given.cpu().numpy(), axis=None)
    ends = np.concatenate((native[:1], native[-1:], pins)).astype(np.float64)  # NaN sorts to the end
    if not np.isfinite(ends).all():
        raise ValueError("values and pinned must be finite; found NaN or infinity")

    # Scale by a power of two, which is exact, to a magnitude of 1: no square overflows or vanishes.
    power = int(np.frexp(np.abs(ends).max())[1]) - 1
    x = np.ldexp(native, -power, dtype=np.float64)
    del native  # for its memory
    scaled = np.ldexp(_centroids(x, k, np.ldexp(pins, -power)), power)
    # Round the centroids to the values' type; two may become one.
    centroids = torch.from_numpy(scaled).to(values.dtype)
    c = np.unique(centroids.double().numpy())
    inertia = _inertia(x, np.ldexp(c, -power)) * 2.0**power * 2.0**power
    labels = _assign_labels(given, c).reshape(values.shape).to(values.device)
    return Clustering(torch.from_numpy(c).to(values.dtype).to(values.device), labels, inertia)


def _check(values: Tensor, k: int, pinned: Sequence[float] | Tensor) -> Floats:
    """Check the arguments; return the pins, rounded to the values' type, ascending and distinct."""
    if not values.is_floating_point():
        raise ValueError(f"values of {values.dtype}: k-means needs a floating-point tensor")
    if not values.numel():
        raise ValueError("values must not be empty")
    pins = np.unique(torch.as_tensor(pinned, dtype=values.dtype).detach().cpu().double().numpy())
    if k < max(1, len(pins)):
        raise ValueError(f"k={k}: must be an integer of at least {max(1, len(pins))}, with pinned centroids included")
    return pins


def _assign_labels(given: Tensor, c: Floats) -> Tensor:
    """Return for every value the index of the nearest centroid in c, the lower one in a tie."""
    edges = torch.from_numpy(_edges(c))
    # Round the edges down to the values' type, so that comparisons in that type have the same
    # results.
    below = edges.to(given.dtype)
    below = torch.where(below.double() > edges, torch.nextafter(below, torch.full_like(below, -torch.inf)), below)
    if given.device.type == "cpu" and len(below) < 256:
        return torch.from_numpy(_count_below(given.numpy().reshape(-1), below.numpy()))
    return torch.bucketize(given, below.to(given.device))


def _edges(c: Floats) -> Floats:
    """Return, for each pair of neighbours in c, the largest float not above the midpoint."""
    a, b = c[:-1] / 2, c[1:] / 2
    middle = a + b
    # The exact rounding error of the sum (Knuth's two-sum).
    rounded = middle - a
    error = (a - (middle - rounded)) + (b - rounded)
    return np.where(error < 0, np.nextafter(middle, -np.inf), middle)


def _bounds(x: Floats, c: Floats) -> Ints:
    """Return the index in ascending x where each centroid's cluster begins, and x's length."""
    return np.concatenate(([0], np.searchsorted(x, _edges(c), side="right"), [len(x)]))


def _inertia(x: Floats, c: Floats) -> float:
    """Return the sum of squared distances of ascending x to the nearest centroids in c."""
    total, bounds = 0.0, _bounds(x, c)
    for m, (begin, end) in zip(c, pairwise(bounds), strict=True):
        for i in range(begin, end, CHUNK):
            distance = x[i : min(i + CHUNK, end)] - m
            total += float(np.square(distance, out=distance).sum())
    return total


def _count_below(x: NDArray[np.floating], edges: NDArray[np.floating]) -> Ints:
    """Return for each value in x how many edges are below that value.

    With few edges, comparing with all of them is faster than any search.
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
    """Return the centroids for x, ascending."""
    bins = min(max(RANGE[0], BINS * k), RANGE[1])
    new = x[1:] != x[:-1]
    if np.count_nonzero(new) < max(EXACT, bins):
        # Few distinct values: use each, with its count as weight.
        first = np.append(0, np.flatnonzero(new) + 1)
        return optimal_centroids(x[first], np.diff(first, append=len(x)).astype(np.float64), k, pins)
    del new  # for its memory
    # Many distinct values: use the mean of each bin, computed around the median for precision and
    # clipped to the bin's range.
    centre = x[len(x) // 2]
    y = x - centre
    cut = _bins(x, bins)
    begin, size = cut[:-1], np.diff(cut).astype(np.float64)
    mean = np.clip(centre + np.add.reduceat(y, begin) / size, x[begin], x[cut[1:] - 1])
    return _refine_splits(x, y, cut, optimal_centroids(mean, size, k, pins), pins)


def _bins(x: Floats, n: int) -> Ints:
    """Return the indices in x where about n bins begin, and x's length.

    The measure of an interval is the cube root of (number of values) x (width)². In optimal
    quantization, all intervals have the same measure (Panter and Dite 1951). The function starts
    with bins of equal count. Three times, it adds cuts at equal shares of the total measure.
    Earlier cuts are kept.
    """
    cut = np.linspace(0, len(x), n // 4, dtype=np.int64)
    for _ in range(3):
        # The accumulated measure at both ends of every bin, and the values there.
        low, high = x[cut[:-1]], x[cut[1:] - 1]
        share = np.append(0, np.cumsum(np.cbrt(np.diff(cut) * (high - low) ** 2)))
        ends = np.stack((low, high), 1).ravel()
        # Where the measure reaches n / 4 equal shares.
        edges = np.interp(np.linspace(0, share[-1], n // 4), np.repeat(share, 2)[1:-1], ends)
        cut = np.union1d(cut, np.searchsorted(x, edges))
    return cut


def _refine_splits(x: Floats, y: Floats, cut: Ints, c: Floats, pins: Floats) -> Floats:
    """Return c after a search for better splits of x near those of c.

    Args:
        x: (n,), values, ascending.
        y: (n,), x minus a constant.
        cut: the indices in x where bins begin, and x's length.
        c: centroids, including the pins.
        pins: fixed centroids.
    """
    centre, fixed = x[0] - y[0], np.isin(c, pins)
    near = np.arange(-REACH * PARTS, REACH * PARTS + 1)[:, None] / PARTS
    for _ in range(ZOOMS):
        bounds = _bounds(x, c)
        if not np.diff(bounds)[~fixed].all():  # a free centroid without values
            break
        # Indices in x around each split, in parts of bins; the ends of x have no alternative.
        options = np.interp(np.searchsorted(cut, bounds[1:-1]) + near, np.arange(len(cut)), cut).astype(np.int64)
        options = np.pad(options, ((0, 0), (1, 1)), constant_values=(0, len(x)))
        options = np.concatenate((bounds[None], options))
        c = np.unique(np.where(fixed, c, centre + _best_of(options, y, c - centre, fixed)))
        cut = np.unique(options)
    return c


def _best_of(options: Ints, y: Floats, c: Floats, fixed: NDArray[np.bool_]) -> Floats:
    """Return the means of the best clusters of y whose bounds are among `options` (o, c + 1).

    The first option is the set of bounds between the clusters of c. A cluster's sum of squares
    about its mean is its sum of squares about its centroid in c, minus size x (mean - centroid)².
    For `fixed` clusters, the sum about the centroid counts. A value that moves to the next lower
    centroid adds twice the distance between the two centroids times the value's distance from their
    midpoint.
    """
    # Number and sum of the values of y before every option.
    spots = np.unique(options)
    where = np.searchsorted(spots, options)
    n, s = spots[where].astype(np.float64), prefix_sums(np.add.reduceat(y, spots[:-1]))[where]
    # Cost of moving a bound away from the first option, in squares about c.
    moved = np.zeros(n.shape)
    moved[:, 1:-1] = np.diff(c) * (2 * (s - s[0])[:, 1:-1] - (c[1:] + c[:-1]) * (n - n[0])[:, 1:-1])
    # One cluster after the other: cost[o] is the least cost with the upper bound at option o.
    cost, begins = np.zeros(len(n)), []
    for i, m in enumerate(c):
        size = n[:, i + 1] - n[:, i, None]
        gain = 0 if fixed[i] else (s[:, i + 1] - s[:, i, None] - m * size) ** 2 / np.maximum(size, 1)
        trial = np.where(size < (0 if fixed[i] else 1), np.inf, cost[:, None] - gain)
        begins.append(trial.argmin(0))
        cost = trial.min(0) + moved[:, i + 1]
    # Follow the best bounds back and take the means.
    row, means = 0, np.empty(len(c))
    for i in reversed(range(len(c))):
        end, row = row, begins[i][row]
        means[i] = (s[end, i + 1] - s[row, i]) / max(n[end, i + 1] - n[row, i], 1)
    return means
