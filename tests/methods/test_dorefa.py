"""Test DoReFa-Net against tests/reference/oracle.py, hand-computed rows, properties, and flawed implementations.

The check_* functions take the implementation as an argument, so that they can be applied to flawed ones too.
k or bits: bit width; n = 2^k - 1 steps.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import torch
from conftest import tiered
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import FloatArray
from torch import Tensor

from qbench.methods.dorefa import (
    quantize_activation,
    quantize_activation_abs,
    quantize_activation_tanh,
    quantize_gradient,
    quantize_weight,
)

Quantizer = Callable[[Tensor, int], Tensor]
Forward = Callable[[FloatArray, int], FloatArray]
Check = Callable[[Quantizer], None]
Mask = npt.NDArray[np.bool_]
Form = tuple[Forward, Callable[[float], Fraction], Callable[[float], float]]

BITS = (1, 2, 3, 4)
WIDE, HALVES = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
DIFFERENTIABLE = (quantize_weight, quantize_activation, quantize_activation_abs, quantize_activation_tanh)
CLIP: Form = (oracle.activation_forward, oracle.clip_unit, oracle.clip_slope)
ABS: Form = (oracle.activation_abs_forward, oracle.abs_unit, oracle.abs_slope)
TANH: Form = (oracle.activation_tanh_forward, oracle.tanh_unit, oracle.tanh_slope)


def array(x: Tensor) -> FloatArray:
    return x.detach().to(torch.float64).numpy()


def upstream(x: Tensor) -> Tensor:
    """Return nonzero gradients that are exact in every dtype, so that x gets the same ones in each dtype."""
    return torch.from_numpy(np.random.default_rng(7).integers(-32, 32, x.shape) / 8 + 1 / 16).to(x.dtype)


def forward_backward(quantize: Quantizer, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = quantize(leaf, bits)
    return out.detach(), torch.autograd.grad(out, leaf, upstream(x))[0]


def unambiguous(unit: list[Fraction], bits: int, dtype: torch.dtype) -> Mask:
    """Return where rounding errors of `dtype` cannot change the level; the paper decides exact ties, so they count."""
    slack = 32 * (2**bits - 1) * torch.finfo(dtype).eps
    return np.array([m == 0 or m > slack for m in (oracle.margin(x, bits) for x in unit)])


def agree(what: str, got: Tensor, want: FloatArray, where: Mask | None = None, ulps: int = 64) -> None:
    where = np.ones(want.size, bool) if where is None else where
    assert where.mean() > 0.8, f"{what}: compares too few points"
    tolerance = ulps * torch.finfo(got.dtype).eps * max(1.0, np.abs(want).max())
    error = np.abs(array(got) - want).reshape(-1)[where].max()
    assert error <= tolerance, f"{what}: off by {error:.3g}, allowed {tolerance:.3g}"


def around(points: FloatArray, dtype: torch.dtype) -> FloatArray:
    """Return the points, neighbours just beyond rounding errors, and points further away."""
    near = 1e3 * torch.finfo(dtype).eps
    return np.concatenate([points + d for d in (0, near, -near, 1e-2, -1e-2)])


def check_weight(quantize: Quantizer) -> None:
    top = 1.25
    for dtype, k in product(WIDE, (*BITS, 8)):
        # All thresholds, in an OIKK tensor; the largest weight is negative, and filters differ in scale.
        points = around(np.arctanh(np.tanh(top) * np.arange(2 - 2**k, 2**k, 2) / (2**k - 1)), dtype)
        points = np.concatenate([np.clip(points, -1.2, 1.2), np.arange(-38, 39) / 32, [-0.0, -top]])
        points = np.append(points, np.zeros(-points.size % 8))  # exact ties, up to a whole filter
        w = torch.from_numpy(np.sort(points)).to(dtype).reshape(-1, 2, 2, 2)
        out, grad = forward_backward(quantize, w, k)
        where = unambiguous(oracle.weight_unit(array(w)), k, dtype) if k > 1 else None
        agree(f"weight forward k={k}", out, oracle.weight_forward(array(w), k), where)
        agree(f"weight backward k={k}", grad, oracle.weight_backward(array(w), array(upstream(w)), k))
        zeros = torch.zeros(3, 2, dtype=dtype)
        out, grad = forward_backward(quantize, zeros, k)
        agree(f"weight zero k={k}", out, oracle.weight_forward(array(zeros), k))
        assert grad.isfinite().all(), f"weight zero k={k}: gradient {grad}"


def check_activation(quantize: Quantizer, form: Form = CLIP) -> None:
    forward, unit, slope = form
    for dtype, k in product(WIDE, (*BITS, 8)):
        ends = np.arange(2 ** (k + 1) - 1) / (2 ** (k + 1) - 2)  # levels and thresholds in turn
        points = around(np.concatenate([ends, -ends, np.arctanh(2 * ends[1:-1] - 1)]), dtype)
        x = torch.from_numpy(np.concatenate([points, np.arange(-96, 97) / 32])).to(dtype)
        out, grad = forward_backward(quantize, x, k)
        where = unambiguous([unit(v) for v in array(x)], k, dtype)
        agree(f"activation forward k={k}", out, forward(array(x), k), where)
        want = oracle.activation_backward(array(x), array(upstream(x)), slope)
        agree(f"activation backward k={k}", grad, want)


def check_gradient(quantize: Quantizer) -> None:
    """Compare with the oracle over all values of the noise, since the implementation is free to choose how it draws.

    Each element must take one of the levels that the oracle reaches at the two ends of the noise. Its mean over
    R draws must be the input within 5 sigma, where sigma <= gap/2/sqrt(R) for a two-valued draw. A correct
    implementation fails one of the 1260 comparisons of means for less than one seed in 1000.
    """
    torch.manual_seed(20160620)
    repeats = 2000
    scale_N1 = np.array([1e-20, 3e-7, 1e-3, 1.0, 42.0, 1e9])[:, None]
    ratio_P = np.outer([1.0, 0.6], np.linspace(-1, 1, 21)).reshape(-1)  # two channels, different maxima
    d_NP = scale_N1 * ratio_P
    d_NCRP = torch.from_numpy(d_NP).reshape(6, 2, 1, 21).repeat(1, 1, repeats, 1)
    noise_end = np.full(d_NP.shape, 0.5 - 2.0**-40)
    for k in (*BITS, 8):
        out_NRP = array(quantize(d_NCRP, k)).transpose(0, 2, 1, 3).reshape(6, repeats, -1) / scale_N1[:, None]
        codes = (out_NRP + 1) * (2**k - 1) / 2
        assert np.abs(codes - codes.round()).max() < 1e-9, f"gradient levels k={k}"
        low, high = (oracle.gradient_forward(d_NP, s * noise_end, k) / scale_N1 for s in (-1, 1))
        reached = (out_NRP >= low[:, None] - 1e-9) & (out_NRP <= high[:, None] + 1e-9)
        assert reached.all(), f"gradient reach k={k}"
        bias = np.abs(out_NRP.mean(axis=1) - ratio_P)
        assert (bias <= 5 * (high - low) / 2 / repeats**0.5 + 1e-12).all(), f"gradient mean k={k}"
        # With one large element zeros become +-m/n with equal probability, independently of neighbours and other calls.
        one_large = torch.zeros(8, 8, 16, 16)
        one_large[:, 0, 0, 0] = 1.0
        sign, later = (quantize(one_large, k).sign() for _ in range(2))
        others = [later, *(sign.roll(1, axis) for axis in range(4))]
        worst = max((sign * other).mean().abs().item() for other in others)
        assert worst < 5 / sign.numel() ** 0.5, f"gradient noise k={k}: mean sign product {worst}, 5 sigma"
        zero = quantize(torch.tensor([[0.0, 0.0], [0.5, -2.0]]), k)[0]
        assert torch.equal(zero, torch.zeros(2)), f"gradient zero k={k}: {zero}"


@pytest.mark.parametrize(
    ("check", "quantize"),
    [
        (check_weight, quantize_weight),
        (check_activation, quantize_activation),
        (partial(check_activation, form=ABS), quantize_activation_abs),
        (partial(check_activation, form=TANH), quantize_activation_tanh),
        (check_gradient, quantize_gradient),
    ],
)
def test_the_implementation_agrees_with_the_oracle(check: Check, quantize: Quantizer) -> None:
    check(quantize)


@pytest.mark.parametrize("dtype", tiered(HALVES, [torch.bfloat16]))
def test_every_half_precision_number(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.abs() <= 4)]
    w = x[(x < 4) & ((x == 0) | (x.abs() > 2**-6))]  # a single largest weight; tiny weights are ties in float32
    for k in BITS:
        for quantize, form in ((quantize_activation, CLIP), (quantize_activation_abs, ABS)):
            # n x is exact in float32 for these x and k, so no input is ambiguous.
            assert torch.equal(quantize(x, k), torch.from_numpy(form[0](array(x), k)).to(dtype))
        where = unambiguous(oracle.weight_unit(array(w)), k, torch.float32) if k > 1 else None
        agree(f"half weight k={k}", quantize_weight(w, k), oracle.weight_forward(array(w), k), where, 1)


# Rows computed by hand
WEIGHT = (quantize_weight, oracle.weight_forward, [0.5, -0.25, 0.1, 0.0, -1.0])
ACTIVATION = (quantize_activation, CLIP[0], [-0.3, 0, 0.1, 0.2, 0.5, 0.6, 0.84, 1, 1.7])
GOLDEN = [
    (*WEIGHT, 1, np.array([37, -37, 37, 37, -37]) / 100),
    (*WEIGHT, 2, np.array([1, -1, 1, 1, -3]) / 3),
    (*WEIGHT, 3, np.array([5, -3, 1, 1, -7]) / 7),
    (*WEIGHT, 4, np.array([9, -5, 1, 1, -15]) / 15),
    (*ACTIVATION, 1, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1]) / 1),
    (*ACTIVATION, 2, np.array([0, 0, 0, 1, 2, 2, 3, 3, 3]) / 3),
    (*ACTIVATION, 3, np.array([0, 0, 1, 1, 4, 4, 6, 7, 7]) / 7),
    # min(1, |x|) times 3: 3, 1.5 (tie to even), 0.3, 2.1.
    (quantize_activation_abs, ABS[0], [-1.5, -0.5, 0.1, 0.7], 2, np.array([3, 2, 0, 2]) / 3),
    # Levels of the first AlexNet; 3 (tanh(x)/2 + 1/2) = 0.05, 1.06, 1.94, 2.95.
    (quantize_activation_tanh, TANH[0], [-2, -0.3, 0.3, 2], 2, np.array([-3, -1, 1, 3]) / 6),
]


@pytest.mark.parametrize(("quantize", "forward", "x", "k", "want"), GOLDEN)
def test_the_values_are_those_computed_by_hand(
    quantize: Quantizer, forward: Forward, x: list[float], k: int, want: FloatArray
) -> None:
    np.testing.assert_allclose(forward(np.array(x, np.float64), k), want, rtol=0, atol=1e-15)
    for dtype in WIDE:
        agree("golden row", quantize(torch.tensor(x, dtype=dtype), k), want)


def test_the_weight_gradient_is_that_computed_by_hand() -> None:
    # The gradient through the maximum: t = (1/2, -1/4), M = 1/2, g = (1, 1), sum(g t) = 1/4, so
    # (3/4)/(1/2) - (3/4)/(1/4) * 1/4 = 3/4 at the maximum and (15/16)/(1/2) = 15/8 elsewhere.
    # Two maxima share that term: t = (1/2, -1/2), g = (1, 0) give 3/4 (2 - 2/2) = 3/4 and 3/4 (0 + 2/2).
    for t, g, want in (([0.5, -0.25], [1.0, 1.0], [0.75, 1.875]), ([0.5, -0.5], [1.0, 0.0], [0.75, 0.75])):
        w = torch.tensor(t, dtype=torch.float64).atanh().requires_grad_()
        for k in (2, 3, 4):
            (grad,) = torch.autograd.grad(quantize_weight(w, k), w, torch.tensor(g, dtype=w.dtype))
            agree("golden weight gradient", grad, np.array(want))
            np.testing.assert_allclose(oracle.weight_backward(array(w), np.array(g), k), want, rtol=1e-14)


def test_the_gradient_levels_are_those_computed_by_hand() -> None:
    # k = 2: the levels are m {+-1/3, +-1}; an exact zero becomes +-m/n, both signs.
    torch.manual_seed(0)
    d = torch.tensor([[3.0, *[0.0] * 100, *[-1.7] * 100], [-6.0, *[0.0] * 100, *[5.0] * 100]])
    out = quantize_gradient(d, 2).round(decimals=4)
    assert [sorted(set(row)) for row in out[:, 1:101].tolist()] == [[-1, 1], [-2, 2]]
    assert [sorted(set(row)) for row in out.tolist()] == [[-3, -1, 1, 3], [-6, -2, 2, 6]]
    # By hand for the oracle: 3 x + u = 3.4 (clipped), 1.9, 0.35, 1.475 -> 3, 2, 0, 1.
    row = oracle.gradient_forward(np.array([[1, 0, -0.5, 0.25]]), np.array([[0.4, 0.4, -0.4, -0.4]]), 2)
    np.testing.assert_allclose(row, [[1, 1 / 3, -1, -1 / 3]], atol=1e-15)


def test_the_oracles_weight_gradient_is_the_derivative_without_rounding() -> None:
    w, g, h = np.array([0.3, -0.9, 0.05, 0.0, 0.7]), np.array([0.5, 2.0, -1.0, 0.25, 3.0]), 1e-6
    steps = h * np.eye(w.size)
    losses = [[g @ [2 * float(x) - 1 for x in oracle.weight_unit(v)] for v in (w + e, w - e)] for e in steps]
    slope = [(above - below) / (2 * h) for above, below in losses]
    np.testing.assert_allclose(oracle.weight_backward(w, g, 2), slope, rtol=1e-7)


# Derandomized, so that a failing property fails on every machine.
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
wide = st.sampled_from(WIDE)
bit_widths = st.sampled_from((*BITS, 8))
# Multiples of 1/1000 are equal or clearly different, so an ulp of a vectorized tanh cannot reorder them.
numbers = st.lists(st.integers(-4000, 4000).map(lambda i: i / 1000), min_size=1, max_size=40)


@PROPERTY
@given(values=numbers, dtype=wide, k=bit_widths, scale=st.sampled_from((1.0, 2.0**-50)))
def test_the_properties_of_weights(values: list[float], dtype: torch.dtype, k: int, scale: float) -> None:
    assume(any(values))
    q = quantize_weight(torch.tensor(sorted(values), dtype=dtype) * scale, k)
    assert (q.diff() >= 0).all()
    top = q.abs().max()
    assert k == 1 or top == 1  # a weight is always at an end, and none beyond
    codes = array(q / top + 1) * (2**k - 1) / 2  # whole codes: odd multiples of 1/n, never 0
    assert np.abs(codes - codes.round()).max() < 64 * 2**k * torch.finfo(dtype).eps
    assert q.unique().numel() == np.unique(codes.round()).size <= 2**k  # a level is a single number


@PROPERTY
@given(values=numbers, dtype=wide, k=bit_widths)
def test_the_properties_of_activations(values: list[float], dtype: torch.dtype, k: int) -> None:
    x = torch.tensor(sorted(values), dtype=dtype)
    clip, absolute = quantize_activation(x, k), quantize_activation_abs(x.abs().sort().values, k)
    for q, low, high in ((clip, 0, 1), (absolute, 0, 1), (quantize_activation_tanh(x, k), -0.5, 0.5)):
        assert (q.diff() >= 0).all()
        assert q.unique().numel() == ((q - low) * (2**k - 1)).round().unique().numel() <= 2**k
        assert low <= q.min() <= q.max() <= high
    assert torch.equal(quantize_activation(clip, k), clip)
    assert torch.equal(quantize_activation_abs(absolute, k), absolute)
    assert torch.equal(quantize_activation_abs(-x, k), quantize_activation_abs(x, k))


@PROPERTY
@given(values=numbers, dtype=wide, k=bit_widths, power=st.integers(-60, 60))
def test_the_properties_of_gradients(values: list[float], dtype: torch.dtype, k: int, power: int) -> None:
    assume(any(values))
    d = torch.tensor([values, [0.0] * len(values), [v / 4 for v in values]], dtype=dtype)
    torch.manual_seed(3)
    q = quantize_gradient(d, k)
    m, n, slack = d.abs().amax(1, keepdim=True), 2**k - 1, 64 * 2**k * torch.finfo(dtype).eps
    assert torch.equal(q[1], d[1])
    codes = array((q / m)[::2] + 1) * n / 2
    assert np.abs(codes - codes.round()).max() < slack
    assert 0 <= codes.round().min() <= codes.round().max() <= n
    assert ((q - d).abs() <= 2 * m / n * (1 + slack)).all()
    torch.manual_seed(3)
    assert torch.equal(quantize_gradient(d * 2.0**power, k), q * 2.0**power)  # fg(c d) = c fg(d)
    for single in (d[0], d[0, :, None], d[0, :, None, None, None]):  # one element per sample: its own scale
        torch.testing.assert_close(quantize_gradient(single, k), single)


def test_the_gradient_noise_follows_the_seed() -> None:
    d = torch.linspace(-1, 1, 300).reshape(3, 100)
    runs = [(torch.manual_seed(s), quantize_gradient(d, 2), quantize_gradient(d, 2))[1:] for s in (5, 5, 6)]
    assert torch.equal(torch.cat(runs[0]), torch.cat(runs[1]))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])
    before = torch.get_rng_state()
    seeded = [quantize_gradient(d, 2, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert torch.equal(torch.get_rng_state(), before)  # a given generator does not use the global one


@pytest.mark.parametrize("dtype", [*HALVES, *WIDE])
def test_the_clip_gradient_is_one_on_the_closed_interval(dtype: torch.dtype) -> None:
    tiny, above = torch.finfo(dtype).tiny, torch.ones((), dtype=dtype).nextafter(torch.tensor(2, dtype=dtype))
    x = torch.tensor([-1.0, -tiny, 0.0, tiny, 0.5, 1.0, above, 2.0], dtype=dtype)
    inside = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0], dtype=dtype)
    assert torch.equal(forward_backward(quantize_activation, x, 2)[1], upstream(x) * inside)


def test_32_bits_and_one_bit_pass_gradients_unchanged() -> None:
    x = 3 * upstream(torch.empty(4, 3))
    out, grad = forward_backward(quantize_weight, x, 32)
    assert torch.equal(out, x)
    assert torch.equal(grad, upstream(x))
    assert torch.equal(quantize_gradient(x, 32), x)
    # One-bit weights: the gradient has no factor E and no |w| <= 1 mask.
    assert torch.equal(forward_backward(quantize_weight, x, 1)[1], upstream(x))


@pytest.mark.parametrize(("dtype", "k"), [*product(HALVES, BITS)])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, k: int) -> None:
    x = torch.linspace(-2, 2.1, 4800).reshape(16, 300).to(dtype)
    for quantize in DIFFERENTIABLE:
        in_half, in_float32 = forward_backward(quantize, x, k), forward_backward(quantize, x.float(), k)
        assert torch.equal(torch.cat(in_half), torch.cat(in_float32).to(dtype))  # outputs, gradients
    out, out32 = (quantize_gradient(d, k, generator=torch.Generator().manual_seed(1)) for d in (x, x.float()))
    assert torch.equal(out, out32.to(dtype))


@pytest.mark.parametrize("quantize", [*DIFFERENTIABLE, quantize_gradient])
def test_the_input_and_its_dtype_stay_the_same(quantize: Quantizer) -> None:
    for dtype, k in product((*HALVES, *WIDE), BITS):
        x = upstream(torch.empty(4, 3, dtype=dtype))
        copy, version = x.clone(), x._version
        out = quantize(x, k)
        assert (out.dtype, out.shape, x._version) == (dtype, x.shape, version)
        assert torch.equal(x, copy)
        if quantize is not quantize_gradient:  # the noise may follow the memory order
            assert torch.equal(quantize(x.t(), k), out.t())


# Mutants: a correct implementation with one named flaw each
def straight_through(x: Tensor, y: Tensor) -> Tensor:
    return x + (y - x).detach()


def round_to_steps(x: Tensor, n: int, half_up: bool = False) -> Tensor:
    return straight_through(x, ((n * x + 0.5).floor() if half_up else (n * x).round()) / n)


def flawed_weight(w: Tensor, bits: int, *, flaw: str) -> Tensor:
    if bits == 1:
        sign = w.sign() if flaw == "sign(0)=0" else torch.where(w >= 0, 1.0, -1.0).to(w)
        binary = w.abs().mean() * sign
        return binary if flaw == "gradient through the mean" else straight_through(w, binary)
    t = straight_through(w, w.tanh()) if flaw == "no tanh gradient" else w.tanh()
    m = t.abs().flatten(1).amax(1).view(-1, *[1] * (w.ndim - 1)) if flaw == "per filter" else t.abs().amax()
    m = m.detach() if flaw == "detached max" else m
    m = m if flaw == "no zero guard" else torch.where(m == 0, 1.0, m)
    return (2 * round_to_steps(t / (2 * m) + 0.5, 2**bits - 1) - 1) * (m if flaw == "rescaled by max" else 1)


def flawed_activation(x: Tensor, bits: int, *, flaw: str) -> Tensor:
    h = x.tanh() if flaw == "tanh" else x
    clipped = torch.nn.functional.hardtanh(h, 0.0, 1.0) if flaw == "open interval" else h.clamp(0, 1)
    clipped = straight_through(h, clipped) if flaw == "unmasked" else clipped
    return round_to_steps(clipped, 2**bits - 1, half_up=flaw == "half up")


def flawed_gradient(d: Tensor, bits: int, *, flaw: str) -> Tensor:
    n, single = 2**bits - 1, [1] * (d.ndim - 1)
    axes = {"global max": tuple(range(d.ndim)), "max per channel": tuple(range(2, d.ndim)) or (1,)}
    m = d.abs().amax(axes.get(flaw, tuple(range(1, d.ndim))), keepdim=True)
    shapes = {"noise per sample": (len(d), *single), "noise shared by the batch": (1, *d.shape[1:])}
    width = {"no noise": 0, "double noise": 2, "half noise": 0.5}
    u = (torch.rand(shapes.get(flaw, d.shape), dtype=d.dtype) - 0.5) * width.get(flaw, 1)
    safe = m if flaw == "no zero guard" else torch.where(m == 0, 1.0, m)
    return 2 * m * (round_to_steps((d / (2 * safe) + 0.5 + u / n).clamp(0, 1), n) - 0.5)


# Each row: check, flawed implementation, expected message, and the flaws that give it.
MUTANTS = [
    (check_weight, flawed_weight, "weight backward k=1", "gradient through the mean"),
    (check_weight, flawed_weight, "weight backward k=2", "detached max", "no tanh gradient"),
    (check_weight, flawed_weight, "weight forward k=1", "sign(0)=0"),
    (check_weight, flawed_weight, "weight forward k=2", "rescaled by max", "per filter"),
    (check_weight, flawed_weight, "weight zero k=2", "no zero guard"),
    (check_activation, flawed_activation, "activation backward k=1", "open interval", "unmasked"),
    (check_activation, flawed_activation, "activation forward k=1", "tanh", "half up"),
    (check_gradient, flawed_gradient, "gradient levels k=1", "global max", "max per channel"),
    (check_gradient, flawed_gradient, "gradient mean k=1", "noise per sample", "no noise", "half noise"),
    (check_gradient, flawed_gradient, "gradient noise k=1", "noise shared by the batch"),
    (check_gradient, flawed_gradient, "gradient reach k=1", "double noise"),
    (check_gradient, flawed_gradient, "gradient zero k=1", "no zero guard"),
]


@pytest.mark.parametrize(
    ("check", "build", "message", "flaw"), [(*row[:3], flaw) for row in MUTANTS for flaw in row[3:]]
)
def test_the_comparison_rejects_every_flaw(check: Check, build: Callable[..., Tensor], message: str, flaw: str) -> None:
    check(partial(build, flaw=""))  # passes without the flaw, so the flaw is what is rejected
    with pytest.raises(AssertionError, match=message):
        check(partial(build, flaw=flaw))
