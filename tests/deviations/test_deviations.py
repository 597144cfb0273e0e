"""Test the known deviations: each does what its description says, and a check of the paper's rule rejects it.

A case observes an installed method: values, gradients, or the masks and scales that a quantizer ends with. The
observation is compared with the result of the paper's equations and with that of the described flaw. Both are computed
in NumPy or by hand.
"""

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from qbench.bits import FLOAT
from qbench.config import registry
from qbench.config.fields import parse_bits
from qbench.config.identity import digest
from qbench.deviations.registry import deviate, deviations
from qbench.methods import dorefa, hwgq, inq, lsq, ttq, xnor
from qbench.models import mlp
from qbench.quant.install import install
from qbench.quant.layers import QLinear, effective_weight, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.verify import verify
from qbench.runs.reader import dump_records, read
from qbench.runs.result import Accuracy, Evaluation, Protocol, Result, store_result

METHODS = {"dorefa": dorefa, "xnor": xnor, "hwgq": hwgq, "ttq": ttq, "inq": inq, "lsq": lsq}
ALL = [(method, name) for method in METHODS for name in deviations(method)]

Observed = tuple[Any, ...]
Observe = Callable[[Method], Observed]

W = np.array([[0.5, -0.25, 0.1, 0.0], [-1.0, 0.7, -0.6, 0.3], [0.05, -0.1, 0.9, -0.8], [0.2, -0.15, 0.4, -0.35]])
X = np.array([[-1.5, -1.0, -0.3, 0.05], [0.2, 0.26, 0.4, 0.55], [0.8, 1.0, 1.3, 2.0], [0.0, 4.0, 7.0, -0.01]])
G = np.arange(1, 17).reshape(4, 4) / 8
T, TOP = np.tanh(W), np.tanh(1.0)


def installed(method: Method, weight: np.ndarray = W) -> tuple[nn.Module, QLinear]:
    """Install a method in a float64 perceptron; its only quantized layer has the given weights."""
    torch.manual_seed(0)
    model = mlp.build((1, 1, len(weight)), 3, hidden=2, width=len(weight)).double()
    model.get_submodule("fc2").weight.data.copy_(torch.from_numpy(weight))
    (layer,) = quantized_layers(install(method, model)).values()
    assert isinstance(layer, QLinear)
    return model, layer


def output_and_gradient(site: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of a quantizer for x, and the gradient of x for the upstream gradient G."""
    leaf = x.detach().clone().requires_grad_()
    out = site(leaf)
    out.backward(torch.from_numpy(G).to(out))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def weights(method: Method) -> Observed:
    """Return values, the gradient of the weights, and the gradients of the quantizer's parameters."""
    _, layer = installed(method)
    observed = output_and_gradient(layer.weight_q, layer.weight)
    return (*observed, *(p.grad for p in layer.weight_q.parameters()))


def activations(method: Method) -> Observed:
    _, layer = installed(method)
    return output_and_gradient(layer.input_q, torch.from_numpy(X))


def gradients(d: np.ndarray) -> Observe:
    """Return an observation of the gradient d (samples, features) passed back through a layer with identity weights."""

    def observe(method: Method) -> Observed:
        _, layer = installed(method, np.eye(d.shape[1]))
        x = torch.zeros(d.shape, dtype=torch.float64, requires_grad=True)
        layer(x).backward(torch.from_numpy(d))
        return (x.grad,)

    return observe


def reduced(observe: Observe, reduce: Callable[[np.ndarray], Any]) -> Observe:
    return lambda method: (reduce(np.asarray(observe(method)[0])),)


def after_step(rate: float) -> Observe:
    """Return an observation of the weights, and of the quantizer's parameters, after a step of SGD."""

    def observe(method: Method) -> Observed:
        model, layer = installed(method)
        layer.weight_q(layer.weight).backward(torch.from_numpy(G))
        optimizer = torch.optim.SGD(layer.parameters(), lr=abs(rate), maximize=rate < 0)
        (method.step or (lambda model, optimizer: optimizer.step()))(model, optimizer)
        return (layer.weight.detach(), *(p.detach() for p in layer.weight_q.parameters()))

    return observe


def masks(change: Callable[[np.ndarray, np.ndarray], np.ndarray], epochs: int) -> Observe:
    """Return an observation of INQ's mask, effective and latent weights after some epochs.

    `change` replaces the training between epochs.
    """

    def observe(method: Method) -> Observed:
        model, layer = installed(method)
        assert method.on_epoch is not None
        for epoch in range(epochs):
            if epoch:
                new = change(layer.weight.detach().numpy(), layer.weight_q.frozen.numpy())
                layer.weight.data.copy_(torch.from_numpy(new))
            method.on_epoch(model, epoch, 4, None)  # type: ignore[arg-type]
        return layer.weight_q.frozen, effective_weight(layer), layer.weight.detach()

    return observe


class Case(NamedTuple):
    """How to build the method, what to observe, and what paper and flaw give there."""

    method: str
    name: str
    options: dict[str, Any]
    observe: Observe
    paper: Observed
    flaw: Observed


def dorefa_weights(k: int) -> Observed:
    return oracle.weight_forward(W, k), oracle.weight_backward(W, G, k)


def dorefa_activations(k: int) -> Observed:
    return oracle.activation_forward(X, k), oracle.activation_backward(X, G, oracle.clip_slope)


SQUASHED = np.tanh(np.maximum(X, 0))
PLAIN = (1 - T**2) * G
E = np.abs(W).mean()
ONE_LARGE = np.concatenate([np.ones((400, 1)), np.full((400, 7), 0.1)], 1)
TWO_SCALES = np.concatenate([ONE_LARGE[:1], ONE_LARGE[:1] / 100])
ZERO_SAMPLE = np.concatenate([np.zeros((1, 8)), ONE_LARGE[:1] * 0])
ZERO_SAMPLE[1, 0] = 1.0

DOREFA = [
    Case("dorefa", "detached_max", {"w": 2}, weights, dorefa_weights(2), (oracle.weight_forward(W, 2), PLAIN / TOP)),
    Case("dorefa", "rescaled_by_max", {"w": 3}, weights, dorefa_weights(3), (TOP * oracle.weight_forward(W, 3), PLAIN)),
    Case("dorefa", "no_tanh_gradient", {"w": 2}, weights, dorefa_weights(2), (oracle.weight_forward(W, 2), G)),
    Case("dorefa", "sign_of_zero", {"w": 1}, weights, dorefa_weights(1), (E * np.sign(W), G)),
    Case(
        "dorefa", "unit_weights", {"w": 1}, weights, dorefa_weights(1),
        (np.where(W >= 0, 1.0, -1.0), oracle.weight_backward(W, G, 2)),
    ),
    Case(
        "dorefa", "tanh_activation", {"w": 32, "a": 2}, activations, dorefa_activations(2),
        (np.round(3 * SQUASHED / SQUASHED.max()) / 3, G * (X >= 0) * (1 - SQUASHED**2) / SQUASHED.max()),
    ),
    Case(
        "dorefa", "tenth_of_activation", {"w": 32, "a": 3}, activations, dorefa_activations(3),
        (np.round(7 * np.clip(X / 10, 0, 1)) / 7, G * (X >= 0) / 10),
    ),
    Case(
        "dorefa", "sign_activation", {"w": 32, "a": 1}, activations, dorefa_activations(1),
        (np.where(X > 0, 1.0, 0.0), dorefa_activations(1)[1]),
    ),
    Case(  # 0.1 is between -1/3 and 1/3 and goes up in 65 of 100 draws: all seven agree in one sample of twenty
        "dorefa", "noise_per_sample", {"w": 32, "g": 2},
        reduced(gradients(ONE_LARGE), lambda q: np.mean(np.ptp(q[:, 1:], axis=1) == 0) > 0.5), (False,), (True,),
    ),
    Case(
        "dorefa", "max_per_tensor", {"w": 32, "g": 2},
        reduced(gradients(TWO_SCALES), lambda q: np.abs(q[1]).max()), (0.01,), (1 / 3,),
    ),
    Case(
        "dorefa", "no_noise", {"w": 32, "g": 2},
        reduced(gradients(ONE_LARGE), lambda q: np.unique(q[:, 1:].round(6))), (np.array([-1, 1]) / 3,), ([1 / 3],),
    ),
    Case(
        "dorefa", "nan_on_zero", {"w": 32, "g": 2},
        reduced(gradients(ZERO_SAMPLE), lambda q: (q[0].tolist(), q[1, 0])),
        (([0.0] * 8, 1.0),), (([np.nan] * 8, 1.0),),
    ),
]  # fmt: skip

ALPHA = np.abs(W).mean(1, keepdims=True)
SIGNS = np.where(W >= 0, 1.0, -1.0)
XNOR_WEIGHTS = (ALPHA * SIGNS, G * (ALPHA + 1 / 4))  # no weight is beyond 1
XNOR_INPUTS = (np.where(X >= 0, 1.0, -1.0), G * (np.abs(X) < 1))
XNOR = [
    Case(
        "xnor", "sign_of_zero", {}, lambda method: (*weights(method), *activations(method)),
        (*XNOR_WEIGHTS, *XNOR_INPUTS), (ALPHA * np.sign(W), XNOR_WEIGHTS[1], np.sign(X), XNOR_INPUTS[1]),
    ),
    Case(
        "xnor", "printed_weight_gradient", {}, weights, XNOR_WEIGHTS, (XNOR_WEIGHTS[0], G * (ALPHA * W + 1 / 4)),
    ),
    Case(
        "xnor", "printed_activation_gradient", {}, activations, XNOR_INPUTS,
        (XNOR_INPUTS[0], G * X * (np.abs(X) <= 1)),
    ),
    Case(
        "xnor", "times_1e9", {}, after_step(1e-9), (W - 1e-9 * XNOR_WEIGHTS[1],), (W - XNOR_WEIGHTS[1],),
    ),
]  # fmt: skip

STEP = 0.538812  # optimal for the first threshold at 0
HWGQ = [
    Case(
        "hwgq", "old_constants", {"a": 2}, activations,
        (np.where(X > 0, np.clip(np.ceil(X / STEP - 0.5), 1, 3), 0) * STEP, G * (X > 0) * (X <= 3 * STEP)),
        (np.clip(np.round(X / 0.538), 0, 3) * 0.538, G * (X > 0) * (X <= 3 * 0.538)),
    ),
    Case("hwgq", "affine_norm", {}, lambda method: (method.requires.norm,), ("no_affine",), ("affine",)),
    Case("hwgq", "no_alpha", {}, weights, (ALPHA * SIGNS, G), (SIGNS, G)),
]  # fmt: skip

# TTQ with threshold 0.1 max|w| = 0.1: ties at 0.1 and -0.1; scales start at the means of their zones.
ABOVE, BELOW = W > 0.1, W < -0.1
P, N = W[ABOVE].mean(), -W[BELOW].mean()
ZONE = np.where(ABOVE, P, np.where(BELOW, N, 1.0))
TERNARY, D_P, D_N = np.where(ABOVE, P, np.where(BELOW, -N, 0.0)), G[ABOVE].sum(), -G[BELOW].sum()
TTQ_PAPER = (TERNARY, G * ZONE, D_P, D_N)
TTQ = [
    Case("ttq", "missing_minus", {"t": 0.1}, weights, TTQ_PAPER, (TERNARY, G * ZONE, D_P, -D_N)),
    Case("ttq", "mean_gradient", {"t": 0.1}, weights, TTQ_PAPER, (TERNARY, G * ZONE, D_P / 16, D_N / 16)),
    Case(
        "ttq", "unclamped_scales", {"t": 0.1}, after_step(1),
        (W - G * ZONE, 1e-8, N - D_N), (W - G * ZONE, P - D_P, N - D_N),
    ),
    Case(
        "ttq", "unscaled_ties", {"t": 0.1}, weights, TTQ_PAPER,
        (np.where(np.abs(W) == 0.1, np.sign(W), TERNARY), G * ZONE, D_P, D_N),
    ),
    Case("ttq", "weights_for_gradient", {"t": 0.1}, weights, TTQ_PAPER, (TERNARY, W * ZONE, D_P, D_N)),
]  # fmt: skip


# INQ with 3 bits: max|w| = 1, n1 = floor(log2(4/3)) = 0, levels 0, +-0.5, +-1.
def level(w: np.ndarray) -> np.ndarray:
    magnitude = np.select([np.abs(w) >= 0.75, np.abs(w) >= 0.25], [1.0, 0.5], 0.0)
    return np.sign(w) * magnitude


def highest(score: np.ndarray, count: int) -> np.ndarray:
    """Return the mask of the highest scores; ties go to the lower index."""
    mask = np.zeros(score.size, bool)
    mask[np.argsort(-score.ravel(), kind="stable")[:count]] = True
    return mask.reshape(score.shape)


def grown(w: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    """Return the weights with the free ones ten times as large, as if by training."""
    return np.where(frozen, w, 10 * w)


FIRST, LAST = highest(np.abs(W), 8), highest(-np.abs(W), 8)
FREE = np.where(FIRST, level(W), 10 * W)  # effective weights before the second portion
SECOND, REMADE = FIRST | highest(np.where(FIRST, -1, np.abs(FREE)), 4), highest(np.abs(FREE), 12)
INQ = [
    Case(
        "inq", "smallest_first", {"w": 3}, masks(grown, 1),
        (FIRST, np.where(FIRST, level(W), W), W), (LAST, np.where(LAST, level(W), W), W),
    ),
    Case(
        "inq", "outlier_to_zero", {"w": 3}, masks(grown, 2),
        (SECOND, np.where(FIRST, level(W), np.where(SECOND, level(10 * W), 10 * W)), np.where(FIRST, W, 10 * W)),
        (
            SECOND, np.where(FIRST, level(W), np.where(SECOND, level(10 * W) * (np.abs(10 * W) < 1.5), 10 * W)),
            np.where(FIRST, W, 10 * W),
        ),
    ),
    Case(
        "inq", "remade_masks", {"w": 3}, masks(grown, 2),
        (SECOND, np.where(SECOND, level(FREE), FREE), np.where(FIRST, W, 10 * W)),
        (REMADE, np.where(REMADE, level(FREE), FREE), np.where(FIRST & REMADE, W, FREE)),
    ),
]  # fmt: skip

# LSQ with 2 bits: levels from -2 to 1 steps, step 2 mean|w|; the same for inputs with negative values.
S, S_X = 2 * np.abs(W).mean(), 2 * np.abs(X).mean()


def lsq_paper(v: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return values, where the gradient passes, and the step's gradient by eq. 1-3 (unscaled)."""
    r = v / s
    slope = np.where(r <= -2, -2, np.where(r >= 1, 1, np.round(r) - r))
    return np.clip(np.round(r), -2, 1) * s, (r > -2) & (r < 1), float((G * slope).sum())


LSQ_W, LSQ_X = lsq_paper(W, S), lsq_paper(X, S_X)
LSQ = [
    Case(
        "lsq", "unmasked_gradient", {"w": 2, "a": 2}, lambda method: (*weights(method), *activations(method)),
        (LSQ_W[0], G * LSQ_W[1], LSQ_W[2] / 16**0.5, LSQ_X[0], G * LSQ_X[1]),
        (LSQ_W[0], G, LSQ_W[2] / 16**0.5, LSQ_X[0], G),
    ),
    Case(
        "lsq", "unclamped_step", {"w": 2, "a": 2}, after_step(8),
        (W - 8 * G * LSQ_W[1], 1e-8), (W - 8 * G * LSQ_W[1], S - 8 * LSQ_W[2] / 16**0.5),
    ),
]  # fmt: skip

CASES = [*DOREFA, *XNOR, *HWGQ, *TTQ, *INQ, *LSQ]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.name}")
every_deviation = pytest.mark.parametrize(("method", "name"), ALL)


def check(case: Case, method: Method, expected: Observed) -> None:
    """Assert that the observation of a method is the expected one."""
    torch.manual_seed(1)
    observed = case.observe(method)
    assert len(observed) == len(expected)
    for got, want in zip(observed, expected, strict=True):
        if isinstance(want, str):
            assert got == want
            continue
        for one, other in zip(_flat(got), _flat(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-9)


def _flat(x: Any) -> list[Any]:
    return [np.asarray(part, dtype=float) for part in x] if isinstance(x, tuple) else [np.asarray(x, dtype=float)]


def test_every_deviation_has_a_case() -> None:
    assert sorted(ALL) == sorted((case.method, case.name) for case in CASES)
    assert len(ALL) >= 14


@every_case
def test_the_method_follows_the_paper_and_the_deviation_does_not(case: Case) -> None:
    method = METHODS[case.method].build(**case.options)
    check(case, method, case.paper)
    with pytest.raises(AssertionError):
        check(case, deviate(case.method, case.name, method), case.paper)


@every_case
def test_the_deviation_is_the_described_one(case: Case) -> None:
    method = METHODS[case.method].build(**case.options)
    check(case, deviate(case.method, case.name, method), case.flaw)
    with pytest.raises(AssertionError):
        check(case, method, case.flaw)


# The registry


def at_widths(method: str, bits: str, **options: Any) -> Method:
    """Build a method at the widths that it quantizes."""
    given = {key: width for key, width in parse_bits(bits).items() if width is not None}
    return METHODS[method].build(**given, **options)  # type: ignore[no-any-return]


@every_deviation
def test_the_registry_entry_of_every_deviation(method: str, name: str) -> None:
    known = deviations(method)[name]
    assert name.isidentifier()
    assert known.what.endswith(".")
    assert "/" in known.source or "tensorpack" in known.source or "the paper" in known.source or "eq." in known.source
    faithful = at_widths(method, known.bits)
    faithful.check(faithful.bits)
    deviating = deviate(method, name, faithful)
    assert deviating is not faithful
    assert (deviating.name, deviating.bits, deviating.supported_bits) == (
        faithful.name,
        faithful.bits,
        faithful.supported_bits,
    )
    with pytest.raises(Unsupported, match=f"deviation={name} has no effect at bits=w32a32g32; try bits={known.bits}"):
        deviate(method, name, replace(faithful, bits=type(faithful.bits)()))


def test_the_name_none_gives_the_method_itself_and_unknown_names_raise() -> None:
    method = dorefa.build()
    assert deviate("dorefa", "none", method) is method
    assert deviate("bwn", "none", method) is method
    assert deviations("bwn") == deviations("my.module:build") == {}
    with pytest.raises(ValueError, match="deviation=detached: must be one of none, detached_max, rescaled_by_max"):
        deviate("dorefa", "detached", method)
    with pytest.raises(ValueError, match=r"deviation=detached_max: must be one of none$"):
        deviate("bwn", "detached_max", method)


@pytest.mark.parametrize(
    ("method", "name", "bits"),
    [("dorefa", "noise_per_sample", "w2a2"), ("dorefa", "sign_of_zero", "w2"), ("dorefa", "detached_max", "w1a2"),
     ("dorefa", "sign_activation", "w1a2"), ("xnor", "printed_weight_gradient", "w32a1"), ("hwgq", "no_alpha", "w32a2"),
     ("hwgq", "old_constants", "w1a5")],
)  # fmt: skip
def test_a_deviation_without_effect_is_unsupported(method: str, name: str, bits: str) -> None:
    with pytest.raises(Unsupported, match="has no effect"):
        deviate(method, name, at_widths(method, bits))


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [("dorefa", "tanh_activation", {"a": 2, "activation": "abs"}), ("hwgq", "old_constants", {"levels": "optimal"}),
     ("hwgq", "old_constants", {"threshold": "half_step"}),
     ("xnor", "printed_weight_gradient", {"gradient": "authors"})],
)  # fmt: skip
def test_a_deviation_that_conflicts_with_an_option_is_unsupported(
    method: str, name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(Unsupported, match=f"deviation={name} .*method[.]"):
        installed(deviate(method, name, METHODS[method].build(**options)))


@pytest.mark.parametrize("name", ["smallest_first", "remade_masks"])
def test_the_deviations_of_inqs_order_need_the_partition_largest(name: str) -> None:
    with pytest.raises(Unsupported, match=f"deviation={name} needs method.partition=largest"):
        masks(grown, 1)(deviate("inq", name, inq.build(partition="random")))


def test_the_options_of_the_method_keep_their_effect() -> None:
    sparse = deviate("ttq", "missing_minus", ttq.build(threshold="sparsity", t=0.5, initial="one", decay=1e-3))
    _, layer = installed(sparse)
    assert (effective_weight(layer) == 0).sum() == 8
    assert layer.weight_q.positive == 1
    assert layer.weight_q.weight_decay == 1e-3
    authors = {
        name: weights(deviate("xnor", name, xnor.build(gradient="authors")))[1] for name in ("none", "sign_of_zero")
    }
    assert torch.equal(authors["none"], authors["sign_of_zero"])
    assert not torch.equal(authors["none"], weights(xnor.build())[1])
    vanilla = activations(deviate("hwgq", "old_constants", hwgq.build(backward="vanilla")))[1]
    assert np.array_equal(vanilla, G * (X > 0))
    third = masks(grown, 1)(deviate("inq", "outlier_to_zero", inq.build(portions=[0.25, 0.5, 1.0])))[0]
    assert third.sum() == 4


@pytest.mark.parametrize(("method", "name"), [(m, n) for m, n in ALL if m in ("ttq", "lsq") and "unclamped" not in n])
def test_the_learned_scales_stay_positive_in_other_deviations(method: str, name: str) -> None:
    for rate in (1e6, -1e6):
        scales = after_step(rate)(deviate(method, name, METHODS[method].build()))[1:]
        assert all(scale >= 0.9e-8 for scale in scales), scales


@every_deviation
def test_the_declared_levels_hold_after_training(method: str, name: str) -> None:
    """Trains a perceptron for three epochs, then sets weights to zero and to thresholds, and scales below zero."""
    deviating = deviate(method, name, at_widths(method, deviations(method)[name].bits))
    torch.manual_seed(0)
    norm = deviating.requires.norm or "affine"
    model = install(deviating, mlp.build((1, 4, 4), 3, hidden=3, width=16, norm=norm))
    x, y = torch.randn(32, 1, 4, 4), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-11 if name == "times_1e9" else 0.02, momentum=0.9)
    step = deviating.step or (lambda model, optimizer: optimizer.step())
    for epoch in range(3):
        if deviating.on_epoch:
            deviating.on_epoch(model, epoch, 3, None)  # type: ignore[arg-type]
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step(model, optimizer)
    for layer in quantized_layers(model).values():
        layer.weight.data[0, :3] = torch.tensor([0.0, -0.0, 0.5])
        if isinstance(layer.weight_q, ttq.TTQWeight):
            layer.weight.data[1, 0] = layer.weight_q.delta(layer.weight)
        if name.startswith("unclamped"):
            next(layer.weight_q.parameters()).data.neg_()
        loose = [k for site in (layer.weight_q, layer.input_q, layer.output_q) for k, v in vars(site).items()
                 if isinstance(v, Tensor)]  # fmt: skip
        assert not loose
        if layer.bits.w < FLOAT:
            layer.weight_q.bytes(layer.weight)
    counts = verify(model.eval(), x)
    assert all(1 <= count.found <= count.allowed for layer in counts.values() for count in layer.values())


# The table of accuracy differences


def load_script() -> ModuleType:
    path = str(ROOT / "scripts" / "deviations.py")
    loader = importlib.machinery.SourceFileLoader("deviations_script", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    previous, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = previous
    return module


def store(root: Path, method: str, bits: str, deviation: str, seed: int, top1: float | None, **changed: Any) -> None:
    """Write the result of a run; a run without top-1 has diverged."""
    path = root / f"{method}-{bits}-{deviation}-{seed}-{changed.get('protocol', '')}"
    done = top1 is not None
    accuracy = Accuracy(top1=top1, top5=100.0, loss=1.0) if top1 is not None else None
    final = Evaluation(test=accuracy, val=accuracy) if accuracy else None
    keys = changed.get("protocol", {})
    result = Result(
        status="done" if done else "diverged", reason=None if done else "Diverged: the loss is nan\nat step 3",
        method=method, options={} if deviation == "none" else {"deviation": deviation},
        bits={key: width or 32 for key, width in parse_bits(bits).items()},
        seed=seed, dataset="glyphs", model="resnet8",
        protocol=Protocol(hash=digest(keys), keys=keys), final=final, wall_seconds=2.0,
        weights_sha256=changed.get("weights", f"{deviation} {seed}"),
    )  # fmt: skip
    path.mkdir(parents=True)
    store_result(path, result)
    manifest = {"processor": "x86_64", "versions": {"torch": torch.__version__}}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_the_table_of_stored_runs(tmp_path: Path) -> None:
    module = load_script()
    for seed, (faithful, minus, ties) in enumerate([(90.0, 80.0, 90.5), (91.0, 83.0, None), (92.0, 83.0, 91.5)]):
        store(tmp_path, "ttq", "w2", "none", seed, faithful)
        store(tmp_path, "ttq", "w2", "missing_minus", seed, minus)
        store(tmp_path, "ttq", "w2", "unscaled_ties", seed, ties)
        store(tmp_path, "ttq", "w2", "unclamped_scales", seed, faithful, weights=f"none {seed}")
        store(tmp_path, "float", "w32", "none", seed, 95.0)
    store(tmp_path, "ttq", "w2", "missing_minus", 3, 0.0)  # beyond the requested seeds
    table = module.deviations_table(read([str(tmp_path)]), 3)
    rows = {(row[0], row[2]): dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert len(rows) == len(table.rows) - sum(len({d.bits for d in deviations(m).values()}) - 1 for m in METHODS)
    none, minus, ties, mean_gradient = (
        rows["ttq", name] for name in ("none", "missing_minus", "unscaled_ties", "mean_gradient")
    )
    assert (none["top-1 %"], none["points lost"], none["n"], none["source"]) == ("91.00", "-", "3", "-")
    # Differences 10, 8, 9: mean 9, standard error 1/sqrt(3), t for two degrees of freedom 4.3027.
    assert (minus["top-1 %"], minus["points lost"], minus["95 % CI"]) == ("82.00", "+9.00", "+6.52 to +11.48")
    assert minus["source"].startswith("TropComplique")
    assert (minus["n"], minus["not done"]) == ("3", "-")
    # Differences -0.5 and 0.5 in the seeds that ended; the third is counted and named.
    assert (ties["points lost"], ties["n"], ties["not done"]) == ("+0.00", "2", "1 diverged")
    assert rows["ttq", "unclamped_scales"]["95 % CI"] == "-", "a tie has no interval"
    record = tmp_path / "record.json"
    record.write_text(dump_records(read([str(tmp_path)])))
    assert module.deviations_table(read([str(record)]), 3) == table, "the record of the runs gives the same table"
    assert "ttq w2 unscaled_ties, seed 1: diverged: Diverged: the loss is nan" in table.notes
    assert "ttq w2 unclamped_scales had no effect: identical weights in 3 of 3 seeds" in table.notes
    assert rows["ttq", "unclamped_scales"]["p (Holm)"] == "-", "no test where nothing differed"
    # p of 9 / (1 / sqrt(3)) with two degrees of freedom is 0.00408; two rows have one: twice that, by Holm.
    assert minus["p (Holm)"] == "0.0082"
    assert ties["p (Holm)"] == "1"
    assert (mean_gradient["top-1 %"], mean_gradient["n"], mean_gradient["not done"]) == ("-", "0", "3 missing")
    page = module.document(table, ["qbench -m method=ttq"], read([str(tmp_path)]), module.describe_machine(tmp_path))
    assert "    qbench -m method=ttq\n" in page
    assert "16 runs" in page
    assert "add up to 32 s" in page
    assert "| ttq | w2 | missing_minus | 82.00 | +9.00 |" in page


def test_one_seed_gives_no_interval_and_protocols_are_not_mixed(tmp_path: Path) -> None:
    module = load_script()
    store(tmp_path, "ttq", "w2", "none", 0, 90.0)
    store(tmp_path, "ttq", "w2", "missing_minus", 0, 80.0)
    table = module.deviations_table(read([str(tmp_path)]), 1)
    (row,) = (dict(zip(table.head, row, strict=True)) for row in table.rows if row[2] == "missing_minus")
    assert (row["points lost"], row["95 % CI"], row["p (Holm)"], row["n"]) == ("+10.00", "-", "-", "1")
    store(tmp_path, "ttq", "w2", "mean_gradient", 0, 80.0, protocol={"epochs": 3})
    with pytest.raises(SystemExit, match="2 protocols"):
        module.deviations_table(read([str(tmp_path)]), 1)


def test_the_commands_measure_every_deviation_once_and_the_method_itself() -> None:
    module = load_script()
    measured = []
    for words in module.sweep_words(3, ["dataset=glyphs"]):
        keys = dict(word.split("=", 1) for word in words[1:])
        assert (words[0], keys["seed"], keys["dataset"]) == ("-m", "0,1,2", "glyphs")
        names = keys["method.deviation"].split(",")
        assert names[0] == "none"
        measured += [(keys["method"], name) for name in names[1:]]
        method = at_widths(keys["method"], keys["bits"])
        for name in names:
            deviate(keys["method"], name, method)
    assert sorted(measured) == sorted(ALL)


def test_the_deviations_read_without_import_are_those_of_the_code() -> None:
    for method in ("dorefa", "xnor", "ttq", "inq", "hwgq", "lsq", "twn", "nosuch"):
        texts = registry.known_deviations(method)
        assert texts == {name: (d.what, d.source) for name, d in deviations(method).items()}
