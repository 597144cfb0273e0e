"""Test PACT and LSQ against direct transcriptions of their equations, forward and backward."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import Configure

from qbench.experiment.setup import assemble
from qbench.methods import lsq, pact
from qbench.models import mlp
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.ops import reference_kernels
from qbench.quant.probe import Probe

GRID = torch.arange(-48, 49, dtype=torch.float64) / 16


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [0.75, 2.0])
def test_pact_follows_its_equations(bits: int, alpha: float) -> None:
    x, a = GRID.clone().requires_grad_(), torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    up = torch.linspace(1, 2, len(GRID), dtype=torch.float64)
    out = pact.quantize_activation(x, a, bits)
    v, n = GRID.numpy(), 2**bits - 1
    y = 0.5 * (np.abs(v) - np.abs(v - alpha) + alpha)  # eq. 1
    np.testing.assert_allclose(out.detach(), np.round(y * n / alpha) * alpha / n, atol=1e-12)
    dx, da = torch.autograd.grad(out, (x, a), up)
    np.testing.assert_allclose(dx, up.numpy() * ((v >= 0) & (v < alpha)))
    assert da.item() == pytest.approx((up.numpy() * (v >= alpha)).sum())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("step", [0.25, 0.375])
def test_lsq_follows_its_equations(bits: int, step: float, signed: bool) -> None:
    x, s = GRID.clone().requires_grad_(), torch.tensor(step, dtype=torch.float64, requires_grad=True)
    up = torch.linspace(1, 2, len(GRID), dtype=torch.float64)
    out = lsq.quantize(x, s, bits, signed)
    q_n, q_p = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    v = GRID.numpy() / step
    np.testing.assert_array_equal(out.detach(), np.round(np.clip(v, -q_n, q_p)) * step)  # eq. 1, 2
    slope = np.where(v <= -q_n, -q_n, np.where(v >= q_p, q_p, np.round(v) - v))  # eq. 3
    dx, ds = torch.autograd.grad(out, (x, s), up)
    inside = (v > -q_n) & (v < q_p)
    np.testing.assert_allclose(dx, up.numpy() * inside)
    assert ds.item() == pytest.approx((up.numpy() * slope).sum(), rel=1e-12)


def test_the_gradient_scale_and_initial_step_of_lsq() -> None:
    w = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    assert lsq.initial_step(w, 3, True).item() == pytest.approx(2 * w.abs().mean().item() / 3**0.5)
    assert lsq.initial_step(torch.zeros(3), 3, True) == 1
    s = torch.tensor(0.1, requires_grad=True)
    plain, scaled = (
        torch.autograd.grad(lsq.quantize(w, step, 3, True).sum(), s)[0]
        for step in (s, lsq.scale_gradient(s, 400, 3, True))
    )
    assert scaled.item() == pytest.approx(plain.item() / (400 * 3) ** 0.5)


@pytest.mark.parametrize("shape", [(3, 32), (3, 2, 4, 4)])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_step_per_channel_is_lsq_of_every_channel_alone(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kind = torch.nn.Linear(32, 3) if len(shape) == 2 else torch.nn.Conv2d(2, 3, 4)
    layer = kind.double()
    layer.weight.data *= torch.tensor([0.1, 1.0, 8.0]).reshape(-1, *[1] * (len(shape) - 1))
    channels, up = lsq.LSQWeight(layer, bits, channel=True), torch.randn(shape, dtype=torch.float64)
    assert channels.step.shape == (3, *[1] * (len(shape) - 1))
    for context in (nullcontext(), reference_kernels()):
        w = layer.weight.detach().clone().requires_grad_()
        with context:
            out = channels(w)
            got = torch.autograd.grad(out, (w, channels.step), up)
        for o in range(3):
            alone = torch.nn.Linear(32, 1).double()
            alone.weight.data = layer.weight.detach()[o].reshape(1, -1)
            one = lsq.LSQWeight(alone, bits)
            v = alone.weight.detach().clone().requires_grad_()
            want = one(v)
            by_v, by_step = torch.autograd.grad(want, (v, one.step), up[o].reshape(1, -1))
            torch.testing.assert_close(out[o].reshape(1, -1), want, rtol=1e-12, atol=0)
            torch.testing.assert_close(got[0][o].reshape(1, -1), by_v, rtol=1e-12, atol=0)
            torch.testing.assert_close(got[1][o].reshape(()), by_step, rtol=1e-12, atol=0)
    assert channels.grid(layer.weight).points.shape == (3, 2**bits, 1)
    assert channels.bytes(layer.weight) == (96, bits, 12)
    assert channels.gradient_factor(layer.weight) == pytest.approx((32 * (2 ** (bits - 1) - 1)) ** -0.5)


def test_the_input_steps_of_lsq_are_set_from_the_probe_with_their_sign() -> None:
    model = install(lsq.build(w=4, a=4), mlp.build((1, 2, 2), 3, hidden=2, width=8))
    x = torch.randn(32, 1, 2, 2)
    probe = Probe([(x, torch.zeros(32, dtype=torch.long))], torch.nn.functional.cross_entropy)
    lsq.prepare(model, probe)
    (site,) = (layer.input_q for layer in quantized_layers(model).values())
    assert site.ready
    assert not site.signed, "the input follows a ReLU"
    assert site.step != 1
    site.fit(torch.randn(10))
    assert site.signed


def test_one_bit_of_lsq_has_no_sign() -> None:
    """With a sign, Qp would be 0: the levels would be -step and 0, and the initial step could not be computed."""
    x = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    for bits, signed in ((1, False), (2, True)):
        site = lsq.LSQActivation(bits)
        site.fit(x)
        assert bool(site.signed) is signed
        assert site.step.item() == pytest.approx(2 * 1.625 / lsq.limits(bits, signed)[1] ** 0.5)
    one = lsq.LSQActivation(1)
    one.fit(x)
    assert set(one(x).tolist()) <= {0.0, one.step.item()}
    assert one(torch.tensor([9.0])).item() == one.step.item() > 0
    assert one.grid(x).points.flatten().tolist() == [0.0, one.step.item()]


@pytest.mark.parametrize("method", [pact, lsq])
def test_half_precision_inputs_are_computed_in_float32(method: object) -> None:
    x = torch.rand(64).half()
    scale = torch.tensor(1 / 3)
    if method is pact:
        out, exact = pact.quantize_activation(x, scale, 8), pact.quantize_activation(x.float(), scale, 8)
    else:
        out, exact = lsq.quantize(x, scale / 100, 8, True), lsq.quantize(x.float(), scale / 100, 8, True)
    assert out.dtype == torch.half
    assert torch.equal(out, exact.half())


def test_an_integer_is_a_valid_initial_clip(configure: Configure) -> None:
    setup = assemble(configure("method=pact", "bits=w2a2", "method.initial=3", "init=scratch"))
    model = setup.install(setup.float_model())
    assert {layer.input_q.get_parameter("alpha").item() for layer in quantized_layers(model).values()} == {3.0}


@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_the_first_batch_sets_the_step_of_an_lsq_activation_that_was_not_prepared(shift: float) -> None:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + shift
    quantizer = lsq.LSQActivation(2)
    outputs = quantizer(x)
    signed = shift < 0
    expected = lsq.initial_step(x, 2, signed)
    assert (bool(quantizer.ready), bool(quantizer.signed), quantizer.is_signed) == (True, signed, signed)
    assert torch.equal(quantizer.step, expected)
    assert torch.equal(outputs, lsq.quantize(x, expected, 2, signed))
