"""Test fixed-point training: conversion against Fractions, training steps against NumPy, and wrong simulations."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import sqrt
from typing import Any

import numpy as np
import oracle_gupta as oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import Bits
from qbench.methods import gupta, uniform
from qbench.methods.gupta import FixedPointFormat, to_fixed
from qbench.models import mlp
from qbench.quant import fused_kernels as passes
from qbench.quant.install import install
from qbench.quant.layers import effective_weight, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.policy import Policy
from qbench.quant.quantizer import IdentityQuantizer
from qbench.quant.verify import NotQuantized, verify

FORMATS = [(2, 3), (1, 4), (4, 0), (6, -2), (-1, 6), (0, 3)]
EVERYWHERE = Policy(first="same", last="same", input="float")
OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    lambda params: torch.optim.Adam(params, lr=0.01),
]


def eighths_of_steps(il: int, fl: int) -> list[Fraction]:
    """Return every eighth of a step, hence every value and tie, from below the range to above it."""
    eps, (low, high) = Fraction(2) ** -fl, oracle.ends(il, fl)
    return [low - 2 * eps + eps * i / 8 for i in range(int((high - low) / eps) * 8 + 33)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor_of(values: list[Fraction], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=dtype)


# to_fixed

Convert = Callable[[Tensor, int, int, str], Tensor]


def check_nearest(convert: Convert) -> None:
    """By hand for <2,1>: values from -2 to 1.5 in halves; ties at odd quarters go down; nothing wraps."""
    x = torch.tensor([-9.0, -2.0, -1.75, -0.26, -0.25, -0.24, 0.25, 0.26, 0.75, 1.25, 1.5, 1.75, 2.0, 9.0])
    y = [-2.0, -2.0, -2.0, -0.5, -0.5, 0.0, 0.0, 0.5, 0.5, 1.0, 1.5, 1.5, 1.5, 1.5]
    assert convert(x, 2, 1, "nearest").tolist() == y


def check_stochastic(convert: Convert) -> None:
    """Each value goes to one of its neighbours, saturated; values on the grid stay, also with 24-bit codes."""
    torch.manual_seed(0)
    for il, fl in FORMATS:
        (low, high), eps, x = oracle.ends(il, fl), Fraction(2) ** -fl, eighths_of_steps(il, fl)
        for value, got in zip(x, convert(tensor_of(x), il, fl, "stochastic").tolist(), strict=True):
            below = oracle.floor_to(value, fl)
            above = below if below == value else below + eps
            assert got in {float(min(max(v, low), high)) for v in (below, above)}, (value, got)
    codes = torch.arange(2.0**23 - 2**19, 2.0**23)
    assert torch.equal(convert(codes / 2**18, 6, 18, "stochastic"), codes / 2**18)


def check_unbiased(convert: Convert) -> None:
    """E Convert(x) = x: the mean of n draws is within 4 standard deviations, eps sqrt(p (1 - p) / n), of x."""
    torch.manual_seed(1)
    n, fl = 40_000, 3
    for x in [i / 8 + f for i in (-9, -1, 0, 5) for f in (1 / 64, 1 / 24, 1 / 16, 0.12)]:
        p = float(oracle.probability_up(Fraction(x), fl))
        mean = convert(torch.full((n,), x), 3, fl, "stochastic").double().mean().item()
        assert abs(mean - x) < 4 * 2.0**-fl * sqrt(p * (1 - p) / n), x


def test_rounding_to_nearest_gives_the_values_computed_by_hand() -> None:
    check_nearest(to_fixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("il", "fl"), FORMATS)
def test_rounding_to_nearest_is_the_papers_on_and_next_to_every_value_and_tie(
    il: int, fl: int, dtype: torch.dtype
) -> None:
    x = tensor_of(eighths_of_steps(il, fl), dtype)
    infinity = torch.full_like(x, torch.inf)
    for v in (x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)):
        expected = [float(oracle.convert(Fraction(value), il, fl)) for value in v.tolist()]
        assert to_fixed(v, il, fl, "nearest").tolist() == expected


def test_stochastic_rounding_gives_a_neighbour_and_keeps_values_on_the_grid() -> None:
    check_stochastic(to_fixed)


def test_the_extreme_draws_keep_values_on_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    x, near = torch.arange(-16, 16) / 8, torch.tensor([0.001, 0.124])
    for bits, shift, expected in ((2**15 - 1, 255 / 256, 1 / 8), (-(2**15), 0.0, 0.0)):
        monkeypatch.setattr(passes, "uniform_16", lambda n, x, g, bits=bits: torch.full((n,), bits))
        monkeypatch.setattr(passes, "_shared_bits", lambda like, g, shift=shift: torch.tensor(shift))
        assert torch.equal(to_fixed(x, 2, 3, "stochastic"), x), "values on the grid have probability 0 to go up"
        assert to_fixed(near, 2, 3, "stochastic").tolist() == [expected] * 2


def test_stochastic_rounding_is_unbiased() -> None:
    check_unbiased(to_fixed)


@pytest.mark.parametrize("rounding", gupta.ROUNDINGS)
@pytest.mark.parametrize(("il", "fl"), FORMATS)
def test_both_roundings_saturate_at_both_ends(il: int, fl: int, rounding: str) -> None:
    low, high = (float(end) for end in oracle.ends(il, fl))
    x = torch.tensor([-torch.inf, 3 * low, low, high, high + 2.0**-fl / 2, -3 * low, 1e38, torch.inf])
    assert to_fixed(x, il, fl, rounding).tolist() == [low] * 3 + [high] * 5
    assert to_fixed(torch.tensor([torch.nan]), il, fl, rounding).isnan().all(), "NaN must stay visible"


@pytest.mark.parametrize("rounding", gupta.ROUNDINGS)
def test_the_gradient_passes_in_the_range_including_its_ends(rounding: str) -> None:
    x = torch.tensor([-2.1, -2.0, -0.3, 0.0, 1.4, 1.5, 1.6, 9.0], requires_grad=True)
    up = torch.arange(1.0, 9)
    (grad,) = torch.autograd.grad(to_fixed(x, 2, 1, rounding), x, up)
    assert grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


def test_the_dtypes_generators_and_limits_of_the_conversion() -> None:
    x = torch.randn(1000, generator=seeded())
    kept = x.clone()
    one, two = (to_fixed(x, 2, 4, "stochastic", generator=seeded(3)) for _ in range(2))
    assert torch.equal(one, two)
    before = torch.get_rng_state()
    assert not torch.equal(one, to_fixed(x, 2, 4, "stochastic", generator=seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)
    to_fixed(x, 2, 4, "nearest")
    assert torch.equal(torch.get_rng_state(), before), "nearest draws nothing"
    assert torch.equal(x, kept)
    assert to_fixed(x.double(), 2, 40, "nearest").dtype == torch.float64
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(
            to_fixed(x.to(half), 4, 12, "nearest"), to_fixed(x.to(half).float(), 4, 12, "nearest").to(half)
        )
    with pytest.raises(ValueError, match=r"rounding=even: must be one of stochastic, nearest"):
        to_fixed(x, 2, 4, "even")
    for il, fl in ((2, 23), (0, 0), (4, -5)):
        with pytest.raises(ValueError, match=r"must be 1 to 24"):
            to_fixed(x, il, fl, "nearest")


def rounded_codes(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    steps = x * 2.0**fl
    up = 0.5 if rounding == "nearest" else torch.rand_like(x)
    return (steps + up).floor() if rounding == "stochastic" else (steps - up).ceil()


def wraps(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    half = 2.0 ** (il + fl - 1)
    return ((rounded_codes(x, il, fl, rounding) + half) % (2 * half) - half) * 2.0**-fl


def half_to_even(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    return (x * 2.0**fl).round().clamp(-(2.0 ** (il + fl - 1)), 2.0 ** (il + fl - 1) - 1) * 2.0**-fl


def half_up(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    return (x * 2.0**fl + 0.5).floor().clamp(-(2.0 ** (il + fl - 1)), 2.0 ** (il + fl - 1) - 1) * 2.0**-fl


def symmetric(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    top = 2.0 ** (il + fl - 1) - 1
    return rounded_codes(x, il, fl, rounding).clamp(-top, top) * 2.0**-fl


def floor_of_the_sum(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    top = 2.0 ** (il + fl - 1)
    return rounded_codes(x, il, fl, rounding).clamp(-top, top - 1) * 2.0**-fl


def coin(x: Tensor, il: int, fl: int, rounding: str) -> Tensor:
    low = (x * 2.0**fl).floor()
    return (low + torch.randint(2, x.shape) * (low != x * 2.0**fl)).clamp(max=2.0 ** (il + fl - 1) - 1) * 2.0**-fl


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (check_nearest, wraps),
        (check_nearest, half_to_even),
        (check_nearest, half_up),
        (check_nearest, symmetric),
        (check_stochastic, wraps),
        (check_stochastic, symmetric),
        (check_stochastic, floor_of_the_sum),  # in float32 values on the grid move
        (check_unbiased, half_up),
        (check_unbiased, coin),
    ],
)
def test_the_checks_reject_wrong_conversions(check: Callable[[Convert], None], wrong: Convert) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


# A layer: one rounding after the wide sum

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def only_layer(model: nn.Module) -> Any:
    (only,) = quantized_layers(model).values()
    return only


def installed(inputs: int, outputs: int, **options: Any) -> nn.Linear:
    """Return a quantized linear layer whose input is not the image, so that it has the method's input quantizer."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(inputs, outputs), nn.Linear(1, 1)).double()
    return install(gupta.build(rounding="nearest", **options), model)[1]


def layer_output(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    layer = installed(w.shape[1], w.shape[0], w=8, a=8, g=32)
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
        return layer.train()(x)


def fixed(x: Tensor) -> Tensor:
    return to_fixed(x, 6, 2, "nearest")


def check_one_rounding(forward: Layer) -> None:
    """By hand for <6,2>, steps of 1/4: 3 x 1/8 = 3/8 is a tie and goes down to 1/4; with bias 1/8 it is 1/2."""
    x = torch.tensor([[0.25, 0.25, 0.25]], dtype=torch.float64)
    w = torch.tensor([[0.5, 0.5, 0.5]] * 3, dtype=torch.float64)
    assert forward(x, w, torch.tensor([0, 0.125, -0.125], dtype=torch.float64)).tolist() == [[0.25, 0.5, 0.25]]
    big = torch.tensor([[31.75, 31.75, -31.75]], dtype=torch.float64)  # a narrow accumulator would saturate
    assert forward(big, torch.ones_like(w), torch.zeros(3, dtype=torch.float64)).tolist() == [[31.75] * 3]
    one, other = torch.tensor([[1.5, -1.5, 0.0]], dtype=torch.float64).expand(3, 3), torch.zeros(3).double()
    assert forward(big, one, other).tolist() == [[0.0] * 3]


def rounds_each_product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return fixed(fixed(x[:, None, :] * w).sum(-1) + b)


def rounds_the_sum_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return fixed(fixed(x @ w.T) + b)


def accumulates_narrow(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(len(x), len(w), dtype=x.dtype)
    for i in range(x.shape[1]):
        total = (total + x[:, i : i + 1] * w[:, i]).clamp(-32, 31.75)
    return fixed(total + b)


def never_rounds(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w.T + b


def test_a_layer_rounds_once_after_the_wide_sum() -> None:
    check_one_rounding(layer_output)


def test_a_layer_rounds_its_input_first() -> None:
    """After a mean or a sum the input may be off the grid: 0.625 goes down to 0.5, and 1.5 x 0.5 is 0.75."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    assert layer_output(0.625 * ones, 1.5 * ones, torch.zeros(1).double()).item() == 0.75


@pytest.mark.parametrize("wrong", [rounds_each_product, rounds_the_sum_twice, accumulates_narrow, never_rounds])
def test_the_check_rejects_wrong_accumulation(wrong: Layer) -> None:
    with pytest.raises(AssertionError):
        check_one_rounding(wrong)


def test_float32_sums_are_wide_enough() -> None:
    """Against exact float64 sums of 576 products at 16 bits: at most a step off, and fewer than 1 in 100 are off."""
    x = to_fixed(torch.randn(4, 64, 8, 8, generator=seeded()).relu() * 2, 6, 10, "nearest")
    w = to_fixed(torch.randn(32, 64, 3, 3, generator=seeded(1)) * 0.1, 2, 14, "nearest")
    wide, exact = F.conv2d(x, w), F.conv2d(x.double(), w.double())
    off = (to_fixed(wide, 6, 10, "nearest") - to_fixed(exact, 6, 10, "nearest").float()).abs() * 2**10
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.01


def test_errors_are_rounded_once_and_give_both_gradients() -> None:
    """By hand for <3,5>, steps of 1/32 in +-4: 0.04 goes to 1/32, 5 saturates; x is 2, w is 0.5."""
    layer = installed(1, 2, w=8, a=8, g=8, integer_errors=3)
    x = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.zero_()
    layer.train()(x).backward(torch.tensor([[0.04, 5.0]], dtype=torch.float64))
    errors = [1 / 32, 4 - 1 / 32]
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert x.grad is not None
    assert layer.bias.grad.tolist() == errors
    assert layer.weight.grad.flatten().tolist() == [2 * e for e in errors]
    assert x.grad.item() == 0.5 * sum(errors)


def test_rounding_is_random_in_training_and_to_nearest_in_evaluation() -> None:
    torch.manual_seed(0)
    model = install(gupta.build(w=8, a=8, g=8), mlp.build((1, 2, 2), 3, hidden=3, width=8, norm="none"))
    images = torch.rand(16, 1, 2, 2)
    assert not torch.equal(model.train()(images), model(images))
    x = torch.randn(64, 3, generator=seeded()).requires_grad_()
    site, state = (
        gupta.GuptaOutput(FixedPointFormat(6, 2, "stochastic"), FixedPointFormat(-4, 12, "stochastic")).eval(),
        torch.get_rng_state(),
    )
    y = site(x, x)
    up = torch.randn(64, 3, generator=seeded(1)) / 99
    assert torch.equal(y, to_fixed(x, 6, 2, "nearest"))
    assert torch.equal(torch.autograd.grad(y, x, up)[0], to_fixed(up, -4, 12, "nearest"))
    assert torch.equal(torch.get_rng_state(), state)
    site.train()
    y = site(x, x)
    leaving = torch.autograd.grad(y, x, up)[0]
    assert not torch.equal(leaving, to_fixed(up, -4, 12, "nearest"))
    assert torch.equal(leaving, to_fixed(leaving, -4, 12, "nearest")), "on the grid"


# Steps: no float master copy of the weights

Step = Callable[[nn.Module, torch.optim.Optimizer], None]


def perceptron(method: Method, width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = install(method, mlp.build((1, 2, 2), 3, hidden=2, width=width, norm="none"), EVERYWHERE)
    assert method.prepare is not None
    method.prepare(model, None)
    return model


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, seed: int) -> None:
    images, labels = torch.rand(16, 1, 2, 2, generator=seeded(seed)), torch.arange(16) % 3
    optimizer.zero_grad()
    F.cross_entropy(model.train()(images), labels).backward()
    step(model, optimizer)


def check_on_the_grid(step: Step, make: Callable[[Any], torch.optim.Optimizer], rounding: str) -> None:
    """After every step, rounding every weight and bias to the grid changes nothing."""
    model = perceptron(gupta.build(w=10, a=10, g=10, rounding=rounding, integer_biases=4))
    optimizer = make(model.parameters())
    first = [p.detach().clone() for p in model.parameters()]
    for i in range(6):
        one_step(model, optimizer, step, i)
        for layer in quantized_layers(model).values():
            assert torch.equal(layer.weight, to_fixed(layer.weight, 2, 8, "nearest"))
            assert layer.bias is not None
            assert torch.equal(layer.bias, to_fixed(layer.bias, 4, 6, "nearest"))
    assert any(not torch.equal(old, p) for old, p in zip(first, model.parameters(), strict=True))


@pytest.mark.parametrize("rounding", gupta.ROUNDINGS)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_weights_and_biases_are_on_their_grids_after_every_step(
    make: Callable[[Any], torch.optim.Optimizer], rounding: str
) -> None:
    check_on_the_grid(gupta.optimizer_step, make, rounding)


def drift(step: Step, rounding: str, steps: int, part: float, count: int = 4000) -> Tensor:
    """Return each effective weight, in steps of the grid, after updates of `part` of a step each, from 0."""
    model = nn.Sequential(nn.Linear(count, 1, bias=False))
    method = gupta.build(w=8, a=32, g=32, rounding=rounding)
    install(method, model, EVERYWHERE)
    found = only_layer(model)
    nn.init.zeros_(found.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(steps):
        found.weight.grad = torch.full_like(found.weight, -part * 2.0**-6)
        step(model, optimizer)
    return effective_weight(found).flatten() * 2**6


def check_no_master(step: Step) -> None:
    """Nearest loses small updates; stochastic rounding keeps them on average (within 4 standard deviations)."""
    torch.manual_seed(0)
    assert not drift(step, "nearest", 20, 0.4).any()
    assert (drift(step, "nearest", 20, 0.6) == 20).all(), "each update rounds to a whole step"
    moved, steps, part = drift(step, "stochastic", 20, 0.1), 20, 0.1
    deviation = sqrt(steps * part * (1 - part) / len(moved))
    assert abs(moved.mean().item() - steps * part) < 4 * deviation
    assert moved.unique().numel() > 3, "weights are rounded independently"


def test_small_updates_are_lost_with_nearest_and_kept_on_average_with_stochastic() -> None:
    check_no_master(gupta.optimizer_step)


def float_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


class FloatMaster:
    """A wrong step: keep float weights, step them, and copy their rounded values into the network."""

    def __init__(self) -> None:
        self.master: dict[int, Tensor] = {}

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for p, _, _ in gupta.fixed_point_parameters(model):
                p.copy_(self.master.get(id(p), p))
            optimizer.step()
            for p, fixed_format, _ in gupta.fixed_point_parameters(model):
                self.master[id(p)] = p.clone()
                p.copy_(fixed_format.convert(p))


def test_the_checks_reject_a_float_master() -> None:
    with pytest.raises(AssertionError):
        check_no_master(FloatMaster())
    with pytest.raises(AssertionError):
        check_no_master(float_step)
    with pytest.raises(AssertionError):
        check_on_the_grid(float_step, OPTIMIZERS[0], "nearest")
    model = perceptron(gupta.build())
    images = torch.rand(4, 1, 2, 2)
    verify(model, images)
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), float_step, 0)
    with pytest.raises(NotQuantized, match="weights"):
        verify(model, images)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_fixed_momentum_is_stored_in_its_own_format(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def buffers(**options: Any) -> tuple[list[Tensor], list[Tensor]]:
        model = perceptron(gupta.build(w=16, a=16, g=16, **options))
        optimizer = make(model.parameters())
        for i in range(3):
            one_step(model, optimizer, gupta.optimizer_step, i)
        states = [optimizer.state[p] for p in model.parameters()]
        return [s.get("momentum_buffer", s.get("exp_avg")) for s in states], [s.get("exp_avg_sq") for s in states]

    kept, squares = buffers(momentum="fixed", integer_momentum=4)
    for m in kept:
        assert torch.equal(m, to_fixed(m, 4, 12, "nearest"))
    assert any(m.any() for m in kept)
    assert all(s is None or s.any() for s in squares), "second moments stay float"
    assert any(not torch.equal(m, to_fixed(m, 4, 12, "nearest")) for m in buffers()[0])


# Formats


def assert_fraction_bits(values: Tensor, fraction: int) -> None:
    """All values are multiples of 2^-fraction, and not all of 2^(1-fraction)."""
    codes = values.detach().double() * 2.0**fraction
    assert torch.equal(codes, codes.round())
    assert (codes % 2 != 0).any(), f"coarser than 2^-{fraction}"


def test_every_kind_of_tensor_has_its_own_format() -> None:
    kinds = {"weights": 1, "biases": 3, "activations": 5, "errors": -2, "updates": 0, "momentum": 2}
    options: dict[str, Any] = {f"integer_{kind}": il for kind, il in kinds.items()}
    model = perceptron(gupta.build(w=12, a=11, g=10, momentum="fixed", **options), width=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for i in range(3):
        one_step(model, optimizer, gupta.optimizer_step, i)
    seen: dict[str, Tensor] = {}
    found = quantized_layers(model)["fc2"]
    found.output_q.register_forward_hook(lambda module, args, y: seen.update(activations=y))
    found.output_q.register_full_backward_hook(lambda module, leaving, arriving: seen.update(errors=leaving[0]))
    before = found.weight.detach().clone()
    one_step(model, optimizer, gupta.optimizer_step, 3)
    assert_fraction_bits(found.weight, 12 - 1)
    assert found.bias is not None
    assert_fraction_bits(found.bias, 12 - 3)
    assert_fraction_bits(seen["activations"], 11 - 5)
    assert_fraction_bits(seen["errors"], 10 + 2)
    assert_fraction_bits(optimizer.state[found.weight]["momentum_buffer"], 12 - 2)
    assert not torch.equal(before, found.weight)


@pytest.mark.parametrize(("il", "rate"), [(4, 1.0), (-6, 1e6)])
def test_updates_are_rounded_and_saturate_in_their_own_format(il: int, rate: float) -> None:
    """<4,4>: weights move in sixteenths; <-6,14>: no weight moves by more than 2^-7, however large the update."""
    model = perceptron(gupta.build(w=8, a=16, g=16, integer_weights=1, integer_biases=1, integer_updates=il))
    before = [p.detach().clone() for p in model.parameters()]
    one_step(model, torch.optim.SGD(model.parameters(), lr=rate), gupta.optimizer_step, 0)
    moved = torch.cat([(p - old).detach().flatten() for p, old in zip(model.parameters(), before, strict=True)])
    assert moved.any()
    assert_fraction_bits(torch.cat([b.flatten() for b in before]), 7)
    if il > 0:
        inside = torch.cat([p.detach().flatten() for p in model.parameters()]).abs() < 0.99
        assert torch.equal(moved[inside] * 16, (moved[inside] * 16).round())
    else:
        assert moved.abs().max() == 2**-7


@pytest.mark.parametrize("bits", [8, 16, 20])
def test_the_verification_of_a_run_covers_all_widths(bits: int) -> None:
    model = perceptron(gupta.build(w=bits, a=bits, g=bits))
    counts = verify(model, torch.rand(8, 1, 2, 2))
    assert {count.allowed for found in counts.values() for count in found.values()} == {2**bits}
    with torch.no_grad():
        model.fc2.weight[0, 0] += 2.0 ** (1 - bits)
    with pytest.raises(NotQuantized, match="fc2: weights"):
        verify(model, torch.rand(8, 1, 2, 2))


@pytest.mark.parametrize("image", ["float", 8, "same"])
def test_the_width_of_the_image_is_not_that_of_the_first_layers_output(image: int | str) -> None:
    rules, image_range = {"fc2": 12}, ((-1.0,), (1.0,))
    policy = Policy(first="same", last="float", input=image, rules=rules, image_range=image_range)
    model = install(
        gupta.build(), mlp.build((1, 2, 2), 3, hidden=3, norm="none"), policy, example=torch.rand(2, 1, 2, 2)
    )
    layers = quantized_layers(model)
    found = [layers[name].output_q.activations for name in ("fc1", "fc2", "fc3")]
    assert found == [FixedPointFormat(6, fraction, "stochastic") for fraction in (10, 6, 10)]
    assert isinstance(model.fc4.output_q, IdentityQuantizer), "the output of a float layer is not quantized"


def test_outputs_stay_float_if_only_weights_are_quantized() -> None:
    """The same holds where the input quantizers are those of another method."""
    alone = gupta.build(w=16, a=32, g=32)
    other = replace(uniform.build(w=32, a=8), bits=Bits(16, 8), weight=alone.weight, output=alone.output)
    for method in (alone, other):
        model = install(method, mlp.build((1, 2, 2), 3, norm="none"))
        assert all(isinstance(found.output_q, IdentityQuantizer) for found in quantized_layers(model).values())


def test_initial_weights_are_rounded_to_nearest_without_random_draws() -> None:
    torch.manual_seed(0)
    model = install(gupta.build(w=8), mlp.build((1, 2, 2), 3, norm="none"), EVERYWHERE)
    expected = [to_fixed(p, 2, 6, "nearest") for p in model.parameters()]
    state = torch.get_rng_state()
    gupta.prepare(model, None)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "even"}, r"rounding=even: must be one of stochastic, nearest"),
        ({"momentum": "none"}, r"momentum=none: must be one of float, fixed"),
        ({"integer_errors": 17}, r"integer_errors=17: must be -16 to 16"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gupta.build(**options)
    with pytest.raises(Unsupported, match="momentum=fixed has no effect"):
        gupta.build(w=32, momentum="fixed")


# Training steps, bit for bit

PLAIN = {"weights": 2, "biases": 2, "activations": 6, "errors": -4, "updates": 2}


@pytest.mark.parametrize(
    ("bits", "integers", "rate", "momentum"),
    [
        (16, PLAIN, 0.1, 0.0),
        (16, PLAIN | {"errors": -3, "updates": 0}, 0.1, 0.9),
        (10, PLAIN | {"momentum": 2, "biases": 3}, 0.7, 0.9),
        (12, PLAIN | {"activations": 0, "errors": -2, "momentum": 1}, 0.5, 0.9),  # outputs saturate
        (8, PLAIN | {"weights": 0, "updates": -4}, 2.0, 0.0),  # weights and updates saturate
    ],
)
def test_training_steps_are_the_papers_bit_for_bit(
    bits: int, integers: dict[str, int], rate: float, momentum: float
) -> None:
    """Images are multiples of 1/16, so every product and sum is exact in float64, and the results must be equal."""
    options: dict[str, Any] = {f"integer_{kind}": il for kind, il in integers.items()}
    options["momentum"] = "fixed" if "momentum" in integers else "float"
    method = gupta.build(w=bits, a=bits, g=bits, rounding="nearest", **options)
    torch.manual_seed(bits)
    model = install(method, mlp.build((1, 3, 2), 3, hidden=1, width=7, norm="none").double(), EVERYWHERE)
    names = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
    tensors = {short: model.get_parameter(name).detach().numpy().copy() for short, name in names.items()}
    exact = oracle.Perceptron(tensors, {kind: (il, bits - il) for kind, il in integers.items()})
    exact.start()
    gupta.prepare(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    start = {short: value.copy() for short, value in exact.tensors.items()}
    for i in range(5):
        images = torch.randint(17, (6, 1, 3, 2), generator=seeded(i)).double() / 16
        labels = torch.randint(3, (6,), generator=seeded(i + 9))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        gupta.optimizer_step(model, optimizer)
        exact.step(images.flatten(1).numpy(), labels.numpy(), rate, momentum)
        for short, name in names.items():
            np.testing.assert_array_equal(
                model.get_parameter(name).detach().numpy(), exact.tensors[short], f"{i} {short}"
            )
    assert all((start[short] != exact.tensors[short]).any() for short in names), "all tensors have changed"
