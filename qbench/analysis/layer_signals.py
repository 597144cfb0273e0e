"""Measures the signal-to-quantization-noise ratio (SQNR), clipped inputs and dead channels of quantized layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qbench.analysis.layer_ablation import quantizers_disabled
from qbench.bits import FLOAT
from qbench.quant.graph import recorded_calls
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.probe import Batch
from qbench.quant.quantizer import Grid
from qbench.quant.sqnr import sqnr_db

# In shapes, n is the number of values per channel, and C is the number of channels.

RELATIVE_SLACK = 1e-6
"""A value counts as clipped if it is beyond the outermost level by more than this fraction of the largest level."""


@dataclass
class LayerSignal:
    """Statistics of a layer with C output channels, computed from its float output y and its quantized output y_hat.

    Args:
        sums: sums over images and positions, each of shape (C,). The summed values are y, y_hat, and their products.
        count: number of values per channel in these sums.
        low, high: smallest and largest value of each channel, for the layer's inputs ("in") and outputs ("out").
        clipped: number of input values beyond the outermost levels, or None if inputs are not quantized.
        inputs: number of all input values.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    low: dict[str, Tensor] = field(default_factory=dict)
    high: dict[str, Tensor] = field(default_factory=dict)
    clipped: int | None = None
    inputs: int = 0

    def add(self, y: Tensor, y_hat: Tensor) -> None:
        """Add the float and the quantized outputs of a batch, both of shape (n, C), to the sums."""
        y, y_hat = y.double(), y_hat.double()
        parts = {"y": y, "z": y_hat, "yy": y * y, "zz": y_hat * y_hat, "yz": y * y_hat, "noise": (y - y_hat) ** 2}
        self.sums = {key: self.sums.get(key, 0) + part.sum(0) for key, part in parts.items()}
        self.count += len(y)

    def extend_range(self, slot: str, values: Tensor) -> None:
        """Extend the range of each channel so that it includes the values, which have shape (n, C)."""
        low, high = values.amin(0), values.amax(0)
        self.low[slot] = torch.minimum(self.low.get(slot, low), low)
        self.high[slot] = torch.maximum(self.high.get(slot, high), high)

    def dead_channels(self, slot: str) -> tuple[int, int]:
        """Return the number of channels that are constant over images and positions, and the number of all channels."""
        return int((self.low[slot] == self.high[slot]).sum()), self.low[slot].numel()

    @property
    def sqnr(self) -> float | None:
        """Return the power of y divided by the power of y - y_hat, in dB, or None if y is zero."""
        return _sqnr(self.sums["yy"].sum().item(), self.sums["noise"].sum().item())

    @property
    def fitted_sqnr(self) -> float | None:
        """Return the variance of y divided by the error after the best gain and offset of y_hat per channel, in dB.

        The SQNR divides the power of y, which also contains the mean, so `fitted_sqnr` can be smaller than `sqnr`.
        Gain and offset have no effect on the network, because the next normalization layer removes them.
        """
        y, z, yy, zz, yz = (self.sums[key] / self.count for key in ("y", "z", "yy", "zz", "yz"))
        y_variance, covariance, z_variance = yy - y * y, yz - y * z, zz - z * z
        # a constant y_hat explains none of the variance of y
        explained = torch.where(z_variance > RELATIVE_SLACK**2 * zz, covariance * covariance / z_variance, 0.0)
        return _sqnr(y_variance.sum().item(), (y_variance - explained).clamp(min=0).sum().item())


def _sqnr(signal: float, noise: float) -> float | None:
    return sqnr_db(signal, noise) if signal > 0 else None


@torch.inference_mode()
def layer_signals(model: nn.Module, batches: Sequence[Batch]) -> dict[str, LayerSignal]:
    """Return the statistics of each quantized layer of a network in eval mode.

    The float output of a layer is its output for the same input, computed with the layer's quantizers disabled.
    """
    layers = quantized_layers(model)
    signals = {name: LayerSignal() for name in layers}
    for images, _ in batches:
        with recorded_calls(model, list(layers)) as calls:
            model(images)
        for name, x, _ in calls:  # use the input at once, because a later activation may change it in place
            _add_batch(signals[name], layers[name], x, model)
    return signals


def _add_batch(signal: LayerSignal, layer: QLayer, x: Tensor, model: nn.Module) -> None:
    y_hat = layer(x)
    with quantizers_disabled(model, [layer.label]):
        y = layer(x)
    signal.add(_by_channel(layer, y), _by_channel(layer, y_hat))
    signal.extend_range("out", _by_channel(layer, y_hat))
    signal.extend_range("in", _by_channel(layer, layer.input_q(x)))
    if layer.bits.a < FLOAT and (grid := layer.input_q.grid(x)) is not None:
        signal.clipped = (signal.clipped or 0) + _count_clipped(grid, x)
        signal.inputs += x.numel()


def _by_channel(layer: QLayer, x: Tensor) -> Tensor:
    """Return a layer's inputs or outputs reshaped to (n, C), with n values for each of C channels."""
    axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # the input may have no batch axis
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _count_clipped(grid: Grid, x: Tensor) -> int:
    """Return the number of values beyond the outermost levels.

    If the lowest level is 0, negative values do not count as clipped, because a ReLU would also set them to 0.
    """
    points = grid.points[..., 0]
    slack = RELATIVE_SLACK * points.abs().nan_to_num(0).amax(1, keepdim=True)
    low = points.nan_to_num(torch.inf).amin(1, keepdim=True)
    high = points.nan_to_num(-torch.inf).amax(1, keepdim=True)
    values = grid.arrange(x)[..., 0]
    return int((values > high + slack).sum() + ((values < low - slack) & (low < 0)).sum())
