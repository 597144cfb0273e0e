"""Test the min-max control against NumPy and by hand."""

import numpy as np
import pytest
import torch

from qbench.methods import uniform

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
