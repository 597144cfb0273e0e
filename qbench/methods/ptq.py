"""PTQ: post-training quantization, the usual way to deploy int8 networks; a control that shows what training adds.

Paper
    None of its own. PTQ is the practice described by Krishnamoorthi, "Quantizing deep convolutional
    networks for efficient inference", arXiv 1806.08342: symmetric weights per channel, affine
    activations, ranges from a few images.

Idea
    Each range is fitted to the weights of the float network, or to its activations on some training
    images. Nothing is trained.

Forward
    Weights: s round(w / s), clipped to +-s n, n = 2^(b-1) - 1, per output channel or per layer.
    minmax: s = max|w| / n. mse: s is 1, 2, ... or 100 % of the minmax step, whichever has the least
    squared error.
    Activations: as in uniform, 2^b levels over a fixed range [l, h]. The range contains zero, and
    zero is a level. After a ReLU, l = 0. minmax: l and h are the extremes. percentile: p % of all
    values are at most h, and p % are at least l. mse: l and h are 1, 2, ... or 100 % of the
    extremes, whichever has the least squared error.

Backward
    The backward pass is needed only if the network is trained further. As in uniform, the
    derivative is 1 for weights. For activations, it is 1 where x is in range, else 0.

Schedule
    No epochs. `prepare` first calibrates the weights. It then calibrates the activations on the
    layers' inputs in the float network. Finally it adapts the statistics of batch normalization to
    the quantizers (`reestimate`). shift: the statistics are measured on the probe, in the float
    network and again with the quantizers in place. The running mean changes by the difference, and
    the running variance by the ratio. replace: the statistics are measured with the quantizers in
    place. They are the mean and variance of each batch of the probe, averaged over the batches with
    equal weights. none: the statistics of the float network are kept.

Sites
    weight, input.

State
    scale, (O, 1, ...) or a scalar: step of the weights, which is the minmax step until `prepare`.
    low, high (scalars): range of a layer's input, 0 and 1 until it is calibrated.

Bits
    w 2-16 or 32, a 1-16 or 32, g 32; by default w8a8g32.

Protocol
    Our own: calibration on the probe, which is 256 training images.

Choices
    By default the ranges of weights and activations are both fitted by mse, and the statistics of
    batch normalization are shifted. At few bits the options give different results, and the control
    should not be weaker than necessary. The statistics of 256 images are noisy. With replace, this
    noise costs more than 8 bits do. With shift, it is the same in both measurements and cancels.
    All activations are calibrated at once on the float network, as deployment tools do. They are
    not calibrated layer by layer with the earlier layers quantized.
    percentile and mse use at most 2^20 values of a layer's input, spread evenly over all values.
    mse shrinks both ends of the range by the same factor.

Deviations
    None known.

Results
    docs/results.md: CIFAR-10, and digits with reestimate=replace. docs/unified.md: glyphs with
    reestimate=replace.
"""

import copy
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
REESTIMATES = ("shift", "replace", "none")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_VALUES = 2**20
"""Largest number of values of a layer's input that calibration uses."""

Range = tuple[Tensor, Tensor]
"""Lower and upper end of a range that contains zero, scalars."""


@in_float32
def quantize_weight(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantize and clip weights (O, ...) to 2^bits - 1 multiples of `scale`, which is (O, 1, ...) or a scalar."""
    top, scale = 2 ** (bits - 1) - 1, scale.to(w.dtype)
    return straight_through(w, (w.detach() / scale).round().clamp(-top, top) * scale)


def weight_scale(w: Tensor, bits: int, channel: bool = True, criterion: str = "minmax") -> Tensor:
    """Return the step for weights (O, ...): one per channel, (O, 1, ..., 1), with `channel`, else a scalar.

    Args:
        criterion: minmax (the step covers the whole range) or mse (the step covers the fraction of
            the range with the least squared error).
    """
    full_scale = uniform.weight_scale(w, bits, channel)
    if criterion == "minmax":
        return full_scale
    axes = tuple(range(1, w.dim())) if channel else tuple(range(w.dim()))
    best, least_error = full_scale, torch.full_like(full_scale, torch.inf)
    for percent in range(100, 0, -1):  # start with the whole range, so that ties go to the larger range
        scale = full_scale * percent / 100
        error = (quantize_weight(w, scale, bits) - w).detach().square().mean(axes, keepdim=channel)
        best, least_error = torch.where(error < least_error, scale, best), torch.minimum(error, least_error)
    return best


def minmax_range(x: Tensor) -> Range:
    """Return the extremes of x, widened to contain zero."""
    low, high = x.aminmax()
    return low.clamp(max=0), high.clamp(min=0)


def percentile_range(x: Tensor, percent: float) -> Range:
    """Return (low, high), such that `percent` % (50-100) of x are at most high, and `percent` % at least low.

    The range is widened to contain zero.
    """
    # round the product first, so that its floating-point error cannot raise the count by one
    values, inside = x.flatten().sort().values, math.ceil(round(x.numel() * percent / 100, 6))
    return values[-inside].clamp(max=0), values[inside - 1].clamp(min=0)


def mse_range(x: Tensor, bits: int) -> Range:
    """Return the extremes of x times one factor.

    Of the factors 0.01, 0.02, ..., 1, the one with the least squared error is used.
    """
    low, high = minmax_range(x)
    errors = [
        (uniform.quantize_activation(x, low * percent / 100, high * percent / 100, bits) - x).square().mean()
        for percent in range(100, 0, -1)  # start with the whole range, so that ties go to the larger range
    ]
    factor = (100 - int(torch.stack(errors).argmin())) / 100
    return low * factor, high * factor


class PTQWeight(Quantizer):
    """Quantizer of one layer's weights to a fixed uniform grid."""

    scale: Tensor

    def __init__(self, weight: Tensor, bits: int, channel: bool, criterion: str) -> None:
        super().__init__()
        self.bits, self.channel, self.criterion = bits, channel, criterion
        self.register_buffer("scale", uniform.weight_scale(weight.detach(), bits, channel))

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_weight(w, self.scale, self.bits)

    def calibrate(self, w: Tensor) -> None:
        """Fit the step to the weights w."""
        self.scale.copy_(weight_scale(w.detach(), self.bits, self.channel, self.criterion))

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group per output channel, or one for the whole layer."""
        top = 2 ** (self.bits - 1) - 1
        points = (torch.arange(-top, top + 1, device=w.device) * self.scale.reshape(-1, 1)).unsqueeze(-1)
        return Grid(points, lambda t: t.reshape(len(points), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage of the codes and of one scale per group."""
        return Storage(w.numel(), self.bits, 4 * self.scale.numel())


class PTQActivation(Quantizer):
    """Quantizer of one layer's input to a uniform grid over a fixed range."""

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

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range over which the levels extend."""
        self.low.copy_(low)
        self.high.copy_(high)

    def grid(self, x: Tensor) -> Grid:
        """Return a grid with one group: 2^bits levels, including zero."""
        step, zero = uniform.step_and_zero(self.low, self.high, self.bits)
        return Grid(((torch.arange(2**self.bits, device=x.device) - zero) * step).reshape(1, -1, 1))


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Batch], find_range: Callable[[Tensor, int], Range], extremes_only: bool
) -> None:
    """Fit the ranges of a network's activations to the layers' inputs in the float network.

    Args:
        find_range: function that takes values (n,) and bits and returns the range.
        extremes_only: whether to pass only the extremes of each batch to `find_range`, instead of a
            sample of at most `MAX_VALUES` values.
    """
    layers = quantized_layers(model)
    sites = {name: layer.input_q for name, layer in layers.items() if isinstance(layer.input_q, PTQActivation)}
    samples: dict[str, list[Tensor]] = {}
    with float_mode(model), eval_mode_keeping_rng(model), recorded_calls(model, list(sites)) as calls:
        for images, _ in batches:
            model(images)
            for name, x, _ in calls:
                stride = -(-x.numel() * len(batches) // MAX_VALUES) | 1  # odd, so that the sampled columns vary
                sample = torch.stack(x.aminmax()) if extremes_only else x.flatten()[::stride]
                samples.setdefault(name, []).append(sample)
            calls.clear()  # frees the recorded tensors of this batch
    for name, values in samples.items():
        sites[name].set_range(*find_range(torch.cat(values).float(), sites[name].bits))


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set the running statistics of batch normalization to averages over `batches`.

    Variances are unbiased. During these passes, batch normalization uses the statistics of each
    batch; all other modules are in evaluation mode.
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        with eval_mode_keeping_rng(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch then averages with equal weights
                norm.train()
            for images, _ in batches:
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def shift_norms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Change the running statistics of batch normalization by what the quantizers change, measured on `batches`."""
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    with float_mode(model):
        before = _measured_statistics(model, norms, batches)
    after = _measured_statistics(model, norms, batches)
    for norm, (mean, var), (new_mean, new_var) in zip(norms, before, after, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += new_mean - mean
        norm.running_var *= torch.where(var > 0, new_var / var, torch.ones_like(var))


def _measured_statistics(model: nn.Module, norms: Sequence[nn.Module], batches: Sequence[Batch]) -> list[Range]:
    """Return (mean, variance) per channel for each batch normalization, and leave its statistics unchanged."""
    saved = [copy.deepcopy(norm.state_dict()) for norm in norms]
    reestimate_norms(model, batches)
    measured = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm, state in zip(norms, saved, strict=True):
        norm.load_state_dict(state)
    return [(state["running_mean"], state["running_var"]) for state in measured]


def build(
    *,
    w: int = 8,
    a: int = 8,
    channel: bool = True,
    weights: str = "mse",
    calibration: str = "mse",
    percentile: float = 99.99,
    reestimate: str = "shift",
) -> Method:
    """Return post-training quantization. The method card explains the options."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: must be one of {', '.join(WEIGHTS)}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration={calibration}: must be one of {', '.join(CALIBRATIONS)}")
    if reestimate not in REESTIMATES:
        raise ValueError(f"reestimate={reestimate}: must be one of {', '.join(REESTIMATES)}")
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile={percentile}: must be 50 to 100")
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
        calibrate(model, probe.batches, ranges[calibration], extremes_only=calibration == "minmax")
        if layers and reestimate != "none":
            (shift_norms if reestimate == "shift" else reestimate_norms)(model, probe.batches)

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
