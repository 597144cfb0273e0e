"""Ternary Weight Networks: weights have three values, and scale and threshold are computed from the weights.

Paper
    Li, Zhang, Liu, "Ternary Weight Networks", arXiv 1605.04711 (2016).

Idea
    TWN approximates W by a tensor with the values -alpha, 0 and alpha. The threshold and alpha are
    chosen so that the mean squared error is small. The optimal threshold has no closed form. For
    Gaussian weights and for uniformly distributed weights, 0.7 mean|W| is close to the optimum.

Forward
    For each layer, delta = 0.7 mean|w|, and alpha is the mean of |w| over all weights with |w| >
    delta. w_hat = alpha sign(w) where |w| > delta, else 0.

Backward
    dL/dw = dL/dw_hat.

Schedule
    Training has one phase.

Sites
    weight.

State
    None.

Bits
    w 2 (three values) or 32, a and g 32; by default w2a32g32.

Protocol
    The recipe is the unified recipe (`optim=unified`). The paper's recipe is not in qbench.

Choices
    None.

Deviations
    None known. If all weights of a layer are zero, they stay zero. The paper's formula would give
    0/0 in this case.

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
    """Ternarize a layer's weights (any shape) to -alpha, 0 and alpha. The gradient passes unchanged."""
    delta, alpha = threshold_and_scale(w)
    return straight_through(w, alpha * sign(w) * (w.detach().abs() > delta))


class TWNWeight(Quantizer):
    """Ternary quantizer of one layer's weights."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        return ternarize_weight(w)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: -alpha, 0 and alpha. The whole tensor is one scale group."""
        _, alpha = threshold_and_scale(w)
        return Grid(torch.stack([-alpha, torch.zeros_like(alpha), alpha]).reshape(1, 3, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of two bits per weight and of the scale."""
        return Storage(w.numel(), 2, 4)


def build(*, w: int = 2) -> Method:
    """Return the `Method` for TWN."""
    return Method(
        name="twn",
        bits=Bits(w),
        supported_bits={"w": (2, FLOAT)},
        traits=frozenset({"odd", "monotone"}),
        weight=lambda name, layer, bits: TWNWeight(),
    )
