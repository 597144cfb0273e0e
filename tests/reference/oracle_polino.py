"""Quantized distillation and differentiable quantization in slow, exact arithmetic: the reference for the tensor code.

The functions compute with Fractions, which represent every float exactly. `k` is the size of a bucket. If `k` is 0, the
whole tensor is one bucket.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def buckets(w: FloatArray, k: int) -> list[list[Fraction]]:
    """Return the buckets of the flattened tensor, each with k consecutive elements.

    If elements are missing in the last bucket, its last element is repeated. A tensor with fewer than k elements is one
    bucket, to which nothing is added.
    """
    flat = [Fraction(v) for v in w.flat]
    if k == 0 or len(flat) < k:
        return [flat]
    rows = [flat[i : i + k] for i in range(0, len(flat), k)]
    rows[-1] += [rows[-1][-1]] * (k - len(rows[-1]))
    return rows


def scale(bucket: Sequence[Fraction]) -> tuple[Fraction, Fraction]:
    """Return alpha = max - min, or 1 if that is below 1e-10, and beta = min."""
    alpha = max(bucket) - min(bucket)
    return (alpha if alpha >= Fraction(1, 10**10) else Fraction(1)), min(bucket)


def unbucketed(rows: list[list[Fraction]], w: FloatArray) -> FloatArray:
    flat = [float(v) for row in rows for v in row]
    return np.array(flat[: w.size], np.float64).reshape(w.shape)


def quantize(w: FloatArray, bits: int, k: int, draws: FloatArray | None = None) -> FloatArray:
    """Return weights quantized to s = 2^bits levels per bucket: round(x (s - 1)) / (s - 1), with ties to even.

    With `draws` (buckets, k) from [0, 1), rounding is stochastic: a value is rounded up if its draw is below its
    fraction, and otherwise rounded down.
    """
    steps, rows = 2**bits - 1, []
    for b, bucket in enumerate(buckets(w, k)):
        alpha, beta = scale(bucket)
        row = []
        for i, v in enumerate(bucket):
            y = (v - beta) / alpha * steps
            code = round(y) if draws is None else floor(y) + (Fraction(draws[b, i]) < y - floor(y))
            row.append(Fraction(code, steps) * alpha + beta)
        rows.append(row)
    return unbucketed(rows, w)


def scaled(w: FloatArray, k: int) -> FloatArray:
    """(v - beta) / alpha of every weight."""
    rows = []
    for bucket in buckets(w, k):
        alpha, beta = scale(bucket)
        rows.append([(v - beta) / alpha for v in bucket])
    return unbucketed(rows, w)


def nearest(x: Fraction, points: Sequence[float]) -> int:
    """Return the index of the nearest point, the upper one at a tie."""
    return min(range(len(points)), key=lambda i: (abs(x - Fraction(points[i])), -i))


def to_points(w: FloatArray, points: Sequence[float], k: int) -> FloatArray:
    """alpha p + beta for the nearest p."""
    rows = []
    for bucket in buckets(w, k):
        alpha, beta = scale(bucket)
        rows.append([alpha * Fraction(points[nearest((v - beta) / alpha, points)]) + beta for v in bucket])
    return unbucketed(rows, w)


def points_gradient(w: FloatArray, points: Sequence[float], k: int, g: FloatArray) -> list[float]:
    """Return dL/dp_i = sum_j alpha(bucket of j) dL/dw_j 1[j assigned to i].

    The sum is over the weights, without the elements that were added to the last bucket.
    """
    sums, size = [Fraction(0)] * len(points), k or w.size
    rows = buckets(w, k)
    for j, (v, up) in enumerate(zip(w.flat, g.flat, strict=True)):
        alpha, beta = scale(rows[j // size])
        sums[nearest((Fraction(v) - beta) / alpha, points)] += alpha * Fraction(up)
    return [float(s) for s in sums]


def quantiles(w: FloatArray, m: int, k: int) -> FloatArray:
    """Percentiles linspace(0, 100, m) of the scaled tensor."""
    return np.percentile(scaled(w, k), np.linspace(0, 100, m))
