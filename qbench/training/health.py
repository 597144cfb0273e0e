"""Checks the health of training at the end of an epoch, and warns of problems or stops the run.

`qbench.training.loop` and `qbench.quant.layers` stop a run if inf or nan appears in images, losses, gradients, weights
or scales. The step in which this happens is not saved. The checks in this module also stop a run if weights explode, or
if a scale is not above zero. With such a scale, the levels would not be in ascending order. All other findings may be
intended. Each of them only causes a warning, which is printed once.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt

from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.quant.layers import QLayer, is_quantizer_key, quantized_layers, quantizers
from qbench.quant.masks import FrozenWeight
from qbench.training.epoch_record import EpochRecord
from qbench.training.layer_stats import SLOTS, LayerTrace, QuantizedTensor

WARN_GROWTH = 100.0
"""If the largest weight of a layer grows by more than this factor since the start, there is a warning.

A step of Adam is about as large as the learning rate. With a learning rate of 0.01, a weight that starts at 1 needs
10^4 steps in the same direction to grow by this factor.
"""

WITHOUT_TRAINING = "without training"
"""In messages of a run that trains nothing, this text takes the place of the epoch and the step."""

MAX_GROWTH = 1e4
"""If the largest weight of a layer grows by more than this factor since the start, the run stops.

At this magnitude, neighbouring float32 numbers differ by about a thousandth of the initial weights. Rounding then
removes updates of the usual size.
"""

MIN_STEPS = 300
"""Number of steps after which a network should be better than chance, even with a warm-up of the learning rate."""

MOST_NAMES = 4
"""Maximum number of parameters that a warning names."""

FIRST_STEPS = 100
"""Number of first steps in which every parameter should get a gradient at least once. A step may skip some layers."""

STANDARD_ERRORS = 3.0
"""Minimum number of standard errors by which an accuracy must exceed chance to count as better than chance.

A guessing network exceeds this limit in 1 of 740 epochs.
"""

HealthWarnings = dict[str, str]
"""Maps the topic of a warning, such as `range conv1`, to the warning's text. A topic has at most one warning."""


def initial_magnitudes(model: nn.Module) -> dict[str, float]:
    """Return the largest weight magnitude of each layer. Later magnitudes are compared with these magnitudes.

    The returned magnitude is at least 1 / sqrt(n), where n is the fan-in of the layer. Otherwise, the growth of a layer
    that starts at 0 would be infinite.
    """
    return {name: max(_max_magnitude(layer), layer.weight[0].numel() ** -0.5) for name, layer in _layers(model).items()}


def exploding_weights(model: nn.Module, start: Mapping[str, float], where: str) -> HealthWarnings:
    """Return warnings about layers whose weights have grown too much.

    Args:
        model: the network.
        start: initial magnitudes of the layers, as returned by `initial_magnitudes`.
        where: text for messages that says when the check was made, such as `in epoch 3, step 72`.

    Raises:
        Diverged: a layer's largest weight has grown by more than the factor `MAX_GROWTH`.
    """
    warnings = {}
    for name, layer in _layers(model).items():
        magnitude = _max_magnitude(layer)
        growth = magnitude / start.get(name, magnitude or 1.0)
        text = (
            f"{name}: the largest weight is {magnitude:.3g}, {growth:,.0f} times the initial one or 1/sqrt(fan-in), "
            f"whichever is larger, {where}"
        )
        if growth > MAX_GROWTH:
            raise Diverged(
                f"{text}; probably the learning rate is too high\ntry a lower optim.lr, or optim.clip_norm=1"
            )
        if growth > WARN_GROWTH:
            warnings[f"range {name}"] = f"{text}; probably optim.lr is too high"
    return warnings


def remedy(trained: bool) -> str:
    """Return advice on what to do about a value that is not finite.

    Args:
        trained: whether there was a training step before. If not, the learning rate cannot be the cause.
    """
    if trained:
        return "try a lower optim.lr"
    return "nothing was trained, so the cause is in the initial weights, in the images or in the method"


def check_scales(model: nn.Module, where: str) -> None:
    """Raise `Diverged` if a scale is not above zero.

    Quantizers list the names of their scales in `positive_parameters`.
    """
    trained = where != WITHOUT_TRAINING
    cause = f"probably an optimizer step was too large\n{remedy(trained)}" if trained else remedy(trained)
    for name, layer in quantized_layers(model).items():
        for slot, quantizer in quantizers(layer).items():
            tensors = dict(quantizer.named_parameters()) | dict(quantizer.named_buffers())
            for key in quantizer.positive_parameters:
                scale = tensors[key].detach()
                if not (scale > 0).all():
                    raise Diverged(
                        f"{name}.{SLOTS[slot]}.{key} is {scale.min().item():.3g} {where}, but must be above 0; {cause}"
                    )


def degenerate_layers(model: nn.Module, traces: Mapping[str, LayerTrace], where: str) -> HealthWarnings:
    """Return warnings about layers whose weights or outputs carry no information.

    A layer gets a warning if all its weights are on the same level although several levels are allowed. A layer also
    gets a warning if its output is the same for all images. This second warning is left out if the layer's input is
    also the same for all images, and an earlier layer already has the second warning.
    """
    warnings: HealthWarnings = {}
    layers, constant = quantized_layers(model), False
    for name, trace in traces.items():
        counts = _weight_level_counts(layers[name], trace.weights)
        if len(counts) > 1 and (counts > 0).sum() == 1:
            warnings[f"level {name}"] = (
                f"{name}: all weights are on one of {len(counts)} levels, {where}; probably the weights are "
                f"small relative to the scale, or have the same sign"
            )
        constant_input = _equal_for_all_images(trace.input)
        if not _equal_for_all_images(trace.output) or (constant and constant_input):
            continue
        constant = True
        cause = (
            "because the layer's input is also the same"
            if constant_input
            else "because all weights of the layer are 0 or all its inputs are on one level"
        )
        warnings[f"output {name}"] = f"{name}: the output is the same for all images, {where}; probably {cause}"
    return warnings


def at_chance(record: EpochRecord, chance: float, step: int, where: str) -> HealthWarnings:
    """Return a warning if the training accuracy is not better than that of a constant answer.

    `chance` is the share of the most frequent class, or 0 if it is not known.
    """
    if step < MIN_STEPS or not 0 < chance < 1 or not record.images:
        return {}
    limit = chance + STANDARD_ERRORS * sqrt(chance * (1 - chance) / record.images)
    if record.train_top1 > 100 * limit:
        return {}
    return {
        "chance": f"training accuracy is {record.train_top1:.1f} %, which is not better than the share of the most "
        f"frequent class ({100 * chance:.1f} %), {where}; probably optim.lr is too high or too low, or the labels do "
        f"not match the images"
    }


def to_train(model: nn.Module) -> list[str]:
    """Return the names of all parameters outside quantizers that require a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad and not is_quantizer_key(name, model)]


def still_without_gradient(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the parameters among `names` whose gradient is missing or 0 in this step.

    Parameters that the method has frozen are left out.
    """
    parameters = dict(model.named_parameters())
    frozen = {f"{name}.weight" for name, layer in quantized_layers(model).items() if _all_frozen(layer)}
    waiting = [name for name in names if parameters[name].requires_grad and name not in frozen]
    return [name for name in waiting if (grad := parameters[name].grad) is None or not grad.any()]


def untrained(names: Sequence[str], steps: int) -> HealthWarnings:
    """Return a warning that names the parameters without a gradient in the first steps."""
    if not names or not steps:
        return {}
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return {
        "gradient": f"parameters not trained: {', '.join(names[:MOST_NAMES])}{more} had no gradient in the first "
        f"{min(steps, FIRST_STEPS)} steps; probably forward() does not use them, detaches or copies a tensor, or clips "
        "all values that depend on them, as quantizers can"
    }


def _all_frozen(layer: QLayer) -> bool:
    return isinstance(layer.weight_q, FrozenWeight) and layer.weight_q.complete


def _layers(model: nn.Module) -> dict[str, QLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QLayer)}


def _max_magnitude(layer: QLayer) -> float:
    low, high = layer.weight.detach().aminmax()
    return max(-low.item(), high.item())


def _weight_level_counts(layer: QLayer, weights: QuantizedTensor | None) -> Tensor:
    """Return the number of weights on each level. The result is empty for float weights or a single weight."""
    if weights is None or layer.weight.numel() == 1 or not layer.weight_q.complete:
        return layer.weight.new_zeros(0)
    return weights.counts


def _equal_for_all_images(x: Tensor) -> bool:
    """Return whether a tensor (N, ...) has the same values for all N images."""
    return bool((x == x[:1]).all())
