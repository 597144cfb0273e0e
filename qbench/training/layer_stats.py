"""Computes statistics of the quantized layers on a few training images, at the end of an epoch.

Observing does not affect training: it runs in evaluation mode without gradients and keeps the random state. The
statistics of a layer with weights `w` and input `a`:

    w.top, a.top          the largest magnitude of the levels
    w.dead, a.dead        number of levels without a value
    w.entropy, a.entropy  entropy of the level frequencies, in bits
    w.flips               share of the weights on another level than at the last observation
    w.frozen              share of the weights that an incremental method has frozen
    a.clipped             share of the input above the highest level or, if some levels are
                          negative, below the lowest
    sqnr, cosine          of the output, relative to the float network with the same latent weights:
                          signal over error in dB, and cosine of the angle
    w.grad                norm of the latent weights' gradient in the last step, after clipping
    w.NAME, a.NAME        a quantizer's parameter or buffer that is one number: step, alpha, n1, ...
    w.NAME.grad           norm of the gradient of a quantizer's parameter

If a tensor has several scale groups, they are counted together. For example, level 3 of one channel and level 3 of
another count as the same level. With an incremental method, a weight that is not frozen yet is counted at its nearest
level. Statistics that are not finite or not known are omitted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import isfinite, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import QLayer, float_mode, quantized_layers
from qbench.quant.masks import FrozenWeight
from qbench.quant.quantizer import Grid, Quantizer
from qbench.quant.sqnr import sqnr_db
from qbench.quant.verify import nearest_points

MIN_IMAGES, MAX_IMAGES, EPOCH_SHARE, MAX_PIXELS = 8, 64, 64, 2**17
"""Limits for the number of observed images: 1/64 of an epoch's images, 8 to 64 images, and fewer if they are large.

An epoch costs about three forward passes over all images. Two forward passes over the observed images therefore cost
about 1 % of an epoch.
"""


SIGNIFICANT_DIGITS = 6
"""Significant digits of the recorded statistics."""

SLOTS = {"w": "weight_q", "a": "input_q", "g": "output_q"}

LayerMetrics = dict[str, dict[str, float]]
"""Maps layer -> statistic -> value."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor before and after its quantizer, and the allowed values."""

    before: Tensor
    after: Tensor
    grid: Grid

    @cached_property
    def codes(self) -> Tensor:
        """The index of each value's level, (groups, values of a group)."""
        return nearest_points(self.grid.arrange(self.after), self.grid.points)[0]

    @property
    def counts(self) -> Tensor:
        """The number of values on each allowed level, in ascending order of the levels."""
        allowed = self.grid.points[..., 0].isfinite().any(0)
        return self.codes.flatten().bincount(minlength=len(allowed))[allowed]


class LayerTrace(NamedTuple):
    """The values of one layer: quantized weights and input (None if they are float), float input, and output."""

    weights: QuantizedTensor | None
    inputs: QuantizedTensor | None
    input: Tensor
    output: Tensor


def observed_images(images: Tensor, epoch_images: int) -> Tensor:
    """Return the first of the images (N, C, H, W), as many as an observation in an epoch of `epoch_images` images
    uses.
    """
    count = min(max(epoch_images // EPOCH_SHARE, MIN_IMAGES), MAX_IMAGES, MAX_PIXELS // prod(images.shape[2:]))
    return images[: max(count, 2)]


@torch.no_grad()
def trace_layers(model: nn.Module, images: Tensor) -> dict[str, LayerTrace]:
    """Return the trace of each quantized layer on images, in execution order.

    If a layer runs several times, its trace is that of the last call.
    """
    if not (layers := quantized_layers(model)):
        return {}
    slots = [f"{name}.{slot}" for name in layers for slot in ("weight_q", "input_q")]
    with eval_mode_keeping_rng(model), recorded_calls(model, [*layers, *slots]) as recorded:
        model(images)
        calls = {name: (x, y) for name, x, y in recorded}
        return {
            name: LayerTrace(
                _quantized_tensor(layer.weight_q, *calls[f"{name}.weight_q"]),
                _quantized_tensor(layer.input_q, *calls[f"{name}.input_q"]),
                *calls[name],
            )
            for name in calls
            if (layer := layers.get(name)) is not None
        }


def _quantized_tensor(quantizer: Quantizer, before: Tensor, after: Tensor) -> QuantizedTensor | None:
    """Return a quantizer's tensors with its grid. Return None if it is float or has no levels yet."""
    grid = quantizer.grid(before)
    return QuantizedTensor(before, after, grid) if grid is not None and grid.points.shape[1] else None


def layer_metrics(
    model: nn.Module,
    images: Tensor,
    traces: Mapping[str, LayerTrace],
    last_codes: Mapping[str, Tensor],
    gradients: LayerMetrics,
) -> LayerMetrics:
    """Return the statistics of every layer; see the docstring of this module.

    Args:
        traces: result of `trace_layers` for these images.
        last_codes: result of `weight_codes` at the last observation, or empty.
        gradients: result of `gradient_norms` after the last step.
    """
    float_outputs, layers = _float_outputs(model, images, list(traces)), quantized_layers(model)
    metrics: LayerMetrics = {}
    for name, trace in traces.items():
        values = dict(_scalars(layers[name]))
        for slot, tensor in (("w", trace.weights), ("a", trace.inputs)):
            if tensor is not None:
                values |= {f"{slot}.{key}": value for key, value in _level_statistics(tensor).items()}
        if trace.inputs is not None:
            values["a.clipped"] = _clipped_share(trace.inputs)
        if trace.weights is not None and name in last_codes and last_codes[name].shape == trace.weights.codes.shape:
            values["w.flips"] = (last_codes[name] != trace.weights.codes).float().mean().item()
        if isinstance(quantizer := layers[name].weight_q, FrozenWeight):
            values["w.frozen"] = quantizer.frozen.float().mean().item()
        values |= _output_similarity(float_outputs[name], trace.output) | gradients.get(name, {})
        metrics[name] = {
            key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for key, value in values.items() if isfinite(value)
        }
    return metrics


def weight_codes(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the codes of every layer's weights, for comparison at the next observation."""
    codes = {}
    for name, trace in traces.items():
        if trace.weights is not None:
            fits_in_byte = trace.weights.grid.points.shape[1] <= 2**8
            codes[name] = trace.weights.codes.to(torch.uint8 if fits_in_byte else torch.int32)
    return codes


def gradient_norms(model: nn.Module) -> LayerMetrics:
    """Return the norms of the gradients of the last step, by layer. The result is empty without gradients."""
    norms: LayerMetrics = {}
    for name, layer in quantized_layers(model).items():
        parameters: list[tuple[str, Tensor]] = [("w.grad", layer.weight)]
        for key, slot in SLOTS.items():
            parameters += [(f"{key}.{n}.grad", p) for n, p in layer.get_submodule(slot).named_parameters()]
        own_norms = {key: p.grad.norm().item() for key, p in parameters if p.grad is not None}
        norms |= {name: own_norms} if own_norms else {}
    return norms


def weight_tensors(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return latent and quantized weights by their names in TensorBoard."""
    tensors = {name: trace.weights for name, trace in traces.items() if trace.weights is not None}
    latent = {f"latent/{name}": tensor.before for name, tensor in tensors.items()}
    return latent | {f"quantized/{name}": tensor.after for name, tensor in tensors.items()}


def input_tensors(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return inputs before and after quantization by their names in TensorBoard."""
    tensors = {name: trace.inputs for name, trace in traces.items() if trace.inputs is not None}
    before = {f"input/{name}": tensor.before for name, tensor in tensors.items()}
    return before | {f"quantized_input/{name}": tensor.after for name, tensor in tensors.items()}


def level_counts(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the number of values on each level, in ascending order, by names in TensorBoard."""
    return {
        f"{slot}.levels/{name}": tensor.counts
        for name, trace in traces.items()
        for slot, tensor in (("w", trace.weights), ("a", trace.inputs))
        if tensor is not None
    }


def _float_outputs(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return the outputs of layers in the float network with the same latent weights."""
    with float_mode(model), eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, names) as calls:
        model(images)
        return {name: y for name, _, y in calls}


def _level_statistics(tensor: QuantizedTensor) -> dict[str, float]:
    counts = tensor.counts.double()
    frequencies = counts[counts > 0] / counts.sum()
    return {
        "top": tensor.grid.points.abs().nan_to_num(0, posinf=0).max().item(),
        "dead": float(len(counts) - len(frequencies)),
        "entropy": abs((frequencies * frequencies.log2()).sum().item()),
    }


def _clipped_share(tensor: QuantizedTensor) -> float:
    x, points = tensor.grid.arrange(tensor.before), tensor.grid.points
    low, high = (points.nan_to_num(torch.inf).amin(1, True), points.nan_to_num(-torch.inf).amax(1, True))
    return ((x > high) | ((x < low) & (low < 0))).float().mean().item()


def _output_similarity(expected: Tensor, output: Tensor) -> dict[str, float]:
    """Return SQNR in dB and cosine of an output. If the expected output is 0, the SQNR is left out."""
    signal, norm, error = expected.norm().item(), output.norm().item(), (output - expected).norm().item()
    if not signal:
        return {}
    return {"sqnr": sqnr_db(signal * signal, error * error)} | (
        {"cosine": (expected * output).sum().item() / (signal * norm)} if norm else {}
    )


def _scalars(layer: QLayer) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of the parameters and buffers of quantizers that are single numbers."""
    for key, slot in SLOTS.items():
        quantizer = layer.get_submodule(slot)
        for name, tensor in chain(quantizer.named_parameters(), quantizer.named_buffers()):
            if tensor.numel() == 1 and tensor.dtype != torch.bool:
                yield f"{key}.{name}", tensor.item()
