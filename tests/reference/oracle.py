"""DoReFa-Net (arXiv 1606.06160) in slow, exact arithmetic: the reference for the tensor code.

Everything rational stays a Fraction from the input to the level; only tanh is computed in float64.
`k` is the bit-width, `n = 2^k - 1` the number of steps. A `*_unit` function is the map into [0, 1]
before the rounding; tests use it to find how far an input is from a rounding threshold. Section
numbers such as 1a are those of notes on the papers outside this repository.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
HALF = Fraction(1, 2)


def qk(x: Fraction, k: int) -> Fraction:
    """Section 1a, core quantizer: rnd(n x)/n with ties to even (what `round` does to a Fraction)."""
    n = 2**k - 1
    return Fraction(round(n * x), n)


def margin(x: Fraction, k: int) -> Fraction:
    """Distance of n x from the nearest rounding threshold j + 1/2, in steps; 0 is an exact tie."""
    y = (2**k - 1) * x
    return abs(y - math.floor(y) - HALF)


def like(values: list[Fraction], x: FloatArray) -> FloatArray:
    """Return values as an array of x's shape."""
    return np.array([float(v) for v in values], dtype=np.float64).reshape(x.shape)


# Weights


def weight_unit(w: FloatArray) -> list[Fraction]:
    """Section 1a, weights 2 <= W < 32: tanh(w) / (2 max|tanh w|) + 1/2, one max for the whole
    tensor.

    An all-zero tensor is 0/0 in the paper; here it is the limit of w = 0 among other weights, which
    is 1/2.
    """
    t = [Fraction(math.tanh(v)) for v in w.flat]
    m = max(abs(v) for v in t)
    return [v / (2 * m) + HALF if m else HALF for v in t]


def weight_forward(w: FloatArray, k: int) -> FloatArray:
    """Section 1a, weights: mean|w| * s(w) with s(0) = +1 for k = 1, else 2 Qk(unit) - 1, not
    rescaled.
    """
    if k == 1:
        scale = sum((abs(Fraction(v)) for v in w.flat), Fraction(0)) / w.size
        return like([scale if v >= 0 else -scale for v in w.flat], w)
    return like([2 * qk(x, k) - 1 for x in weight_unit(w)], w)


def weight_backward(w: FloatArray, g: FloatArray, k: int) -> FloatArray:
    """Section 1a, weights and 'max-gradient detail': takes g = dL/dw_q, returns dL/dw.

    k = 1: identity. k >= 2: with r = t/M and straight-through rounding, dL/dr = g, so dL/dt_j =
    g_j/M for the numerator and dL/dM = -sum(g t)/M^2 for the max, which goes to the argmax. Several
    maxima share it equally, as TensorFlow's reduce_max and torch's amax do. Not for all-zero w.
    """
    if k == 1:
        return g.copy()
    t = np.tanh(w)
    m = np.abs(t).max()
    at_max = np.abs(w) == np.abs(w).max()
    d_max = -(g * t).sum() / m**2
    d_t = g / m + np.where(at_max, np.sign(t) * d_max / at_max.sum(), 0.0)
    return d_t / np.cosh(w) ** 2


# Activations: three bounded h(x), section 1a "Activations"


def clip_unit(x: float) -> Fraction:
    """h(x) = clip(x, 0, 1): the authors' AlexNet training script, SVHN since 2018."""
    return min(max(Fraction(x), Fraction(0)), Fraction(1))


def abs_unit(x: float) -> Fraction:
    """h(x) = min(1, |x|): SVHN before 2018 ('cabs')."""
    return min(abs(Fraction(x)), Fraction(1))


def tanh_unit(x: float) -> Fraction:
    """h(x) = tanh(x)/2, in [-1/2, 1/2], moved up by 1/2: the first released AlexNet."""
    return Fraction(math.tanh(x)) / 2 + HALF


def clip_slope(x: float) -> float:
    """1 on the closed interval [0, 1], 0 outside (section 1a, activations)."""
    return 1.0 if 0 <= x <= 1 else 0.0


def abs_slope(x: float) -> float:
    """clip'(|x|) * sign(x): closed at |x| = 1 as for clip; 0 at x = 0, as autodiff of abs gives."""
    return 0.0 if x == 0 or abs(x) > 1 else math.copysign(1.0, x)


def tanh_slope(x: float) -> float:
    """d/dx tanh(x)/2 = 1 / (2 cosh^2 x)."""
    return 0.5 / math.cosh(x) ** 2


def activation_forward(x: FloatArray, k: int) -> FloatArray:
    """Section 1a: Qk(clip(x, 0, 1))."""
    return like([qk(clip_unit(v), k) for v in x.flat], x)


def activation_abs_forward(x: FloatArray, k: int) -> FloatArray:
    """Section 1a: Qk(min(1, |x|))."""
    return like([qk(abs_unit(v), k) for v in x.flat], x)


def activation_tanh_forward(x: FloatArray, k: int) -> FloatArray:
    """Section 1a: Qk(tanh(x)/2 + 1/2) - 1/2; for k = 2 the levels are -1/2, -1/6, 1/6, 1/2."""
    return like([qk(tanh_unit(v), k) - HALF for v in x.flat], x)


def activation_backward(x: FloatArray, g: FloatArray, slope: Callable[[float], float]) -> FloatArray:
    """Section 1a: the rounding is straight-through, so dL/dx = g h'(x), whatever k."""
    return g * np.array([slope(float(v)) for v in x.flat], dtype=np.float64).reshape(x.shape)


# Gradients


def gradient_forward(d: FloatArray, u: FloatArray, k: int) -> FloatArray:
    """Section 1a, gradients (paper eq. 12): 2 m (Qk(clip(d/(2m) + 1/2 + u/n, 0, 1)) - 1/2).

    d and u have shape (N, ...); u is the noise, each element in (-1/2, 1/2); m = max|d| is taken
    per sample. A sample of zeros (0/0 in the paper) stays zero.
    """
    n = 2**k - 1
    out: list[Fraction] = []
    for d_sample, u_sample in zip(d.reshape(len(d), -1), u.reshape(len(u), -1), strict=True):
        m = max(abs(Fraction(v)) for v in d_sample)
        for dv, uv in zip(d_sample, u_sample, strict=True):
            x = Fraction(dv) / (2 * m) + HALF + Fraction(uv) / n if m else HALF
            out.append(2 * m * (qk(min(max(x, Fraction(0)), Fraction(1)), k) - HALF))
    return like(out, d)
