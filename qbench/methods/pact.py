"""PACT: activations are clipped at a learned level, and weights are quantized as in DoReFa-Net.

Paper
    Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
    arXiv 1805.06085 (2018).

Idea
    DoReFa-Net clips activations at 1, but this clipping level does not suit every layer. In PACT,
    every layer learns a clipping level. Weight decay reduces the clipping level, and thereby the
    distance between neighbouring quantization levels.

Forward
    Activations: y = 0.5 (|x| - |x - alpha| + alpha), which is x clipped to [0, alpha]. x_hat =
    round(y n / alpha) alpha / n, n = 2^k - 1.
    Weights are quantized by DoReFa-Net's function for the same number of bits.

Backward
    dL/dx = dL/dx_hat where 0 <= x < alpha, else 0. dL/dalpha is the sum of dL/dx_hat over all x >=
    alpha. Values below alpha do not contribute to dL/dalpha.

Schedule
    Training has one phase and starts from a float network.

Sites
    weight, input.

State
    alpha (scalar): the clipping level of a layer's input.

Bits
    w and a each 1-16 or 32, g 32; by default w2a2g32.

Protocol
    The paper trains ResNet-20 on CIFAR-10 for 200 epochs, by SGD with momentum 0.9, batch size 128
    and weight decay 2e-4. The learning rate starts at 0.1 and is divided by 10 at epochs 60 and
    120. The first and last layers keep a high precision.

Choices
    initial: the initial alpha. The default 10 is remembered from the paper and not verified.
    decay: weight decay of alpha. The default 2e-4 equals the weight decay of the weights in the
    paper's protocol. `optim.weight_decay` does not change this option.

Deviations
    qbench keeps alpha at 1e-3 or more.

Results
    docs/results.md (digits).
"""

from math import inf

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods.dorefa import DoReFaWeight
from qbench.quant.fused_kernels import at_least, grad_between, next_float, scalar
from qbench.quant.layers import clamp_min_
from qbench.quant.method import Method, Requires
from qbench.quant.ops import Cells, fused_quantizer, levels_k, straight_through
from qbench.quant.quantizer import Grid, Quantizer

SMALLEST = 1e-3


def quantize_activation(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Quantize activations (any shape) to 2^bits levels in [0, alpha]. Eq. 1-3.

    alpha is a scalar above 0 and gets a gradient. With 32 bits, return x itself.
    """
    if bits == FLOAT:
        return x
    n = float(2**bits - 1)

    def plain(x: Tensor, alpha: Tensor) -> Tensor:
        clipped = torch.where(x >= alpha, alpha, x.clamp(min=0))  # at x = alpha, the gradient goes to alpha (eq. 3)
        top = alpha.detach()
        return straight_through(clipped, (clipped.detach() * n / top).round() * top / n)

    def value(x: Tensor, alpha: Tensor) -> Tensor:
        return x.clamp(min=0).clamp_(max=scalar(alpha)).mul_(n).div_(alpha).round_().mul_(alpha).div_(n)

    def backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        top = scalar(alpha)
        # alpha's gradient: the sum over x >= alpha
        clipped = grad_between(grad, x, next_float(top, -inf, x.dtype), inf)
        # x's gradient: where 0 <= x < alpha
        return grad_between(grad, x, next_float(0, -inf, x.dtype), top), clipped.sum()

    return fused_quantizer(x, alpha, plain=plain, value=value, backward=backward, cells=_cells(alpha.detach(), n))


def _cells(alpha: Tensor, n: float) -> Cells:
    """Return the cells: one cell for x below 0, one cell per level, and one cell for x >= alpha."""

    def number(x: Tensor) -> Tensor:
        code = x.clamp(min=0).clamp_(max=scalar(alpha)).mul_(n).div_(alpha).round_()
        return code.add_(at_least(x, 0)).add_(at_least(x, scalar(alpha)))

    def inside(c: Tensor) -> Tensor:  # slightly below each level, since alpha itself belongs to the last cell
        return c.sub_(1).mul_(alpha * (1 - 2**-10) / n)

    return Cells(number, inside, int(n) + 3)


class LearnedClip(Quantizer):
    """Base class of quantizers with a learned scalar clipping level `alpha`. `decay` is the weight decay of alpha."""

    positive_parameters: tuple[str, ...] = ("alpha",)

    def __init__(self, bits: int, initial: float, decay: float) -> None:
        super().__init__()
        self.bits, self.weight_decay = bits, decay
        self.alpha = nn.Parameter(torch.tensor(initial))


class PACTActivation(LearnedClip):
    """Quantizer of one layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return quantize_activation(x, self.alpha, self.bits)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: 2^bits levels from 0 to alpha. The whole tensor is one scale group."""
        return Grid((levels_k(self.bits, x) * self.alpha).reshape(1, -1, 1))


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, then keep the clipping levels above zero."""
    optimizer.step()
    clamp_min_(model, {LearnedClip: ("alpha",)}, SMALLEST)


def build(*, w: int = 2, a: int = 2, initial: float = 10.0, decay: float = 2e-4) -> Method:
    """Return the `Method` for PACT. `initial` is the initial alpha, and `decay` is the weight decay of alpha."""
    if initial <= SMALLEST:
        raise ValueError(f"initial={initial}: must be a number above {SMALLEST}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: must be at least 0 and below 1")
    widths = (*range(1, 17), FLOAT)
    return Method(
        name="pact",
        bits=Bits(w, a),
        supported_bits={"w": widths, "a": widths},
        option_slots={"initial": "a", "decay": "a"},
        requires=Requires(act="either"),
        traits=frozenset({"monotone", "monotone_input", "idempotent_input", "clipped_input", "cells_input"}),
        weight=lambda name, layer, bits: DoReFaWeight(bits),
        input=lambda name, layer, bits: PACTActivation(bits, initial, decay),
        step=optimizer_step,
    )
