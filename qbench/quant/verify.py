"""Verifies that a network is quantized, by counting the levels in its quantized tensors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT, LevelCount
from qbench.quant.graph import eval_mode_keeping_rng, read_without_call, recorded_calls
from qbench.quant.image import ImageQuantizer
from qbench.quant.layers import BypassedActivation, QLayer, computed_weight, quantized_layers
from qbench.quant.quantizer import Quantizer

ROUNDING = 4e-7
"""Largest allowed distance from a level due to float32 rounding, relative to the scale group's largest level."""

ARITHMETIC = 1e-5
"""Largest allowed distance from a level due to a method's arithmetic, relative to the scale group's largest level.

`FRACTION_OF_STEP` also limits this distance."""

FRACTION_OF_STEP = 0.05
"""Limit on the distance that `ARITHMETIC` allows, as a fraction of the smallest step between levels."""


class NotQuantized(Exception):
    """Raised if the network computes with values that are not on the grid of a quantizer."""


def verify(model: nn.Module, images: Tensor) -> dict[str, dict[str, LevelCount]]:
    """Count the levels in every quantized layer, in one forward and backward pass.

    Before that, the network runs on one image, to check that evaluation uses no float weights.

    Returns:
        For each layer and each of its quantized tensors (w, a, g): the largest number of levels that was found in a
        scale group, and the allowed number. g is left out if a layer has no gradient, such as the first layers if their
        weights are frozen.

    Raises:
        NotQuantized: a value is not on the grid, a quantizer declares no grid, or evaluation does not call a layer. The
            message names the layer and the tensor.
    """
    layers = quantized_layers(model)
    parameters = [name for name, layer in layers.items() if computed_weight(layer) is None]
    if read := read_without_call(model, images[:1], parameters):
        raise NotQuantized(f"{read[0]}: evaluation uses its float weight without calling the layer")
    slots = [f"{name}.{slot}" for name in layers for slot in ("input_q", "weight_q", "output_q")]
    with eval_mode_keeping_rng(model), torch.enable_grad(), recorded_calls(model, slots) as calls:
        logits = model(images)
        passed = {slot: (before, after) for slot, before, after in calls}
        if missing := [name for name in layers if f"{name}.weight_q" not in passed]:
            raise NotQuantized(f"{missing[0]}: evaluation does not call the layer")
        outputs = [f"{name}.output_q" for name, layer in layers.items() if layer.bits.g < FLOAT]
        passed |= _gradients(logits, {slot: passed.pop(slot) for slot in outputs})
    return {name: _verify_layer(name, layer, passed) for name, layer in layers.items()}


def _gradients(logits: Tensor, outputs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the gradients that arrive at quantizers of gradients, and those that leave them.

    Quantizers without gradient are left out.

    Args:
        logits: the network's output.
        outputs: for each quantizer, the output of its layer before and after it.
    """
    with_gradient = {slot: pair for slot, pair in outputs.items() if pair[0].requires_grad}
    if not with_gradient:
        return {}
    # Wrong labels ensure that the gradients are not zero.
    loss = F.cross_entropy(logits, (logits.detach().argmax(1) + 1) % logits.shape[1])
    # The gradient that arrives at a quantizer is the gradient of the quantizer's output; the gradient that leaves is
    # the gradient of the quantizer's input.
    tensors = [t for before, after in with_gradient.values() for t in (after, before)]
    gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
    pairs = {slot: (next(gradients), next(gradients)) for slot in with_gradient}
    return {slot: pair for slot, pair in pairs.items() if pair[0] is not None}


def verify_weights(name: str, layer: QLayer, weights: Tensor) -> LevelCount:
    """Count the levels in the weights that a layer uses in evaluation.

    Raises:
        NotQuantized: some weights are still float, or are not on the grid of their quantizer.
    """
    if not layer.weight_q.complete:
        raise NotQuantized(f"{name}: weights are still float")
    return _count_levels(f"{name}: weights", layer.weight_q, layer.weight, weights)


NOTED_SHARE = 0.01
"""If at least this share of a layer's inputs is negative and therefore becomes 0, `negatives_warning` says so."""


def negatives_warning(model: nn.Module, images: Tensor) -> str:
    """Return a warning that names layers without negative input levels whose inputs are often negative, or ""."""
    clipped = {name: share for name, share in clipped_negatives(model, images).items() if share >= NOTED_SHARE}
    if not clipped:
        return ""
    worst = ", ".join(f"{n} {100 * clipped[n]:.0f} %" for n in sorted(clipped, key=clipped.__getitem__)[:-4:-1])
    count = "1 layer sets" if len(clipped) == 1 else f"{len(clipped)} layers set"
    return f"{count} negative inputs to 0 ({worst} of the inputs), because no level is negative"


def clipped_negatives(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the fraction of negative inputs, for each layer whose input levels are all at least 0.

    Quantization sets negative inputs of such a layer to 0. If the quantizer replaces a ReLU, this is intended, and the
    layer is left out. Layers that read the image and layers without negative inputs are also left out.
    """
    bypassed = [module for module in model.modules() if isinstance(module, BypassedActivation)]
    intended = {layer for activation in bypassed for layer in activation.readers}
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.bits.a < FLOAT}
    slots = {
        f"{n}.input_q": n for n in layers if n not in intended and not isinstance(layers[n].input_q, ImageQuantizer)
    }
    with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, list(slots)) as calls:
        model(images)
    shares = {}
    for slot, before, _ in calls:
        grid = layers[slots[slot]].input_q.grid(before)
        share = (before < 0).float().mean().item()
        if share and grid is not None and not bool((grid.points < 0).any()):
            shares[slots[slot]] = share
    return shares


def _verify_layer(name: str, layer: QLayer, passed: dict[str, tuple[Tensor, Tensor]]) -> dict[str, LevelCount]:
    slots = (
        ("w", layer.bits.w, "weights", "weight_q", layer.weight_q),
        ("a", layer.bits.a, "activations", "input_q", layer.input_q),
        ("g", layer.bits.g, "gradients", "output_q", layer.output_q),
    )
    return {
        key: _count_levels(f"{name}: {what}", quantizer, *passed[f"{name}.{slot}"])
        for key, bits, what, slot, quantizer in slots
        if bits < FLOAT and (key != "g" or f"{name}.{slot}" in passed)
    }


def _count_levels(what: str, quantizer: Quantizer, before: Tensor, after: Tensor) -> LevelCount:
    with torch.no_grad():
        before, after = before.detach(), after.detach()
        grid = quantizer.grid(before)
        if grid is None:
            raise NotQuantized(f"{what}: {type(quantizer).__name__} declares no grid")
        if not grid.points.shape[1]:
            raise NotQuantized(f"{what}: the grid has no levels")
        arranged = grid.arrange(after)
        if len(arranged) != len(grid.points):
            raise NotQuantized(
                f"{what}: the grid has {len(grid.points)} scale groups, but its function arrange makes "
                f"{len(arranged)} groups"
            )
        index, distance = nearest_points(arranged, grid.points)
    off = ~(distance <= _tolerance(grid.points))  # also true for NaN
    if off.any():
        raise NotQuantized(
            f"{what}: {int(off.sum())} of {off.numel()} values are not on the {grid.points.shape[1]} levels"
        )
    used = torch.zeros(grid.points.shape[:2], dtype=torch.bool, device=index.device).scatter_(1, index, True)
    allowed = ~grid.points[..., 0].isnan()
    return LevelCount(found=int(used.sum(1).max()), allowed=int(allowed.sum(1).max()))


def _tolerance(points: Tensor) -> Tensor:
    """Return the largest allowed distance between a value and its level, for each scale group.

    `points` has the shape (G, L, D), for G scale groups, L levels and dimension D. The result has the shape (G, 1).
    `scale` is the largest magnitude of a group's points, and `step` is the smallest distance between two points. The
    result is max(ROUNDING * scale, min(ARITHMETIC * scale, FRACTION_OF_STEP * step)).
    """
    # Compute the largest magnitude of the levels of each group, made positive for a group of zeros.
    scale = points.abs().nan_to_num(0).amax((1, 2)).clamp(min=torch.finfo(points.dtype).tiny)
    # Compute the smallest distance between two neighbouring levels, or infinity if no two levels are
    # distinct. NaN is padding.
    steps = (points[:, 1:] - points[:, :-1]).norm(dim=-1).nan_to_num(torch.inf)
    step = torch.where(steps > 0, steps, torch.inf).amin(1) if steps.shape[1] else torch.full_like(scale, torch.inf)
    arithmetic = torch.minimum(ARITHMETIC * scale, FRACTION_OF_STEP * step)
    return torch.maximum(ROUNDING * scale, arithmetic).unsqueeze(1)


def nearest_points(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the point nearest to each value, and the distance from this point, both of shape (G, n).

    For G scale groups, L levels and dimension D, points have the shape (G, L, D), and n values per group have the shape
    (G, n, D). Scalar points (D = 1) must be ascending. NaN among the points is padding.
    """
    if values.shape[-1] > 1:
        return _nearest_vectors(values, points)
    line, x = points[..., 0].nan_to_num(nan=float("inf")).contiguous(), values[..., 0].contiguous()
    # Find the first point at or above x, and the point below this point.
    right = torch.searchsorted(line, x).clamp(max=line.shape[1] - 1)
    left = (right - 1).clamp(min=0)
    to_left, to_right = (x - line.gather(1, left)).abs(), (line.gather(1, right) - x).abs()
    return torch.where(to_left < to_right, left, right), torch.minimum(to_left, to_right)


def _nearest_vectors(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    exact = "donot_use_mm_for_euclid_dist"  # with a matrix product, half of the significant digits would be lost
    groups = zip(values, points.nan_to_num(nan=float("inf")), strict=True)  # one group at a time, to save memory
    nearest = [torch.cdist(value, point, compute_mode=exact).min(-1) for value, point in groups]
    distance, index = (torch.stack(each) for each in zip(*nearest, strict=True))
    return index, distance
