"""The methods' equations, implemented a second time in NumPy, in float64, with gradients derived by hand.

The code uses nothing of the package. It was written from the papers and notes on them, not from the tensor code. Every
function returns its value and `back`. The function `back` takes the upstream gradient G = dL/dvalue and returns the
gradient of the first argument. If there are learned scales, it returns a tuple of this gradient and their gradients.
Equation numbers are given where they are known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

Array = npt.NDArray[np.float64]
Back = Callable[[Array], Any]
Pair = tuple[Array, Back]


def sign(x: Array) -> Array:
    """Two values: +1 for zeros of either sign."""
    return np.where(x >= 0, 1.0, -1.0)


def half_even(x: Array) -> Array:
    return np.rint(x)


# XNOR-Net and BWN, 1603.05279


def filter_scales(w: Array) -> Array:
    """Alpha = ||W||_1 / n of every filter, in a shape that multiplies w."""
    n = w[0].size
    return np.array([np.abs(f).sum() / n for f in w]).reshape(-1, *[1] * (w.ndim - 1))


def xnor_weight(w: Array, gradient: str = "paper") -> Pair:
    """Paper: dC/dW = dC/dW~ (1/n + alpha 1{|W| <= 1}). Authors: (alpha 1{|W| < 1} + 1/n) (1 -
    1/c_in), where c_in is the number of input channels, or of inputs in a linear layer. Jiecaoyu: (g alpha
    1{|W| <= 1} + sign(W)/n sum g sign(W)) (1 - 1/c_in) n, with sign(0) = 0.
    """
    n, alpha, value = w[0].size, filter_scales(w), filter_scales(w) * sign(w)
    if gradient == "paper":
        return value, lambda g: g * (1 / n + alpha * (np.abs(w) <= 1))
    if gradient == "authors":
        return value, lambda g: g * (alpha * (np.abs(w) < 1) + 1 / n) * (1 - 1 / w.shape[1])

    def back(g: Array) -> Array:
        out = np.zeros_like(w)
        for f, up, scale, by in zip(w, g, alpha.ravel(), out, strict=True):
            shared = sum(float(u) * float(np.sign(x)) for u, x in zip(up.ravel(), f.ravel(), strict=True)) / n
            by[...] = (up * scale * (np.abs(f) <= 1) + np.sign(f) * shared) * (1 - 1 / w.shape[1]) * n
        return out

    return value, back


def xnor_activation(x: Array) -> Pair:
    """The gradient passes where |x| < 1, strictly."""
    return sign(x), lambda g: np.where((x > -1) & (x < 1), g, 0.0)


def input_scale(x: Array, kernel: tuple[int, int], stride: int, padding: int) -> Array:
    """K = A * k with A = mean over channels of |I| and every entry of k being 1 / (w h): (N, 1, H',
    W').
    """
    height, width = kernel
    a = np.abs(x).sum(1) / x.shape[1]
    a = np.pad(a, ((0, 0), (padding, padding), (padding, padding)))
    rows, columns = (a.shape[1] - height) // stride + 1, (a.shape[2] - width) // stride + 1
    k = np.zeros((len(x), 1, rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = a[:, i * stride : i * stride + height, j * stride : j * stride + width]
            k[:, 0, i, j] = window.sum((1, 2)) / (height * width)
    return k


def centred(w: Array) -> Array:
    """w minus its mean over the input channels, at every position of every filter."""
    return w - w.sum(1, keepdims=True) / w.shape[1]


def clamped(w: Array) -> Array:
    return np.where(w > 1, 1.0, np.where(w < -1, -1.0, w))


# TWN, 1605.04711


def twn_weight(w: Array) -> Pair:
    """Delta = 0.7 E|W| of the layer, alpha = mean |W| beyond it (0 without any); straight-through."""
    delta = 0.7 * np.abs(w).sum() / w.size
    beyond = np.abs(w) > delta
    alpha = np.abs(w)[beyond].mean() if beyond.any() else 0.0
    return alpha * np.sign(w) * beyond, lambda g: g


# TTQ, 1612.01064


def ttq_max_threshold(w: Array, t: float) -> float:
    return float(t * np.abs(w).max())


def ttq_weight(w: Array, positive: float, negative: float, delta: float) -> Pair:
    """Eq. 6-8, with the minus sign that the chain rule gives dL/dWn."""
    up, down = w > delta, w < -delta

    def back(g: Array) -> tuple[Array, Array, Array]:
        slope = np.ones_like(w)
        slope[up], slope[down] = positive, negative
        return g * slope, np.asarray(g[up].sum()), np.asarray(-g[down].sum())

    return positive * up - negative * down, back


def ttq_means(w: Array, delta: float) -> tuple[float, float]:
    """The initial scales: mean magnitudes of the two zones."""
    return float(w[w > delta].mean()), float(-w[w < -delta].mean())


# HWGQ, 1702.00953

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_INFINITY = 14.0


def _moments(low: Array, high: Array) -> tuple[Array, Array]:
    """Integrals of phi and x phi over [low, high], elementwise, by quadrature in pieces of at most
    1/4.
    """
    zeroth, first = np.zeros_like(low), np.zeros_like(low)
    pieces = max(1, math.ceil(float((high - low).max()) * 4))
    for piece in range(pieces):
        a, b = low + (high - low) * piece / pieces, low + (high - low) * (piece + 1) / pieces
        x = (a + b)[:, None] / 2 + (b - a)[:, None] / 2 * _NODES
        phi = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * _WEIGHTS * (b - a)[:, None] / 2
        zeroth += phi.sum(1)
        first += (x * phi).sum(1)
    return zeroth, first


def _cells(q: Array, first: float) -> tuple[Array, Array]:
    middle = (q[1:] + q[:-1]) / 2
    return np.concatenate([[first], middle]), np.concatenate([middle, [_INFINITY]])


def lloyd_step(q: Array) -> Array:
    """Every level moves to the mean of its cell under the positive half of N(0, 1); t_1 = 0."""
    zeroth, first = _moments(*_cells(q, 0.0))
    return first / zeroth


def lloyd_levels(m: int, rounds: int = 4000) -> Array:
    """Lloyd's algorithm as in textbooks."""
    q = (np.arange(m) + 0.5) / m * 3
    for _ in range(rounds):
        moved = lloyd_step(q)
        if np.abs(moved - q).max() < 1e-14:
            break
        q = moved
    return q


def optimal_levels(m: int) -> Array:
    """The fixed point of `lloyd_step`, by Newton's method; there is one, because phi is
    log-concave.
    """
    start = math.sqrt(3) * np.array([_quantile((i + 0.5) / m) for i in range(m)])
    return np.asarray(optimize.fsolve(lambda q: q - lloyd_step(q), start, xtol=1e-13), np.float64)


def _quantile(p: float) -> float:
    """The quantile of the half-normal density."""
    return float(optimize.brentq(lambda x: math.erf(x / math.sqrt(2)) - p, 0, _INFINITY))


def uniform_step(m: int, first: float) -> float:
    """The step D of least error for levels D, 2 D ... m D. The first cell begins at `first` D;
    below, it is zero.
    """
    i = np.arange(1, m + 1)

    def slope(step: float) -> float:
        low, high = _cells(i * step, first * step)
        zeroth, moment = _moments(low, high)
        return float((i * (i * step * zeroth - moment)).sum())

    return float(optimize.brentq(slope, 0.3 / m, 10 / m, xtol=1e-15))


def hwgq_activation(x: Array, q: Array, backward: str, first: float | None = 0.0) -> Pair:
    """Zero up to `first`, then the level of the cell, which includes its upper border."""
    edges = np.concatenate([[0.0 if first is None else first], (q[1:] + q[:-1]) / 2])
    index = (x[..., None] > edges).sum(-1)
    top = q[-1]
    tail = 1 / np.where(x > top, x - (top - 1), 1.0)
    slope = {
        "vanilla": np.where(x > 0, 1.0, 0.0),
        "clipped": np.where((x > 0) & (x <= top), 1.0, 0.0),
        "log_tailed": np.where(x > top, tail, np.where(x > 0, 1.0, 0.0)),
    }[backward]
    return np.concatenate([[0.0], q])[index], lambda g: g * slope


def hwgq_weight(w: Array) -> Pair:
    """alpha b per filter; the gradient of w~ is that of w."""
    return filter_scales(w) * sign(w), lambda g: g


# INQ, 1702.03044


def inq_exponent(w: Array) -> int:
    """n1 = floor(log2(4 s / 3)), s = max|w|, without a rounding error: the largest n with 3 2^n <=
    4 s (eq. 2).
    """
    s = Fraction(float(np.abs(w).max()))
    n = math.frexp(float(s))[1] + 2
    while 3 * Fraction(2) ** n > 4 * s:
        n -= 1
    return n


def inq_magnitudes(n1: int, bits: int) -> list[float]:
    """0 and 2^n2 ... 2^n1 with n2 = n1 + 1 - 2^(b-1) / 2."""
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    return [0.0, *(2.0**n for n in range(n2, n1 + 1))]


def inq_rounded(w: Array, n1: int, bits: int) -> Array:
    """Eq. 4: beta sgn(w) where |w| in [(alpha + beta) / 2, 3 beta / 2), else 0; larger ones
    saturate at 2^n1.
    """
    magnitudes = inq_magnitudes(n1, bits)
    out = np.where(np.abs(w) >= 1.5 * magnitudes[-1], magnitudes[-1], 0.0)
    for alpha, beta in pairwise(magnitudes):
        out[((alpha + beta) / 2 <= np.abs(w)) & (np.abs(w) < 1.5 * beta)] = beta
    return out * sign(w)


class InqLayer:
    """A layer through the phases: the largest free weights are rounded and frozen until the portion
    is reached.
    """

    def __init__(self, w: Array, bits: int) -> None:
        self.bits = bits
        self.n1: int | None = None
        self.frozen, self.value = np.zeros(w.shape, bool), np.zeros(w.shape)

    def partition(self, w: Array, portion: float, chosen: npt.NDArray[np.bool_] | None = None) -> None:
        """`chosen`: which weights are frozen afterwards, for the random partition. n1 is that of
        the first portion.
        """
        n1 = inq_exponent(w) if self.n1 is None else self.n1
        self.n1 = n1
        rounded = inq_rounded(w, n1, self.bits)
        free = sorted(np.flatnonzero(~self.frozen.ravel()), key=lambda i: -abs(w.flat[i]))
        if chosen is not None:
            free = [i for i in free if chosen.flat[i]]
        for i in free[: round(portion * w.size) - int(self.frozen.sum())]:
            self.frozen.flat[i], self.value.flat[i] = True, rounded.flat[i]

    def weight(self, w: Array) -> Pair:
        return np.where(self.frozen, self.value, w), lambda g: np.where(self.frozen, 0.0, g)


# DoReFa-Net, 1606.06160


def q_k(x: Array, k: int) -> Array:
    """Eq. 5; its gradient is defined as 1 (eq. 6)."""
    n = 2**k - 1
    return half_even(n * x) / n


def dorefa_weight(w: Array, k: int) -> Pair:
    """k = 1: E|w| sign(w) over the layer, gradient 1. Else eq. 9, with the chain rule through tanh
    and the maximum; elements that share the maximum share its gradient equally.
    """
    if k == 1:
        return np.abs(w).sum() / w.size * sign(w), lambda g: g
    t = np.tanh(w)
    m = np.abs(t).max()
    if m == 0:
        return 2 * q_k(np.full(w.shape, 0.5), k) - 1, lambda g: g * np.nan

    def back(g: Array) -> Array:
        top = np.abs(t) == m
        by_m = -(g * t).sum() / m**2
        by_t = g / m + top / top.sum() * np.sign(t) * by_m
        return by_t * (1 - t**2)

    return 2 * q_k(t / (2 * m) + 0.5, k) - 1, back


def dorefa_activation(x: Array, k: int, activation: str = "clip") -> Pair:
    """Eq. 11 for three bounded h: min(1, max(0, x)), min(1, |x|), and tanh(x)/2 on [-1/2, 1/2]."""
    if activation == "clip":
        return q_k(np.clip(x, 0, 1), k), lambda g: g * ((x >= 0) & (x <= 1))
    if activation == "abs":
        return q_k(np.minimum(np.abs(x), 1), k), lambda g: g * np.sign(x) * (np.abs(x) <= 1)
    h = np.tanh(x) / 2
    return q_k(h + 0.5, k) - 0.5, lambda g: g * (1 - np.tanh(x) ** 2) / 2


def dorefa_gradient(d: Array, k: int, u: Array) -> Array:
    """Eq. 12 with u ~ Uniform(-0.5, 0.5); max_0 is every sample's own; samples of zeros stay zero."""
    out = np.zeros_like(d)
    for i, sample in enumerate(d):
        m = np.abs(sample).max()
        if m > 0:
            noisy = np.clip(sample / (2 * m) + 0.5 + u[i] / (2**k - 1), 0, 1)
            out[i] = 2 * m * (q_k(noisy, k) - 0.5)
    return out


# PACT, 1805.06085


def pact_activation(x: Array, alpha: float, k: int) -> Pair:
    """Eq. 1-3: alpha's gradient is 1 where x >= alpha, x's where 0 <= x < alpha."""
    y = np.where(x < 0, 0.0, np.where(x < alpha, x, alpha))
    n = 2**k - 1

    def back(g: Array) -> tuple[Array, Array]:
        return np.where((x >= 0) & (x < alpha), g, 0.0), np.asarray(g[x >= alpha].sum())

    return half_even(y * n / alpha) * alpha / n, back


# LSQ, 1902.08153


def lsq_range(bits: int, signed: bool) -> tuple[int, int]:
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq(v: Array, s: float, bits: int, signed: bool, features: int = 0) -> Pair:
    """Eq. 1-3 and 5; with `features` the step's gradient is scaled by 1 / sqrt(features Q_P)
    (section 2.2).
    """
    q_n, q_p = lsq_range(bits, signed)
    scale = 1 / math.sqrt(features * q_p) if features else 1.0
    ratio = v / s
    inside = (-q_n < ratio) & (ratio < q_p)

    def back(g: Array) -> tuple[Array, Array]:
        by_s = np.where(inside, half_even(ratio) - ratio, np.where(ratio <= -q_n, -q_n, q_p))
        return np.where(inside, g, 0.0), np.asarray((g * by_s).sum() * scale)

    return half_even(np.clip(ratio, -q_n, q_p)) * s, back


def lsq_initial(v: Array, bits: int, signed: bool) -> float:
    """2 <|v|> / sqrt(Q_P) (section 2.1)."""
    return float(2 * np.abs(v).mean() / math.sqrt(lsq_range(bits, signed)[1]))


# Uniform: Jacob et al., 1712.05877, with symmetric weights


def uniform_weight(w: Array, bits: int, channel: bool) -> Pair:
    n = 2 ** (bits - 1) - 1
    out = np.zeros_like(w)
    for part, into in zip(w, out, strict=True) if channel else [(w, out)]:
        s = np.abs(part).max() / n
        into[...] = half_even(part / s) * s if s else 0.0
    return out, lambda g: g


def uniform_activation(x: Array, low: float, high: float, bits: int) -> Pair:
    """The range contains zero, whose code is z."""
    low, high = min(low, 0.0), max(high, 0.0)
    n = 2**bits - 1
    s = (high - low) / n
    z = half_even(np.asarray(-low / s))
    code = half_even(x / s) + z
    return (np.clip(code, 0, n) - z) * s, lambda g: np.where((code >= 0) & (code <= n), g, 0.0)


# A whole network


@dataclass(frozen=True)
class Site:
    """A function of (tensor, *scales), and the names of the scales without the name of the layer."""

    function: Callable[..., Pair]
    scales: tuple[str, ...] = ()


def _unchanged(x: Array) -> Pair:
    return x, lambda g: g


def _rectified(x: Array) -> Pair:
    return np.maximum(x, 0), lambda g: g * (x > 0)


@dataclass(frozen=True)
class Layer:
    """A linear layer (w of two axes) or a convolution, its quantizers, and what follows it.

    `output` is a function of (y without bias, x) -> (y, back). `back` returns the gradients of both arguments.
    `gradient` is a function of the gradient of the layer's output. `norm` is the name of the batch normalization after
    the layer, if there is one.
    """

    name: str
    weight: Site = Site(_unchanged)
    input: Site = Site(_unchanged)
    output: Callable[[Array, Array], tuple[Array, Callable[[Array], tuple[Array, Array]]]] | None = None
    gradient: Callable[[Array], Array] | None = None
    stride: int = 1
    padding: int = 0
    act: bool = True
    norm: str = ""


def linear(x: Array, w: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    return x @ w.T, lambda g: (g @ w, g.T @ x)


def convolution(x: Array, w: Array, stride: int, padding: int) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    height, width = w.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows, columns = (x.shape[2] - height) // stride + 1, (x.shape[3] - width) // stride + 1
    y = np.zeros((len(x), len(w), rows, columns))
    windows = [
        (i, j, np.s_[:, :, i * stride : i * stride + height, j * stride : j * stride + width])
        for i in range(rows)
        for j in range(columns)
    ]
    for i, j, window in windows:
        y[:, :, i, j] = np.einsum("nchw,ochw->no", x[window], w)

    def back(g: Array) -> tuple[Array, Array]:
        by_x, by_w = np.zeros_like(x), np.zeros_like(w)
        for i, j, window in windows:
            by_x[window] += np.einsum("no,ochw->nchw", g[:, :, i, j], w)
            by_w += np.einsum("no,nchw->ochw", g[:, :, i, j], x[window])
        return by_x[:, :, padding : x.shape[2] - padding, padding : x.shape[3] - padding], by_w

    return y, back


def normalized(x: Array, scale: Array, shift: Array, eps: float = 1e-5) -> Pair:
    """Batch normalization in training; `back` gives the gradients of x, scale and shift."""
    axes = (0, *range(2, x.ndim))
    gamma, beta = (v.reshape(1, -1, *[1] * (x.ndim - 2)) for v in (scale, shift))
    count = x.size / x.shape[1]
    middle = x - x.sum(axes, keepdims=True) / count
    deviation = np.sqrt((middle**2).sum(axes, keepdims=True) / count + eps)
    y = middle / deviation

    def back(g: Array) -> tuple[Array, Array, Array]:
        mean, along = g.sum(axes, keepdims=True) / count, (g * y).sum(axes, keepdims=True) / count
        return gamma * (g - mean - y * along) / deviation, (g * y).sum(axes), g.sum(axes)

    return gamma * y + beta, back


def cross_entropy(logits: Array, labels: npt.NDArray[np.int64]) -> tuple[float, Array]:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    hit = np.eye(logits.shape[1])[labels]
    return float(-np.log((p * hit).sum(1)).mean()), (p - hit) / len(logits)


def quantized_layer(layer: Layer, params: Mapping[str, Array], x: Array) -> tuple[Array, Callable[[Array], Any]]:
    """Return the layer's output and back(G) -> (gradient of x, gradients of the layer's parameters
    by name).
    """

    def scales(site: Site) -> list[Array]:
        return [params[f"{layer.name}.{name}"] for name in site.scales]

    x_hat, back_x = layer.input.function(x, *scales(layer.input))
    w_hat, back_w = layer.weight.function(params[f"{layer.name}.weight"], *scales(layer.weight))
    y, back_y = linear(x_hat, w_hat) if w_hat.ndim == 2 else convolution(x_hat, w_hat, layer.stride, layer.padding)
    back_out = None
    if layer.output:
        y, back_out = layer.output(y, x)
    bias = params.get(f"{layer.name}.bias")
    if bias is not None:
        y = y + bias.reshape(1, -1, *[1] * (y.ndim - 2))

    def back(g: Array) -> tuple[Array, dict[str, Array]]:
        g = layer.gradient(g) if layer.gradient else g
        grads = {f"{layer.name}.bias": g.sum((0, *range(2, g.ndim)))} if bias is not None else {}
        g, by_output = back_out(g) if back_out else (g, np.zeros_like(x))
        by_x_hat, by_w_hat = back_y(g)
        for site, back_site, upstream, first in (
            (layer.input, back_x, by_x_hat, "x"),
            (layer.weight, back_w, by_w_hat, "weight"),
        ):
            result = back_site(upstream)
            by_first, by_scales = (result[0], result[1:]) if site.scales else (result, ())
            grads[f"{layer.name}.{first}"] = by_first
            grads.update({f"{layer.name}.{n}": s for n, s in zip(site.scales, by_scales, strict=True)})
        return grads.pop(f"{layer.name}.x") + by_output, grads

    return y, back


def _named(gradients: tuple[Array, ...], names: Sequence[str]) -> tuple[Array, dict[str, Array]]:
    return gradients[0], dict(zip(names, gradients[1:], strict=True))


def network(
    params: Mapping[str, Array], layers: Sequence[Layer], x: Array, labels: npt.NDArray[np.int64]
) -> tuple[Array, float, dict[str, Array]]:
    """Return logits, mean cross entropy and its gradient with respect to every parameter and to the
    image ("x").
    """
    backs: list[Callable[[Array], Any]] = []
    for layer in layers:
        if params[f"{layer.name}.weight"].ndim == 2 and x.ndim > 2:
            shape, x = x.shape, x.reshape(len(x), -1)
            backs.append(lambda g, shape=shape: g.reshape(shape))  # type: ignore[misc]
        x, back = quantized_layer(layer, params, x)
        backs.append(back)
        if layer.norm:
            names = [f"{layer.norm}.weight", f"{layer.norm}.bias"]
            x, back = normalized(x, *(params[n] for n in names))
            backs.append(lambda g, back=back, names=names: _named(back(g), names))
        if layer.act and layer is not layers[-1]:
            x, back = _rectified(x)
            backs.append(back)
    loss, g = cross_entropy(x, labels)
    grads: dict[str, Array] = {}
    for back in reversed(backs):
        g = back(g)
        if isinstance(g, tuple):
            g, parameter_grads = g
            grads.update(parameter_grads)
    return x, loss, {**grads, "x": g}
