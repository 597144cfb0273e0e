"""Ternary Weight Networks: three weight values, with scale and threshold computed from the weights.

Paper
    Li, Zhang, Liu, "Ternary Weight Networks", arXiv 1605.04711 (2016).

Idea
    Of all tensors with the values -alpha, 0 and alpha, TWN takes the one nearest to W in the mean
    square. The best threshold has no closed form, but 0.7 of the mean magnitude is close to the
    optimum for Gaussian and for uniform weights.

Forward
    Per layer: delta = 0.7 mean|w|; w_hat = alpha sign(w) where |w| > delta, else 0; alpha is the
    mean of the |w| above delta.

Backward
    dL/dw = dL/dw_hat.

Schedule
    One phase.

Sites
    weight.

State
    None.

Bits
    w 2 (three values) or 32, a and g 32; by default w2a32g32.

Protocol
    The paper's recipe is not recorded here. The unified recipe (`optim=unified`) is used.

Choices
    None.

Deviations
    None known. A layer whose weights are all zero stays zero, although the formula gives 0/0.

Results
    docs/results.md (digits).
"""

import torch
from torch import Tensor

from qbench.bits import FLOAT, Bits
from qbench.quant.method import Method
from qbench.quant.ops import in_float32, sign, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage


def threshold_and_scale(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return two scalars without gradient: delta = 0.7 mean|w|, and alpha, the mean of all |w| above delta."""
    magnitude = w.detach().abs()
    delta = 0.7 * magnitude.mean()
    kept = magnitude > delta
    return delta, (magnitude * kept).sum() / kept.sum().clamp(min=1)


@in_float32
def ternarize_weight(w: Tensor) -> Tensor:
    """Ternarize a layer's weights (any shape) to -alpha, 0 and alpha, with the identity as gradient."""
    delta, alpha = threshold_and_scale(w)
    return straight_through(w, alpha * sign(w) * (w.detach().abs() > delta))


class TWNWeight(Quantizer):
    """Ternary quantizer of one layer's weights."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        return ternarize_weight(w)

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group: -alpha, 0 and alpha."""
        _, alpha = threshold_and_scale(w)
        return Grid(torch.stack([-alpha, torch.zeros_like(alpha), alpha]).reshape(1, 3, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage of two bits per weight and of the scale."""
        return Storage(w.numel(), 2, 4)


def build(*, w: int = 2) -> Method:
    """Return TWN."""
    return Method(
        name="twn",
        bits=Bits(w),
        supported_bits={"w": (2, FLOAT)},
        traits=frozenset({"odd", "monotone"}),
        weight=lambda name, layer, bits: TWNWeight(),
    )
