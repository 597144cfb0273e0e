"""Computes statistics of the quantized layers on a few training images, at the end of an epoch.

An observation is one computation of these statistics. An observation does not affect training: the network is in
evaluation mode, without gradients, and the random state is kept. A layer with weights `w` and input `a` has the
following statistics:

    w.top, a.top          largest magnitude of the levels
    w.dead, a.dead        number of levels on which there is no value
    w.entropy, a.entropy  entropy of the level frequencies, in bits
    w.flips               fraction of the weights that changed level since the previous observation
    w.frozen              fraction of the weights that an incremental method has frozen
    a.clipped             fraction of the inputs that are above the highest level or, if some levels
                          are negative, below the lowest level
    sqnr                  power of the float output over power of the error of the output, in dB
    cosine                cosine of the angle between the output and the float output
    w.grad                norm of the latent weights' gradient in the last step, after clipping
    w.NAME, a.NAME        a quantizer's parameter or buffer that is one number: step, alpha, n1, ...
    w.NAME.grad           norm of the gradient of a quantizer's parameter

The float output is the layer's output in the float network that has the same latent weights. If a tensor has several
scale groups, their levels are counted together. For example, level 3 of one channel and level 3 of another channel
count as the same level. With an incremental method, a weight that is not frozen yet is counted at its nearest level. A
statistic that is not finite or not known is omitted.
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
"""Limits for the number of observed images, and for the total number of pixels of these images.

An observation uses 1/64 of the images of an epoch, but at least 8 and at most 64. If the images are large, it uses
fewer images. Training for one epoch costs about as much as three forward passes over all images. The two forward passes
of an observation therefore cost about 1 % of an epoch.
"""


SIGNIFICANT_DIGITS = 6
"""Number of significant digits of the recorded statistics."""

SLOTS = {"w": "weight_q", "a": "input_q", "g": "output_q"}

LayerMetrics = dict[str, dict[str, float]]
"""Layer name -> name of a statistic, such as `w.top` -> value."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor before and after quantization, and the grid of allowed values."""

    before: Tensor
    after: Tensor
    grid: Grid

    @cached_property
    def codes(self) -> Tensor:
        """The index of each value's level, of shape (groups, values per group)."""
        return nearest_points(self.grid.arrange(self.after), self.grid.points)[0]

    @property
    def counts(self) -> Tensor:
        """The number of values on each allowed level, in ascending order of the levels."""
        allowed = self.grid.points[..., 0].isfinite().any(0)
        return self.codes.flatten().bincount(minlength=len(allowed))[allowed]


class LayerTrace(NamedTuple):
    """The tensors of one layer in a forward pass.

    Args:
        weights: the quantized weights, or None if weights are float.
        inputs: the quantized inputs, or None if inputs are float.
        input: the layer's input before quantization.
        output: the layer's output.
    """

    weights: QuantizedTensor | None
    inputs: QuantizedTensor | None
    input: Tensor
    output: Tensor


def observed_images(images: Tensor, epoch_images: int) -> Tensor:
    """Return the images that an observation uses: the first images of `images` (N, C, H, W).

    Their number depends on `epoch_images`, the number of images in an epoch.
    """
    count = min(max(epoch_images // EPOCH_SHARE, MIN_IMAGES), MAX_IMAGES, MAX_PIXELS // prod(images.shape[2:]))
    return images[: max(count, 2)]


@torch.no_grad()
def trace_layers(model: nn.Module, images: Tensor) -> dict[str, LayerTrace]:
    """Return the tensors of each quantized layer in a forward pass on images, in execution order.

    If a layer runs several times, its tensors come from the last call.
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
    """Return a tensor before and after quantization, or None if the tensor is float or has no levels yet."""
    grid = quantizer.grid(before)
    return QuantizedTensor(before, after, grid) if grid is not None and grid.points.shape[1] else None


def layer_metrics(
    model: nn.Module,
    images: Tensor,
    traces: Mapping[str, LayerTrace],
    last_codes: Mapping[str, Tensor],
    gradients: LayerMetrics,
) -> LayerMetrics:
    """Return the statistics of every layer. The docstring of this module describes the statistics.

    Args:
        model: the network.
        images: the observed images.
        traces: the tensors of the layers for these images, as returned by `trace_layers`.
        last_codes: the weights' codes at the previous observation, as returned by `weight_codes`, or an empty map.
        gradients: the norms of the gradients after the last step, as returned by `gradient_norms`.
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
            values["w.flips"] = (last_codes[name] != _from_top(trace.weights)).float().mean().item()
        if isinstance(quantizer := layers[name].weight_q, FrozenWeight):
            values["w.frozen"] = quantizer.frozen.float().mean().item()
        values |= _output_similarity(float_outputs[name], trace.output) | gradients.get(name, {})
        metrics[name] = {
            key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for key, value in values.items() if isfinite(value)
        }
    return metrics


def weight_codes(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the codes of every layer's weights, 0 for the highest level.

    The next observation compares new codes with these codes.
    """
    codes = {}
    for name, trace in traces.items():
        if trace.weights is not None:
            fits_in_byte = trace.weights.grid.points.shape[1] <= 2**8
            codes[name] = _from_top(trace.weights).to(torch.uint8 if fits_in_byte else torch.int32)
    return codes


def _from_top(weights: QuantizedTensor) -> Tensor:
    """Return the code of each weight, 0 for the highest level. A grid may get more levels at its lower end only."""
    return weights.grid.points.shape[1] - 1 - weights.codes


def gradient_norms(model: nn.Module) -> LayerMetrics:
    """Return the norms of the gradients of the last step, by layer. The result is empty if there are no gradients."""
    norms: LayerMetrics = {}
    for name, layer in quantized_layers(model).items():
        parameters: list[tuple[str, Tensor]] = [("w.grad", layer.weight)]
        for key, slot in SLOTS.items():
            parameters += [(f"{key}.{n}.grad", p) for n, p in layer.get_submodule(slot).named_parameters()]
        own_norms = {key: p.grad.norm().item() for key, p in parameters if p.grad is not None}
        norms |= {name: own_norms} if own_norms else {}
    return norms


def weight_tensors(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the latent and the quantized weights of all layers, by their names in TensorBoard."""
    tensors = {name: trace.weights for name, trace in traces.items() if trace.weights is not None}
    latent = {f"latent/{name}": tensor.before for name, tensor in tensors.items()}
    return latent | {f"quantized/{name}": tensor.after for name, tensor in tensors.items()}


def input_tensors(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the inputs of all layers before and after quantization, by their names in TensorBoard."""
    tensors = {name: trace.inputs for name, trace in traces.items() if trace.inputs is not None}
    before = {f"input/{name}": tensor.before for name, tensor in tensors.items()}
    return before | {f"quantized_input/{name}": tensor.after for name, tensor in tensors.items()}


def level_counts(traces: Mapping[str, LayerTrace]) -> dict[str, Tensor]:
    """Return the number of values on each level, in ascending order of the levels, by tensor name in TensorBoard."""
    return {
        f"{slot}.levels/{name}": tensor.counts
        for name, trace in traces.items()
        for slot, tensor in (("w", trace.weights), ("a", trace.inputs))
        if tensor is not None
    }


def _float_outputs(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return the outputs that the layers have in the float network with the same latent weights."""
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
    """Return the SQNR in dB and the cosine of an output. If the float output is 0, the SQNR is omitted."""
    signal, norm, error = expected.norm().item(), output.norm().item(), (output - expected).norm().item()
    if not signal:
        return {}
    return {"sqnr": sqnr_db(signal * signal, error * error)} | (
        {"cosine": (expected * output).sum().item() / (signal * norm)} if norm else {}
    )


def _scalars(layer: QLayer) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of each parameter and buffer of a quantizer that is a single number."""
    for key, slot in SLOTS.items():
        quantizer = layer.get_submodule(slot)
        for name, tensor in chain(quantizer.named_parameters(), quantizer.named_buffers()):
            if tensor.numel() == 1 and tensor.dtype != torch.bool:
                yield f"{key}.{name}", tensor.item()
