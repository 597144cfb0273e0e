"""Deviations of public code from DoReFa-Net's paper and from the current code of its authors."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qbench.bits import FLOAT
from qbench.deviations.registry import Deviation, recast
from qbench.methods.dorefa import DoReFaActivation, DoReFaGradient, DoReFaWeight, quantize_activation, quantize_weight
from qbench.quant.layers import FloatLayer, QLayer
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import in_float32, on_backward, quantize_k, sign, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage

# Weights


def _max_magnitude(t: Tensor) -> Tensor:
    """Return max|t| without gradient, or 1 if all elements of t are zero."""
    top = t.detach().abs().max()
    return torch.where(top == 0, torch.ones_like(top), top)


@in_float32
def detached_max(w: Tensor, bits: int) -> Tensor:
    """Quantize weights. The backward pass treats the maximum of |tanh w| as a constant."""
    t = torch.tanh(w)
    return 2 * quantize_k(t / (2 * _max_magnitude(t)) + 0.5, bits) - 1


@in_float32
def rescaled_by_max(w: Tensor, bits: int) -> Tensor:
    """Quantize weights as `detached_max` does, then multiply the result by max|tanh w|.

    All levels are between -max|tanh w| and max|tanh w|.
    """
    return _max_magnitude(torch.tanh(w)) * detached_max(w, bits)


@in_float32
def no_tanh_gradient(w: Tensor, bits: int) -> Tensor:
    """Quantize weights with dL/dw = dL/dw_hat. The backward pass ignores tanh and the maximum."""
    return straight_through(w, quantize_weight(w.detach(), bits))


@in_float32
def sign_of_zero(w: Tensor) -> Tensor:
    """Binarize weights to mean|w| sign(w), with sign(0) = 0."""
    return straight_through(w, w.detach().abs().mean() * w.detach().sign())


@in_float32
def unit_weights(w: Tensor) -> Tensor:
    """Binarize weights to +-1. The gradient passes, as it does with more bits, through tanh and the maximum."""
    t = torch.tanh(w)
    top = t.abs().max()
    return straight_through(t / torch.where(top == 0, torch.ones_like(top), top), sign(w))


class DetachedMax(DoReFaWeight):
    """Weight quantizer whose backward pass treats the maximum of |tanh w| as a constant."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return detached_max(w, self.bits)


class RescaledByMax(DoReFaWeight):
    """Weight quantizer that rescales quantized weights to the range of tanh w."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return rescaled_by_max(w, self.bits)

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group, which has 2^bits levels between -max|tanh w| and max|tanh w|."""
        return Grid(super().grid(w).points * _max_magnitude(torch.tanh(w)))

    def bytes(self, w: Tensor) -> Storage:
        """Return the bytes that the codes and the maximum need."""
        return Storage(w.numel(), self.bits, 4)


class NoTanhGradient(DoReFaWeight):
    """Weight quantizer with dL/dw = dL/dw_hat."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return no_tanh_gradient(w, self.bits)


class SignOfZero(DoReFaWeight):
    """Binary weight quantizer with sign(0) = 0, so that zero is a third value."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return sign_of_zero(w)

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group, whose levels are -E, 0 and E, where E = mean|w|."""
        scale = w.abs().mean()
        return Grid(torch.stack([-scale, torch.zeros_like(scale), scale]).reshape(1, 3, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the size of the codes and the scale in bytes. A code of three levels needs two bits."""
        return Storage(w.numel(), 2, 4)


class UnitWeights(DoReFaWeight):
    """Binary weight quantizer without a scale."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return unit_weights(w)

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group, whose levels are -1 and 1."""
        return Grid(w.new_tensor([-1.0, 1.0]).reshape(1, 2, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the bytes that the codes need."""
        return Storage(w.numel(), 1, 0)


# Activations


@in_float32
def tanh_activation(x: Tensor, bits: int) -> Tensor:
    """Divide t = tanh(relu(x)) by the maximum of t over the batch, and quantize the quotient."""
    t = torch.tanh(x.clamp(min=0))
    return quantize_k(t / _max_magnitude(t), bits)


@in_float32
def tenth_of_activation(x: Tensor, bits: int) -> Tensor:
    """Quantize clip(0.1 x, 0, 1)."""
    return quantize_k((0.1 * x).clamp(0, 1), bits)


@in_float32
def sign_activation(x: Tensor, bits: int) -> Tensor:
    """Return 1 for x > 0 and 0 otherwise, with the gradient of clip(x, 0, 1). The width is always one bit."""
    clipped = x.clamp(0, 1)
    return straight_through(clipped, clipped.detach().sign())


# Gradients


def _quantize_gradient(x: Tensor, bits: int, m: Tensor, noise: Tensor) -> Tensor:
    """Quantize a gradient by eq. 12 of the paper, with the given maximum m and the given noise."""
    return 2 * m * (quantize_k((x / (2 * m) + 0.5 + noise).clamp(0, 1), bits) - 0.5)


def _sample_max(x: Tensor) -> Tensor:
    """Return max|x| of each of the N samples, of shape (N, 1, ..., 1)."""
    return x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)


def _noise(like: Tensor, bits: int) -> Tensor:
    """Return noise with the paper's distribution and the shape of `like`."""
    half_step = 0.5 / (2**bits - 1)
    return torch.empty_like(like).uniform_(-half_step, half_step)


@in_float32
def noise_per_sample(x: Tensor, bits: int) -> Tensor:
    """Quantize a gradient (N, ...). The noise is one random number per sample instead of one per element."""
    m = _sample_max(x)
    return torch.where(m == 0, torch.zeros_like(x), _quantize_gradient(x, bits, m, _noise(m, bits)))


@in_float32
def max_per_tensor(x: Tensor, bits: int) -> Tensor:
    """Quantize a gradient of any shape with one maximum for the whole batch."""
    m = x.abs().max()
    return torch.where(m == 0, torch.zeros_like(x), _quantize_gradient(x, bits, m, _noise(x, bits)))


@in_float32
def no_noise(x: Tensor, bits: int) -> Tensor:
    """Quantize a gradient (N, ...) by rounding to the nearest level."""
    m = _sample_max(x)
    return torch.where(m == 0, torch.zeros_like(x), _quantize_gradient(x, bits, m, torch.zeros_like(x)))


@in_float32
def nan_on_zero(x: Tensor, bits: int) -> Tensor:
    """Quantize a gradient (N, ...) by the paper's formula, which gives 0 / 0 if all elements of a sample are zero."""
    return _quantize_gradient(x, bits, _sample_max(x), _noise(x, bits))


class NoisePerSample(DoReFaGradient):
    """Gradient quantizer with one random number of noise per sample."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y. In the backward pass, the gradient of y is quantized."""
        return on_backward(y, lambda d: noise_per_sample(d, self.bits))


class MaxPerTensor(DoReFaGradient):
    """Gradient quantizer with one scale for the whole batch."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y. In the backward pass, the gradient of y is quantized."""
        return on_backward(y, lambda d: max_per_tensor(d, self.bits))

    def grid(self, grad: Tensor) -> Grid:
        """Return a grid with one group for the whole batch."""
        return Grid(super().grid(grad.reshape(1, -1)).points)


class NoNoise(DoReFaGradient):
    """Gradient quantizer that rounds to the nearest level."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y. In the backward pass, the gradient of y is quantized."""
        return on_backward(y, lambda d: no_noise(d, self.bits))


class NanOnZero(DoReFaGradient):
    """Gradient quantizer whose result is 0 / 0 for samples whose gradient is zero."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y. In the backward pass, the gradient of y is quantized."""
        return on_backward(y, lambda d: nan_on_zero(d, self.bits))


# The deviations


def _weights(kind: type[DoReFaWeight], what: str, source: str, *, binary: bool = False) -> Deviation:
    """Return a deviation of the weight quantizer.

    The deviation changes one-bit weights if `binary` is true, else weights with more bits.
    """

    def where(module: Quantizer) -> bool:
        return isinstance(module, DoReFaWeight) and (module.bits == 1) is binary

    return Deviation(
        what, source, lambda method: replace(method, weight=recast(method.weight, kind, where)),
        acts=lambda bits: bits.w == 1 if binary else 1 < bits.w < FLOAT, bits="w1" if binary else "w2",
    )  # fmt: skip


def _activations(
    name: str,
    function: Callable[[Tensor, int], Tensor],
    what: str,
    source: str,
    *,
    bits: str = "w32a2",
    binary: bool = False,
) -> Deviation:
    """Return a deviation (a known difference of public code) that replaces DoReFa's clip of activations.

    If `binary` is true, the deviation changes only one-bit activations.
    """

    def apply(method: Method) -> Method:
        original = method.input

        def deviating(layer_name: str, layer: FloatLayer, width: int) -> Quantizer:
            assert original is not None
            module = original(layer_name, layer, width)
            assert isinstance(module, DoReFaActivation)
            if module.function is not quantize_activation:
                raise Unsupported(f"deviation={name} changes the clip of activations, so add method.activation=clip")
            if width == 1 or not binary:
                module.function = function
            return module

        return replace(method, input=deviating)

    acts = (lambda bits: bits.a == 1) if binary else (lambda bits: bits.a < FLOAT)
    return Deviation(what, source, apply, acts=acts, bits=bits)


def _gradients(kind: type[DoReFaGradient], what: str, source: str) -> Deviation:
    """Return a deviation whose gradient quantizers are of the class `kind`."""

    def apply(method: Method) -> Method:
        original = method.output

        def deviating(layer_name: str, layer: QLayer, bits: int) -> Quantizer | None:
            assert original is not None
            module = original(layer_name, layer, bits)
            if module is not None:
                module.__class__ = kind
            return module

        return replace(method, output=deviating)

    return Deviation(what, source, apply, acts=lambda bits: bits.g < FLOAT, bits="w32a32g4")


CSYHHU = "csyhhu/Awesome-Deep-Neural-Network-Compression, Codes/DoReFa/module.py"

DEVIATIONS = {
    "detached_max": _weights(
        DetachedMax, "The maximum of |tanh w| is a constant in the backward pass.",
        "jsk1107/dorefanet-pytorch, dorefanet.py; a test in larq/larq#651 expects this deviation",
    ),
    "rescaled_by_max": _weights(
        RescaledByMax,
        "After rounding, weights are multiplied by max|tanh w| again; the maximum is a constant in the backward pass.",
        "zzzxxxttt/pytorch_DoReFaNet, utils/quant_dorefa.py; questioned in its issue 10",
    ),
    "no_tanh_gradient": _weights(
        NoTanhGradient, "The backward pass ignores tanh and the maximum: dL/dw = dL/dw_hat.",
        "hpi-xnor/BMXNet#36",
    ),
    "sign_of_zero": _weights(
        SignOfZero, "sign(0) = 0 in binary weights.",
        "torch.sign in zzzxxxttt/pytorch_DoReFaNet, utils/quant_dorefa.py, and in jsk1107/dorefanet-pytorch, "
        "dorefanet.py; tf.sign in tensorpack until 0dbcbac7 (2018)",
        binary=True,
    ),
    "unit_weights": _weights(
        UnitWeights, "Binary weights follow the formula for more bits, so they are +-1, without a scale.",
        "tensorpack's first svhn-digit-dorefa.py (2016), before 236c78e0",
        binary=True,
    ),
    "tanh_activation": _activations(
        "tanh_activation", tanh_activation,
        "tanh x / max|tanh x| over the batch, the formula for weights, replaces the clip of activations.",
        f"{CSYHHU}; ModelTC/MQBench, mqbench/fake_quantize/dorefa.py if this quantizer is used for activations",
    ),
    "tenth_of_activation": _activations(
        "tenth_of_activation", tenth_of_activation, "Activations are multiplied by 0.1 before the clip.",
        "Jzz24/pytorch_quantization, models/quant_dorefa.py, and its issue 3; 666DZY666/micronet, WqAq/dorefa",
        bits="w32a4",
    ),
    "sign_activation": _activations(
        "sign_activation", sign_activation, "One-bit activations are 1 for every x > 0, not only for x > 0.5.",
        "torch.sign after the clip in zzzxxxttt/pytorch_DoReFaNet, utils/quant_dorefa.py",
        bits="w32a1", binary=True,
    ),
    "noise_per_sample": _gradients(
        NoisePerSample, "All elements of a sample's gradient share one draw of noise.",
        "a misreading of eq. 12, whose noise has no index; found in no public code",
    ),
    "max_per_tensor": _gradients(
        MaxPerTensor, "Gradients are scaled by the maximum of the batch, not by the maximum of each sample.",
        f"{CSYHHU}, dorefa_gradient_attachment",
    ),
    "no_noise": _gradients(
        NoNoise, "Gradients are rounded to the nearest level, without noise.",
        f"{CSYHHU}, dorefa_gradient_attachment",
    ),
    "nan_on_zero": _gradients(
        NanOnZero, "A sample whose gradient is zero gives 0 / 0.",
        "tensorpack, examples/DoReFa-Net/dorefa.py divides by the maximum without a guard",
    ),
}  # fmt: skip
