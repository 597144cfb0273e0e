"""DoReFa-Net: low-bit weights, activations and gradients, each quantized by a fixed function.

Paper
    Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
    Gradients", arXiv 1606.06160 (2016). Authors' code: tensorpack, examples/DoReFa-Net.

Idea
    DoReFa maps weights, activations and gradients to [0, 1], rounds them to k bits, and maps the
    result back. In the backward pass, the derivative of the rounding is replaced by 1
    (straight-through). The dot product of two fixed-point vectors can be computed by bit
    operations, in the forward pass and in the backward pass.

Forward
    Qk(x) = round(n x) / n, with n = 2^k - 1. Ties are rounded to even.
    Weights, k >= 2: 2 Qk(tanh w / (2 max|tanh w|) + 1/2) - 1. The maximum is taken over all weights
    of the layer.
    The levels are (2 i - n) / n, for i from 0 to n. Zero is not a level.
    Weights, k = 1: E sign(w), with E = mean|w| of the layer and sign(0) = +1.
    Activations: Qk(h(x)), with h(x) = clip(x, 0, 1).

Backward
    Weights, k >= 2: the gradient includes the derivatives of tanh and of the maximum.
    Weights, k = 1: dL/dw = dL/dw_hat.
    Activations: dL/dx = h'(x) dL/dx_hat. With h = clip, h'(x) is 1 where 0 <= x <= 1, and 0
    elsewhere.
    Gradients: f(d) = 2 m (Qk(clip(d / (2 m) + 1/2 + u, 0, 1)) - 1/2), where d is dL/dy of the
    layer's output y, and m is max|d| of the sample. The noise u is drawn for every element,
    uniformly from (-1/2, 1/2) / n. f(d) is unbiased.
    The levels are (2 i - n) m / n, for i from 0 to n. Zero is not a level.

Schedule
    Training has one phase and starts from a float network.

Sites
    weight, input, output. The output quantizer quantizes the gradient of a layer's output. The
    gradients of the layer's weights and of the layer's input are both computed from this quantized
    gradient.

State
    None.

Bits
    w, a, g each 1-16 or 32; by default w2a32g32.

Protocol
    The paper uses Adam. The authors' code for SVHN trains from scratch for 200 epochs with batch
    size 128. The learning rate is 1e-3, and is halved every 100 epochs. The first and last layers
    are float. The last layer's input is clipped to [0, 1] but not quantized. Each layer between the
    first and the last is followed by batch normalization.

Choices
    activation: the bounded function h. The paper does not define h. The authors' code has used
    three functions. `clip` (default) is the function in today's code. `abs` is min(1, |x|). The
    authors' SVHN script used `abs` until October 2018. The accuracies in that script were
    measured with `abs`. `tanh` is tanh(x) / 2, rounded to levels in [-1/2, 1/2]. The authors' first
    published AlexNet used `tanh`. `abs` and `tanh` need networks without a ReLU before the
    quantizer (`model.act=fused`). `clip` works with or without a ReLU, because `clip` itself sets
    negative values to 0.
    If the input of a layer stays float, qbench keeps the network's ReLU before this layer. By
    default, the last layer is such a layer. The authors' code clips the input of these layers
    instead.
    Values are rounded to nearest with ties to even, as in torch and in today's TensorFlow. The
    authors' first code rounded ties up.

Deviations
    If the gradient of a sample is zero, its quantized gradient is zero. If all weights of a layer
    are zero, the maximum is replaced by 1. The paper's formulas would give 0/0 in both cases.

Results
    docs/results.md (digits). The paper has no CIFAR-10 result. Third parties published CIFAR-10
    results of DoReFa-Net.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import divide_codes_, grad_within, scalar, with_noise
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
    """Quantize a layer's weights (any shape). With 32 bits, return w itself. Section 2.3, eq. 7-10.

    With 1 bit, there are two levels, -mean|w| and mean|w|. With more bits, there are 2^bits levels
    in [-1, 1]. The mean and the maximum of the formulas are taken over the whole tensor.
    """
    if bits == FLOAT:
        return w
    if bits == 1:
        return straight_through(w, w.detach().abs().mean() * sign(w))
    n = float(2**bits - 1)

    def plain(t: Tensor) -> Tensor:
        top = t.abs().max()  # differentiated: the gradient also passes through the maximum
        return 2 * quantize_k(t / (2 * torch.where(top == 0, torch.ones_like(top), top)) + 0.5, bits) - 1

    def value(t: Tensor) -> Tensor:
        return divide_codes_(t.div(2 * _largest(t)).add_(0.5).mul_(n).round_(), n).mul_(2).sub_(1)

    def backward(grad: Tensor, t: Tensor) -> Tensor:
        top = _largest(t)
        # -1 or 1 where |t| is the maximum, else 0
        ends = t.div(top).trunc_()
        # gradient of the maximum, divided equally among the elements that attain it
        share = scalar((grad * t).sum() / ends.abs().sum().clamp(min=1)) / top
        # gradient of t / top with respect to t: (grad - ends * share) / top
        return grad.sub(ends.mul_(share)).div_(top)

    return fused_quantizer(torch.tanh(w), plain=plain, value=value, backward=backward)


def _largest(t: Tensor) -> float | Tensor:
    """Return max|t|, or 1 if all weights are zero, to avoid 0/0."""
    top = scalar(t.detach().abs().amax())  # amax is several times faster than vector_norm and max
    return torch.where(top == 0, 1.0, top) if isinstance(top, Tensor) else top or 1.0


def quantize_activation(x: Tensor, bits: int) -> Tensor:
    """Return Qk(clip(x, 0, 1)) for activations (any shape). The result has 2^bits levels in [0, 1].

    With 32 bits, return x itself. Section 2.4, eq. 11.
    """
    if bits == FLOAT:
        return x
    n = float(2**bits - 1)
    return fused_quantizer(
        x,
        plain=lambda x: quantize_k(x.clamp(0, 1), bits),
        value=lambda x: divide_codes_(x.clamp(0, 1).mul_(n).round_(), n),
        backward=lambda grad, x: grad_within(grad, x, 0, 1),
        cells=_cells_of_clip(n),
        masks=True,
    )


def _cells_of_clip(n: float) -> Cells:
    """Return the cells of Qk(clip(x, 0, 1)): one cell for each level, one cell below [0, 1] and one cell above."""

    def number(x: Tensor) -> Tensor:
        clipped = x.clamp(0, 1)
        side = x.sub(clipped).sign_()  # -1 below the range, 1 above it, else 0
        return clipped.mul_(n).round_().add_(side).add_(1)

    return Cells(number, lambda c: c.sub_(1).div_(n), int(n) + 3)


def quantize_activation_abs(x: Tensor, bits: int) -> Tensor:
    """Quantize activations with h(x) = min(1, |x|), as the authors' SVHN script did until October 2018."""
    if bits == FLOAT:
        return x
    n = float(2**bits - 1)
    return fused_quantizer(
        x,
        plain=lambda x: quantize_k(x.abs().clamp(max=1), bits),
        value=lambda x: divide_codes_(x.abs().clamp_(max=1).mul_(n).round_(), n),
        backward=lambda grad, x: grad_within(grad, x, -1, 1).mul_(x.sign()),
        masks=True,
    )


@in_float32
def quantize_activation_tanh(x: Tensor, bits: int) -> Tensor:
    """Quantize activations with h(x) = tanh(x) / 2 on [-1/2, 1/2], as the authors' first published AlexNet did."""
    return x if bits == FLOAT else quantize_k(torch.tanh(x) / 2 + 0.5, bits) - 0.5


@in_float32
def quantize_gradient(x: Tensor, bits: int, *, generator: Generator | None = None) -> Tensor:
    """Quantize a gradient (N, ...) with stochastic rounding. The scale of a sample is its max|x|. Eq. 12.

    With 32 bits, return x itself. Every element has its own noise from `generator`, by default
    torch's global generator. A sample whose elements are all zero stays zero.
    """
    if bits == FLOAT:
        return x
    n = 2**bits - 1
    step = _sample_max(x).mul_(2 / n)  # distance of two levels, which is 0 if all elements of a sample are 0
    steps = torch.where(step < torch.finfo(step.dtype).tiny, 0.0, 1 / step)

    def rounded(x: Tensor, noise: Tensor, steps: Tensor, step: Tensor) -> Tensor:
        # map [-m, m] to [0, n], add noise of the width of one step, round, and map back
        return noise.add_(x.mul(steps).add_(n / 2)).clamp_(0, n).round_().sub_(n / 2).mul_(step)

    return with_noise(rounded, x, steps, step, generator=generator)


def _sample_max(x: Tensor) -> Tensor:
    """Return max|x| of every sample, as a tensor (N, 1, ..., 1) without gradient."""
    x, axes = x.detach(), tuple(range(1, x.dim()))
    if not axes:
        return x.abs()
    return torch.maximum(x.amax(axes, keepdim=True), -x.amin(axes, keepdim=True)).abs()  # abs only makes -0 to 0


class DoReFaWeight(Quantizer):
    """Quantizer of one layer's weights by DoReFa's formulas."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_weight(w, self.bits)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values of the whole tensor: -E and E for one bit, else 2^bits levels in [-1, 1]."""
        levels = 2 * levels_k(self.bits, w) - 1
        return Grid((levels * w.abs().mean() if self.bits == 1 else levels).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and, for one bit, of the scale E."""
        return Storage(w.numel(), self.bits, 4 if self.bits == 1 else 0)


class DoReFaActivation(Quantizer):
    """Quantizer of one layer's input. It applies `function`. The levels are in the interval [`low`, `low` + 1]."""

    def __init__(self, function: Callable[[Tensor, int], Tensor], low: float, bits: int) -> None:
        super().__init__()
        self.function, self.low, self.bits = function, low, bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return self.function(x, self.bits)

    def grid(self, x: Tensor) -> Grid:
        """Return the 2^bits allowed values of the whole tensor, equally spaced on an interval of length 1."""
        return Grid((levels_k(self.bits, x) + self.low).reshape(1, -1, 1))


class DoReFaGradient(Quantizer):
    """Quantizer of the gradient of one layer's output."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y unchanged. The backward pass quantizes the gradient of y."""
        return on_backward(y, lambda d: quantize_gradient(d, self.bits))

    def grid(self, grad: Tensor) -> Grid:
        """Return the 2^bits allowed values of each sample, from -max|x| to max|x|. A sample is one scale group."""
        m = _sample_max(grad).reshape(-1, 1)
        return Grid(((2 * levels_k(self.bits, grad) - 1) * m).unsqueeze(-1), lambda t: t.reshape(len(t), -1, 1))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], float]] = {
    "clip": (quantize_activation, 0.0),
    "abs": (quantize_activation_abs, 0.0),
    "tanh": (quantize_activation_tanh, -0.5),
}
"""Maps the name of a bounded function h to its quantizer and to the lowest level of this quantizer."""

CLIP_TRAITS = ("monotone_input", "idempotent_input", "clipped_input", "cells_input")


def build(*, w: int = 2, a: int = 32, g: int = 32, activation: str = "clip") -> Method:
    """Return the `Method` for DoReFa. `activation` names the bounded function h: clip, abs or tanh."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation}: must be one of {', '.join(ACTIVATIONS)}")
    if activation != "clip" and a == FLOAT:
        raise Unsupported(
            f"activation={activation} has no effect at bits.a={FLOAT}, because float activations use the network's ReLU"
        )
    function, low = ACTIVATIONS[activation]
    widths = (*range(1, 17), FLOAT)
    return Method(
        name="dorefa",
        bits=Bits(w, a, g),
        supported_bits={"w": widths, "a": widths, "g": widths},
        traits=frozenset({"monotone", *(CLIP_TRAITS if activation == "clip" else ())}),
        requires=Requires(act="either" if activation == "clip" else "fused"),
        weight=lambda name, layer, bits: DoReFaWeight(bits),
        input=lambda name, layer, bits: DoReFaActivation(function, low, bits),
        output=lambda name, layer, bits: DoReFaGradient(bits) if bits < FLOAT else None,
    )
