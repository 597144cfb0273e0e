"""Test the min-max control against NumPy and by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qbench.methods import uniform
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.probe import Probe

X = 3 * torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
GRID = torch.arange(-48, 49, dtype=torch.float64) / 16


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("channel", [True, False])
def test_the_weights_are_those_of_numpy(bits: int, channel: bool) -> None:
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)).requires_grad_()
    out, v = uniform.quantize_weight(w, bits, channel), w.detach().numpy()
    top = np.abs(v).max(axis=(1, 2, 3), keepdims=True) if channel else np.abs(v).max()
    s = top / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(out.detach(), np.round(v / s) * s, atol=1e-12)
    up = torch.rand_like(w)
    assert torch.equal(torch.autograd.grad(out, w, up)[0], up)
    assert uniform.quantize_weight(torch.zeros(2, 3), bits, channel).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.5), (-1.0, 2.0), (-0.7, 0.4)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_activations_are_those_of_numpy(low: float, high: float, bits: int) -> None:
    x = GRID.clone().requires_grad_()
    out = uniform.quantize_activation(x, torch.tensor(low), torch.tensor(high), bits)
    n = 2**bits - 1
    step = (float(np.float32(high)) - float(np.float32(low))) / n
    zero = round(-float(np.float32(low)) / step)
    codes = np.clip(np.round(GRID.numpy() / step) + zero, 0, n)
    np.testing.assert_allclose(out.detach(), (codes - zero) * step, atol=1e-12)
    assert out.detach().unique().numel() <= 2**bits
    assert 0.0 in out.detach().tolist()
    inside = (np.round(GRID.numpy() / step) + zero >= 0) & (np.round(GRID.numpy() / step) + zero <= n)
    np.testing.assert_array_equal(torch.autograd.grad(out.sum(), x)[0], inside)


def test_the_range_moves_in_training_only() -> None:
    site = uniform.UniformActivation(4, 0.1).train()
    site(torch.tensor([0.5, 2.0]))
    assert (site.low.item(), site.high.item()) == (0, 2), "the first batch sets the range"
    site(torch.tensor([-1.0, 1.0]))
    assert (site.low.item(), site.high.item()) == (pytest.approx(-0.1), pytest.approx(1.9))
    site.eval()(torch.tensor([9.0]))
    assert site.high.item() == pytest.approx(1.9)


def test_prepare_sets_ranges_that_training_does_not_use() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4))
    expected = net(X)
    inputs = net[0](X)
    model = install(uniform.build(w=16, a=16), net, example=X)
    uniform.prepare(model, Probe([(X, torch.zeros(len(X), dtype=torch.long))], F.cross_entropy))
    quantizer = quantized_layers(model)["1"].input_q
    assert (quantizer.low, quantizer.high) == (inputs.min().clamp(max=0), inputs.max().clamp(min=0))
    torch.testing.assert_close(model.eval()(X), expected, rtol=0, atol=1e-3)
    quantizer.train()(inputs / 2)  # the first batch replaces the range
    assert (quantizer.low, quantizer.high) == (inputs.min().clamp(max=0) / 2, inputs.max().clamp(min=0) / 2)


def test_a_scale_takes_four_bytes() -> None:
    w = torch.randn(5, 3)
    one, each = (uniform.UniformWeight(4, channel).bytes(w) for channel in (False, True))
    assert (one.codes, one.code_bits, one.extra_bytes) == (15, 4, 4)
    assert (each.codes, each.code_bits, each.extra_bytes) == (15, 4, 20)
