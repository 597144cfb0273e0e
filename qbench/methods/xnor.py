"""XNOR-Net: weights and activations binary, each filter with a scale.

Paper
    Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
    ECCV 2016, arXiv 1603.05279. Authors' code: allenai/XNOR-Net (Torch).

Idea
    Of all scaled binary filters, alpha B with alpha = mean|W| and B = sign(W) is nearest to W in the mean square. With
    binary activations too, a convolution is XNOR and bit count.

Forward
    Weights, per output filter of n weights: alpha sign(w), alpha = mean|w|, sign(0) = +1. Activations: sign(x).
    With scale=K the output is multiplied by K = A * k: A the mean of |x| over channels, k a box filter of the kernel's
    size (stride and padding the layer's); for a linear layer by mean|x|.

Backward
    Weights, gradient=paper: dL/dw = (1 / n + alpha 1{|w| <= 1}) dL/dw_hat. gradient=authors:
    dL/dw = (alpha 1{|w| < 1} + 1 / n) (1 - 1 / c) n dL/dw_hat, c the filter's input channels.
    Activations: dL/dx = 1{|x| < 1} dL/dx_hat. K carries no gradient.

Schedule
    One phase.

Sites
    weight, input; output with scale=K.

State
    None.

Bits
    w 1 or 32, a 1 or 32, g 32; by default w1a1g32.

Protocol
    The authors' code: Adam, rate 1e-3 falling to 1e-5 in steps over 55 epochs, batch 800; first and last layer float;
    blocks ordered batch normalization, sign, convolution, pooling.

Choices
    scale: the paper multiplies by K; the authors' code leaves it out, and they say that it gains less than a point:
    `none` is the default.
    gradient: `paper` (default) as the formula is commonly read; the paper's printed derivative of sign, r 1{|r| <= 1},
    is taken for a slip. The authors' code multiplies Adam's gradients by 1e9 on top, against Adam's epsilon: not done.
    center, clamp: the authors' code subtracts from the latent weights their mean over input channels, and clamps them
    to [-1, 1], before every step, which the paper does not mention: both off by default.

Deviations
    Padding is zero, a value that binary activations do not have; the authors' code does the same.

Results
    README (digits, glyphs).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import above, at_least, grad_between
from qbench.quant.layers import FloatLayer, QLayer, quantized_layers
from qbench.quant.method import Method, Requires, Unsupported
from qbench.quant.ops import Cells, fused_quantizer, in_float32, sign, surrogate
from qbench.quant.quantizer import Grid, Quantizer, Storage

GRADIENTS = ("paper", "authors")
SCALES = ("none", "K")
SIGNS = {"monotone_input", "idempotent_input", "clipped_input", "cells_input"}


def filter_scale(w: Tensor) -> Tensor:
    """Return mean|w| of every output filter, (O, 1, ..., 1), without gradient. Eq. 6."""
    return w.detach().abs().mean(tuple(range(1, w.dim())), keepdim=True)


@in_float32
def binarize_weight(w: Tensor, *, gradient: str = "paper") -> Tensor:
    """Binarize weights (O, ...) per output filter: mean|w| sign(w), sign(0) = +1. Section 3.1.

    Args:
        gradient: paper or authors; see the card.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient}: allowed are {', '.join(GRADIENTS)}")
    alpha, n = filter_scale(w), w[0].numel()
    if gradient == "authors":
        slope = (alpha * (w.detach().abs() < 1) + 1 / n) * (1 - 1 / w.shape[1]) * n
    else:
        slope = alpha * (w.detach().abs() <= 1) + 1 / n
    return surrogate(w, alpha * sign(w), slope)


@in_float32
def binarize_activation(x: Tensor) -> Tensor:
    """Return sign(x), sign(0) = +1, with gradient 1 where |x| < 1 and 0 elsewhere."""
    return fused_quantizer(
        x,
        plain=lambda x: surrogate(x, sign(x), x.detach().abs() < 1),
        value=sign,
        backward=lambda grad, x: grad_between(grad, x, -1, 1),
        cells=Cells(lambda x: above(x, -1).add_(at_least(x, 0)).add_(at_least(x, 1)), lambda c: c.sub_(1.5), 4),
    )


class BinaryWeight(Quantizer):
    """Binary weights of one layer."""

    def __init__(self, gradient: str) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return binarize_weight(w, gradient=self.gradient)

    def grid(self, w: Tensor) -> Grid:
        """One group per output filter: -alpha, alpha."""
        alpha = filter_scale(w).reshape(-1, 1)
        return Grid(torch.stack([-alpha, alpha], 1), lambda t: t.reshape(len(t), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """One bit a weight and a scale per filter."""
        return Storage(w.numel(), 1, 4 * len(w))


class BinaryActivation(Quantizer):
    """Binary activations in front of one layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs."""
        return binarize_activation(x)

    def grid(self, x: Tensor) -> Grid:
        """-1 and 1."""
        return Grid(x.new_tensor([-1.0, 1.0]).reshape(1, 2, 1))


class InputScale(Quantizer):
    """Multiplies a layer's products by K, the mean magnitude of the inputs that each output read. Section 3.2.

    The layer's bias is not multiplied: K stands for what the convolution's signs lost.
    """

    def __init__(self, layer: FloatLayer) -> None:
        super().__init__()
        self.owner = (layer,)  # in a tuple, or the layer would be a part of its own part

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return (y - bias) K + bias."""
        (layer,) = self.owner
        k = self._k(layer, x.detach().abs())
        if layer.bias is None:
            return y * k
        return y * k + layer.bias.reshape(-1, *[1] * (y.dim() - 2)) * (1 - k)

    def _k(self, layer: FloatLayer, magnitude: Tensor) -> Tensor:
        """Return K, of y's shape or broadcast to it."""
        if not isinstance(layer, nn.Conv2d):
            return magnitude.mean(-1, keepdim=True)
        kernel = (layer.kernel_size[0], layer.kernel_size[1])
        mean = magnitude.reshape(len(magnitude), layer.groups, -1, *magnitude.shape[2:]).mean(2)  # of each group
        box = mean.new_full((layer.groups, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        k = F.conv2d(mean, box, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return k.repeat_interleave(layer.out_channels // layer.groups, 1) if layer.groups > 1 else k


def _input_scale(layer: QLayer) -> InputScale | None:
    """K for a layer whose input is binary; none for one that reads the image or floats."""
    return InputScale(layer) if isinstance(layer.input_q, BinaryActivation) else None


def site(layer: FloatLayer, gradient: str, center: bool) -> BinaryWeight:
    """Return a layer's weight quantizer; refuse what the authors' formulas make of filters with one input channel."""
    if layer.weight.shape[1] == 1 and (gradient == "authors" or center):
        what = "gradient=authors" if gradient == "authors" else "center=true"
        raise Unsupported(f"{what} makes filters of one input channel stand still; leave such layers float")
    return BinaryWeight(gradient)


def tidy(model: nn.Module, *, center: bool, clamp: bool) -> None:
    """Center the latent weights over input channels and clamp them to [-1, 1], in place (authors' code)."""
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            if isinstance(layer.weight_q, BinaryWeight):
                if center:
                    layer.weight.sub_(layer.weight.mean(1, keepdim=True))
                if clamp:
                    layer.weight.clamp_(-1, 1)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, *, center: bool, clamp: bool) -> None:
    """Step, then `tidy`."""
    optimizer.step()
    tidy(model, center=center, clamp=clamp)


def build(
    *, w: int = 1, a: int = 1, gradient: str = "paper", scale: str = "none", center: bool = False, clamp: bool = False
) -> Method:
    """Return XNOR-Net; for the options see the card."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient}: allowed are {', '.join(GRADIENTS)}")
    if scale not in SCALES:
        raise ValueError(f"scale={scale}: allowed are {', '.join(SCALES)}")
    if a == FLOAT and scale == "K":
        raise Unsupported(f"scale=K has no effect at bits.a={FLOAT}: it stands for what sign(x) loses")
    return Method(
        name="xnor",
        bits=Bits(w, a),
        supported_bits={"w": (1, FLOAT), "a": (1, FLOAT)},
        requires=Requires(act="fused"),
        traits=frozenset({"odd", "monotone", "idempotent"} | SIGNS),
        weight=lambda name, layer, bits: site(layer, gradient, center),
        input=lambda name, layer, bits: BinaryActivation(),
        output=(lambda name, layer, bits: _input_scale(layer)) if scale == "K" else None,
        prepare=(lambda model, probe: tidy(model, center=center, clamp=clamp)) if center or clamp else None,
        step=(lambda m, optimizer: stepped(m, optimizer, center=center, clamp=clamp)) if center or clamp else None,
    )
