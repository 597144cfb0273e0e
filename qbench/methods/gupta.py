"""Gupta: training in fixed point with stochastic rounding, without a float copy of the weights.

Paper
    Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical Precision",
    ICML 2015, arXiv 1502.02551. No official code is known.

Idea
    All numbers are stored in fixed point, without a float copy of the weights. 16 bits are enough
    for training if rounding is unbiased. Rounding to nearest loses every update that is smaller
    than half a step. With stochastic rounding, the mean of the rounded update equals the exact
    update. For example, an update of a tenth of a step is rounded up to a whole step with
    probability 1/10, and to 0 otherwise.

Forward
    A format <IL, FL> has WL = IL + FL bits: IL integer bits, including the sign, and FL fraction
    bits. The step is eps = 2^-FL. The range is [-2^(IL-1), 2^(IL-1) - eps].
    Convert(x) saturates: it sets values outside the range to the nearest end of the range. It
    rounds values inside the range. Let f = floor(x / eps) eps. Nearest rounding returns f if x <= f
    + eps / 2, else f + eps. Stochastic rounding returns f + eps with probability (x - f) / eps,
    else f. (Saturation and stochastic rounding are taken from a text that restates the paper. The
    ends of the range and the rounding of ties are from memory.)
    A layer computes y = Convert(sum(w x) + bias). The products and the sum are computed in a wider
    format. Only the sum is rounded to the format <IL, FL>. Stored weights are on the grid already,
    so the layer does not round them.

Backward
    The gradients that arrive from the next layers are summed in a wider format, and Convert rounds
    this sum. The result is the error dL/dy of the layer. The gradients of the layer's weights and
    input are computed from this error. The derivative of Convert for activations is 1 where the
    activation is in range, and 0 elsewhere.
    Update: W <- Convert(W + Convert(dW)), where dW is the optimizer's update. Biases are updated in
    the same way.

Schedule
    Training has one phase. The initial weights are random and rounded to nearest.

Sites
    weight (with the bias), input, output (activations forward, errors backward).

State
    None. The weights and biases themselves are stored as values on the fixed-point grid.

Bits
    w, a and g each 8-20 or 32; by default w16a16g16. The three widths are word lengths WL: w is for
    weights, biases, updates and momentum, a is for inputs and outputs of layers, and g is for
    errors. With fewer than 8 bits, outputs at the default IL would have fewer than 2 fraction bits.
    20 bits are the widest format in the paper (from memory). With more than 20 bits, float32 is too
    coarse to show whether a value is on the grid.

Protocol
    The protocol is from memory and not verified. The data are MNIST and CIFAR-10. The networks are
    a perceptron and small CNNs with ReLU, without batch normalization. Training uses SGD, with
    momentum 0.9 for the CNNs. WL is 16. Several FL are tried for weights and updates. The formats
    of outputs are <6,10> and <4,12>.

Choices
    rounding: `stochastic` or `nearest`, for all conversions in training. The paper compares the
    two. In evaluation mode, values and gradients are rounded to nearest, and no random numbers are
    drawn.
    integer_*: IL of each kind of tensor. FL is WL - IL. By default, IL is 2 for weights, biases and
    updates, and 6 for activations. Like the protocol, these defaults are from memory. For errors,
    IL is -4, so their range is +-1/32. This range is sufficient for batches of 64 images. The loss
    is a mean over the batch, so errors at the logits are at most 1/64. Smaller batches need a
    larger range.
    momentum: `float` or `fixed`. With `fixed`, SGD's momentum buffer or Adam's first moment is
    rounded after each step, to a format with integer_momentum integer bits. The paper does not say
    whether its momentum is float or fixed. Adam's second moment stays float, because squares of
    gradients do not fit such a format.
    The gradient of a saturated value is 0, as in methods that clip values. The sources do not state
    this gradient. ReLU, pooling and sums between layers are computed in float, from values on the
    grid. The input quantizer of the next layer rounds the results.

Deviations
    By default, the first and last layers stay float (`layers.first`, `layers.last`). In the paper,
    all layers are in fixed point.
    The sum of a layer's products is computed in float32, with 24 significant bits. If the exact sum
    is close to a rounding threshold, the result may therefore be the neighbouring grid value. (On
    CUDA, torch's default TF32 convolutions keep 11 bits of each factor.)
    dW is computed as the difference of the float32 values W + dW and W. For |W| < 2, a dW below
    2^-24 is therefore lost. With WL 16, 2^-24 is 1/1024 of a step.

Results
    docs/results.md (digits).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import blockwise, grad_within, stochastic_rounding_fill
from qbench.quant.image import ImageQuantizer
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.method import Method, Requires, Unsupported
from qbench.quant.ops import fused_quantizer, on_backward, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage

ROUNDINGS = ("stochastic", "nearest")
MOMENTUMS = ("float", "fixed")
INTEGER_MOMENTUM = 2
WIDTHS = (*range(8, 21), FLOAT)
INTEGERS = range(-16, 17)
MOMENTUM_STATE = ("momentum_buffer", "exp_avg")  # the names in SGD and in Adam


def to_fixed(
    x: Tensor, integer_bits: int, fraction_bits: int, rounding: str, *, generator: Generator | None = None
) -> Tensor:
    """Convert x (any shape) to fixed point <integer_bits, fraction_bits>: saturate, then round to the grid. Section 3.

    The grid has steps of 2^-fraction_bits. The range is -2^(integer_bits-1) to 2^(integer_bits-1) -
    2^-fraction_bits. The gradient is 1 inside the range, including both ends, and 0 outside.

    Args:
        integer_bits, fraction_bits: IL and FL. One of the two may be negative. IL + FL must be 1 to
            24 for float32, and 1 to 53 for float64.
        rounding: `nearest`, with ties rounded down, or `stochastic`. Stochastic rounding draws one
            random number per element. The probability of rounding up is the distance from the lower
            grid value, measured in steps.
        generator: source of the random numbers, by default torch's global generator.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding}: must be one of {', '.join(ROUNDINGS)}")
    significand = 53 if x.dtype == torch.float64 else 24
    if not 1 <= integer_bits + fraction_bits <= significand:
        total = integer_bits + fraction_bits
        raise ValueError(
            f"integer_bits + fraction_bits={total}: must be 1 to {significand}, the significant bits of {x.dtype}"
        )
    eps = 2.0**-fraction_bits
    low, high = -(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 1) - eps

    def value(x: Tensor) -> Tensor:
        round_into = stochastic_rounding_fill(x, generator) if rounding == "stochastic" else _round_to_nearest

        def fill(piece: Tensor, result: Tensor, steps: Tensor, *scratch: Tensor) -> None:
            # saturate, and count in steps of the grid
            torch.clamp(piece, low, high, out=steps).mul_(1 / eps)
            # the only rounding: eps is a power of two, so both products are exact
            round_into(steps, result, *scratch)
            result.mul_(eps)

        return blockwise(x, fill, scratch=3)

    return fused_quantizer(
        x,
        plain=lambda x: straight_through(x.clamp(low, high), value(x)),
        value=value,
        backward=lambda grad, x: grad_within(grad, x, low, high),
        masks=True,
        repeatable=rounding == "nearest",
    )


def _round_to_nearest(steps: Tensor, result: Tensor, half: Tensor, *scratch: Tensor) -> None:
    """Write `steps`, rounded to nearest with ties down, to `result`. Overwrite `steps` and `half`."""
    torch.add(torch.floor(steps, out=result), 0.5, out=half)
    result.add_(steps.gt_(half))


class FixedPointFormat(NamedTuple):
    """A fixed-point format <integer, fraction> with a rounding mode. A word length of 32 means float."""

    integer: int
    fraction: int
    rounding: str

    def convert(self, x: Tensor, training: bool = True) -> Tensor:
        """Return x in this format. In evaluation mode, always round to nearest."""
        if self.integer + self.fraction == FLOAT:
            return x
        return to_fixed(x, self.integer, self.fraction, self.rounding if training else "nearest")

    def grid(self, like: Tensor) -> Grid:
        """Return the allowed values: all 2^WL values of the format. The whole tensor is one scale group."""
        half = 2 ** (self.integer + self.fraction - 1)
        codes = torch.arange(-half, half, device=like.device).to(like.dtype)
        return Grid((codes * 2.0**-self.fraction).reshape(1, -1, 1))


class GuptaWeight(Quantizer):
    """Quantizer of one layer's weights. `prepare` and each training step round the weights to the grid.

    The quantizer also stores the fixed-point formats of biases, updates and momentum.
    """

    def __init__(
        self,
        weights: FixedPointFormat,
        biases: FixedPointFormat,
        updates: FixedPointFormat,
        momentum: FixedPointFormat,
    ) -> None:
        super().__init__()
        self.weights, self.biases, self.updates, self.momentum = weights, biases, updates, momentum

    def forward(self, w: Tensor) -> Tensor:
        """Return w unchanged. `prepare` and the training steps round w, so that no float copy of the weights exists."""
        return w

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: all values of the weights' format. The whole tensor is one scale group."""
        return self.weights.grid(w)

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes. The fixed-point format is constant, so it is not stored."""
        return Storage(w.numel(), self.weights.integer + self.weights.fraction, 0)


class GuptaActivation(Quantizer):
    """Quantizer of one layer's input to the format of activations."""

    def __init__(self, activations: FixedPointFormat) -> None:
        super().__init__()
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded input. Values already on the grid stay the same."""
        return self.activations.convert(x, self.training)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: all values of the activations' format. The whole tensor is one scale group."""
        return self.activations.grid(x)


class GuptaOutput(Quantizer):
    """Quantizer of one layer's output y, in the format of activations, and of dL/dy, in the format of errors."""

    def __init__(self, activations: FixedPointFormat, errors: FixedPointFormat) -> None:
        super().__init__()
        self.activations, self.errors = activations, errors

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the rounded y. The backward pass rounds the gradient of y."""
        training = self.training
        y = self.activations.convert(y, training)
        return on_backward(y, lambda d: self.errors.convert(d, training))

    def grid(self, grad: Tensor) -> Grid:
        """Return the allowed values: all values of the errors' format. The whole tensor is one scale group."""
        return self.errors.grid(grad)


def fixed_point_parameters(model: nn.Module) -> Iterator[tuple[Tensor, FixedPointFormat, GuptaWeight]]:
    """Yield (tensor, format, weight quantizer of the layer) for each tensor of weights or biases in fixed point."""
    for layer in quantized_layers(model).values():
        if isinstance(site := layer.weight_q, GuptaWeight):
            yield layer.weight, site.weights, site
            if layer.bias is not None:
                yield layer.bias, site.biases, site


@torch.no_grad()
def prepare(model: nn.Module, probe: object) -> None:
    """Round the initial weights and biases to nearest."""
    for parameter, fixed_format, _ in fixed_point_parameters(model):
        parameter.copy_(fixed_format.convert(parameter, training=False))


@torch.no_grad()
def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, then convert the updates, the updated parameters and the momentum to fixed point."""
    before = [(p, p.clone(), fixed_format, site) for p, fixed_format, site in fixed_point_parameters(model)]
    optimizer.step()
    for parameter, old, fixed_format, site in before:
        # W <- Convert(W + Convert(dW)), where dW is the change that the optimizer made
        parameter.copy_(fixed_format.convert(old + site.updates.convert(parameter - old)))
        for key, state in optimizer.state.get(parameter, {}).items():
            if key in MOMENTUM_STATE and state is not None:
                state.copy_(site.momentum.convert(state))


def unused_options(model: nn.Module) -> dict[str, str]:
    """Return `integer_biases` with the reason, if it has no effect because no quantized layer has a bias."""
    biases = any(layer.bias is not None for layer in quantized_layers(model).values() if layer.bits.w < FLOAT)
    return {} if biases else {"integer_biases": "no quantized layer has a bias"}


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
    integer_momentum: int = INTEGER_MOMENTUM,
) -> Method:
    """Return the `Method` for fixed-point training. The method card (module docstring) explains the options."""
    integers = {"weights": integer_weights, "biases": integer_biases, "activations": integer_activations}
    integers |= {"errors": integer_errors, "updates": integer_updates, "momentum": integer_momentum}
    for key, value, allowed in (("rounding", rounding, ROUNDINGS), ("momentum", momentum, MOMENTUMS)):
        if value not in allowed:
            raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")
    for key, integer in integers.items():
        if integer not in INTEGERS:
            raise ValueError(f"integer_{key}={integer}: must be {INTEGERS[0]} to {INTEGERS[-1]}")
    if momentum == "float" and integer_momentum != INTEGER_MOMENTUM:
        raise Unsupported(f"integer_momentum={integer_momentum} has no effect; add method.momentum=fixed")
    if momentum == "fixed" and w == FLOAT:
        raise Unsupported(
            f"momentum=fixed has no effect at bits.w={FLOAT}, because momentum has the same width as the weights"
        )

    def fixed_format(kind: str, bits: int) -> FixedPointFormat:
        return FixedPointFormat(integers[kind], bits - integers[kind], rounding)

    def weight(name: str, layer: nn.Module, bits: int) -> GuptaWeight:
        return GuptaWeight(
            weights=fixed_format("weights", bits),
            biases=fixed_format("biases", bits),
            updates=fixed_format("updates", bits),
            momentum=fixed_format("momentum", bits if momentum == "fixed" else FLOAT),
        )

    def output(name: str, layer: nn.Module, bits: int) -> GuptaOutput | None:
        assert isinstance(layer, QLayer)
        # The output usually has the activation width of the layer. If the layer's input is float or
        # is the image, the output has the method's activation width `a`. If `a` is 32, another
        # method quantizes the activations, and the output is float.
        reads_image = isinstance(layer.input_q, ImageQuantizer)
        width = a if reads_image or FLOAT in (a, layer.bits.a) else layer.bits.a
        if layer.bits == Bits() or bits == width == FLOAT:
            return None
        return GuptaOutput(fixed_format("activations", width), fixed_format("errors", bits))

    return Method(
        name="gupta",
        bits=Bits(w, a, g),
        supported_bits=dict.fromkeys("wag", WIDTHS),
        unused_options=unused_options,
        option_slots={
            "integer_weights": "w",
            "integer_biases": "w",
            "integer_updates": "w",
            "integer_activations": "a",
            "integer_errors": "g",
        },
        requires=Requires(norm="none", start="scratch", act="keep"),
        traits=frozenset(
            {"monotone_input", "idempotent_input", "clipped_input", "no_master"}
            | ({"fixed_point_gradients"} if g != FLOAT else set())
        ),
        weight=weight,
        input=lambda name, layer, bits: GuptaActivation(fixed_format("activations", bits)),
        output=output,
        prepare=prepare,
        step=optimizer_step,
    )
