"""k-means of scalars at its global optimum, without a seed, some centroids given and fixed.

In one dimension clusters are intervals of the sorted values, so that dynamic programming finds the optimum; the best
split's monotone movement makes a layer of it n log n (Grønlund et al. 2017, arXiv 1701.07204, section 2). A given
centroid shuts off whatever lies on its two sides: each gap between neighbours is a problem of its own, whose first and
last interval belong to the given centroids, and the free ones are shared out among the gaps.

The exact packages (kmeans1d, ckwrap) fix no centroids and keep tables k times as long as the values.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EXACT = 10_000  # up to so many distinct values every split is considered, beyond only those between bins:
BINS = 128  # so many a centroid,
RANGE = (2_000, 100_000)  # but from so many to so many in all;
ZOOMS, REACH, PARTS = 3, 8, 4  # then so often those in so many bins on either side of each split, in so many parts each
CHUNK = 1 << 16  # elements at a time: as many as stay in cache

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Clustering(NamedTuple):
    """What `kmeans` finds."""

    centroids: Tensor  #: (c,), ascending and distinct, of the values' type and device
    labels: Tensor  #: int64, of the values' shape: index of the nearest centroid, half way the lower one
    inertia: float  #: sum of squared distances to the nearest of `centroids`


def kmeans(values: Tensor, k: int, pinned: Sequence[float] | Tensor = ()) -> Clustering:
    """Cluster all elements of `values` (any shape, finite) around k centroids of least inertia.

    Those in `pinned` count among the k and are in the result as given (in the type of `values`; a repeated one counts
    once), nearest to some value or not. Where the rest suffices to give every distinct value a centroid of its own,
    the result is those and no more. Up to `EXACT` distinct values (and up to as many as there are bins) the inertia is
    the least there is, to the rounding of float64 sums (1e-15 of what a single centroid leaves) and of the centroids to
    the type of `values`. Beyond, it is the least within some bins of the best splits between bins, hardly more (a
    share of 1e-7 or none) unless splits that are far apart are almost equally good; then more by a share of about
    (k / bins)² or less: 6e-5 up to k = 781. No gradient.

    Computed on the CPU in n log n. Memory beside the result: 16 bytes a value, 4 more for half precision and for a
    tensor that is not contiguous or elsewhere than on the CPU, and 4 (k + 100) for each of the bins or of `EXACT`.
    """
    if not values.is_floating_point():
        raise ValueError(f"values of {values.dtype}: k-means needs a floating-point tensor")
    if not values.numel():
        raise ValueError("values: k-means of an empty tensor; it needs at least one value")
    pins = np.unique(torch.as_tensor(pinned, dtype=values.dtype).detach().cpu().double().numpy())
    if k < max(1, len(pins)):
        raise ValueError(f"k={k}: allowed are integers from {max(1, len(pins))}, the pinned centroids counted in")
    half = values.dtype in (torch.float16, torch.bfloat16)
    given = (values.detach().float() if half else values.detach()).contiguous()
    native = np.sort(given.cpu().numpy(), axis=None)
    ends = np.concatenate((native[:1], native[-1:], pins)).astype(np.float64)  # NaN sorts to the end
    if not np.isfinite(ends).all():
        raise ValueError("values, pinned: NaN or infinity among them; k-means needs finite numbers")

    power = int(np.frexp(np.abs(ends).max())[1]) - 1  # to a magnitude of 1: no square overflows or vanishes
    x = np.ldexp(native, -power, dtype=np.float64)
    del native
    scaled = np.ldexp(_centroids(x, k, np.ldexp(pins, -power)), power)
    centroids = torch.from_numpy(scaled).to(values.dtype)
    c = np.unique(centroids.double().numpy())
    inertia = _inertia(x, np.ldexp(c, -power)) * 2.0**power * 2.0**power
    edges = torch.from_numpy(_edges(c))
    below = edges.to(given.dtype)
    below = torch.where(below.double() > edges, torch.nextafter(below, torch.full_like(below, -torch.inf)), below)
    if values.device.type == "cpu" and len(below) < 256:
        labels = torch.from_numpy(_labels(given.numpy().reshape(-1), below.numpy())).reshape(values.shape)
    else:
        labels = torch.bucketize(given, below.to(values.device))
    return Clustering(torch.from_numpy(c).to(values.dtype).to(values.device), labels, inertia)


def _edges(c: Floats) -> Floats:
    """Return for neighbours in c the largest number that is not above their exact middle."""
    a, b = c[:-1] / 2, c[1:] / 2
    middle = a + b
    rounded = middle - a
    error = (a - (middle - rounded)) + (b - rounded)  # exact (Knuth's two-sum)
    return np.where(error < 0, np.nextafter(middle, -np.inf), middle)


def _bounds(x: Floats, c: Floats) -> Ints:
    """Return where in x, ascending, the values nearest to each of c begin, and x's end."""
    return np.concatenate(([0], np.searchsorted(x, _edges(c), side="right"), [len(x)]))


def _inertia(x: Floats, c: Floats) -> float:
    total, bounds = 0.0, _bounds(x, c)
    for m, (begin, end) in zip(c, pairwise(bounds), strict=True):
        for i in range(begin, end, CHUNK):
            away = x[i : min(i + CHUNK, end)] - m
            total += float(np.square(away, out=away).sum())
    return total


def _labels(x: NDArray[np.floating], below: NDArray[np.floating]) -> Ints:
    """Return how many of `below` are less than each of x: to compare with all beats any search where they are few."""
    labels = np.empty(x.shape, np.int64)
    less, count = np.empty(min(x.size, CHUNK), np.bool_), np.empty(min(x.size, CHUNK), np.uint8)
    for i in range(0, x.size, CHUNK):
        part = x[i : i + CHUNK]
        n = len(part)
        count[:n] = 0
        for edge in below:
            np.greater(part, edge, out=less[:n])
            np.add(count[:n], less[:n].view(np.uint8), out=count[:n])
        labels[i : i + n] = count[:n]
    return labels


def _centroids(x: Floats, k: int, pins: Floats) -> Floats:
    """Return the centroids for x, ascending."""
    bins = min(max(RANGE[0], BINS * k), RANGE[1])
    new = x[1:] != x[:-1]
    if np.count_nonzero(new) < max(EXACT, bins):
        first = np.append(0, np.flatnonzero(new) + 1)
        return _optimum(x[first], np.diff(first, append=len(x)).astype(np.float64), k, pins)
    del new  # for its memory
    centre = x[len(x) // 2]
    y = x - centre
    cut = _bins(x, bins)
    begin, size = cut[:-1], np.diff(cut).astype(np.float64)
    mean = np.clip(centre + np.add.reduceat(y, begin) / size, x[begin], x[cut[1:] - 1])
    return _zoomed(x, y, cut, _optimum(mean, size, k, pins), pins)


def _bins(x: Floats, n: int) -> Ints:
    """Return where in x bins begin, and x's end: about n of them, narrow where it matters.

    The cube root of (values in a bin) x (its width)² is the measure of which optimal quantization gives each cell the
    same share (Panter and Dite 1951). Bins of equal count are cut evenly in it, then once more and again; cuts stay.
    """
    cut = np.linspace(0, len(x), n // 4, dtype=np.int64)
    for _ in range(3):
        low, high = x[cut[:-1]], x[cut[1:] - 1]
        share = np.append(0, np.cumsum(np.cbrt(np.diff(cut) * (high - low) ** 2)))
        ends = np.stack((low, high), 1).ravel()
        edges = np.interp(np.linspace(0, share[-1], n // 4), np.repeat(share, 2)[1:-1], ends)
        cut = np.union1d(cut, np.searchsorted(x, edges))
    return cut


def _zoomed(x: Floats, y: Floats, cut: Ints, c: Floats, pins: Floats) -> Floats:
    """Return c after looking for better splits of x near its own; y is x less a constant, `cut` where bins begin."""
    centre, fixed = x[0] - y[0], np.isin(c, pins)
    near = np.arange(-REACH * PARTS, REACH * PARTS + 1)[:, None] / PARTS
    for _ in range(ZOOMS):
        bounds = _bounds(x, c)
        if not np.diff(bounds)[~fixed].all():
            break
        options = np.interp(np.searchsorted(cut, bounds[1:-1]) + near, np.arange(len(cut)), cut).astype(np.int64)
        options = np.pad(options, ((0, 0), (1, 1)), constant_values=(0, len(x)))
        options = np.concatenate((bounds[None], options))
        c = np.unique(np.where(fixed, c, centre + _best_of(options, y, c - centre, fixed)))
        cut = np.unique(options)
    return c


def _best_of(options: Ints, y: Floats, c: Floats, fixed: NDArray[np.bool_]) -> Floats:
    """Return the means of the best clusters of y, each bound of which is one of `options` (o, c + 1); first those of c.

    A cluster's squares about its mean are those about c less size x (mean - c)²; `fixed` ones count about c. A value
    that goes from one of c to the next below adds twice the distance of these two times its own from their middle.
    """
    spots = np.unique(options)
    where = np.searchsorted(spots, options)
    n, s = spots[where].astype(np.float64), _prefix(np.add.reduceat(y, spots[:-1]))[where]
    moved = np.zeros(n.shape)
    moved[:, 1:-1] = np.diff(c) * (2 * (s - s[0])[:, 1:-1] - (c[1:] + c[:-1]) * (n - n[0])[:, 1:-1])
    cost, begins = np.zeros(len(n)), []
    for i, m in enumerate(c):
        size = n[:, i + 1] - n[:, i, None]
        gain = 0 if fixed[i] else (s[:, i + 1] - s[:, i, None] - m * size) ** 2 / np.maximum(size, 1)
        trial = np.where(size < (0 if fixed[i] else 1), np.inf, cost[:, None] - gain)
        begins.append(trial.argmin(0))
        cost = trial.min(0) + moved[:, i + 1]
    row, means = 0, np.empty(len(c))
    for i in reversed(range(len(c))):
        end, row = row, begins[i][row]
        means[i] = (s[end, i + 1] - s[row, i]) / max(n[end, i + 1] - n[row, i], 1)
    return means


def _optimum(v: Floats, w: Floats, k: int, pins: Floats) -> Floats:
    """Return the best centroids for distinct v, ascending, of weights w; pins are among the k."""
    loose, free = ~np.isin(v, pins), k - len(pins)
    v, w = v[loose], w[loose]
    if len(v) <= free:
        return np.union1d(v, pins)
    if not free:
        return pins
    walls: list[float | None] = [None, *pins, None]
    at = [0, *np.searchsorted(v, pins), len(v)]
    best = [(0.0, np.empty(0))]  # by number of free centroids: the least cost so far and where they are
    for (left, right), (i, j) in zip(pairwise(walls), pairwise(at), strict=True):
        options = _gap(v[i:j], w[i:j], left, right, free)
        sums = [[cost + more for more, _ in options] for cost, _ in best]
        merged = []
        for n in range(min(free, len(best) + len(options) - 2) + 1):
            a = min(range(max(0, n - len(options) + 1), min(n, len(best) - 1) + 1), key=lambda a: sums[a][n - a])
            merged.append((sums[a][n - a], np.concatenate((best[a][1], options[n - a][1]))))
        best = merged
    return np.union1d(best[-1][1], pins)


def _gap(v: Floats, w: Floats, left: float | None, right: float | None, most: int) -> list[tuple[float, Floats]]:
    """Return for 0, 1, ... `most` free centroids their least cost for v, ascending, and where they are.

    As many of the first of v as is best go to the centroid `left`, of the last to `right`; None: there is none.
    """
    n = len(v)
    y = v - v[n // 2] if n else v
    weight, first, second = (_prefix(w * part) for part in (np.ones(n), y, y * y))
    cost = np.full(n + 1, np.inf) if left is None else np.append(0, np.cumsum(w * (v - left) ** 2))
    rest = np.full(n + 1, np.inf) if right is None else np.append(np.cumsum((w * (v - right) ** 2)[::-1])[::-1], 0)
    cost[0] = rest[n] = 0
    begins: list[NDArray[np.int32]] = []
    found: list[tuple[float, Floats]] = []
    for m in range(min(most, n) + 1):
        if m:
            cost, begin = _layer(cost, weight, first, second, m, last=m == most and right is None)
            begins.append(begin)
        end = int(np.argmin(cost + rest))
        total, means = float(cost[end] + rest[end]), np.empty(m)
        for layer in range(m if np.isfinite(total) else 0, 0, -1):
            start = int(begins[layer - 1][end])
            part, share = v[start:end], w[start:end]
            means[layer - 1] = part[0] + share @ (part - part[0]) / share.sum()
            end = start
        found.append((total, means))
    return found


def _prefix(a: Floats) -> Floats:
    """Return sums whose differences are those of a's intervals, taken outward from the middle: tails spoil nothing."""
    m = len(a) // 2
    return np.concatenate((-np.cumsum(a[:m][::-1])[::-1], [0], np.cumsum(a[m:])))


def _layer(
    before: Floats, weight: Floats, first: Floats, second: Floats, m: int, last: bool
) -> tuple[Floats, NDArray[np.int32]]:
    """Return the least costs of the first i values with one cluster more than `before`, and where that one begins.

    Row i looks for the best begin in m - 1 ... i - 1. It moves upward with i, so that rows between known ones look
    between theirs; a pass over all such rows at once reads every begin a few times. `last`: only that of all values.
    """
    n = len(before) - 1
    rows = n - m + 1
    known = before - second
    cost, begin = np.full(n + 1, np.inf), np.zeros(n + 1, np.int32)
    single = np.isinf(before[m])  # no begin but the first
    at = np.full(rows + 2, m - 1 if single else n - 1)  # row r is i = r + m - 1; a frame of the extremes around them
    at[0] = m - 1
    bits = 3 if rows < 2_500 else 2 if rows < 6_000 else 1  # fewer passes for more reads, while those stay in cache
    steps = [1 << s for s in range((rows.bit_length() - 1) // bits * bits, -1, -bits)]
    wide = rows + 1
    for step in [rows] if last else [1] if single else steps:
        r = np.arange(step, rows + 1, step)
        r = r[r % wide > 0]
        i, lower = r + m - 1, r - r % wide
        low, high = at[lower], np.minimum(at[np.minimum(lower + wide, rows + 1)], i - 1)
        size = high - low + 1
        end = np.cumsum(size)
        start = end - size
        j = np.arange(end[-1]) + np.repeat(low - start, size)
        trial = np.repeat(first[i], size) - first[j]
        trial *= trial
        trial /= np.repeat(weight[i], size) - weight[j]
        np.subtract(known[j], trial, out=trial)
        least = np.minimum.reduceat(trial, start)
        hits = np.flatnonzero(trial == np.repeat(least, size))
        at[r] = j[hits[np.searchsorted(hits, start)]]
        cost[i] = least + second[i]
        begin[i] = at[r]
        wide = step
    return cost, begin
