"""PTQ: post-training quantization. It is the usual way to deploy int8 networks, and the control for quantized training.

Paper
    PTQ has no paper of its own. It follows the practice that Krishnamoorthi describes in
    "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342. Weights have
    symmetric levels with one scale per channel. Activations have affine levels. The ranges of
    activations are measured on a few images.

Idea
    Nothing is trained. The range of a weight quantizer is fitted to the weights of the float
    network. The range of an activation quantizer is fitted to the activations of the float network
    on some training images.

Forward
    Weights: s round(w / s), clipped to +-s n, n = 2^(b-1) - 1, with one step s per output channel
    or per layer. With weights=minmax, s = max|w| / n. With weights=mse, s is 1, 2, ... or 100 % of
    the minmax step. The percentage with the smallest squared error is taken.
    Activations: 2^b levels over a fixed range [l, h], as in the method uniform. The range contains
    zero, and zero is a level. After a ReLU, l = 0. With calibration=minmax, l and h are the minimum
    and the maximum. With calibration=percentile, p % of all values are at most h, and p % are at
    least l, where p is the option `percentile`. With calibration=mse, l and h are 1, 2, ... or 100
    % of the minimum and of the maximum. The percentage with the smallest squared error is taken.

Backward
    The backward pass is used only if the network is trained further. As in the method uniform, the
    derivative of a quantized weight with respect to the weight is 1. The derivative of a quantized
    activation with respect to the activation x is 1 where x is in range, else 0.

Schedule
    There are no epochs. `prepare` works in three steps. First it fits the steps of the weights.
    Then it fits the ranges of the activations to the layers' inputs in the float network. Finally
    it adapts the running statistics of batch normalization to the quantizers. The option
    `reestimate` chooses one of three ways.
    shift: mean and variance of the inputs of batch normalization are measured twice on the probe
    (256 training images), without and with the quantizers. The difference of the two means is added
    to the running mean. The running variance is multiplied by the ratio of the two variances.
    replace: mean and variance of each batch of the probe are measured with the quantizers. The
    averages over the batches become the running statistics.
    none: the running statistics of the float network are kept.

Sites
    weight, input.

State
    scale, (O, 1, ...) or a scalar: step of the weights. Before `prepare`, scale is the minmax step.
    low, high (scalars): ends of the range of a layer's input. Before `prepare`, they are 0 and 1.

Bits
    w 2-16 or 32, a 1-16 or 32, g 32; by default w8a8g32.

Protocol
    There is no protocol of a paper. qbench calibrates on the probe, which is 256 training images.

Choices
    The defaults are weights=mse, calibration=mse and reestimate=shift. With few bits, other values
    of these options give different results. The defaults are chosen so that the control is as
    accurate as possible. Statistics of 256 images are noisy. With reestimate=replace, this noise
    reduces accuracy more than rounding to 8 bits. With reestimate=shift, both measurements have the
    same noise, so the noise cancels.
    qbench measures the ranges of all activations at once in the float network, as deployment tools
    do. While a range is measured, the earlier layers are therefore not quantized.
    calibration=percentile and calibration=mse use at most 2^20 values of a layer's input, evenly
    sampled. calibration=mse multiplies both ends of the range by the same factor.

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
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.bits import FLOAT, Bits
from qbench.methods import uniform
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import float_mode, quantized_layers
from qbench.quant.method import Method, Requires, Unsupported
from qbench.quant.ops import in_float32, straight_through
from qbench.quant.probe import Batch, Probe
from qbench.quant.quantizer import Grid, Quantizer, Storage

WEIGHTS, CALIBRATIONS = ("minmax", "mse"), ("minmax", "percentile", "mse")
REESTIMATES = ("shift", "replace", "none")
PERCENTILE = 99.99
MAX_VALUES = 2**20
"""Largest number of values of a layer's input that calibration uses."""

Range = tuple[Tensor, Tensor]
"""Lower and upper end of a range that contains zero, as scalar tensors."""


@in_float32
def quantize_weight(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round and clip weights (O, ...) to 2^bits - 1 multiples of `scale`, which is a scalar or (O, 1, ...)."""
    top, scale = 2 ** (bits - 1) - 1, scale.to(w.dtype)
    return straight_through(w, (w.detach() / scale).round().clamp(-top, top) * scale)


def weight_scale(w: Tensor, bits: int, channel: bool = True, criterion: str = "minmax") -> Tensor:
    """Return the step for weights (O, ...). With `channel`, return one step per channel, (O, 1, ..., 1), else a scalar.

    Args:
        criterion: minmax (the levels cover the whole range) or mse (the levels cover the fraction
            of the range that gives the smallest squared error).
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
    """Return (low, high), the minimum and maximum of x. The range is widened to contain zero."""
    low, high = x.aminmax()
    return low.clamp(max=0), high.clamp(min=0)


def percentile_range(x: Tensor, percent: float) -> Range:
    """Return (low, high). `percent` % (50 to 100) of all values are at most high, and `percent` % are at least low.

    The range is widened to contain zero.
    """
    # round the product first, so that its floating-point error cannot raise the count by one
    values, inside = x.flatten().sort().values, math.ceil(round(x.numel() * percent / 100, 6))
    return values[-inside].clamp(max=0), values[inside - 1].clamp(min=0)


def mse_range(x: Tensor, bits: int) -> Range:
    """Return (low, high), the minimum and the maximum of x, both multiplied by one factor.

    Of the factors 0.01, 0.02, ..., 1, the factor with the smallest squared error is used.
    """
    low, high = minmax_range(x)
    errors = [
        (uniform.quantize_activation(x, low * percent / 100, high * percent / 100, bits) - x).square().mean()
        for percent in range(100, 0, -1)  # start with the whole range, so that ties go to the larger range
    ]
    factor = (100 - int(torch.stack(errors).argmin())) / 100
    return low * factor, high * factor


class PTQWeight(Quantizer):
    """Quantizer of one layer's weights, with fixed and equally spaced levels."""

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
        """Return the allowed values, with one scale group per output channel, or one for the whole layer."""
        top = 2 ** (self.bits - 1) - 1
        points = (torch.arange(-top, top + 1, device=w.device) * self.scale.reshape(-1, 1)).unsqueeze(-1)
        return Grid(points, lambda t: t.reshape(len(points), -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of one scale per group."""
        return Storage(w.numel(), self.bits, 4 * self.scale.numel())


class PTQActivation(Quantizer):
    """Quantizer of one layer's input, with equally spaced levels over a fixed range."""

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
        """Set the range [low, high] of the levels."""
        self.low.copy_(low)
        self.high.copy_(high)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: 2^bits levels, including zero. The whole tensor is one scale group."""
        step, zero = uniform.step_and_zero(self.low, self.high, self.bits)
        return Grid(((torch.arange(2**self.bits, device=x.device) - zero) * step).reshape(1, -1, 1))


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Sequence[Batch], find_range: Callable[[Tensor, int], Range], extremes_only: bool
) -> None:
    """Fit the ranges of a network's activations to the layers' inputs in the float network.

    Args:
        find_range: function that takes values (n,) and the number of bits, and returns (low, high).
        extremes_only: true passes only the minimum and maximum of each batch to `find_range`. False
            passes a sample of at most `MAX_VALUES` values.
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


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalization modules of all classes that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set the running statistics of batch normalization to the averages of the statistics of `batches`.

    Variances are unbiased. During the forward passes, batch normalization uses the statistics of
    the current batch. All other modules are in evaluation mode.
    """
    norms = _norms(model)
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
    """Change the running statistics in the same way as quantization changes the mean and variance on `batches`."""
    norms = _norms(model)
    with float_mode(model):
        before = _measured_statistics(model, norms, batches)
    after = _measured_statistics(model, norms, batches)
    for norm, (mean, var), (new_mean, new_var) in zip(norms, before, after, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += new_mean - mean
        norm.running_var *= torch.where(var > 0, new_var / var, torch.ones_like(var))


def _measured_statistics(model: nn.Module, norms: Sequence[nn.Module], batches: Sequence[Batch]) -> list[Range]:
    """Return (mean, variance) per channel for each batch normalization. The running statistics are left unchanged."""
    saved = [copy.deepcopy(norm.state_dict()) for norm in norms]
    reestimate_norms(model, batches)
    measured = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm, state in zip(norms, saved, strict=True):
        norm.load_state_dict(state)
    return [(state["running_mean"], state["running_var"]) for state in measured]


def unused_options(model: nn.Module) -> dict[str, str]:
    """Return `reestimate` with the reason, if it has no effect because the network has no batch normalization."""
    return {} if _norms(model) else {"reestimate": "the network has no batch normalization"}


def build(
    *,
    w: int = 8,
    a: int = 8,
    channel: bool = True,
    weights: str = "mse",
    calibration: str = "mse",
    percentile: float = PERCENTILE,
    reestimate: str = "shift",
) -> Method:
    """Return the `Method` for post-training quantization. The method card (module docstring) explains the options."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: must be one of {', '.join(WEIGHTS)}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration={calibration}: must be one of {', '.join(CALIBRATIONS)}")
    if reestimate not in REESTIMATES:
        raise ValueError(f"reestimate={reestimate}: must be one of {', '.join(REESTIMATES)}")
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile={percentile}: must be 50 to 100")
    if percentile != PERCENTILE and calibration != "percentile":
        raise Unsupported(
            f"percentile={percentile} has no effect with calibration={calibration}; add method.calibration=percentile"
        )
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
        unused_options=unused_options,
        option_slots={"channel": "w", "weights": "w", "calibration": "a", "percentile": "a"},
        requires=Requires(act="keep"),
        traits=frozenset({"odd", "monotone", "idempotent", "monotone_input", "idempotent_input"}),
        weight=lambda name, layer, bits: PTQWeight(layer.weight, bits, channel, weights),
        input=lambda name, layer, bits: PTQActivation(bits),
        prepare=prepare,
        needs_training=False,
    )
