"""PTQ: quantization without training, as int8 networks are shipped; the control of what training buys.

Paper
    None of its own; the practice that Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
    arXiv 1806.08342, describes: symmetric weights per channel, affine activations, ranges from a few images.

Idea
    Fit each range to what the float network holds and shows on some training images, and stop there.

Forward
    Weights: s round(w / s) within +-s n, n = 2^(b-1) - 1, per output channel or per layer; s = max|w| / n (minmax) or
    the best in squared error of 1, 2, ..., 100 % of that (mse). Activations: as in uniform, 2^b levels over a fixed
    [l, h] that holds zero, which is a level; behind a ReLU l = 0. minmax: the extremes; percentile: the value that p %
    of all do not exceed, and its mirror image; mse: the best in squared error of 1, 2, ..., 100 % of the extremes.

Backward
    As in uniform, for whoever goes on training: weights the identity, activations where x is in range.

Schedule
    No epoch. `prepare`: weights; then activations, on the inputs that layers have in the float network; then batch
    normalization, mean and variance of each batch of the Probe behind the quantizers, averaged evenly over batches.

Sites
    weight, input.

State
    scale, (O, 1, ...) or a scalar: step of weights, that of minmax until `prepare`. low, high (scalars): range of a
    layer's input, 0 and 1 where nothing was calibrated.

Bits
    w 2-16 or 32, a 1-16 or 32, g 32; by default w8a8g32.

Protocol
    Ours: the Probe, 256 training images.

Choices
    mse for both by default, and normalization measured anew: the options differ at few bits, where the control should
    not be weaker than it need be. Activations are calibrated on the float network all at once, as deployment tools do,
    not layer by layer behind quantized ones; percentile and mse see at most 2^20 values of a layer, spread evenly. mse
    shrinks both ends by the same part.

Deviations
    None known.

Results
    README (digits).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods import uniform
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import float_mode, quantized_layers
from qbench.quant.method import Method, Requires
from qbench.quant.ops import in_float32, straight_through
from qbench.quant.probe import Batch, Probe
from qbench.quant.quantizer import Grid, Quantizer, Storage

WEIGHTS, CALIBRATIONS = ("minmax", "mse"), ("minmax", "percentile", "mse")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PARTS, SAMPLE = 100, 2**20

Range = tuple[Tensor, Tensor]


@in_float32
def quantize_weight(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantize weights (O, ...) to 2^bits - 1 multiples of `scale`, (O, 1, ...) or a scalar; clipped beyond."""
    top, scale = 2 ** (bits - 1) - 1, scale.to(w.dtype)
    return straight_through(w, (w.detach() / scale).round().clamp(-top, top) * scale)


def weight_scale(w: Tensor, bits: int, channel: bool = True, how: str = "minmax") -> Tensor:
    """Return the step, (O, 1, ..., 1) or a scalar, of `how`: minmax or mse."""
    whole = uniform.weight_scale(w, bits, channel)
    if how == "minmax":
        return whole
    axes = tuple(range(1, w.dim())) if channel else tuple(range(w.dim()))
    best, least = whole, torch.full_like(whole, torch.inf)
    for part in range(PARTS, 0, -1):
        scale = whole * part / PARTS
        error = (quantize_weight(w, scale, bits) - w).detach().square().mean(axes, keepdim=channel)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def minmax_range(x: Tensor) -> Range:
    """Return the extremes of x, moved to hold zero."""
    low, high = x.aminmax()
    return low.clamp(max=0), high.clamp(min=0)


def percentile_range(x: Tensor, percent: float) -> Range:
    """Return the least value that `percent` (50-100) of x do not exceed, its mirror image below; moved to hold zero."""
    values, inside = x.flatten().sort().values, math.ceil(round(x.numel() * percent / 100, 6))
    return values[-inside].clamp(max=0), values[inside - 1].clamp(min=0)


def mse_range(x: Tensor, bits: int) -> Range:
    """Return the extremes of x, shrunk by the part that leaves the least squared error."""
    low, high = minmax_range(x)
    errors = [
        (uniform.quantize_activation(x, low * i / PARTS, high * i / PARTS, bits) - x).square().mean()
        for i in range(PARTS, 0, -1)
    ]
    part = (PARTS - int(torch.stack(errors).argmin())) / PARTS
    return low * part, high * part


class PTQWeight(Quantizer):
    """A layer's weights on an even grid that stays."""

    scale: Tensor

    def __init__(self, weight: Tensor, bits: int, channel: bool, how: str) -> None:
        super().__init__()
        self.bits, self.channel, self.how = bits, channel, how
        self.register_buffer("scale", uniform.weight_scale(weight.detach(), bits, channel))

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_weight(w, self.scale, self.bits)

    def calibrate(self, w: Tensor) -> None:
        """Fit the step to weights."""
        self.scale.copy_(weight_scale(w.detach(), self.bits, self.channel, self.how))

    def grid(self, w: Tensor) -> Grid:
        """One group per output channel, or one."""
        top = 2 ** (self.bits - 1) - 1
        points = (torch.arange(-top, top + 1, device=w.device) * self.scale.reshape(-1, 1)).unsqueeze(-1)
        return Grid(points, lambda t: t.reshape(len(points), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Codes, and a scale per group."""
        return Storage(w.numel(), self.bits, 4 * self.scale.numel())


class PTQActivation(Quantizer):
    """A layer's input on an even grid over a range that stays."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return uniform.quantize_activation(x, self.low, self.high, self.bits)

    def take(self, low: Tensor, high: Tensor) -> None:
        """Quantize over this range from now on."""
        self.low.copy_(low)
        self.high.copy_(high)

    def grid(self, x: Tensor) -> Grid:
        """2^bits levels, zero among them."""
        step, zero = uniform.step_and_zero(self.low, self.high, self.bits)
        return Grid(((torch.arange(2**self.bits, device=x.device) - zero) * step).reshape(1, -1, 1))


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Batch], find: Callable[[Tensor, int], Range], whole: bool) -> None:
    """Fit the ranges of a network's activations to its float inputs.

    Args:
        find: (values (n,), bits) -> range.
        whole: whether the extremes of each batch are all that `find` wants to see.
    """
    layers = quantized_layers(model)
    sites = {name: layer.input_q for name, layer in layers.items() if isinstance(layer.input_q, PTQActivation)}
    seen: dict[str, list[Tensor]] = {}
    with float_mode(model), eval_mode_keeping_rng(model), recorded_calls(model, list(sites)) as calls:
        for images, _ in batches:
            model(images)
            for name, x, _ in calls:
                step = -(-x.numel() * len(batches) // SAMPLE) | 1  # odd: not the same column of every map
                seen.setdefault(name, []).append(torch.stack(x.aminmax()) if whole else x.flatten()[::step])
            calls.clear()
    for name, values in seen.items():
        sites[name].take(*find(torch.cat(values).float(), sites[name].bits))


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set running mean and (unbiased) variance of batch normalization to the average over these batches."""
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        with eval_mode_keeping_rng(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for an even average
                norm.train()
            for images, _ in batches:
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def build(
    *,
    w: int = 8,
    a: int = 8,
    channel: bool = True,
    weights: str = "mse",
    calibration: str = "mse",
    percentile: float = 99.99,
    reestimate: bool = True,
) -> Method:
    """Return post-training quantization; for the options see the card."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: allowed are {', '.join(WEIGHTS)}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration={calibration}: allowed are {', '.join(CALIBRATIONS)}")
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile={percentile}: allowed are 50 to 100")
    ranges: dict[str, Callable[[Tensor, int], Range]] = {
        "minmax": lambda x, bits: minmax_range(x),
        "percentile": lambda x, bits: percentile_range(x, percentile),
        "mse": mse_range,
    }

    def prepare(model: nn.Module, probe: Probe) -> None:
        layers = quantized_layers(model)
        for layer in layers.values():
            if isinstance(layer.weight_q, PTQWeight):
                layer.weight_q.calibrate(layer.weight)
        calibrate(model, probe.batches, ranges[calibration], calibration == "minmax")
        if reestimate and layers:
            reestimate_norms(model, probe.batches)

    return Method(
        name="ptq",
        bits=Bits(w, a),
        supported_bits={"w": (*range(2, 17), FLOAT), "a": (*range(1, 17), FLOAT)},
        requires=Requires(act="keep"),
        traits=frozenset({"odd", "monotone", "idempotent", "monotone_input", "idempotent_input"}),
        weight=lambda name, layer, bits: PTQWeight(layer.weight, bits, channel, weights),
        input=lambda name, layer, bits: PTQActivation(bits),
        prepare=prepare,
        needs_training=False,
    )
