"""Gupta: everything that training stores is fixed point, rounded stochastically; no float weights stand behind.

Paper
    Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical Precision", ICML 2015,
    arXiv 1502.02551. No official code is known.

Idea
    16 bits are enough to train with if rounding is unbiased: an update below half a step is always lost when rounded to
    nearest, and survives on average when rounded up with a probability equal to its fraction of a step.

Forward
    A format <IL, FL> has WL = IL + FL bits, the sign in IL, step eps = 2^-FL and range [-2^(IL-1), 2^(IL-1) - eps].
    Convert(x) saturates, never wraps, and rounds within; with f = floor(x / eps) eps, nearest: f if x <= f + eps / 2,
    else f + eps; stochastic: f + eps with probability (x - f) / eps, else f. (Saturation and stochastic rounding from a
    restatement of the paper, the range's ends and the side of a tie from memory.)
    A layer: y = Convert(sum of w x, + bias), products and sum wide, one rounding. Weights are used as stored.

Backward
    A layer's error dL/dy = Convert of the wide sum that arrives; both of its gradients read it. Through Convert of
    activations: the gradient where they are in range, else 0.
    Update: W <- Convert(W + Convert(dW)), dW what the optimizer adds; biases the same.

Schedule
    One phase, from random weights rounded to nearest.

Sites
    weight (with the bias), input, output (activations forward, errors backward).

State
    None: the weights and biases themselves lie on their grid.

Bits
    WL of weights, biases, updates, momentum (w), of layers' inputs and outputs (a), of errors (g): 8-20 or 32; by
    default w16a16g16. Below 8, outputs at the default IL would have fewer than 2 fraction bits; above 20, the widest
    that the paper is remembered to use, the check of float32 values against a grid means nothing.

Protocol
    From memory, unverified: MNIST and CIFAR-10, a perceptron and small CNNs with ReLU, no batch normalization; SGD, for
    the CNNs with momentum 0.9; WL 16, FL varied for weights and updates, outputs at <6,10> and <4,12>.

Choices
    rounding: `stochastic` or `nearest`, the paper's comparison, for all conversions in training. Evaluation, in its
    gradients too, rounds to nearest and draws nothing.
    integer_*: IL of each kind; FL is WL - IL. Weights, biases, updates 2 and activations 6 as remembered above.
    Errors -4, +-1/32: the loss is a mean, and an error at the logits at most 1/64 for 64 images; fewer want more.
    momentum: `float`, or `fixed`: rounded (SGD's buffer, Adam's first moment) behind each step, to integer_momentum.
    The paper does not say. Adam's second moment stays float: squares do not fit such a format.
    Saturated values get no gradient, as of a clip; of this the sources say nothing.
    ReLU, pooling and sums between layers are float on values that are on the grid; the next layer rounds its input.

Deviations
    First and last layer stay float by the layer policy; the paper has everything in fixed point.
    The wide sum is float32's, of 24 significant bits: near a threshold it may take the neighbouring value. (On CUDA,
    torch's default TF32 convolutions keep 11 bits of each factor.) dW is taken back out of the float32 sum W + dW:
    below 2^-24 for |W| < 2, 1/1024 of a step at WL 16, it is gone.

Results
    README (digits).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import blockwise, grad_within, stochastic_rounding_fill
from qbench.quant.install import ImageQuantizer
from qbench.quant.layers import FloatLayer, QLayer, quantized_layers
from qbench.quant.method import Method, Requires, Unsupported
from qbench.quant.ops import fused_quantizer, in_float32, on_backward, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage

ROUNDINGS = ("stochastic", "nearest")
MOMENTUMS = ("float", "fixed")
WIDTHS = (*range(8, 21), FLOAT)
INTEGERS = range(-16, 17)
MOMENTUM_STATE = ("momentum_buffer", "exp_avg")  # SGD's, Adam's


@in_float32
def to_fixed(
    x: Tensor, integer_bits: int, fraction_bits: int, rounding: str, *, generator: Generator | None = None
) -> Tensor:
    """Convert to fixed point <integer_bits, fraction_bits>: saturate, then round to a multiple of 2^-fraction_bits.

    The range is -2^(integer_bits-1) to 2^(integer_bits-1) - 2^-fraction_bits; in it, ends included, gradients pass.

    Args:
        integer_bits, fraction_bits: either may be negative; together 1 to 24, in float64 1 to 53.
        rounding: `nearest`, half way down; `stochastic`, up with the probability of the fraction, one draw an element.
        generator: of the draws; torch's global one without.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding}: allowed are {', '.join(ROUNDINGS)}")
    held = 53 if x.dtype == torch.float64 else 24
    if not 1 <= integer_bits + fraction_bits <= held:
        total = integer_bits + fraction_bits
        raise ValueError(f"integer_bits + fraction_bits={total}: allowed are 1 to {held}, the bits computed with")
    eps = 2.0**-fraction_bits
    low, high = -(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 1) - eps

    def value(x: Tensor) -> Tensor:
        rounded = stochastic_rounding_fill(x, generator) if rounding == "stochastic" else _nearest

        def fill(piece: Tensor, made: Tensor, steps: Tensor, *scratch: Tensor) -> None:
            rounded(torch.clamp(piece, low, high, out=steps).mul_(1 / eps), made, *scratch)
            made.mul_(eps)

        return blockwise(x, fill, scratch=3)

    return fused_quantizer(
        x,
        plain=lambda x: straight_through(x.clamp(low, high), value(x)),
        value=value,
        backward=lambda grad, x: grad_within(grad, x, low, high),
        repeatable=rounding == "nearest",
    )


def _nearest(steps: Tensor, made: Tensor, half: Tensor, *scratch: Tensor) -> None:
    torch.add(torch.floor(steps, out=made), 0.5, out=half)
    made.add_(steps.gt_(half))


class Format(NamedTuple):
    """A fixed-point format <integer, fraction> and how to round to it; float where its word length is 32."""

    integer: int
    fraction: int
    rounding: str

    def convert(self, x: Tensor, training: bool = True) -> Tensor:
        """Return x in this format; outside training rounded to nearest."""
        if self.integer + self.fraction == FLOAT:
            return x
        return to_fixed(x, self.integer, self.fraction, self.rounding if training else "nearest")

    def grid(self, like: Tensor) -> Grid:
        """Return all its 2^WL values as one group."""
        half = 2 ** (self.integer + self.fraction - 1)
        codes = torch.arange(-half, half, device=like.device).to(like.dtype)
        return Grid((codes * 2.0**-self.fraction).reshape(1, -1, 1))


class GuptaWeight(Quantizer):
    """A layer's weights, which lie on their grid after `prepare` and each step; holds what is stored with them too."""

    def __init__(self, weights: Format, biases: Format, updates: Format, momentum: Format) -> None:
        super().__init__()
        self.weights, self.biases, self.updates, self.momentum = weights, biases, updates, momentum

    def forward(self, w: Tensor) -> Tensor:
        """Return w itself: were it rounded here, w would be a float copy behind."""
        return w

    def grid(self, w: Tensor) -> Grid:
        """One group: the values of the weights' format."""
        return self.weights.grid(w)

    def bytes(self, w: Tensor) -> Storage:
        """Codes alone; the format is fixed."""
        return Storage(w.numel(), self.weights.integer + self.weights.fraction, 0)


class GuptaActivation(Quantizer):
    """A layer's input in the activations' format."""

    def __init__(self, activations: Format) -> None:
        super().__init__()
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded input; what is on the grid stays."""
        return self.activations.convert(x, self.training)

    def grid(self, x: Tensor) -> Grid:
        """One group: the values of the activations' format."""
        return self.activations.grid(x)


class GuptaOutput(Quantizer):
    """A layer's output in the activations' format, and its gradient in the errors'."""

    def __init__(self, activations: Format, errors: Format) -> None:
        super().__init__()
        self.activations, self.errors = activations, errors

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the rounded y; its gradient will be rounded."""
        training = self.training
        y = self.activations.convert(y, training)
        return on_backward(y, lambda d: self.errors.convert(d, training))

    def grid(self, grad: Tensor) -> Grid:
        """One group: the values of the errors' format."""
        return self.errors.grid(grad)


def stored(model: nn.Module) -> Iterator[tuple[Tensor, Format, GuptaWeight]]:
    """Yield every weight and bias in fixed point, with its format and its layer's others."""
    for layer in quantized_layers(model).values():
        if isinstance(site := layer.weight_q, GuptaWeight):
            yield layer.weight, site.weights, site
            if layer.bias is not None:
                yield layer.bias, site.biases, site


@torch.no_grad()
def prepare(model: nn.Module, probe: object) -> None:
    """Round the initial weights and biases to nearest."""
    for parameter, form, _ in stored(model):
        parameter.copy_(form.convert(parameter, training=False))


@torch.no_grad()
def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step with every update, then its sum with the parameter, then momentum in fixed point."""
    before = [(parameter, parameter.clone(), form, site) for parameter, form, site in stored(model)]
    optimizer.step()
    for parameter, old, form, site in before:
        parameter.copy_(form.convert(old + site.updates.convert(parameter - old)))
        for key, state in optimizer.state.get(parameter, {}).items():
            if key in MOMENTUM_STATE and state is not None:
                state.copy_(site.momentum.convert(state))


def build(
    *,
    w: int = 16,
    a: int = 16,
    g: int = 16,
    rounding: str = "stochastic",
    integer_weights: int = 2,
    integer_biases: int = 2,
    integer_activations: int = 6,
    integer_errors: int = -4,
    integer_updates: int = 2,
    momentum: str = "float",
    integer_momentum: int = 2,
) -> Method:
    """Return training in fixed point; for the options see the card."""
    integers = {"weights": integer_weights, "biases": integer_biases, "activations": integer_activations}
    integers |= {"errors": integer_errors, "updates": integer_updates, "momentum": integer_momentum}
    for key, value, allowed in (("rounding", rounding, ROUNDINGS), ("momentum", momentum, MOMENTUMS)):
        if value not in allowed:
            raise ValueError(f"{key}={value}: allowed are {', '.join(allowed)}")
    for key, integer in integers.items():
        if integer not in INTEGERS:
            raise ValueError(f"integer_{key}={integer}: allowed are {INTEGERS[0]} to {INTEGERS[-1]}")
    if momentum == "fixed" and w == FLOAT:
        raise Unsupported(f"momentum=fixed has no effect at bits.w={FLOAT}: it takes the weights' word length")

    def form(kind: str, bits: int) -> Format:
        return Format(integers[kind], bits - integers[kind], rounding)

    def weight(name: str, layer: FloatLayer, bits: int) -> GuptaWeight:
        kept = form("momentum", bits if momentum == "fixed" else FLOAT)
        return GuptaWeight(form("weights", bits), form("biases", bits), form("updates", bits), kept)

    def output(name: str, layer: QLayer, bits: int) -> GuptaOutput | None:
        own, image = layer.bits, isinstance(layer.input_q, ImageQuantizer)  # own.a may be the image's
        width = a if image or FLOAT in (a, own.a) else own.a  # float where activations are another method's
        absent = own == Bits() or bits == width == FLOAT
        return None if absent else GuptaOutput(form("activations", width), form("errors", bits))

    return Method(
        name="gupta",
        bits=Bits(w, a, g),
        supported_bits=dict.fromkeys("wag", WIDTHS),
        requires=Requires(norm="none", start="scratch", act="keep"),
        traits=frozenset({"monotone_input", "idempotent_input", "clipped_input", "no_master"}),
        weight=weight,
        input=lambda name, layer, bits: GuptaActivation(form("activations", bits)),
        output=output,
        prepare=prepare,
        step=stepped,
    )
