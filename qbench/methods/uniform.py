"""Uniform: min-max fake quantization. It is the control for all other methods.

Paper
    Uniform has no paper of its own. Its formulas are those of Jacob et al., "Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv
    1712.05877. The levels of weights are symmetric.

Idea
    The levels are equally spaced over the range of the values. A comparison with this control shows
    how much accuracy another method gains.

Forward
    Weights: s round(w / s), with one step s = max|w| / (2^(b-1) - 1) per output channel or per
    layer. There are 2^b - 1 levels, including zero.
    Activations: s (clip(round(x / s) + z, 0, 2^b - 1) - z), with the step s = (h - l) / (2^b - 1)
    and the zero point z = round(-l / s). l and h are moving averages of each batch's minimum and
    maximum. The range [l, h] is widened to contain zero. The levels are multiples of s, so zero is
    a level. The ends of the range of levels can therefore differ from l and h by up to s / 2.

Backward
    Weights: dL/dw = dL/dw_hat. Activations: dL/dx = dL/dx_hat where round(x / s) + z is in 0 ...
    2^b - 1, else 0.

Schedule
    Training has one phase and starts from a float network.

Sites
    weight, input.

State
    low, high (scalars): ends of the range of a layer's input. seen (bool): whether the range has
    been set from a batch.

Bits
    w 2-16 or 32, a 1-16 or 32, g 32; by default w8a8g32.

Protocol
    The recipe is the unified recipe (`optim=unified`), which is the same for all methods.

Choices
    channel: `true` (default) means one step per output channel of the weights. `false` means one
    step per layer.
    momentum: the weight of a new batch in the moving averages, 0.1 by default.

Deviations
    None known.

Results
    docs/results.md (digits).
"""

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.fused_kernels import grad_within
from qbench.quant.layers import float_mode, quantized_layers
from qbench.quant.method import Method, Requires
from qbench.quant.ops import fused_quantizer, in_float32, round_ste, straight_through, wide_type
from qbench.quant.probe import Probe
from qbench.quant.quantizer import Grid, Quantizer, Storage


@in_float32
def quantize_weight(w: Tensor, bits: int, channel: bool = True) -> Tensor:
    """Quantize weights (O, ...) to 2^bits - 1 levels from -max|w| to max|w|, per channel or per layer."""
    scale = weight_scale(w, bits, channel)
    return straight_through(w, (w.detach() / scale).round() * scale)


def weight_scale(w: Tensor, bits: int, channel: bool) -> Tensor:
    """Return the step, (O, 1, ..., 1) with `channel`, else a scalar. A step is 1 if its weights are all 0."""
    magnitude = w.detach().abs()
    top = magnitude.amax(tuple(range(1, w.dim())), keepdim=True) if channel else magnitude.amax()
    scale = top / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_activation(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Quantize activations (any shape) to 2^bits levels over [low, high], shifted so that 0 is a level.

    Args:
        low, high: ends of the range, scalars with low <= 0 <= high.
    """
    step, zero = step_and_zero(low.to(wide_type(x)), high.to(wide_type(x)), bits)
    top = 2**bits - 1

    def plain(x: Tensor) -> Tensor:
        return ((round_ste(x / step) + zero).clamp(0, top) - zero) * step

    def value(x: Tensor) -> Tensor:
        return x.div(step).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(step)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        return grad_within(grad, x.div(step).round_().add_(zero), 0, top)

    return fused_quantizer(x, plain=plain, value=value, backward=backward)


def step_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the step between levels, and the code (0 to 2^bits - 1) of the value 0."""
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(low.dtype).tiny)
    return step, (-low / step).round()


class UniformWeight(Quantizer):
    """Quantizer of one layer's weights, with equally spaced levels."""

    def __init__(self, bits: int, channel: bool) -> None:
        super().__init__()
        self.bits, self.channel = bits, channel

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_weight(w, self.bits, self.channel)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values, with one scale group per output channel, or one for the whole layer."""
        top = 2 ** (self.bits - 1) - 1
        scale = weight_scale(w, self.bits, self.channel).reshape(-1, 1)
        points = (torch.arange(-top, top + 1, device=w.device) * scale).unsqueeze(-1)
        return Grid(points, lambda t: t.reshape(len(points), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of one scale per group."""
        return Storage(w.numel(), self.bits, 4 * (len(w) if self.channel else 1))


class UniformActivation(Quantizer):
    """Quantizer of one layer's input. The levels are equally spaced over a moving range of the inputs."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, bits: int, momentum: float) -> None:
        super().__init__()
        self.bits, self.momentum = bits, momentum
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(1.0))
        self.register_buffer("seen", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations. In training, first update the range."""
        if self.training and x.numel():
            self.update_range(x)
        return quantize_activation(x, self.low, self.high, self.bits)

    @torch.no_grad()
    def update_range(self, x: Tensor) -> None:
        """Move the range towards the minimum and maximum of the batch x. The first batch sets the range."""
        low, high = (end.to(self.low.dtype) for end in (x.amin().clamp(max=0), x.amax().clamp(min=0)))
        weight = torch.where(self.seen, self.momentum, 1.0).to(low.dtype)
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)
        self.seen.fill_(True)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: 2^bits levels, including zero. The whole tensor is one scale group."""
        step, zero = step_and_zero(self.low, self.high, self.bits)
        return Grid(((torch.arange(2**self.bits, device=x.device) - zero) * step).reshape(1, -1, 1))


def prepare(model: nn.Module, probe: Probe) -> None:
    """Set the range of every input quantizer from the layer's inputs in the float network, on the probe images.

    This range is used only if the network is evaluated before it is trained. The first training
    batch replaces the range.
    """
    for name, layer in quantized_layers(model).items():
        quantizer = layer.input_q
        if isinstance(quantizer, UniformActivation) and not quantizer.seen:
            with float_mode(model):
                inputs, _ = probe.responses(model, name)
            quantizer.update_range(inputs)
            quantizer.seen.fill_(False)


def build(*, w: int = 8, a: int = 8, channel: bool = True, momentum: float = 0.1) -> Method:
    """Return the `Method` for min-max quantization. `momentum` is the weight of a new batch in the moving averages."""
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum={momentum}: must be above 0 and at most 1")
    return Method(
        name="uniform",
        bits=Bits(w, a),
        supported_bits={"w": (*range(2, 17), FLOAT), "a": (*range(1, 17), FLOAT)},
        option_slots={"channel": "w", "momentum": "a"},
        requires=Requires(act="keep"),
        traits=frozenset({"odd", "monotone", "idempotent", "monotone_input", "idempotent_input"}),
        weight=lambda name, layer, bits: UniformWeight(bits, channel),
        input=lambda name, layer, bits: UniformActivation(bits, momentum),
        prepare=prepare,
    )
