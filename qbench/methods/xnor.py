"""XNOR-Net: weights and activations are binary, and weights have one scale per filter.

Paper
    Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary
    Convolutional Neural Networks", ECCV 2016, arXiv 1603.05279. Authors' code: allenai/XNOR-Net
    (Torch).

Idea
    A filter W is approximated by alpha B, where B is binary. The mean squared error is smallest for
    alpha = mean|W| and B = sign(W). If activations are binary too, a convolution consists of XNOR
    operations and bit counts.

Forward
    Weights: w_hat = alpha sign(w) for each output filter of n weights, with alpha = mean|w| and
    sign(0) = +1.
    Activations: x_hat = sign(x).
    With scale=K the output is multiplied by K = A * k, where * is a convolution with the layer's
    stride and padding. A is the mean of |x| over channels. k is a box filter of the kernel's size,
    which computes a mean. For a linear layer, K is mean|x|.

Backward
    Weights, gradient=paper: dL/dw = (1 / n + alpha 1{|w| <= 1}) dL/dw_hat.
    Weights, gradient=authors: dL/dw = (alpha 1{|w| < 1} + 1 / n) (1 - 1 / c) dL/dw_hat, where c is
    the filter's number of input channels. Before each step of SGD, the gradients of binary weights
    are multiplied by n. Before each step of Adam, all gradients are multiplied by 1e9.
    Weights, gradient=jiecaoyu: dL/dw = (alpha 1{|w| <= 1} g + sign(w) s / n) (1 - 1 / c) n, where g
    = dL/dw_hat, and s is the sum of g sign(w) over the filter.
    Activations: dL/dx = 1{|x| < 1} dL/dx_hat. No gradient passes through K.

Schedule
    Training has one phase.

Sites
    weight, input. With scale=K, also output.

State
    None.

Bits
    w 1 or 32, a 1 or 32, g 32; by default w1a1g32.

Protocol
    The authors' code trains for 55 epochs by Adam with batch size 800. The learning rate is 1e-3,
    then 5e-4 from epoch 19, 1e-4 from epoch 30, 5e-5 from epoch 44 and 1e-5 from epoch 53. Weight
    decay is 5e-4 up to epoch 29 and 0 afterwards. The first and last layers are float. The order of
    layers in a block is batch normalization, sign, convolution, pooling.

Choices
    scale: `K` multiplies the output by K, as in the paper. `none` (default) leaves the output
    unchanged, as in the authors' code. The authors write that K improves accuracy by less than one
    point.
    gradient: the formula of the weights' gradient.
    `paper` (default) is the paper's formula without one factor. The paper prints r 1{|r| <= 1} as
    the derivative of sign. We assume that the factor r is a misprint.
    `authors` is the formula of the authors' code. The factor 1e9 makes Adam's epsilon and weight
    decay negligible. `jiecaoyu` is the formula of the CIFAR-10 code in jiecaoyu/XNOR-Net-PyTorch.
    This formula includes the derivative of alpha with respect to every weight of the filter. The
    paper's formula leaves out this derivative.
    center, clamp: `center` subtracts the mean over input channels from the latent weights, and
    `clamp` clamps the latent weights to [-1, 1]. The authors' code centers and clamps before every
    step. The paper does not mention centering or clamping. These two options are off by default.

Deviations
    Convolutions pad their input with zeros, as in the authors' code, although binary activations
    are never zero.

Results
    docs/results.md (digits, glyphs).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import above, at_least, grad_between
from qbench.quant.layers import FloatLayer, QLayer, quantized_layers
from qbench.quant.method import Method, Requires, Step, Unsupported, check_kind, factory_for
from qbench.quant.ops import Cells, fused_quantizer, in_float32, on_backward, sign, straight_through, surrogate
from qbench.quant.quantizer import Grid, Quantizer, Storage

GRADIENTS = ("paper", "authors", "jiecaoyu")
ADAM_FACTOR = 1e9
"""Factor by which the authors' code multiplies all gradients before a step of Adam."""
SCALES = ("none", "K")
SIGN_TRAITS = {"monotone_input", "idempotent_input", "clipped_input", "cells_input"}


def check_gradient(gradient: str) -> None:
    """Raise `ValueError` if `gradient` is not one of `GRADIENTS`."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient}: must be one of {', '.join(GRADIENTS)}")


def filter_scale(w: Tensor) -> Tensor:
    """Return the scale alpha = mean|w| of every output filter, (O, 1, ..., 1), without gradient. Eq. 6."""
    return w.detach().abs().mean(tuple(range(1, w.dim())), keepdim=True)


@in_float32
def binarize_weight(w: Tensor, *, gradient: str = "paper") -> Tensor:
    """Binarize weights (O, ...) to mean|w| sign(w) for each output filter, with sign(0) = +1. Section 3.1.

    Args:
        gradient: paper, authors or jiecaoyu; see the method card.
    """
    check_gradient(gradient)
    alpha, n = filter_scale(w), w[0].numel()  # n: weights of one filter
    value, latent = alpha * sign(w), w.detach()
    if gradient == "paper":
        return surrogate(w, value, alpha * (latent.abs() <= 1) + 1 / n)
    centering = 1 - 1 / w.shape[1]
    if gradient == "authors":
        return surrogate(w, value, (alpha * (latent.abs() < 1) + 1 / n) * centering)
    signs = latent.sign()

    def exact(grad: Tensor) -> Tensor:
        through_alpha = (grad * signs).mean(tuple(range(1, grad.dim())), keepdim=True) * signs
        return (grad * alpha * (latent.abs() <= 1) + through_alpha) * (centering * n)

    return straight_through(on_backward(w, exact), value)


def binarize_activation(x: Tensor) -> Tensor:
    """Return sign(x) for activations (any shape), with sign(0) = +1. The gradient is 1 where |x| < 1, else 0."""
    return fused_quantizer(
        x,
        plain=lambda x: surrogate(x, sign(x), x.detach().abs() < 1),
        value=sign,
        backward=lambda grad, x: grad_between(grad, x, -1, 1),
        # four cells: x <= -1, (-1, 0), [0, 1), x >= 1; value and gradient are constant in each
        cells=Cells(lambda x: above(x, -1).add_(at_least(x, 0)).add_(at_least(x, 1)), lambda c: c.sub_(1.5), 4),
        masks=True,
    )


class BinaryWeight(Quantizer):
    """Binary quantizer of one layer's weights."""

    def __init__(self, gradient: str) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return binarize_weight(w, gradient=self.gradient)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values, with one scale group per output filter: -alpha and alpha."""
        alpha = filter_scale(w).reshape(-1, 1)
        return Grid(torch.stack([-alpha, alpha], 1), lambda t: t.reshape(len(t), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of one bit per weight and of one scale per filter."""
        return Storage(w.numel(), 1, 4 * len(w))


class BinaryActivation(Quantizer):
    """Binary quantizer of one layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs of the activations."""
        return binarize_activation(x)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: -1 and 1. The whole tensor is one scale group."""
        return Grid(x.new_tensor([-1.0, 1.0]).reshape(1, 2, 1))


class InputScale(Quantizer):
    """Quantizer that multiplies each output by K, the mean magnitude of the inputs to that output. Section 3.2.

    K restores the magnitudes that sign(x) removes from the products of weights and inputs. The
    layer's bias contains no such product, so the bias is not multiplied.
    """

    def __init__(self, layer: FloatLayer) -> None:
        super().__init__()
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        # A tuple hides the layer from torch, which would otherwise register it as a submodule of its own submodule.
        self.owner = (layer,)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return (y - bias) K + bias."""
        (layer,) = self.owner
        k = self._k(layer, x.detach().abs())
        if layer.bias is None:
            return y * k
        bias = layer.bias.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else layer.bias
        return y * k + bias * (1 - k)

    def _k(self, layer: nn.Conv2d | nn.Linear, magnitude: Tensor) -> Tensor:
        """Return K with a shape that can be broadcast to the layer's output."""
        if not isinstance(layer, nn.Conv2d):
            return magnitude.mean(-1, keepdim=True)
        kernel = (layer.kernel_size[0], layer.kernel_size[1])
        # A: mean magnitude over the channels of each group
        mean = magnitude.reshape(len(magnitude), layer.groups, -1, *magnitude.shape[2:]).mean(2)
        # K = A * k: convolve with a box filter, with the layer's own stride, padding and dilation
        box = mean.new_full((layer.groups, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        k = F.conv2d(mean, box, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return k.repeat_interleave(layer.out_channels // layer.groups, 1) if layer.groups > 1 else k


def _input_scale(name: str, layer: QLayer) -> InputScale | None:
    """Return an `InputScale` for a layer with binary input. If the input is the image or float, return None."""
    if not isinstance(layer.input_q, BinaryActivation):
        return None
    check_kind("xnor with scale=K", name, layer)
    return InputScale(layer)


def weight_quantizer(layer: FloatLayer, gradient: str, center: bool) -> BinaryWeight:
    """Return a layer's weight quantizer.

    Raises:
        Unsupported: the filters have one input channel (c = 1), and the options need more. With
            gradient=authors or gradient=jiecaoyu, the factor 1 - 1 / c would be 0. With `center`,
            all weights would be 0.
    """
    if layer.weight.shape[1] == 1 and (gradient != "paper" or center):
        what = "center=true" if gradient == "paper" else f"gradient={gradient}"
        raise Unsupported(f"{what} cannot train filters with one input channel; leave their layers in float")
    return BinaryWeight(gradient)


def center_and_clamp(model: nn.Module, *, center: bool, clamp: bool) -> None:
    """Center latent weights over input channels and clamp them to [-1, 1], in place, as the authors' code does.

    Weights that are not trained stay as they are.
    """
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            if isinstance(layer.weight_q, BinaryWeight) and layer.weight.requires_grad:
                if center:
                    layer.weight.sub_(layer.weight.mean(1, keepdim=True))
                if clamp:
                    layer.weight.clamp_(-1, 1)


def multiply_gradients(model: nn.Module, factor: float) -> None:
    """Multiply the gradients of all parameters by `factor`, in place."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(factor)


def scale_as_authors(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Multiply all gradients by 1e9 (Adam), or gradients of binary weights by n (SGD), as the authors' code does."""
    if isinstance(optimizer, torch.optim.Adam):
        multiply_gradients(model, ADAM_FACTOR)
        return
    for layer in quantized_layers(model).values():
        if isinstance(layer.weight_q, BinaryWeight) and layer.weight.grad is not None:
            layer.weight.grad.mul_(layer.weight[0].numel())


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, gradient: str, center: bool, clamp: bool
) -> None:
    """Scale the gradients if `gradient` is "authors", step the optimizer, then apply `center_and_clamp`."""
    if gradient == "authors":
        scale_as_authors(model, optimizer)
    optimizer.step()
    center_and_clamp(model, center=center, clamp=clamp)


def step_function(w: int, gradient: str, center: bool, clamp: bool) -> Step | None:
    """Return the function for `Method.step`, or None if the options do not change the optimizer's step."""
    if w == FLOAT or not (gradient == "authors" or center or clamp):
        return None
    return partial(optimizer_step, gradient=gradient, center=center, clamp=clamp)


def build(
    *, w: int = 1, a: int = 1, gradient: str = "paper", scale: str = "none", center: bool = False, clamp: bool = False
) -> Method:
    """Return the `Method` for XNOR-Net. The method card (module docstring) explains the options."""
    check_gradient(gradient)
    if scale not in SCALES:
        raise ValueError(f"scale={scale}: must be one of {', '.join(SCALES)}")
    if a == FLOAT and scale == "K":
        raise Unsupported(
            f"scale=K has no effect at bits.a={FLOAT}, because float inputs keep the magnitudes that K would restore"
        )
    changes_weights = center or clamp
    return Method(
        name="xnor",
        bits=Bits(w, a),
        supported_bits={"w": (1, FLOAT), "a": (1, FLOAT)},
        option_slots={"gradient": "w", "center": "w", "clamp": "w", "scale": "a"},
        requires=Requires(act="fused"),
        traits=frozenset({"odd", "monotone", "idempotent"} | SIGN_TRAITS),
        weight=factory_for(w, lambda name, layer, bits: weight_quantizer(layer, gradient, center)),
        input=lambda name, layer, bits: BinaryActivation(),
        output=(lambda name, layer, bits: _input_scale(name, layer)) if scale == "K" else None,
        prepare=(lambda model, probe: center_and_clamp(model, center=center, clamp=clamp)) if changes_weights else None,
        step=step_function(w, gradient, center, clamp),
    )
