"""BWN weights and HWGQ activations in slow, exact arithmetic: the reference for the tensor code.

Forward and backward use Fractions; the levels come from closed-form moments of the half-normal
density 2 phi(x), x > 0, in float64 (NumPy and scipy, no torch). Section numbers such as 1a are
those of notes on the papers outside this repository. `m` is the number of positive levels q_1 < ...
< q_m, 2^bits - 1 of them; `t` are the thresholds between cells.
"""

import math
from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

FloatArray = npt.NDArray[np.float64]


# Weights


def binarize_forward(w: FloatArray) -> FloatArray:
    """Sections 2a and 3a: alpha b for every index of axis 0, alpha = mean|w| of that filter, b = +1
    where w >= 0.
    """
    rows = []
    for row in w.reshape(len(w), -1):
        alpha = sum((abs(Fraction(v)) for v in row), Fraction(0)) / len(row)
        rows.append([float(alpha if v >= 0 else -alpha) for v in row])
    return np.array(rows, np.float64).reshape(w.shape)


def binarize_backward(w: FloatArray, g: FloatArray) -> FloatArray:
    """Section 3a: the gradient with respect to alpha b is the gradient of w, unchanged: no alpha,
    no mask, no 1/n.
    """
    assert w.shape == g.shape
    return g.copy()


# Activations


def thresholds(q: FloatArray) -> list[Fraction]:
    """Section 3a: midpoints of neighbouring levels; the threshold at 0 is a separate rule and not
    among them.
    """
    return [(Fraction(a) + Fraction(b)) / 2 for a, b in pairwise(q)]


def margin(x: FloatArray, q: FloatArray) -> FloatArray:
    """Distance of each x from the nearest midpoint; infinite where there is none."""
    t = np.array([float(s) for s in thresholds(q)])
    return np.abs(x[..., None] - t).min(axis=-1, initial=np.inf)


def activation_forward(x: FloatArray, q: FloatArray) -> FloatArray:
    """Section 3a: x <= 0 -> 0; else the level whose cell (t_i, t_{i+1}] contains x, so x = t gives
    the lower.
    """
    t = thresholds(q)
    values = [q[bisect_left(t, Fraction(v))] if v > 0 else 0.0 for v in x.flat]
    return np.array(values, np.float64).reshape(x.shape)


def slope(x: float, q_m: float, backward: str) -> float:
    """Section 3a, activations backward; tau = q_m - 1 makes the log tail continuous at q_m."""
    if x <= 0:
        return 0.0
    if backward == "vanilla" or x <= q_m:
        return 1.0
    return {"clipped": 0.0, "log_tailed": float(1 / (Fraction(x) - (Fraction(q_m) - 1)))}[backward]


def activation_backward(x: FloatArray, q: FloatArray, g: FloatArray, backward: str) -> FloatArray:
    slopes = [slope(float(v), float(q[-1]), backward) for v in x.flat]
    return g * np.array(slopes, np.float64).reshape(x.shape)


# Levels. Moments over x > 0: E[1; cell], E[x; cell] with density 2 phi, and E[x^2] = 1 in all.


def cells(q: FloatArray) -> FloatArray:
    """Convention A, sections 4.2 and 4.3: 0, the midpoints, infinity."""
    return np.concatenate([[0.0], (q[:-1] + q[1:]) / 2, [np.inf]])


def moments(t: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Probability of each cell [t_i, t_{i+1}] given x > 0, and the mean of x times it."""
    density = 2 * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    return -np.diff(2 * special.ndtr(-t)), -np.diff(density)


def centroids(q: FloatArray) -> FloatArray:
    """Mean of x in the cell of each level: Lloyd's condition is q == centroids(q)."""
    mass, first = moments(cells(q))
    return first / mass


def mse(q: FloatArray, t: FloatArray | None = None) -> float:
    """E[(Q(x) - x)^2 | x > 0]; the cells are those of convention A unless others are given."""
    mass, first = moments(cells(q) if t is None else t)
    return float(1 - (2 * q * first - q**2 * mass).sum())


def fitted_step(step: float, m: int) -> float:
    """Return the best step for the cells of the levels i step, i = 1..m.

    The MSE is stationary in the step if the result (fitted) equals the given step: half the derivative of the MSE is
    sum(i^2 mass) (step - fitted). The cells move with the step too. At a midpoint, however, both neighbouring levels
    have the same error, so this part of the derivative is 0.
    """
    i = np.arange(1, m + 1)
    mass, first = moments(cells(step * i))
    return float((i * first).sum() / (i**2 * mass).sum())


def uniform_levels(m: int) -> FloatArray:
    """Section 4.3, A: the best of a scan over steps, refined to a root of the derivative."""
    i = np.arange(1, m + 1)
    scan = np.geomspace(0.5 / m, 8 / m, 400)
    best = int(np.argmin([mse(step * i) for step in scan]))
    root = optimize.brentq(lambda step: step - fitted_step(step, m), scan[best - 1], scan[best + 1], xtol=1e-15)
    return float(root) * i


def lloyd_max_levels(m: int) -> FloatArray:
    """Section 4.2: Lloyd's algorithm with exact centroids; a root finder replaces its slow last
    part.

    It starts from the density of levels of a fine quantizer, proportional to phi^(1/3): a normal of
    variance 3.
    """
    q = -math.sqrt(3) * special.ndtri((1 - (np.arange(m) + 0.5) / m) / 2)
    for _ in range(50):
        q = centroids(q)
    band = (1, 1) if m > 2 else None
    found = optimize.root(lambda q: q - centroids(q), q, method="hybr", options={"xtol": 1e-13, "band": band})
    return np.asarray(found.x, np.float64)


def levels(bits: int, uniform: bool) -> FloatArray:
    """The 2^bits - 1 positive levels; a log-concave density has one Lloyd-Max quantizer, so a root
    is the optimum.
    """
    return (uniform_levels if uniform else lloyd_max_levels)(2**bits - 1)


# Numbers to compare all of this with, copied from the sections named

# Section 3a, constants of the authors' code: EdMIPS steps; levels of the prototxts "3ne" and "2n".
PUBLISHED_STEP = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
THREE, TWO = [0.538, 1.076, 1.614], [0.453, 1.51]
# Section 4.3, marked C (computed there, not printed in the paper): bits: step, MSE given x > 0.
# First with zero for x <= 0 (convention A), then for round(x / step) step (B).
UNIFORM = {1: (0.797885, 0.363380), 2: (0.538812, 0.086441), 3: (0.321729, 0.020406), 4: (0.184243, 0.005025)}
HALF_STEP = {1: (1.224006, 0.190174), 2: (0.650770, 0.046860), 3: (0.353411, 0.012889), 4: (0.193249, 0.003693)}
# Section 4.2, marked C: number of positive levels: the levels, their thresholds, MSE given x > 0.
LLOYD = {
    1: ([0.797885], [], 0.363380),
    2: ([0.452780, 1.510418], [0.981599], 0.117482),
    3: ([0.317716, 1.000106, 1.893595], [0.658911, 1.446850], 0.057978),
    7: (
        [0.145706, 0.441321, 0.750443, 1.085635, 1.467528, 1.938612, 2.625063],
        [0.293514, 0.595882, 0.918039, 1.276582, 1.703070, 2.281837],
        0.012232,
    ),
    15: (
        [
            *(0.070155, 0.210928, 0.353110, 0.497714, 0.645876, 0.798927, 0.958490, 1.126640),
            *(1.306147, 1.500912, 1.716779, 1.963224, 2.257440, 2.636614, 3.213562),
        ],
        [
            *(0.140542, 0.282019, 0.425412, 0.571795, 0.722402, 0.878709, 1.042565),
            *(1.216393, 1.403530, 1.608846, 1.840001, 2.110332, 2.447027, 2.925088),
        ],
        0.002839,
    ),
}
DIGITS = 5.1e-7  # they have six decimals
