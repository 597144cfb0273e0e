"""DoReFa-Net: low-bit weights, activations and gradients, each by one fixed function.

Paper
    Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
    arXiv 1606.06160 (2016). Authors' code: tensorpack, examples/DoReFa-Net.

Idea
    Bring weights, activations and gradients into [0, 1], round there to k bits, come back; only the rounding is
    straight-through. With fixed point on both sides a dot product becomes bit counts in forward and backward.

Forward
    Qk(x) = round(n x) / n, n = 2^k - 1, halves to even.
    Weights, 2 <= k: 2 Qk(tanh w / (2 max|tanh w|) + 1/2) - 1, the maximum over the layer; levels (2 i - n) / n in
    [-1, 1], no zero among them. Weights, k = 1: E sign(w) with E = mean|w| of the layer and sign(0) = +1.
    Activations: Qk(h(x)), with h(x) = clip(x, 0, 1).

Backward
    Weights, 2 <= k: through tanh and through the maximum. Weights, k = 1: dL/dw = dL/dw_hat. Activations: the
    derivative of h; for the clip 1 on the closed interval 0 <= x <= 1.
    Gradients: f(d) = 2 m (Qk(clip(d / (2 m) + 1/2 + u, 0, 1)) - 1/2), m = max|d| of the sample, u uniform in
    (-1/2, 1/2) / n for every element: unbiased, levels (2 i - n) m / n, no zero among them.

Schedule
    One phase, from a float network.

Sites
    weight, input, output (the gradient of a layer's output, read by both of the layer's own gradients).

State
    None.

Bits
    w, a, g each 1-16 or 32; by default w2a32g32.

Protocol
    The paper's: Adam; SVHN from scratch at 1e-3, halved every 100 of 200 epochs, batch 128 (authors' code); first and
    last layer float, the last layer's input bounded but not quantized, batch normalization everywhere between.

Choices
    activation: the paper leaves h open, the authors' code had three. `clip` (default): today's code. `abs`:
    min(1, |x|), the SVHN script until October 2018, under which its quantized figures were measured. `tanh`:
    tanh(x) / 2, rounded on [-1/2, 1/2], of the first published AlexNet. Both others need the network's ReLU out of
    the way (`model.act=fused`), the clip contains it.
    A layer that stays float, and what the last layer reads, keeps the network's ReLU, where the authors' code clips.
    Rounding halves to even, as torch and today's TensorFlow do; the authors' first code rounded them up.

Deviations
    A sample whose gradient is zero stays zero, and a layer whose weights are all zero takes maximum 1: the formulas
    give 0/0 there.

Results
    README (digits). The paper has no CIFAR-10 result; those in circulation are third parties'.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import divide_codes_, grad_within, uniform
from qbench.quant.method import Method, Requires, Unsupported
from qbench.quant.ops import (
    Cells,
    fused_quantizer,
    in_float32,
    levels_k,
    on_backward,
    quantize_k,
    sign,
    straight_through,
)
from qbench.quant.quantizer import Grid, Quantizer, Storage


@in_float32
def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Quantize a layer's weights (any shape); 32 returns w itself. Sections 2.3, eq. 7-10.

    The maximum, and for 1 bit the scale, are taken over the whole tensor. One bit gives +-mean|w|, 2 bits and more
    give 2^bits levels in [-1, 1].
    """
    if bits == FLOAT:
        return w
    if bits == 1:
        return straight_through(w, w.detach().abs().mean() * sign(w))
    n = float(2**bits - 1)

    def plain(t: Tensor) -> Tensor:
        top = t.abs().max()
        return 2 * quantize_k(t / (2 * torch.where(top == 0, torch.ones_like(top), top)) + 0.5, bits) - 1

    t = torch.tanh(w)
    top = t.detach().abs().amax()
    top = torch.where(top == 0, 1.0, top)

    def value(t: Tensor) -> Tensor:
        return divide_codes_(t.div(2 * top).add_(0.5).mul_(n).round_(), n).mul_(2).sub_(1)

    def backward(grad: Tensor, t: Tensor) -> Tensor:
        ends = t.div(top).trunc_()  # -1 or 1 where the maximum is: its share of the gradient goes there
        share = (grad * t).sum().div_(top).div_(ends.abs().sum().clamp_(min=1))
        return torch.addcmul(grad, ends, share, value=-1).div_(top)

    return fused_quantizer(t, plain=plain, value=value, backward=backward)


@in_float32
def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """Quantize activations: Qk(clip(x, 0, 1)), 2^bits levels in [0, 1]; 32 returns x itself. Section 2.4, eq. 11."""
    if bits == FLOAT:
        return x
    n = float(2**bits - 1)
    return fused_quantizer(
        x,
        plain=lambda x: quantize_k(x.clamp(0, 1), bits),
        value=lambda x: divide_codes_(x.clamp(0, 1).mul_(n).round_(), n),
        backward=lambda grad, x: grad_within(grad, x, 0, 1),
        cells=_cells(n),
    )


def _cells(n: float) -> Cells:
    """Return the cells of Qk(clip(x, 0, 1)): 0 below the range, one for each level, one above the range."""

    def number(x: Tensor) -> Tensor:
        clipped = x.clamp(0, 1)
        side = x.sub(clipped).sign_()
        return clipped.mul_(n).round_().add_(side).add_(1)

    return Cells(number, lambda c: c.sub_(1).div_(n), int(n) + 3)


@in_float32
def quantize_activation_abs(x: Tensor, bits: int) -> Tensor:
    """Quantize activations by h(x) = min(1, |x|): the authors' SVHN script until October 2018."""
    if bits == FLOAT:
        return x
    n = float(2**bits - 1)
    return fused_quantizer(
        x,
        plain=lambda x: quantize_k(x.abs().clamp(max=1), bits),
        value=lambda x: divide_codes_(x.abs().clamp_(max=1).mul_(n).round_(), n),
        backward=lambda grad, x: grad_within(grad, x, -1, 1).mul_(x.sign()),
    )


@in_float32
def quantize_activation_tanh(x: Tensor, bits: int) -> Tensor:
    """Quantize activations by h(x) = tanh(x) / 2 on [-1/2, 1/2]: the authors' first published AlexNet."""
    return x if bits == FLOAT else quantize_k(torch.tanh(x) / 2 + 0.5, bits) - 0.5


@in_float32
def quantize_gradient(x: Tensor, bits: int, *, generator: Generator | None = None) -> Tensor:
    """Quantize a gradient (N, ...) stochastically, scaled by each sample's maximum; 32 returns x. Eq. 12.

    Noise is drawn for every element from torch's global generator unless `generator` is given. Samples that are zero
    stay zero.
    """
    if bits == FLOAT:
        return x
    n = 2**bits - 1
    m = _sample_max(x)
    noise = uniform(x, generator).sub_(0.5).div_(n)
    unit = x.detach().div(torch.where(m == 0, 1.0, 2 * m)).add_(0.5).add_(noise).clamp_(0, 1)
    return unit.mul_(n).round_().div_(n).sub_(0.5).mul_(2 * m)


def _sample_max(x: Tensor) -> Tensor:
    """Return max|x| of every sample, (N, 1, ..., 1)."""
    axes = tuple(range(1, x.dim()))
    return x.detach().abs().amax(dim=axes, keepdim=True) if axes else x.detach().abs()


class DoReFaWeight(Quantizer):
    """DoReFa's weights of one layer."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_weight(w, self.bits)

    def grid(self, w: Tensor) -> Grid:
        """One group: +-E for one bit, else 2^bits levels in [-1, 1]."""
        levels = 2 * levels_k(self.bits, w) - 1
        return Grid((levels * w.abs().mean() if self.bits == 1 else levels).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Codes, and for one bit the scale E."""
        return Storage(w.numel(), self.bits, 4 if self.bits == 1 else 0)


class DoReFaActivation(Quantizer):
    """DoReFa's activations in front of one layer, for a function with `levels` of 2^bits values from `low` on."""

    def __init__(self, function: Callable[[Tensor, int], Tensor], low: float, bits: int) -> None:
        super().__init__()
        self.function, self.low, self.bits = function, low, bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return self.function(x, self.bits)

    def grid(self, x: Tensor) -> Grid:
        """2^bits levels, evenly over an interval of length 1."""
        return Grid((levels_k(self.bits, x) + self.low).reshape(1, -1, 1))


class DoReFaGradient(Quantizer):
    """Quantizes the gradient of a layer's output."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y; its gradient will be quantized."""
        return on_backward(y, lambda d: quantize_gradient(d, self.bits))

    def grid(self, grad: Tensor) -> Grid:
        """One scale group per sample."""
        m = _sample_max(grad).reshape(-1, 1)
        return Grid(((2 * levels_k(self.bits, grad) - 1) * m).unsqueeze(-1), lambda t: t.reshape(len(t), -1, 1))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], float]] = {
    "clip": (quantize_activation, 0.0),
    "abs": (quantize_activation_abs, 0.0),
    "tanh": (quantize_activation_tanh, -0.5),
}


CLIPPED = ("monotone_input", "idempotent_input", "clipped_input", "cells_input")


def build(*, w: int = 2, a: int = 32, g: int = 32, activation: str = "clip") -> Method:
    """Return DoReFa at the given widths; `activation` is the bounded function h: clip, abs or tanh."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation}: allowed are {', '.join(ACTIVATIONS)}")
    if activation != "clip" and a == FLOAT:
        raise Unsupported(f"activation={activation} has no effect at bits.a={FLOAT}; the network's own ReLU acts there")
    function, low = ACTIVATIONS[activation]
    widths = (*range(1, 17), FLOAT)
    return Method(
        name="dorefa",
        bits=Bits(w, a, g),
        supported_bits={"w": widths, "a": widths, "g": widths},
        traits=frozenset({"monotone", *(CLIPPED if activation == "clip" else ())}),
        requires=Requires(act="either" if activation == "clip" else "fused"),
        weight=lambda name, layer, bits: DoReFaWeight(bits),
        input=lambda name, layer, bits: DoReFaActivation(function, low, bits),
        output=lambda name, layer, bits: DoReFaGradient(bits) if bits < FLOAT else None,
    )
