"""Test BWN weights and HWGQ activations against tests/reference/oracle_hwgq.py, published numbers, and properties.

The check_* functions take the implementation as an argument, so that they can be applied to flawed ones too.
q: positive levels, q_m the largest; t: thresholds.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product

import numpy as np
import oracle_hwgq as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_hwgq import DIGITS, HALF_STEP, LLOYD, PUBLISHED_STEP, THREE, TWO, UNIFORM, FloatArray
from torch import Tensor

from qbench.methods import hwgq, xnor
from qbench.methods.hwgq import binarize_weight, half_wave_levels, quantize_activation
from qbench.quant.ops import activation_memory, reference_kernels

Subject = Callable[..., Tensor]

WIDE, HALVES = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
MODES = ("vanilla", "clipped", "log_tailed")


def array(x: Tensor) -> FloatArray:
    return x.detach().to(torch.float64).numpy()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def upstream(x: Tensor) -> Tensor:
    """Return nonzero gradients that are exact in every dtype, so that x gets the same ones in each dtype."""
    return torch.from_numpy(np.random.default_rng(7).integers(-32, 32, x.shape) / 8 + 1 / 16).to(x.dtype)


def forward_backward(quantize: Subject, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = quantize(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, upstream(x))[0]


def agree(what: str, got: Tensor, want: FloatArray, ulps: int = 16) -> None:
    """Compare with a tolerance relative to each element, so that small ones count too."""
    excess = np.abs(array(got) - want) - ulps * torch.finfo(got.dtype).eps * np.abs(want)
    worst = int(np.argmax(excess))
    assert (excess <= 0).all(), f"{what}: {got.reshape(-1)[worst]} for {want.reshape(-1)[worst]}"


def points_around(q: Tensor) -> Tensor:
    """Return all points where value or slope may change, neighbours, a grid, tiny and huge numbers, both signs."""
    points = torch.cat([q, (q[1:] + q[:-1]) / 2, q / 2, q[-1:] - 1])  # the last is the pole of the log tail
    near = 1e3 * torch.finfo(q.dtype).eps
    near_points = [points + d for d in (0, near, -near, 1e-2, -1e-2)]
    near_points += [q.nextafter(torch.full_like(q, far)) for far in (0.0, 9.0)]
    rest = torch.tensor([0.0, torch.finfo(q.dtype).tiny, 1e-6, 1.62, 5, 1e3, 1e30], dtype=q.dtype)
    positive = torch.cat([*near_points, torch.arange(1, 129, dtype=q.dtype) / 32, rest])
    return torch.cat([positive, -positive])


def assert_same_levels(what: str, out: Tensor, x: Tensor, levels: Tensor) -> None:
    """Compare bit for bit, except where rounding errors of a midpoint may change the level."""
    q = levels.to(computed_in(x.dtype))
    where = oracle.margin(array(x), array(q)) > 4 * torch.finfo(q.dtype).eps * float(q[-1])
    assert where.mean() > 0.9, f"{what}: compares too few points"
    want = torch.from_numpy(oracle.activation_forward(array(x), array(q))).to(x.dtype)
    wrong = x[torch.from_numpy(where) & (out != want)]
    assert wrong.numel() == 0, f"{what} at {wrong.tolist()[:9]}, levels {q.tolist()}"


def check_activation(quantize: Subject) -> None:
    steps = [[step * i for i in range(1, 2**bits)] for bits, step in PUBLISHED_STEP.items()]
    for dtype, levels in product(WIDE, [*steps, THREE, TWO, [0.25, 0.5], *(row[0] for row in LLOYD.values())]):
        q = torch.tensor(levels, dtype=dtype)
        x = points_around(q)
        for mode in MODES:
            out, grad = forward_backward(lambda v, q=q, mode=mode: quantize(v, q, mode), x)
            assert_same_levels("activation forward", out, x, q)
            want = oracle.activation_backward(array(x), array(q), array(upstream(x)), mode)
            agree(f"activation backward {mode}", grad, want)
    for dtype, levels in product((*HALVES, *WIDE), ([0.5, 1, 1.5], [0.25, 1, 3], [1.0, 1.5])):
        q = torch.tensor(levels, dtype=dtype)  # the midpoints are exact in every dtype
        t = (q[1:] + q[:-1]) / 2
        x, want = torch.cat([t, t.nextafter(q[1:]), t.nextafter(q[:-1])]), torch.cat([q[:-1], q[1:], q[:-1]])
        got = quantize(x, q.to(computed_in(dtype)), "clipped")
        assert torch.equal(got, want), f"activation ties: {got} for {want}"


def check_weight(binarize: Subject) -> None:
    rng = np.random.default_rng(3)
    for dtype, shape in product(WIDE, [(6, 3, 3, 3), (6, 5), (6, 2, 1, 1), (6, 1)]):
        scale = np.array([1e-3, 0.5, 0, 1, 40, 1e4]).reshape(-1, *[1] * (len(shape) - 1))  # filter 2 is all zeros
        w = torch.from_numpy(rng.standard_normal(shape) * scale).to(dtype)
        w[3].view(-1)[0], w[4].view(-1)[-1] = 0.0, -0.0  # s(0) = +1
        out, grad = forward_backward(binarize, w)
        agree("weight forward", out, oracle.binarize_forward(array(w)))
        agree("weight backward", grad, oracle.binarize_backward(array(w), array(upstream(w))), 0)


def assert_rounded_once(quantize: Subject, x: Tensor) -> None:
    for half, single in zip(forward_backward(quantize, x), forward_backward(quantize, x.float()), strict=True):
        assert half.dtype == x.dtype, f"half types: {half.dtype}"
        assert torch.equal(half, single.to(x.dtype)), "half types: not float32, rounded once"


def check_half_activation(quantize: Subject) -> None:
    for dtype, levels in product(HALVES, (THREE, LLOYD[15][0])):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x, q = every[every.isfinite()], torch.tensor(levels)
        for mode in MODES:
            assert_rounded_once(partial(quantize, levels=q, backward=mode), x)
        assert_same_levels("half types", quantize(x, q, "clipped"), x, q)


def check_half_weight(binarize: Subject) -> None:
    for dtype in HALVES:
        assert_rounded_once(binarize, torch.linspace(-2, 5.1, 4800).reshape(16, 4, 75).to(dtype))
    w = torch.full((2, 512, 3, 3), -100.0, dtype=torch.float16)  # the sum overflows in float16, the mean does not
    assert torch.equal(binarize(w), w), "half types: overflow"


def check_levels(make: Subject) -> None:
    for bits, uniform in product(range(1, 9), (True, False)):
        what, q = f"levels bits={bits} uniform={uniform}", make(bits, uniform)
        assert q.shape == (2**bits - 1,), f"{what}: shape {tuple(q.shape)}"
        assert q.dtype in WIDE, f"{what}: {q.dtype}"
        assert (q.diff(prepend=q.new_zeros(1)) > 0).all(), f"{what}: not ascending from 0"
        v = array(q)
        if uniform:
            step = v[-1] / len(v)
            agree(f"{what}: spacing", q, step * np.arange(1, 2**bits), 4)
            assert abs(oracle.fitted_step(step, len(v)) - step) < 1e-6 * step, f"{what}: not stationary"
        else:
            assert np.abs(oracle.centroids(v) - v).max() < 1e-6, f"{what}: not centroids"
        # The conditions change slowly near the optimum, so a search that stopped early may still satisfy them.
        assert np.abs(v - oracle.levels(bits, uniform)).max() < 1e-6, f"{what}: not the optimum"


@pytest.mark.parametrize("bits", UNIFORM)
def test_the_levels_are_the_tabulated_ones(bits: int) -> None:
    i, near = np.arange(1, 2**bits), DIGITS + 3e-7  # six decimals, and float32 above 2
    equal, free = array(half_wave_levels(bits)), array(half_wave_levels(bits, uniform=False))  # True is the default
    for q in (equal, oracle.levels(bits, True)):
        step, error = UNIFORM[bits]
        np.testing.assert_allclose(q / i, step, rtol=0, atol=near)
        assert abs(oracle.mse(q) - error) < DIGITS
    for q in (free, oracle.levels(bits, False)):
        levels, t, error = LLOYD[2**bits - 1]
        np.testing.assert_allclose(q, levels, rtol=0, atol=near)
        np.testing.assert_allclose([float(v) for v in oracle.thresholds(q)], t, rtol=0, atol=near)
        assert abs(oracle.mse(q) - error) < DIGITS
    published = oracle.mse(PUBLISHED_STEP[bits] * i)
    assert oracle.mse(equal) < published < oracle.mse(equal) + 2e-6
    assert oracle.mse(free) <= oracle.mse(equal) + 1e-12
    for shift in (-1e-3, 1e-3):
        assert oracle.mse(equal) < oracle.mse(equal * (1 + shift))
        assert all(oracle.mse(free) < oracle.mse(free + shift * (i == j)) for j in i)


def test_the_oracle_gives_the_other_published_rows() -> None:
    # Two positive levels ("2n").
    q = oracle.lloyd_max_levels(2)
    np.testing.assert_allclose([*q, (q[0] + q[1]) / 2, oracle.mse(q)], np.hstack(LLOYD[2]), rtol=0, atol=DIGITS)
    # Thresholds .807 and 1.345; shares of the 2-bit levels, and 5.3 % above q_m.
    np.testing.assert_allclose([float(v) for v in oracle.thresholds(np.array(THREE))], [0.807, 1.345], atol=1e-12)
    shares = [*oracle.moments(oracle.cells(np.array(THREE)))[0], *oracle.moments(np.array([1.614, np.inf]))[0]]
    np.testing.assert_allclose(np.array(shares) / 2, [0.290, 0.121, 0.089, 0.053], rtol=0, atol=6e-4)
    for bits, (step, error) in HALF_STEP.items():  # where zero is a level of the rounding
        i = np.arange(2**bits)
        assert abs(oracle.mse(step * i, np.append(np.maximum(step * (i - 0.5), 0), np.inf)) - error) < DIGITS


def test_the_activations_are_those_computed_by_hand() -> None:
    x = [-1, 0, 1e-6, 0.3, 0.8071, 1.4, 5]
    want = [0, 0, 0.538, 0.538, 1.076, 1.614, 1.614]
    slopes = {"vanilla": [0, 1, 1, 1, 1], "clipped": [0, 1, 1, 0, 0], "log_tailed": [0, 1, 1, 0.994036, 0.227998]}
    np.testing.assert_array_equal(oracle.activation_forward(np.array(x), np.array(THREE)), want)
    for dtype, (mode, slope) in product(WIDE, slopes.items()):
        q, v = torch.tensor(THREE, dtype=dtype), torch.tensor([0, 1e-6, 1.614, 1.62, 5], dtype=dtype)
        quantize = partial(quantize_activation, levels=q, backward=mode)
        assert torch.equal(quantize(torch.tensor(x, dtype=dtype)), torch.tensor(want, dtype=dtype))
        grad = forward_backward(quantize, v)[1]
        np.testing.assert_allclose(array(grad / upstream(v)), slope, rtol=0, atol=6e-7)
        by_default = forward_backward(partial(quantize_activation, levels=q), v)[1]
        assert torch.equal(by_default, grad) == (mode == "clipped")
        np.testing.assert_allclose([oracle.slope(s, float(q[-1]), mode) for s in v.tolist()], slope, atol=6e-7)


@pytest.mark.parametrize(("bits", "uniform"), [*product((1, 2, 3, 4), (True, False))])
def test_the_levels_and_the_quantizer_have_the_tabulated_error(bits: int, uniform: bool) -> None:
    x = torch.special.ndtri((torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18)  # N(0,1), evenly
    out = quantize_activation(x, half_wave_levels(bits, uniform))
    error = UNIFORM[bits][1] if uniform else LLOYD[2**bits - 1][2]
    assert ((out - x)[x > 0] ** 2).mean().item() == pytest.approx(error, rel=0, abs=2e-5)
    assert (out == 0).double().mean() == 0.5


def test_the_weights_are_those_computed_by_hand() -> None:
    # By hand: mean|w| is 1, 1/2 and 0; the zero of the first filter counts as positive.
    w = [[0.0, -1.0, 2.0, -1.0], [-0.5, -0.5, 0.25, 0.75], [0.0, -0.0, 0.0, 0.0]]
    want = [[1.0, -1.0, 1.0, -1.0], [-0.5, -0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(oracle.binarize_forward(np.array(w)), want)
    for dtype, shape in product((*HALVES, *WIDE), ((3, 4), (3, 1, 2, 2), (3, 4, 1, 1))):
        got = binarize_weight(torch.tensor(w, dtype=dtype).reshape(shape))
        assert torch.equal(got, torch.tensor(want, dtype=dtype).reshape(shape))


@pytest.mark.parametrize("name", ["", "clip", "Clipped", "log-tailed", "hard_tanh"])
def test_an_unknown_backward_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)(?=.*vanilla)(?=.*clipped)(?=.*log_tailed)"):
        quantize_activation(torch.zeros(2), torch.tensor(THREE), backward=name)


# Derandomized, so that a failing property fails on every machine.
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
# On grids that are exact in every dtype, including midpoints: exact ties occur, and rounding changes no level.
inputs = st.lists(st.integers(-255, 255).map(lambda i: i / 64), min_size=1, max_size=40)
level_sets = st.lists(st.integers(1, 100).map(lambda i: i / 32), min_size=1, max_size=15, unique=True).map(sorted)


@PROPERTY
@given(values=inputs, levels=level_sets, dtype=st.sampled_from((*HALVES, *WIDE)), power=st.integers(-9, 9))
def test_the_properties_of_activations(
    values: list[float], levels: list[float], dtype: torch.dtype, power: int
) -> None:
    x, q = torch.tensor(sorted(values), dtype=dtype), torch.tensor(levels, dtype=computed_in(dtype))
    out = quantize_activation(x, q)
    assert torch.equal(out, torch.from_numpy(oracle.activation_forward(array(x), array(q))).to(dtype))
    assert (out.diff() >= 0).all()
    assert torch.equal(out > 0, x > 0)
    assert torch.isin(out[x > 0], q.to(dtype)).all()
    distance = (x[:, None] - q.to(dtype)).abs().amin(1)  # exact, as is out - x
    assert torch.equal((out - x).abs()[x > 0], distance[x > 0])  # no positive level is nearer
    assert torch.equal(quantize_activation(out, q), out)  # q_i is a fixed point, and so is 0
    assert torch.equal(quantize_activation(x * 2.0**power, q * 2.0**power), out * 2.0**power)


@PROPERTY
@given(data=st.data(), dtype=st.sampled_from(WIDE), filters=st.integers(1, 4), size=st.integers(1, 6))
def test_the_properties_of_weights(data: st.DataObject, dtype: torch.dtype, filters: int, size: int) -> None:
    values = data.draw(st.lists(st.integers(-64, 64), min_size=filters * size, max_size=filters * size))
    w = torch.tensor(values, dtype=dtype).reshape(filters, size) / 16
    out = binarize_weight(w)
    assert torch.equal(out >= 0, w >= 0)
    exact, binary = w.double(), out.double()
    loss, squares = (exact - binary).square().sum(1), binary.square().sum(1)
    for change in (-0.1, -1e-3, 1e-3, 0.1):  # alpha minimises |w - alpha b|^2 for each filter by itself ...
        rise = (exact - (1 + change) * binary).square().sum(1) - loss
        assert (rise >= 0.9 * change**2 * squares - 1e-12).all()
    for flip in 1 - 2 * torch.eye(size, dtype=torch.float64):  # ... and so does b
        assert ((exact - binary * flip).square().sum(1) >= loss - 1e-12).all()


@pytest.mark.parametrize("dtype", [*HALVES, *WIDE])
def test_the_input_and_its_dtype_stay_the_same(dtype: torch.dtype) -> None:
    x = upstream(torch.empty(4, 3, dtype=dtype))
    for q in (torch.tensor(THREE), torch.tensor(THREE, dtype=torch.float64)):
        for quantize in (binarize_weight, *(partial(quantize_activation, levels=q, backward=mode) for mode in MODES)):
            before = x.clone(), q.clone()
            out, grad = forward_backward(quantize, x)
            assert out.dtype == grad.dtype == quantize(x).dtype == dtype
            assert torch.equal(quantize(x.t().contiguous().t()), out)
            assert torch.equal(x, before[0])
            assert torch.equal(q, before[1])
        assert_same_levels("levels of another dtype", quantize_activation(x.flatten(), q), x.flatten(), q)


# Mutants: a correct implementation with one named flaw each


def with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Return exactly `value`, with the derivative `slope` in x."""
    linear = x * slope.detach()
    return value.detach() + (linear - linear.detach())


def flawed_activation(x: Tensor, levels: Tensor, backward: str, *, flaw: str) -> Tensor:
    v, q = (u.to(x.dtype if flaw == "half arithmetic" else computed_in(x.dtype)) for u in (x, levels))
    t = q[:-1] if flaw == "thresholds at levels" else (q[1:] + q[:-1]) / 2
    value = q[torch.bucketize(v.detach(), t, right=flaw == "tie to the upper level")]
    if flaw == "convention B":
        value = (v * len(q) / q[-1]).round().clamp(0, len(q)) * q[-1] / len(q)
    value = torch.where({"negative to q_1": v == v, "zero to q_1": v >= 0}.get(flaw, v > 0), value, 0.0)
    if flaw == "naive sum":
        return v + (value - v).detach()
    backward = {"vanilla for": "vanilla", "clipped for": "clipped"}.get(flaw.removesuffix(f" {backward}"), backward)
    tail = 1 / (v.clamp(min=q[-1]) - {"tau=0": 0.0, "tau=q_1": q[0]}.get(flaw, q[-1] - 1))
    tail = {"vanilla": torch.ones_like(v), "clipped": torch.zeros_like(v), "log_tailed": tail}[backward]
    slope = torch.where(v >= q[-1] if flaw == "open at q_m" else v > q[-1], tail, 1.0)
    slope = torch.where({"no mask": v == v, "gradient at 0": v >= 0}.get(flaw, v > 0), slope, 0.0)
    return with_slope(v, value, slope).to(x.dtype)


def flawed_weight(w: Tensor, *, flaw: str) -> Tensor:
    v = w if flaw == "half arithmetic" else w.to(computed_in(w.dtype))
    inner = tuple(range(1, w.ndim))
    axes = {"per layer": (0, *inner), "per input channel": (0, *inner[1:])}.get(flaw, inner)
    total = v.abs().sum(axes, keepdim=True)
    alpha = v.square().mean(inner, keepdim=True).sqrt() if flaw == "RMS" else total / (v.numel() / total.numel())
    value = alpha * (v.sign() if flaw == "sign(0)=0" else torch.where(v >= 0, 1.0, -1.0))
    slope = {"alpha times gradient": alpha, "mask": v.abs() <= 1}.get(flaw, torch.ones_like(v))
    return value if flaw == "gradient through alpha" else with_slope(v, value, slope).to(w.dtype)


def flawed_levels(bits: int, uniform: bool, *, flaw: str) -> Tensor:
    q = oracle.levels(bits, uniform)
    if flaw == "stopped early" and not uniform:
        q = oracle.uniform_levels(len(q))
        for _ in range(220):  # at 3 bits within 1e-6 of its centroids, and 1e-5 from the optimum
            q = oracle.centroids(q)
    step = {"step of B": HALF_STEP.get(bits, (q[0],))[0], "published step": PUBLISHED_STEP.get(bits, q[0])}
    q = step[flaw] * np.arange(1, 2**bits) if uniform and flaw in step else q
    return torch.tensor([0.0, *q] if flaw == "zero among them" else q[::-1].copy() if flaw == "descending" else q)


# Each row: check, flawed implementation, expected message, and the flaws that give it.
MUTANTS = [
    (check_activation, flawed_activation, "forward", "convention B", "thresholds at levels"),
    (check_activation, flawed_activation, "forward", "negative to q_1", "zero to q_1", "naive sum"),
    (check_activation, flawed_activation, "ties", "tie to the upper level"),
    (check_activation, flawed_activation, "backward vanilla", "no mask", "gradient at 0", "clipped for vanilla"),
    (check_activation, flawed_activation, "backward clipped", "vanilla for clipped", "open at q_m"),
    (check_activation, flawed_activation, "backward log_tailed", "clipped for log_tailed", "tau=0", "tau=q_1"),
    (check_half_activation, flawed_activation, "rounded once", "half arithmetic"),
    (check_weight, flawed_weight, "forward", "sign(0)=0", "per layer", "per input channel", "RMS"),
    (check_weight, flawed_weight, "backward", "alpha times gradient", "mask", "gradient through alpha"),
    (check_half_weight, flawed_weight, "half types", "half arithmetic"),
    (check_levels, flawed_levels, "uniform=True: not stationary", "step of B", "published step"),
    (check_levels, flawed_levels, "uniform=False: not the optimum", "stopped early"),
    (check_levels, flawed_levels, "shape|not ascending", "zero among them", "descending"),
]


SUBJECT = {flawed_activation: quantize_activation, flawed_weight: binarize_weight, flawed_levels: half_wave_levels}


@pytest.mark.parametrize(("check", "build"), dict.fromkeys(row[:2] for row in MUTANTS))
def test_the_implementation_agrees_with_the_oracle(check: Callable[..., None], build: Subject) -> None:
    check(SUBJECT[build])
    check(partial(build, flaw=""))  # passes without a flaw, so the flaws are what is rejected below


@pytest.mark.parametrize(
    ("check", "build", "message", "flaw"), [(*row[:3], flaw) for row in MUTANTS for flaw in row[3:]]
)
def test_the_comparison_rejects_every_flaw(check: Callable[..., None], build: Subject, message: str, flaw: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(partial(build, flaw=flaw))


@pytest.mark.parametrize("gradient", ["paper", "authors"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 3)])
def test_the_weights_of_xnor_are_those_of_bwn_with_another_gradient(gradient: str, shape: tuple[int, ...]) -> None:
    """Paper: g (1/n + alpha 1{|w| <= 1}); authors' code: g (alpha 1{|w| < 1} + 1/n) (1 - 1/c)."""
    w = torch.linspace(-1.5, 1.5, int(np.prod(shape)), dtype=torch.float64).reshape(shape)
    w.view(-1)[:2] = torch.tensor([1.0, -1.0])
    w.requires_grad_()
    upward = torch.linspace(1, 2, w.numel(), dtype=torch.float64).reshape(shape)
    out = xnor.binarize_weight(w, gradient=gradient)
    assert torch.equal(out, binarize_weight(w))
    (got,) = torch.autograd.grad(out, w, upward)
    rows, g = w.detach().reshape(shape[0], -1), upward.reshape(shape[0], -1)
    n, c = rows.shape[1], shape[1]
    for row, up, grad in zip(rows, g, got.reshape(shape[0], -1), strict=True):
        alpha = sum(abs(x) for x in row.tolist()) / n
        for x, u, d in zip(row.tolist(), up.tolist(), grad.tolist(), strict=True):
            inside = abs(x) <= 1 if gradient == "paper" else abs(x) < 1
            expected = u * (1 / n + alpha * inside) * (1 if gradient == "paper" else 1 - 1 / c)
            assert d == pytest.approx(expected, rel=1e-12)


def test_the_activations_of_xnor_are_signs() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    out = xnor.binarize_activation(x)
    assert out.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    out.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_the_input_scale_of_xnor_is_that_computed_by_hand() -> None:
    """K is the mean of |x| over channels and kernel; here 3x3 with padding 1, inputs 1..9 and -3 times that."""
    layer = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
    plane = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    x = torch.cat([plane, -3 * plane], 1)
    scaled = xnor.InputScale(layer)(torch.ones(1, 4, 3, 3), x)
    assert scaled[0, 0, 1, 1].item() == pytest.approx(2 * 45 / 9)
    assert scaled[0, 3, 0, 0].item() == pytest.approx(2 * (1 + 2 + 4 + 5) / 9)
    linear = xnor.InputScale(torch.nn.Linear(3, 2, bias=False))(torch.ones(1, 2), torch.tensor([[1.0, -2, 6]]))
    assert linear.tolist() == [[3.0, 3.0]]


def test_the_sign_control_of_hwgq_passes_the_gradient_at_its_ends() -> None:
    """zhaoweicai/hwgq, quant_layer.cpp, hard_tanh: -1 <= x <= 1, where XNOR-Net's code has -1 < x < 1."""
    x = torch.tensor([-2.0, -1.0000001, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.0000001, 2.0])
    site = hwgq.build(w=1, a=1, levels="sign").input
    assert site is not None
    quantizer = site("conv", torch.nn.Conv2d(1, 1, 1), 1)
    for contexts in ([], [reference_kernels()], [activation_memory("codes")]):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            leaf = x.clone().requires_grad_()
            out = quantizer(leaf)
            out.sum().backward()
        assert out.tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_the_sign_control_has_one_bit_of_weights_and_activations() -> None:
    method = hwgq.build(w=1, a=1, levels="sign")
    assert [method.allowed_widths(key) for key in "wa"] == ["1 or 32", "1 or 32"]
