"""Sentinels: what says that a run goes wrong before its accuracy is read. Asked at the end of an epoch.

inf and nan in images, losses, gradients, weights and scales stop a run in the step in which they appear, and nothing of
it is saved: `qbench.training.loop`, `qbench.quant.layers`. So do a scale that is not above zero, with which levels lose
their order, and weights that have run away. All else may be what somebody wants to see, and is said once.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.quant.layers import QLayer, quantized_layers, quantizers
from qbench.training.layer_stats import SLOTS, LayerTrace, QuantizedTensor

GROWN = 100.0
"""Times its start that a layer's largest weight may reach unnoticed. Steps as large as the rate, which is what Adam
takes, would need 10^4 in one direction at a rate of 0.01 for a layer that starts at 1."""
EXPLODED = 1e4
"""Times its start at which the run ends: neighbouring float32 are then a thousandth of the start's weights apart, and
updates of the usual size are lost."""
LEARNT = 300
"""Steps after which a network should answer better than by chance: warm-ups and cold starts are shorter."""
SIGMAS = 3.0
"""Standard errors above chance that count as better: by luck 1 epoch in 740."""

HealthWarnings = dict[str, str]
"""What to say, by what it is about: the same thing is said once."""


def starts(model: nn.Module) -> dict[str, float]:
    """Return what each layer's weights are measured by later: the largest magnitude, at least 1 / sqrt(inputs)."""
    return {name: max(_largest(layer), layer.weight[0].numel() ** -0.5) for name, layer in _layers(model).items()}


def exploding_weights(model: nn.Module, start: Mapping[str, float], at: str) -> HealthWarnings:
    """Return the layers whose weights have outgrown their start.

    Args:
        at: where this is in the run, for messages: `in epoch 3, step 72`.

    Raises:
        Diverged: one has by more than `EXPLODED` times.
    """
    found = {}
    for name, layer in _layers(model).items():
        now = _largest(layer)
        times = now / start.get(name, now or 1.0)
        said = f"{name}: its largest weight, {now:.3g}, is {times:,.0f} times what it started with, {at}"
        if times > EXPLODED:
            raise Diverged(f"{said}; likely the rate is too high\ntry a lower optim.lr, or optim.clip_norm=1")
        if times > GROWN:
            found[f"range {name}"] = f"{said}; likely optim.lr is too high"
    return found


def check_scales(model: nn.Module, at: str) -> None:
    """Raise `Diverged` where a scale is not above zero, of those that a quantizer names in `positive_parameters`."""
    for name, layer in quantized_layers(model).items():
        for slot, quantizer in quantizers(layer).items():
            tensors = dict(quantizer.named_parameters()) | dict(quantizer.named_buffers())
            for key in quantizer.positive_parameters:
                scale = tensors[key].detach()
                if not (scale > 0).all():
                    said = f"{name}.{SLOTS[slot]}.{key} is {scale.min().item():.3g}, and must be above 0, {at}"
                    raise Diverged(
                        f"{said}; likely a step was too large and nothing kept it there\ntry a lower optim.lr"
                    )


def degenerate_layers(model: nn.Module, seen: Mapping[str, LayerTrace], at: str) -> HealthWarnings:
    """Return the layers that tell nothing apart: all weights on one of several levels, or one answer to all images.

    A layer that reads the same of all images is named only if no layer before it is.
    """
    found: HealthWarnings = {}
    layers, silent = quantized_layers(model), False
    for name, sight in seen.items():
        levels = _levels(layers[name], sight.weights)
        if len(levels) > 1 and (levels > 0).sum() == 1:
            said = f"{name}: all its weights lie on one level of {len(levels)}, {at}"
            found[f"level {name}"] = f"{said}; likely they are small against the level's scale, or of one sign"
        if not _alike(sight.output) or (silent and _alike(sight.input)):
            continue
        silent = True
        cause = "so is its input, already" if _alike(sight.input) else "its weights are 0, or its inputs on one level"
        found[f"output {name}"] = f"{name}: all its outputs are equal whatever the image, {at}; likely {cause}"
    return found


def at_chance(record: Mapping[str, Any], classes: int, step: int, at: str) -> HealthWarnings:
    """Return whether an epoch's training accuracy is no better than guessing one of `classes`."""
    if step < LEARNT or classes < 2 or not record["images"]:
        return {}
    guessed = 1 / classes
    better = guessed + SIGMAS * sqrt(guessed * (1 - guessed) / record["images"])
    if record["train_top1"] > 100 * better:
        return {}
    said = f"training accuracy is {record['train_top1']:.1f} % of {classes} classes, which is chance, {at}"
    return {"chance": f"{said}; likely optim.lr is too high or too low, or labels and images do not belong together"}


def _layers(model: nn.Module) -> dict[str, QLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QLayer)}


def _largest(layer: QLayer) -> float:
    low, high = layer.weight.detach().aminmax()
    return max(-low.item(), high.item())


def _levels(layer: QLayer, weights: QuantizedTensor | None) -> Tensor:
    """Return how many weights lie on each level; nothing where that could not be otherwise, or they are float yet."""
    if weights is None or layer.weight.numel() == 1 or not layer.weight_q.complete:
        return layer.weight.new_zeros(0)
    return weights.counts


def _alike(x: Tensor) -> bool:
    """Whether all images of a batch (N, ...) give the same."""
    return bool((x == x[:1]).all())
