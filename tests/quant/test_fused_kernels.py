"""The fused form of every quantizer against its plain definition: equal values, gradients to a
millionth.
"""

import math

import pytest
import torch
from conftest import tiered
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.config import compose, registry
from qbench.methods import apot, dorefa, gupta, hwgq, lsq, pact, uniform, xnor
from qbench.models import resnet
from qbench.quant import fused_kernels, ops
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.probe import Probe

MODES = ("recompute", "keep", "codes")
METHODS = [name for name in registry.names("method") if name not in ("float",)]


def edge_cases(levels: int = 4) -> Tensor:
    """Return activations that include ties, ends, borders of cells and zeros of both signs, in
    channels_last.
    """
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5) * 1.5
    flat = x.view(-1)
    for i, n in enumerate((1, 2, 3, 7, 15)):
        special = torch.arange(-2 * n, 2 * n + 1) / (2 * n)
        flat[60 * i : 60 * i + len(special)] = special
    flat[300:304] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    flat[304:308] = torch.tensor([math.nextafter(1, 2), math.nextafter(1, 0), 1e-40, -1e-40])
    return x.to(memory_format=torch.channels_last)


def all_forms(function, x: Tensor, *learned: Tensor) -> list[list[Tensor]]:
    """Return value and gradients with `recompute`, `keep` and `codes`, and of the plain definition."""
    torch.manual_seed(1)
    upstream, results = torch.randn_like(x), []
    for context in (*map(ops.activation_memory, MODES), ops.reference_kernels()):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *learned)]
        with context:
            y = function(*leaves)
            y.backward(upstream)
        results.append([y.detach(), *[leaf.grad for leaf in leaves]])
    return results


T = torch.tensor
ACTIVATIONS = {
    **{f"dorefa {b}": (lambda x, b=b: dorefa.quantize_activation(x, b), ()) for b in (1, 2, 3, 4, 8, 16)},
    **{f"dorefa abs {b}": (lambda x, b=b: dorefa.quantize_activation_abs(x, b), ()) for b in (1, 3, 8)},
    **{f"pact {b}": (lambda x, a, b=b: pact.quantize_activation(x, a, b), (T(0.7),)) for b in (1, 2, 4, 8, 16)},
    "pact, alpha 1": (lambda x, a: pact.quantize_activation(x, a, 2), (T(1.0),)),
    **{
        f"lsq {b} {signed}": (lambda x, s, b=b, signed=signed: lsq.quantize(x, s, b, signed), (T(step),))
        for b, signed, step in ((1, False, 1.0), (2, False, 0.5), (2, True, 0.5), (4, True, 0.21), (8, False, 0.01))
    },
    **{
        f"uniform {b}": (lambda x, b=b: uniform.quantize_activation(x, T(-0.4), T(1.3), b), ())
        for b in (1, 2, 4, 8, 16)
    },
    **{f"apot {b}": (lambda x, a, b=b: apot.quantize_activation(x, a, b), (T(0.7),)) for b in (2, 3, 4, 5)},
    "xnor": (xnor.binarize_activation, ()),
    **{
        f"hwgq {b} {u} {how}": (
            lambda x, b=b, u=u, how=how: hwgq.quantize_activation(x, hwgq.half_wave_levels(b, u), how),
            (),
        )
        for b in (1, 2, 4, 6)
        for u in (True, False)
        for how in hwgq.BACKWARDS
    },
    **{
        f"hwgq half step {how}": (
            lambda x, how=how: hwgq.quantize_activation_half_step(x, T([0.5, 1.0, 1.5]), how),
            (),
        )
        for how in hwgq.BACKWARDS
    },
    "gupta": (lambda x: gupta.to_fixed(x, 1, 3, "nearest"), ()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_in_all_forms(name: str, dtype: torch.dtype) -> None:
    function, learned = ACTIVATIONS[name]
    *modes, plain = all_forms(function, edge_cases().to(dtype), *[t.to(dtype) for t in learned])
    for other in modes:
        assert torch.equal(other[0], plain[0])
        assert other[0].stride() == plain[0].stride()
        for mine, theirs in zip(other[1:], plain[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
            if mine.dim():
                assert torch.equal(mine == 0, theirs == 0)  # the masks are the same, ends included
    for other in modes[1:]:
        assert all(map(torch.equal, modes[0], other))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ops.HALF, ids=str)
def test_half_precision_gives_the_results_of_float32(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of the plain definition in float32, rounded once."""
    monkeypatch.setattr(ops, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(ops, "HALF_BLOCK", 100)
    function, learned = ACTIVATIONS[name]
    x = edge_cases().to(dtype)
    upstream = torch.randn_like(x)
    leaves = [x.float().requires_grad_(), *[t.clone().requires_grad_() for t in learned]]
    with ops.reference_kernels():
        expected = function(*leaves)
        expected.backward(upstream.float())
    for mode in MODES:
        halves = [x.clone().requires_grad_(), *[t.clone().requires_grad_() for t in learned]]
        with ops.activation_memory(mode):
            y = function(*halves)
            y.backward(upstream)
        for result in (y, *([y.recompute()] if hasattr(y, "recompute") else [])):
            assert (result.dtype, result.stride()) == (dtype, x.stride())
            assert torch.equal(result, expected.to(dtype))
        for mine, theirs in zip(halves, leaves, strict=True):
            same = theirs.grad.to(mine.dtype)
            torch.testing.assert_close(mine.grad, same, rtol=1e-6, atol=1e-6 * float(same.abs().max()))


def test_half_precision_saves_half_precision() -> None:
    """The backward pass needs two bytes for each element, or one byte with `codes`."""
    for mode, size in (("recompute", 2), ("codes", 1)):
        sizes: list[int] = []

        def keep(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.element_size())
            return t

        with ops.activation_memory(mode), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            dorefa.quantize_activation(edge_cases().bfloat16().requires_grad_(), 2)
        assert sizes == [size]


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("w", [torch.randn(7, 5, 3, 3), torch.zeros(3, 2), T([0.5, -0.5, 0.1]), T([-2.0])])
def test_dorefa_weights(bits: int, w: Tensor) -> None:
    fused, *_, plain = all_forms(lambda w: dorefa.quantize_weight(w, bits), w)
    assert torch.equal(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-5, atol=1e-6)


def trained_step(name: str, context) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of a small network under a method, after `prepare` and the first
    `on_epoch`.
    """
    (config,) = compose.configurations([f"method={name}"])
    from qbench.experiment.builders import build_method

    method = build_method(config.method, config.activation, config.bits.resolved())
    torch.manual_seed(0)
    norm = method.requires.norm or "affine"
    model = install(method, resnet.build((3, 8, 8), 4, depth=8, width=4, norm=norm), example=torch.zeros(1, 3, 8, 8))
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    labels = torch.arange(8) % 4
    probe = Probe([(images, labels)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    if method.on_epoch:
        method.on_epoch(model, 0, 4, probe)
    torch.manual_seed(2)
    with context:
        logits = model.train()(images)
        F.cross_entropy(logits, labels).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", tiered(METHODS, ["dorefa", "gupta", "lsq", "xnor"]))
def test_networks_in_all_forms(name: str) -> None:
    logits, grads = trained_step(name, ops.activation_memory("recompute"))
    for context in (ops.activation_memory("keep"), ops.activation_memory("codes"), ops.reference_kernels()):
        others, theirs = trained_step(name, context)
        assert torch.equal(logits, others)
        assert grads.keys() == theirs.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=1e-6 * float(theirs[key].abs().max() + 1))


def network(method: Method | None = None) -> nn.Module:
    """Return a ResNet-20 whose activations outweigh everything else, with a method or without, in
    channels_last.
    """
    torch.manual_seed(0)
    model = resnet.build((3, 16, 16), 10, depth=20, width=4)
    if method is not None:
        install(method, model, example=torch.zeros(1, 3, 16, 16))
    return model.to(memory_format=torch.channels_last)


IMAGES = torch.randn(64, 3, 16, 16).to(memory_format=torch.channels_last)


def alive(model: nn.Module) -> int:
    """Return the bytes that are still allocated after a forward pass."""
    model(IMAGES)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logits = model(IMAGES)
    del logits
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def saved(model: nn.Module) -> int:
    """Return the bytes of the distinct storages that saved_tensors_hooks see."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(IMAGES)
    return sum(storages.values())


@pytest.mark.parametrize(
    "build", tiered([dorefa.build, pact.build, xnor.build, hwgq.build, lsq.build], [dorefa.build, lsq.build])
)
def test_memory_for_backward_is_about_that_of_float(build, monkeypatch) -> None:
    monkeypatch.setattr(ops, "FEW_ELEMENTS", 0)
    method = build() if build in (xnor.build, hwgq.build) else build(w=2, a=2)
    float_model, model = network(), network(method)
    assert alive(model) <= 1.05 * alive(float_model)
    assert saved(model) <= 1.05 * saved(float_model)
    with ops.reference_kernels():
        assert alive(model) > 1.1 * alive(float_model), "the plain definition needs more"
    if "cells_input" in method.traits:
        with ops.activation_memory("codes"):
            assert saved(model) <= 0.65 * saved(float_model)
            assert alive(model) <= 0.68 * alive(float_model)


def test_small_results_are_saved_and_not_computed_again(monkeypatch) -> None:
    monkeypatch.setattr(ops, "FEW_ELEMENTS", 100)
    for mode, count, recomputed in (("recompute", 99, False), ("recompute", 100, True), ("codes", 99, True)):
        with ops.activation_memory(mode):
            x = torch.rand(count, requires_grad=True)
            assert hasattr(dorefa.quantize_activation(x, 2), "recompute") is recomputed


class CountPasses(TorchDispatchMode):
    """Counts operations that make or change tensors of at least `size` elements, and bool tensors
    among them.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.passes, self.masks = size, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.size and function not in VIEWS:
            self.passes += 1
            self.masks += result.dtype == torch.bool
        return result


VIEWS = {torch.ops.aten.detach.default, torch.ops.aten.view.default, torch.ops.aten.alias.default}


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (lambda x: dorefa.quantize_activation(x, 2), 4 + 1),
        (lambda x: xnor.binarize_activation(x), 4 + 1),
        (lambda x: pact.quantize_activation(x, T(1.0), 2), 7 + 2),
        (lambda x: lsq.quantize(x, T(0.3), 2, False), 4 + 8),
    ],
)
def test_passes_over_the_activations(function, passes: int) -> None:
    x = torch.randn(4096, requires_grad=True)
    with CountPasses(4096) as count:
        function(x).backward(torch.ones(4096))
    assert count.passes - 1 <= passes, "one more accumulates x.grad"
    assert count.masks == 0


def test_a_result_read_outside_the_layers_has_the_same_gradients() -> None:
    """A network that calls the public functions itself gets the gradients of the quantized layers."""
    x, w = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    F.conv2d(dorefa.quantize_activation(x, 2), w).square().sum().backward()
    expected = x.grad, w.grad
    x.grad = w.grad = None
    quantized = dorefa.quantize_activation(x, 2)
    with ops.recompute_in_backward(quantized):
        y = F.conv2d(quantized, w)
    del quantized
    y.square().sum().backward()
    assert torch.equal(expected[0], x.grad)
    assert torch.equal(expected[1], w.grad)


def test_changing_a_scale_before_backward_is_an_error() -> None:
    """Optimizers write to parameters in place: backward must recompute what forward computed."""
    step, x = T(0.5, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    w = torch.randn(4, 3, requires_grad=True)
    quantized = lsq.quantize(x, step, 2, True)
    with ops.recompute_in_backward(quantized):
        y = F.linear(quantized, w)
    with torch.no_grad():
        step.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("threads", [1, 2])
def test_draws_do_not_depend_on_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    draws = fused_kernels.uniform(torch.empty(300_001))
    assert draws.double().mul(2**24).frac().eq(0).all()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 5 * (1 / 12 / 300_001) ** 0.5
    assert (draws[[0, 1, -1]] * 2**24).tolist() == [6816874, 14401642, 3095658]


def test_draws_are_uniform_and_uncorrelated() -> None:
    """Over 4,000 tensors: each element uniform, no two correlated, nor four in the corners of a
    rectangle.
    """
    seeds, count = 4000, 300
    sources = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    draws = torch.stack([fused_kernels.uniform_16(count, torch.empty(0), source) for source in sources])
    assert draws.dtype == torch.int16
    assert len({tuple(row) for row in draws.tolist()}) == seeds
    for bit in range(16):
        share = (draws >> bit & 1).double().mean(0)
        assert (share - 0.5).abs().max() < 5.5 * 0.5 / seeds**0.5, f"bit {bit}"
    unit = (draws.double() + 0.5) / (2**15 * 3**-0.5)  # variance 1
    correlation = unit.T @ unit / seeds
    assert (correlation.diagonal() - 1).abs().max() < 5.5 * 0.8**0.5 / seeds**0.5
    assert correlation.fill_diagonal_(0).abs().max() < 5.5 / seeds**0.5, "some two, of 44,850 pairs"
    grid = unit[:, : 8 * 9 * 4].reshape(seeds, 8, 9, 4)  # of 75 words 8 full rows of 9, each word four numbers
    for column in range(1, 9):
        corners = grid[:, :-1, 0] * grid[:, :-1, column] * grid[:, 1:, 0] * grid[:, 1:, column]
        assert corners.mean((0, 1)).abs().max() < 6 / (seeds * 7) ** 0.5 + 0.004, f"column {column}"


@pytest.mark.parametrize("x", [0.0, 3.0, 0.25, -0.75, 2**-18, 1 - 2**-18, 1000.5])
def test_stochastic_rounding_has_no_bias(x: float) -> None:
    torch.manual_seed(0)
    calls = [fused_kernels.stochastic_round(torch.full((2**16,), x)) for _ in range(40)]
    rounded = torch.stack(calls).double()
    assert set(rounded.unique().tolist()) <= {math.floor(x), math.floor(x) + 1.0}
    p, n = x - math.floor(x), rounded.numel()
    assert abs(float(rounded.mean()) - x) <= 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch itself
@pytest.mark.parametrize("method", tiered(["dorefa", "lsq"], []))
def test_torch_compile_captures_the_whole_network(method: str) -> None:
    """Nothing in the layers breaks the graph of torch.compile."""
    build = {"dorefa": dorefa.build, "lsq": lsq.build}[method]
    model = resnet.build((3, 8, 8), 4, depth=8, width=4)
    install(build(w=2, a=2), model, example=torch.zeros(1, 3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    model(images)  # LSQ's steps start from the first batch
    eager = model(images)
    captured = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(captured, eager)
