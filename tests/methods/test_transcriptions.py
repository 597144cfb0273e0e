"""Test every method against transcriptions.py: values and gradients, per function and in whole networks.

The transcriptions were written from the papers independently of the tensor code, so an error would have to occur in
both.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transcriptions as paper
from conftest import tiered
from torch import Tensor, nn
from transcriptions import Array, Layer, Pair, Site

from qbench.config.schema import Optim
from qbench.methods import bwn, dorefa, hwgq, inq, lsq, pact, ttq, twn, uniform, xnor
from qbench.models import mlp
from qbench.quant import fused_kernels as passes
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import quantize_k, sign, straight_through, surrogate
from qbench.quant.policy import Policy
from qbench.quant.probe import Probe
from qbench.training.optimizer import parameter_groups

RNG = np.random.default_rng(20)
EIGHTHS = RNG.integers(-24, 25, (6, 4, 3, 3)) / 8.0  # full of ties, zeros, -1 and 1
INPUTS: dict[str, Array] = {
    "linear": RNG.normal(size=(7, 5)),
    "small": RNG.normal(size=(4, 3, 3, 3)) * 0.05,
    "eighths": EIGHTHS,
    "large": RNG.normal(size=(3, 6)) * 1e4,
    "constant": np.full((3, 4), -0.375),
    "two": np.where(RNG.random((5, 4)) < 0.5, -0.5, 0.5),
    "negative_zero": np.array([[-0.0, 0.0, 0.3], [-0.0, -1.0, 1.0]]),
    "a_filter_of_zeros": np.array([[0.0, -0.0, 0.0], [0.7, -0.2, 0.1]]),
    "zeros": np.zeros((2, 3)),
    "one": np.array([[-0.6]]),
}
inputs = pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())


def f64(x: Any) -> Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def agree(got: Tensor, want: Array | float, what: str = "", rtol: float = 1e-11) -> None:
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=rtol, atol=rtol * scale, err_msg=what)


def check(function: Callable[..., Tensor], want: Pair, x: Array, *scales: float) -> None:
    """Compare values and all gradients with the transcription, for an upstream gradient that is nowhere zero."""
    leaves = [f64(v).requires_grad_() for v in (x, *scales)]
    g = np.random.default_rng(x.size).normal(size=x.shape) + 0.01
    out = function(*leaves)
    agree(out, want[0], "value")
    by = want[1](g)
    grads = torch.autograd.grad(out, leaves, f64(g))
    for i, (got, wanted) in enumerate(zip(grads, by if scales else (by,), strict=True)):
        agree(got, wanted, f"gradient {i}")
    assert torch.equal(leaves[0], f64(x)), "the input was written to"


# Binary weights and activations


@inputs
@pytest.mark.parametrize("gradient", ["paper", "authors", "jiecaoyu"])
def test_the_weights_of_xnor(x: Array, gradient: str) -> None:
    check(partial(xnor.binarize_weight, gradient=gradient), paper.xnor_weight(x, gradient), x)


@inputs
def test_the_activations_of_xnor_and_the_weights_of_hwgq(x: Array) -> None:
    check(xnor.binarize_activation, paper.xnor_activation(x), x)
    check(hwgq.binarize_weight, paper.hwgq_weight(x), x)


@pytest.mark.parametrize("method", [bwn.build, partial(xnor.build, a=32)], ids=["bwn", "xnor"])
@pytest.mark.parametrize(("center", "clamp"), [(True, False), (False, True), (True, True)])
def test_the_weights_are_centered_and_clamped_after_a_step(
    method: Callable[..., Method], center: bool, clamp: bool
) -> None:
    model = install(method(center=center, clamp=clamp), convolutions("none"), ALL)
    before = {n: p.detach().clone().numpy() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = p.detach().sin() * 8
    step = method(center=center, clamp=clamp).step
    assert step is not None
    step(model, torch.optim.SGD(model.parameters(), lr=0.5))
    for name, p in model.named_parameters():
        want = before[name] - 0.5 * np.sin(before[name]) * 8
        if "weight" in name:
            want = paper.centred(want) if center else want
            want = paper.clamped(want) if clamp else want
        agree(p, want, name)


@pytest.mark.parametrize("method", [bwn.build, partial(xnor.build, a=32), xnor.build], ids=["bwn", "xnor", "xnor_a1"])
def test_the_authors_scale_gradients_before_a_step(method: Callable[..., Method]) -> None:
    """allenai/XNOR-Net: with SGD, gradients of binary weights times n; with Adam, all gradients times 1e9."""
    parts = method(gradient="authors")
    assert parts.step is not None
    for adam in (False, True):
        model = install(parts, convolutions("none"), ALL)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-8)
        parameters = list(model.parameters())
        parts.step(model, torch.optim.Adam(parameters, lr=0.01) if adam else torch.optim.SGD(parameters, lr=0.5))
        for name, p in model.named_parameters():
            n = p[0].numel() if "weight" in name else 1
            # Adam's first step is lr g / (|g| + eps): with g = 10, all of lr; with g = 1e-8, half of lr
            agree(before[name] - p, np.full(p.shape, 0.01 if adam else 0.5e-8 * n), name, 1e-8)


@pytest.mark.parametrize("gradient", ["authors", "jiecaoyu"])
def test_the_gradients_of_code_need_filters_of_two_channels(gradient: str) -> None:
    site = bwn.build(gradient=gradient).weight
    assert site is not None
    with pytest.raises(Unsupported, match=f"gradient={gradient} cannot train filters with one input channel"):
        site("conv", nn.Conv2d(1, 4, 3), 1)


# Ternary weights


@inputs
def test_the_weights_of_twn(x: Array) -> None:
    check(twn.ternarize_weight, paper.twn_weight(x), x)


@inputs
@pytest.mark.parametrize("t", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("scales", [(0.5, 2.0), (1.0, 1.0)])
def test_the_weights_of_ttq(x: Array, t: float, scales: tuple[float, float]) -> None:
    delta = paper.ttq_max_threshold(x, t)
    for threshold in (delta, f64(delta)):
        ternary = partial(ttq.ternarize_weight, threshold=threshold)
        check(ternary, paper.ttq_weight(x, *scales, delta), x, *scales)


@pytest.mark.parametrize("initial", ["mean", "one"])
@pytest.mark.parametrize(("threshold", "t"), [("max", 0.05), ("max", 0.4), ("sparsity", 0.3), ("sparsity", 0.5)])
def test_the_threshold_and_initial_scales_of_ttq(threshold: str, t: float, initial: str) -> None:
    layer = nn.Linear(10, 20).double()
    w = layer.weight.detach().numpy()
    site = ttq.build(threshold=threshold, t=t, initial=initial).weight
    assert site is not None
    module = site("fc", layer, 2)
    out = module(layer.weight).detach().numpy()
    if threshold == "max":
        delta = paper.ttq_max_threshold(w, t)
    else:
        delta = np.sort(np.abs(w).ravel())[round(t * w.size) - 1]
        assert (out == 0).sum() == round(t * w.size)
    means = paper.ttq_means(w, delta) if initial == "mean" else (1.0, 1.0)
    agree(module.positive, means[0])
    agree(module.negative, means[1])
    agree(module(layer.weight), paper.ttq_weight(w, *means, delta)[0])


# Activations of HWGQ


@pytest.mark.parametrize("bits", tiered(range(1, 9), range(1, 8)))
def test_the_levels_of_hwgq(bits: int) -> None:
    m = 2**bits - 1
    digits = 1e-6 if hwgq.half_wave_levels(bits).dtype == torch.float32 else 1e-10
    agree(hwgq.half_wave_levels(bits, False), paper.optimal_levels(m), rtol=digits)
    agree(hwgq.half_wave_levels(bits, True), paper.uniform_step(m, 0) * np.arange(1, m + 1), rtol=digits)
    agree(hwgq.half_step_levels(bits), paper.uniform_step(m, 0.5) * np.arange(1, m + 1), rtol=digits)


def test_newtons_method_and_lloyds_iteration_give_the_same_levels() -> None:
    for m in (1, 2, 3, 7):
        np.testing.assert_allclose(paper.optimal_levels(m), paper.lloyd_levels(m), rtol=1e-9)


HALF_WAVE = {
    "two_bits": np.array([0.538, 1.076, 1.614]),
    "sparse": np.array([0.453, 1.51]),
    "exact_ties": np.array([0.5, 1.0, 1.5, 2.0]),
    "one_level": np.array([0.75]),
}


def half_wave_inputs(q: Array) -> Array:
    edges = (q[1:] + q[:-1]) / 2
    points = np.concatenate([q, edges, [0.0, -0.0, q[0] / 2, q[-1] - 1, -1.0, 1e4, -1e4]])
    return np.concatenate([points, points + 1e-6, points - 1e-6, RNG.normal(size=200)])


@pytest.mark.parametrize("backward", ["vanilla", "clipped", "log_tailed"])
@pytest.mark.parametrize("q", HALF_WAVE.values(), ids=HALF_WAVE.keys())
def test_the_activations_of_hwgq(q: Array, backward: str) -> None:
    x = half_wave_inputs(q)
    quantize = partial(hwgq.quantize_activation, levels=f64(q), backward=backward)
    check(quantize, paper.hwgq_activation(x, q, backward), x)


def test_the_memory_layout_changes_no_value() -> None:
    x, q = RNG.normal(size=(3, 5, 4, 2)), HALF_WAVE["two_bits"]
    for layout in (lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.transpose(0, 3)):
        for function, want in (
            (partial(hwgq.quantize_activation, levels=f64(q)), lambda v: paper.hwgq_activation(v, q, "clipped")),
            (hwgq.binarize_weight, paper.hwgq_weight),
            (partial(inq.quantize_weight, bits=4), lambda v: (paper.inq_rounded(v, paper.inq_exponent(v), 4), None)),
            (partial(dorefa.quantize_weight, bits=3), lambda v: paper.dorefa_weight(v, 3)),
        ):
            strided = layout(f64(x))
            assert not strided.is_contiguous()
            agree(function(strided), want(strided.numpy())[0])


@pytest.mark.parametrize("backward", ["vanilla", "clipped", "log_tailed"])
@pytest.mark.parametrize("m", [1, 3, 7])
def test_the_half_step_activations_of_hwgq(m: int, backward: str) -> None:
    q = np.arange(1, m + 1) * 0.5
    x = half_wave_inputs(q)
    quantize = partial(hwgq.quantize_activation_half_step, levels=f64(q), backward=backward)
    check(quantize, paper.hwgq_activation(x, q, backward, first=0.25), x)


AUTHORS = {("uniform", 1): [0.799], ("uniform", 2): [0.538, 1.076, 1.614], ("optimal", 2): [0.453, 1.51]}
AUTHORS |= {("uniform", 3): list(0.3217 * np.arange(1, 8)), ("uniform", 4): list(0.185 * np.arange(1, 16))}


@pytest.mark.parametrize(("kind", "bits"), AUTHORS)
def test_the_published_levels_of_hwgq(kind: str, bits: int) -> None:
    site = hwgq.build(a=bits, levels=kind, constants="authors").input
    assert site is not None
    agree(site("fc", nn.Linear(2, 2), bits).levels, np.array(AUTHORS[kind, bits]), rtol=1e-6)


# INQ


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", [n for n in INPUTS if n != "zeros"])
def test_the_levels_and_rounding_of_inq(name: str, bits: int) -> None:
    w = INPUTS[name]
    n1 = paper.inq_exponent(w)
    positive = paper.inq_magnitudes(n1, bits)
    assert inq.largest_exponent(f64(w)) == n1
    agree(inq.power_of_two_levels(f64(w), bits), np.array([-p for p in positive[:0:-1]] + positive))
    agree(inq.quantize_weight(f64(w), bits), paper.inq_rounded(w, n1, bits))


@pytest.mark.parametrize("exponent", [-9, -1, 0, 3])
def test_the_largest_exponent_of_inq_at_its_borders(exponent: int) -> None:
    border = np.float32(0.75 * 2.0**exponent)
    for s in (border, np.nextafter(border, np.float32(0)), np.nextafter(border, np.float32(9e9))):
        w = np.array([s, -s / 3], np.float64)
        assert inq.largest_exponent(f64(w)) == paper.inq_exponent(w), s
    levels = inq.levels_from_exponent(exponent, 4)
    edges = np.array(paper.inq_magnitudes(exponent, 4))
    x = np.concatenate([edges, edges * 1.5, edges * 0.75, edges[1:2] / 2, edges * 3.7])
    x = np.concatenate([x, np.nextafter(x, 0), np.nextafter(x, 1e9)])
    x = np.concatenate([x, -x])
    agree(inq.round_to_levels(f64(x), levels.double()), paper.inq_rounded(x, exponent, 4))


@pytest.mark.parametrize("portions", [(0.5, 0.75, 0.875, 1.0), (0.2, 0.4, 0.6, 0.8, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize("partition", ["largest", "random"])
@pytest.mark.parametrize("bits", [2, 5])
def test_all_portions_of_inq(portions: tuple[float, ...], bits: int, partition: str) -> None:
    method = inq.build(w=bits, portions=portions, partition=partition)
    assert method.on_epoch is not None
    model = install(method, convolutions("none"), ALL)
    layers = quantized_layers(model)
    mirror = {n: paper.InqLayer(layer.weight.detach().numpy(), bits) for n, layer in layers.items()}
    rng = np.random.default_rng(bits)
    for epoch in range(len(portions)):
        method.on_epoch(model, epoch, len(portions), Probe([], torch.nn.functional.cross_entropy))
        for name, layer in layers.items():
            w, frozen = layer.weight.detach().numpy(), layer.weight_q.frozen.numpy()
            chosen = None if partition == "largest" else frozen
            assert frozen.sum() == round(portions[epoch] * w.size)
            assert not (mirror[name].frozen & ~frozen).any(), "a frozen weight became free"
            mirror[name].partition(w, portions[epoch], chosen)
            np.testing.assert_array_equal(frozen, mirror[name].frozen)
            check(layer.weight_q, mirror[name].weight(w), w)
            with torch.no_grad():  # momentum and decay move every latent weight
                layer.weight.add_(f64(rng.normal(size=w.shape) * np.abs(w).max() * 0.4))
    assert all(layer.weight_q.complete for layer in layers.values())


# DoReFa


@inputs
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_weights_of_dorefa(x: Array, bits: int) -> None:
    want = paper.dorefa_weight(x, bits)
    if x.any() or bits == 1:
        check(partial(dorefa.quantize_weight, bits=bits), want, x)
    else:
        agree(dorefa.quantize_weight(f64(x), bits), want[0])


ACTIVATIONS = {
    "clip": dorefa.quantize_activation,
    "abs": dorefa.quantize_activation_abs,
    "tanh": dorefa.quantize_activation_tanh,
}


@inputs
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_the_activations_of_dorefa(x: Array, bits: int, activation: str) -> None:
    check(partial(ACTIVATIONS[activation], bits=bits), paper.dorefa_activation(x, bits, activation), x)


def noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Array:
    return passes.uniform(torch.empty(*shape, dtype=torch.float64), generator).numpy() - 0.5


@inputs
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_gradients_of_dorefa(x: Array, bits: int) -> None:
    u = noise(x.shape, torch.Generator().manual_seed(bits))
    got = dorefa.quantize_gradient(f64(x), bits, generator=torch.Generator().manual_seed(bits))
    agree(got, paper.dorefa_gradient(x, bits, u))


# PACT, LSQ, uniform


@inputs
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [0.375, 1.0, 3.0])
def test_the_activations_of_pact(x: Array, bits: int, alpha: float) -> None:
    check(partial(pact.quantize_activation, bits=bits), paper.pact_activation(x, alpha, bits), x, alpha)


@inputs
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("step", [0.25, 0.1])
def test_the_quantizer_of_lsq(x: Array, bits: int, signed: bool, step: float) -> None:
    check(partial(lsq.quantize, bits=bits, signed=signed), paper.lsq(x, step, bits, signed), x, step)
    scaled = partial(lsq.scale_gradient, count=x.size, bits=bits, signed=signed)
    function = lambda v, s: lsq.quantize(v, scaled(s), bits, signed)  # noqa: E731
    check(function, paper.lsq(x, step, bits, signed, x.size), x, step)
    if x.any():
        agree(lsq.initial_step(f64(x), bits, signed), paper.lsq_initial(x, bits, signed))


@inputs
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("channel", [True, False])
def test_the_weights_of_uniform(x: Array, bits: int, channel: bool) -> None:
    check(partial(uniform.quantize_weight, bits=bits, channel=channel), paper.uniform_weight(x, bits, channel), x)


@inputs
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.5, 2.0), (0.0, 0.875), (-3.0, 0.0)])
def test_the_activations_of_uniform(x: Array, bits: int, low: float, high: float) -> None:
    function = partial(uniform.quantize_activation, low=f64(low), high=f64(high), bits=bits)
    check(function, paper.uniform_activation(x, low, high, bits), x)


def test_the_moving_range_of_uniform() -> None:
    site = uniform.build(a=3, momentum=0.25).input
    assert site is not None
    module = site("fc", nn.Linear(2, 2), 3)
    batches = [np.array([0.5, 2.0]), np.array([-1.0, -0.25]), np.array([-4.0, 8.0])]
    for x, low, high in zip(batches, (0.0, -0.25, -1.1875), (2.0, 1.5, 3.125), strict=True):
        out = module(f64(x))
        assert (module.low.item(), module.high.item()) == (low, high)
        agree(out, paper.uniform_activation(x, low, high, 3)[0], rtol=1e-6)
    module.eval()
    module(f64(batches[0]))
    assert module.low.item() == -1.1875


@pytest.mark.parametrize("decay", [0.0, 0.125])
@pytest.mark.parametrize("name", ["pact", "ttq"])
def test_the_learned_scales_decay_and_stay_positive(name: str, decay: float) -> None:
    method = pact.build(initial=2.0, decay=decay) if name == "pact" else ttq.build(initial="one", decay=decay)
    model = install(method, perceptron("affine"))
    optimizer = torch.optim.SGD(parameter_groups(model, Optim(weight_decay=0.5)), lr=0.5, momentum=0.5)
    scales = {n: p for n, p in model.named_parameters() if "_q" in n}
    assert scales
    assert method.step is not None
    want, velocity = (2.0, 0.0) if name == "pact" else (1.0, 0.0)
    for gradient in (0.25, -1.0, 0.75):
        for p in scales.values():
            p.grad = torch.full_like(p, gradient)
        method.step(model, optimizer)
        velocity = 0.5 * velocity + gradient + decay * want
        want -= 0.5 * velocity
        for p in scales.values():
            agree(p, want, rtol=1e-6)
    for p in scales.values():
        p.grad = torch.full_like(p, 1e3)
    method.step(model, optimizer)
    assert all(0 < p < 0.01 for p in scales.values())


# Whole networks

ALL = Policy(first="same", last="same", input="float")


def convolutions(norm: str, kernel: int = 3, stride: int = 2, padding: int = 1) -> nn.Module:
    """Return two convolutions followed by a linear layer, for images of 2 channels of 7x7."""
    torch.manual_seed(3)
    batch_norm = nn.BatchNorm2d if norm == "affine" else nn.Identity
    size = (7 + 2 * padding - kernel) // stride + 1
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        c1=nn.Conv2d(2, 4, 3, padding=1, bias=norm == "none"), b1=batch_norm(4), a1=nn.ReLU(),
        c2=nn.Conv2d(4, 5, kernel, stride, padding, bias=norm == "none"), b2=batch_norm(5), a2=nn.ReLU(),
        flat=nn.Flatten(), fc=nn.Linear(5 * size * size, 3),
    )  # fmt: skip
    model = nn.Sequential(parts)
    model.feeds = {"a1": ("c2",), "a2": ("fc",)}  # type: ignore[assignment]
    return with_random_affine(model)


def with_random_affine(model: nn.Module) -> nn.Module:
    """Return the model in float64, with random scales and shifts of batch normalization.

    Otherwise values on a lattice would have their mean, zero, on the lattice: a tie that rounding errors decide.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 0.6)
    return model.double()


def perceptron(norm: str) -> nn.Module:
    torch.manual_seed(4)
    return with_random_affine(mlp.build((2, 7, 7), 3, hidden=2, width=6, norm=norm))


def without_biases(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.bias = None
    return model


def batch() -> tuple[Array, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(11, 2, 7, 7)), rng.integers(0, 3, 11)


def parameters(model: nn.Module) -> dict[str, Array]:
    return {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}


def compare(model: nn.Module, layers: Sequence[Layer], rtol: float = 1e-9) -> None:
    """Compare logits, loss and every gradient, including that of the image, with the transcription.

    Networks with batch normalization must not have zero gradients, since these would show nothing.
    """
    image, labels = batch()
    x = f64(image).requires_grad_()
    torch.manual_seed(8)
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    torch.manual_seed(8)
    want_logits, want_loss, grads = paper.network(parameters(model), layers, image, labels)
    agree(logits, want_logits, "logits", rtol)
    agree(loss, want_loss, "loss", rtol)
    named = {**dict(model.named_parameters()), "x": x}
    assert grads.keys() == named.keys()
    for name, p in named.items():
        assert p.grad is not None, name
        largest = np.abs(grads[name]).max(initial=0)
        assert largest > 1e-9 or not layers[0].norm, f"{name}: its gradient is zero"
        digits = rtol if p.dtype == torch.float64 else 1e-6  # the scales of inputs are float32 in every network
        np.testing.assert_allclose(p.grad, grads[name], rtol=digits, atol=digits * largest, err_msg=name)


Sites = Callable[[nn.Module, str], dict[str, Any]]
"""(network, name of a layer) -> arguments of `Layer` for it."""


def weights(function: Callable[..., Pair]) -> Sites:
    return lambda model, name: {"weight": Site(function)}


def both(function: Callable[..., Pair], activation: Callable[..., Pair], *scales: str, act: bool = False) -> Sites:
    """Return sites for all weights and for all inputs but the image; `act`: whether the network keeps its ReLU."""

    def sites(model: nn.Module, name: str) -> dict[str, Any]:
        reads_image = name in ("c1", "fc1")
        return {"weight": Site(function), "act": act} | ({} if reads_image else {"input": Site(activation, scales)})

    return sites


def ttq_sites(threshold: str, t: float) -> Sites:
    def sites(model: nn.Module, name: str) -> dict[str, Any]:
        def function(w: Array, positive: Array, negative: Array) -> Pair:
            sparsity = np.sort(np.abs(w).ravel())[round(t * w.size) - 1]
            delta = paper.ttq_max_threshold(w, t) if threshold == "max" else sparsity
            return paper.ttq_weight(w, float(positive), float(negative), delta)

        return {"weight": Site(function, ("weight_q.positive", "weight_q.negative"))}

    return sites


def k_sites(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the sites with the factor K, through which no gradient flows; the bias is added after it."""
    layer = model.get_submodule(name)

    def output(y: Array, x: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        if y.ndim == 2:
            k = np.abs(x).sum(1, keepdims=True) / x.shape[1]
        else:
            k = paper.input_scale(x, layer.kernel_size, layer.stride[0], layer.padding[0])
        return y * k, lambda g: (g * k, np.zeros_like(x))

    arguments = both(paper.xnor_weight, paper.xnor_activation)(model, name)
    return arguments | ({"output": output} if "input" in arguments else {})


def dorefa_sites(w: int, a: int, g: int, activation: str = "clip") -> Sites:
    def sites(model: nn.Module, name: str) -> dict[str, Any]:
        act = partial(paper.dorefa_activation, k=a, activation=activation)
        arguments = both(partial(paper.dorefa_weight, k=w), act)(model, name)
        return arguments | ({"gradient": lambda d: paper.dorefa_gradient(d, g, noise(d.shape))} if g < 32 else {})

    return sites


def hwgq_sites(bits: int, backward: str, first: float = 0) -> Sites:
    """Return the sites of HWGQ; the network stores its levels in float32."""
    step = paper.uniform_step(2**bits - 1, first)
    q = (step * np.arange(1, 2**bits)).astype(np.float32).astype(np.float64)
    return both(paper.hwgq_weight, partial(paper.hwgq_activation, q=q, backward=backward, first=first * q[0]))


def lsq_sites(w: int, a: int) -> Sites:
    def weight(v: Array, s: Array) -> Pair:
        return paper.lsq(v, float(s), w, True, v.size)

    def activation(v: Array, s: Array) -> Pair:
        return paper.lsq(v, float(s), a, False, v[0].size)

    def sites(model: nn.Module, name: str) -> dict[str, Any]:
        arguments = both(weight, activation, "input_q.step", act=True)(model, name)
        return arguments | {"weight": Site(weight, ("weight_q.step",))}

    return sites


def uniform_sites(w: int, a: int, channel: bool) -> Sites:
    """Return the sites of uniform; the network stores the range in float32."""

    def activation(x: Array) -> Pair:
        return paper.uniform_activation(x, float(np.float32(x.min())), float(np.float32(x.max())), a)

    return both(partial(paper.uniform_weight, bits=w, channel=channel), activation, act=True)


def pact_sites(w: int, a: int) -> Sites:
    def activation(x: Array, alpha: Array) -> Pair:
        return paper.pact_activation(x, float(alpha), a)

    return both(partial(paper.dorefa_weight, k=w), activation, "input_q.alpha")


CASES: dict[str, tuple[Method, Sites]] = {
    "bwn": (bwn.build(), weights(paper.xnor_weight)),
    "bwn_authors": (bwn.build(gradient="authors"), weights(partial(paper.xnor_weight, gradient="authors"))),
    "xnor": (xnor.build(), both(paper.xnor_weight, paper.xnor_activation)),
    "twn": (twn.build(), weights(paper.twn_weight)),
    "ttq_max": (ttq.build(t=0.25), ttq_sites("max", 0.25)),
    "ttq_sparsity": (ttq.build(threshold="sparsity", t=0.4, initial="one"), ttq_sites("sparsity", 0.4)),
    "hwgq_clipped": (hwgq.build(a=2), hwgq_sites(2, "clipped")),
    "hwgq_log_tailed": (hwgq.build(a=3, backward="log_tailed"), hwgq_sites(3, "log_tailed")),
    "hwgq_vanilla": (hwgq.build(a=4, backward="vanilla"), hwgq_sites(4, "vanilla")),
    "hwgq_half_step": (hwgq.build(a=2, threshold="half_step"), hwgq_sites(2, "clipped", 0.5)),
    "dorefa_w1a1g4": (dorefa.build(w=1, a=1, g=4), dorefa_sites(1, 1, 4)),
    "dorefa_w2a2g2": (dorefa.build(w=2, a=2, g=2), dorefa_sites(2, 2, 2)),
    "dorefa_abs": (dorefa.build(w=3, a=4, activation="abs"), dorefa_sites(3, 4, 32, "abs")),
    "dorefa_tanh": (dorefa.build(w=3, a=2, g=8, activation="tanh"), dorefa_sites(3, 2, 8, "tanh")),
    "pact": (pact.build(w=3, a=2, initial=0.5), pact_sites(3, 2)),
    "lsq": (lsq.build(w=2, a=3), lsq_sites(2, 3)),
    "uniform_channel": (uniform.build(w=3, a=4), uniform_sites(3, 4, True)),
    "uniform_layer": (uniform.build(w=2, a=8, channel=False), uniform_sites(2, 8, False)),
}


def layers_of(model: nn.Module, norm: str, sites: Sites) -> list[Layer]:
    norm_of = {"c1": "b1", "c2": "b2", "fc": "", "fc1": "bn1", "fc2": "bn2", "fc3": ""}
    return [
        Layer(
            name,
            norm=norm_of[name] if norm == "affine" else "",
            stride=layer.stride[0] if isinstance(layer, nn.Conv2d) else 1,
            padding=layer.padding[0] if isinstance(layer, nn.Conv2d) else 0,
            **sites(model, name),
        )
        for name, layer in quantized_layers(model).items()
    ]


def probe() -> Probe:
    image, labels = batch()
    return Probe([(f64(image), torch.from_numpy(labels))], torch.nn.functional.cross_entropy)


@pytest.mark.parametrize("norm", ["none", "affine"])
@pytest.mark.parametrize("build", [convolutions, perceptron])
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_whole_networks(case: str, build: Callable[[str], nn.Module], norm: str) -> None:
    method, sites = CASES[case]
    model = install(method, build(norm), ALL)
    if method.prepare:
        method.prepare(model, probe())
    compare(model, layers_of(model, norm, sites))


@pytest.mark.parametrize(
    "build",
    [
        perceptron,
        *(
            partial(convolutions, kernel=kernel, stride=stride, padding=padding)
            for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (5, 3, 2), (2, 1, 0), (1, 2, 0), (7, 1, 0))
        ),
    ],
)
def test_the_gradients_of_networks_with_the_factor_k(build: Callable[[str], nn.Module]) -> None:
    model = install(xnor.build(scale="K"), without_biases(build("affine")), ALL)
    compare(model, layers_of(model, "affine", k_sites))


@pytest.mark.parametrize("build", [perceptron, convolutions])
def test_the_factor_k_does_not_multiply_the_bias(build: Callable[[str], nn.Module]) -> None:
    """(sign(I) * sign(W)) K alpha approximates the convolution I * W; the bias is added to it."""
    model = install(xnor.build(scale="K"), build("none"), ALL)
    compare(model, layers_of(model, "none", k_sites))


@pytest.mark.parametrize("build", [convolutions, perceptron])
def test_the_gradients_of_a_network_halfway_through_inq(build: Callable[[str], nn.Module]) -> None:
    method = inq.build(w=4)
    model = install(method, build("affine"), ALL)
    mirror = {n: paper.InqLayer(layer.weight.detach().numpy(), 4) for n, layer in quantized_layers(model).items()}
    assert method.on_epoch is not None
    method.on_epoch(model, 0, 4, probe())
    for name, layer in mirror.items():
        layer.partition(model.get_submodule(name).weight.detach().numpy(), 0.5)
    compare(model, layers_of(model, "affine", lambda model, name: {"weight": Site(mirror[name].weight)}))


@pytest.mark.parametrize("build", [convolutions, perceptron])
def test_the_initial_steps_of_lsq(build: Callable[[str], nn.Module]) -> None:
    """They come from the inputs of the layers in the float network."""
    model = install(lsq.build(w=3, a=2), build("none"), ALL)
    assert lsq.prepare is not None
    lsq.prepare(model, probe())
    inputs_of: dict[str, Array] = {}

    def spy(name: str) -> Site:
        return Site(lambda x: (inputs_of.update({name: x}), (x, lambda g: g))[1])

    params = {n: p for n, p in parameters(model).items() if "_q" not in n}
    paper.network(params, layers_of(model, "none", lambda model, name: {"input": spy(name)}), *batch())
    for i, (name, layer) in enumerate(quantized_layers(model).items()):
        agree(layer.weight_q.step, paper.lsq_initial(params[f"{name}.weight"], 3, True))
        if i:
            agree(layer.input_q.step, paper.lsq_initial(inputs_of[name], 2, False), rtol=1e-6)


# Known wrong implementations, which the comparison must reject

NORMAL = np.random.default_rng(6).normal(size=(4, 3))
TIES = np.array([-1.5, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 2.0])


def ttq_without_the_minus(w: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return ttq.ternarize_weight(w, positive, -(2 * negative.detach() - negative), 0.1)


def dorefa_with_a_fixed_maximum(w: Tensor) -> Tensor:
    t = w.tanh()
    return 2 * quantize_k(t / (2 * t.abs().max().detach()) + 0.5, 2) - 1


def lsq_with_the_clips_slope_alone(v: Tensor, s: Tensor) -> Tensor:
    return straight_through(v.clamp(-2 * s, s), lsq.quantize(v, s, 2, True))


MUTANTS: dict[str, tuple[Callable[..., Tensor], Pair, Array, tuple[float, ...]]] = {
    "xnor: one scale for the layer": (
        lambda w: xnor.binarize_weight(w.reshape(1, -1)).reshape(w.shape), paper.xnor_weight(NORMAL), NORMAL, (),
    ),
    "xnor: the authors' gradient for the paper's": (
        partial(xnor.binarize_weight, gradient="authors"), paper.xnor_weight(NORMAL), NORMAL, (),
    ),
    "xnor: gradient passes at 1": (
        lambda x: straight_through(x.clamp(-1, 1), sign(x)), paper.xnor_activation(TIES), TIES, (),
    ),
    "xnor: sign(0) = 0": (
        lambda x: surrogate(x, x.sign(), x.abs() < 1), paper.xnor_activation(TIES), TIES, (),
    ),
    "ttq: the scale's gradient without the minus": (
        ttq_without_the_minus, paper.ttq_weight(NORMAL, 0.5, 2, 0.1), NORMAL, (0.5, 2.0),
    ),
    "hwgq: a tie goes up": (
        lambda x: surrogate(x, (x * 2 + 0.5).floor().clamp(1, 3) / 2 * (x > 0), (x > 0) & (x <= 1.5)),
        paper.hwgq_activation(TIES, np.array([0.5, 1.0, 1.5]), "clipped"), TIES, (),
    ),
    "hwgq: first threshold at half a step": (
        partial(hwgq.quantize_activation_half_step, levels=f64([0.5, 1.0])),
        paper.hwgq_activation(NORMAL, np.array([0.5, 1.0]), "clipped"), NORMAL, (),
    ),
    "dorefa: no gradient through the maximum": (
        dorefa_with_a_fixed_maximum, paper.dorefa_weight(NORMAL, 2), NORMAL, (),
    ),
    "dorefa: gradient stops at 0 and 1": (
        lambda x: surrogate(x, quantize_k(x.clamp(0, 1), 2), (x > 0) & (x < 1)),
        paper.dorefa_activation(TIES, 2), TIES, (),
    ),
    "pact: x = alpha counts for both": (
        lambda x, a: straight_through(torch.minimum(x.clamp(min=0), a), pact.quantize_activation(x, a, 2)),
        paper.pact_activation(TIES, 0.75, 2), TIES, (0.75,),
    ),
    "lsq: the step's gradient is the clip's": (
        lsq_with_the_clips_slope_alone, paper.lsq(NORMAL, 0.5, 2, True), NORMAL, (0.5,),
    ),
    "lsq: the step's gradient is not scaled": (
        partial(lsq.quantize, bits=2, signed=True), paper.lsq(NORMAL, 0.5, 2, True, NORMAL.size), NORMAL, (0.5,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_rejects_known_wrong_implementations(mutant: str) -> None:
    function, want, x, scales = MUTANTS[mutant]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(function, want, x, *scales)
