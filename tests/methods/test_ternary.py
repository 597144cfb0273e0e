"""Test TWN and TTQ against NumPy, hand-computed rows, and implementations with the flaws of public code."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench.methods import ttq, twn
from qbench.models import mlp
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers

Ternarize = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def test_the_weights_of_twn_are_those_computed_by_hand() -> None:
    """The weights above 0.7 times the mean magnitude get their own mean magnitude as scale."""
    w = torch.tensor([1.2, -0.8, 0.5, -0.5, 2.0, 0.7, 0.7, -1.6 + 1.6 - 0.0])
    w = torch.cat([w, torch.tensor([-0.6, 3.0])])
    mean = np.abs(w.numpy()).mean()
    kept = np.abs(w.numpy()) > 0.7 * mean
    alpha = np.abs(w.numpy())[kept].mean()
    expected = np.where(kept, alpha * np.sign(w.numpy()), 0)
    np.testing.assert_allclose(twn.ternarize_weight(w).numpy(), expected, rtol=1e-6)
    golden = twn.ternarize_weight(torch.tensor([2.0, -1.0, 0.5, -0.5]))  # threshold 0.7, kept 2 and -1
    assert golden.tolist() == [1.5, -1.5, 0, 0]
    assert twn.ternarize_weight(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_gradient_of_twn_is_the_identity() -> None:
    w = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    up = torch.linspace(-1, 1, 50)
    assert torch.equal(torch.autograd.grad(twn.ternarize_weight(w), w, up)[0], up)


W = torch.tensor([0.9, -0.7, 0.3, -0.1, 0.1, 0.05, -0.4, 0.0], dtype=torch.float64)
G = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.float64)
POSITIVE, NEGATIVE, DELTA = 0.5, 0.25, 0.1


def check_ttq(ternarize: Ternarize) -> None:
    """By hand for W, G and the scales above; weights of +-0.1 are on the threshold and become zero."""
    w, p, n = W.clone().requires_grad_(), *(torch.tensor(s, dtype=torch.float64) for s in (POSITIVE, NEGATIVE))
    p.requires_grad_()
    n.requires_grad_()
    out = ternarize(w, p, n, DELTA)
    assert out.tolist() == [0.5, -0.25, 0.5, 0, 0, 0, -0.25, 0], "forward"
    dw, dp, dn = torch.autograd.grad(out, (w, p, n), G)
    assert dp.item() == 1 + 3, "sum over the positive zone"
    assert dn.item() == -(2 + 7), "minus the sum over the negative zone"
    assert dw.tolist() == [0.5, 0.5, 1.5, 4, 5, 6, 1.75, 8], "scaled by zone"


def test_ttq_gives_the_values_and_gradients_computed_by_hand() -> None:
    check_ttq(ttq.ternarize_weight)


def flawed(w: Tensor, p: Tensor, n: Tensor, delta: float, *, flaw: str = "") -> Tensor:
    """TTQ implemented again, with one of the flaws of public code."""
    up, down = (w >= delta, w <= -delta) if flaw == "ties" else (w > delta, w < -delta)

    class Ternary(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, w: Tensor, p: Tensor, n: Tensor) -> Tensor:
            return p * up - (p if flaw == "one scale" else n) * down

        @staticmethod
        def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            size = w.numel() if flaw == "mean" else 1
            sign = 1 if flaw == "no minus" else -1
            middle = 0.0 if flaw == "dead zero" else 1.0
            scale = p * up + n * down + middle * ~(up | down)
            if flaw == "plain":
                scale = torch.ones_like(g)
            return g * scale, (g * up).sum() / size, sign * (g * down).sum() / size

    return Ternary.apply(w, p, n)  # type: ignore[no-any-return]


def test_the_second_implementation_without_a_flaw_agrees() -> None:
    check_ttq(flawed)


@pytest.mark.parametrize("flaw", ["ties", "one scale", "mean", "no minus", "dead zero", "plain"])
def test_the_check_rejects_every_flaw(flaw: str) -> None:
    with pytest.raises(AssertionError):
        check_ttq(partial(flawed, flaw=flaw))


def test_the_gradients_of_ttqs_scales_are_finite_differences() -> None:
    w = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p, n = (torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (0.7, 0.4))
    assert torch.autograd.gradcheck(lambda p, n: ttq.ternarize_weight(w, p, n, 0.3).square().sum(), (p, n))


def test_the_thresholds_and_initial_scales_of_ttq() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 25)
    w = layer.weight.detach()
    site = ttq.TTQWeight(layer, "max", 0.05, "mean", 0.0)
    assert site.delta(w) == 0.05 * w.abs().max()
    assert site.positive.item() == pytest.approx(w[w > site.delta(w)].mean().item())
    assert site.negative.item() == pytest.approx(-w[w < -site.delta(w)].mean().item())
    sparse = ttq.TTQWeight(layer, "sparsity", 0.4, "one", 0.0)
    assert (sparse(w) == 0).sum() == 0.4 * w.numel()
    assert sparse.positive == sparse.negative == 1


def test_the_scales_stay_positive_and_decay_only_if_configured() -> None:
    model = install(ttq.build(), mlp.build((1, 2, 2), 3, hidden=2, width=8))
    (layer,) = quantized_layers(model).values()
    optimizer = torch.optim.SGD(layer.weight_q.parameters(), lr=1e6)
    layer.weight_q(layer.weight).sum().backward()
    ttq.optimizer_step(model, optimizer)
    assert layer.weight_q.positive.item() == pytest.approx(ttq.SMALLEST)
    assert layer.weight_q.negative.item() > 0
    assert layer.weight_q.weight_decay == 0
    decayed = install(replace(ttq.build(decay=2e-4)), mlp.build((1, 2, 2), 3, hidden=2, width=8))
    assert next(iter(quantized_layers(decayed).values())).weight_q.weight_decay == 2e-4
