"""Checks the backward pass: weights, inputs and learned parameters must get correct gradients."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qbench.bits import Bits
from qbench.check.subject import MethodUnderTest, NotApplicable, PropertyViolation, batches
from qbench.quant.graph import recorded_calls
from qbench.quant.layers import QLayer, quantized_layers
from qbench.quant.masks import FrozenWeight
from qbench.quant.ops import without_rounding
from qbench.quant.quantizer import IdentityQuantizer, Quantizer

FLOOR = 1e-4
"""For upstream gradients of about 1, smaller gradients count as zero.

A gradient that is exactly zero in theory can have a rounding error of this size, if it is a sum whose terms cancel.
"""

TOLERANCE = 1e-4
"""Largest allowed relative difference between a gradient and its estimate by finite differences."""

STRAIGHT = "the gradient of rounding is zero; use `round_ste` or `straight_through` in qbench/quant/ops.py"
HINTS = {
    "outputs": STRAIGHT,
    "weights": f"{STRAIGHT}; for weights that are not trained, set `requires_grad_(False)`",
    "inputs": STRAIGHT,
    "learned parameters": "compute the result from these parameters, and do not round or `detach` them",
}


def gradients_arrive(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that weights, inputs and learned parameters get useful gradients in the first epoch.

    A gradient is useful if it is finite and not zero everywhere.

    Each quantizer is checked separately, so that a quantizer that stops the gradient does not make the check fail for
    earlier layers too. The check skips post-training methods, weights that require no gradient, and layers whose
    weights are all frozen.
    """
    if not subject.make(bits).needs_training:
        raise NotApplicable("the method does not train")
    model = subject.network(bits, epoch=0).train()
    layers = quantized_layers(model)
    torch.manual_seed(6)
    with torch.no_grad(), recorded_calls(model, list(layers)) as calls:
        model(batches()[0][0])
    checked = 0
    for name, x, y in calls:
        for what, grads in _gradients(layers[name], x, y):
            checked += 1
            _arrived(name, what, grads)
    if not checked:
        raise NotApplicable("the weights are fixed before the first step, and nothing else is trained")


def _gradients(layer: QLayer, x: Tensor, y: Tensor) -> Iterator[tuple[str, list[Tensor | None]]]:
    """For each quantizer of a layer, yield (kind, gradients). The kind names the tensors, such as `weights`."""
    all_frozen = isinstance(layer.weight_q, FrozenWeight) and layer.weight_q.complete
    fixed = not layer.weight.requires_grad or all_frozen
    cases: list[tuple[str, Quantizer, Callable[[Tensor], Tensor], Tensor]] = [
        ("outputs", layer.output_q, lambda value: layer.output_q(value, x), y),
        ("weights", layer.weight_q, layer.weight_q, layer.weight),
        ("inputs", layer.input_q, layer.input_q, torch.cat([x, torch.randn_like(x)])),  # x may be all zeros
    ]
    for what, quantizer, function, value in cases:
        if isinstance(quantizer, IdentityQuantizer):
            continue
        value = value.detach().clone()
        if what != "weights" or not fixed:
            value.requires_grad_()
            result = function(value)
            some_float = what == "weights" and not layer.weight_q.complete
            upstream = torch.randn_like(result) if some_float else _balanced_over_levels(result.detach())
            yield what, _derivatives(result, upstream, [value])
            value = value.detach()
        if learned := [p for p in quantizer.parameters() if p.requires_grad]:
            wide = torch.cat([function(value), function(100 * torch.randn_like(value))])  # also beyond a learned range
            yield "learned parameters", _derivatives(wide, torch.randn_like(wide), learned)


def _derivatives(result: Tensor, upstream: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    if not result.requires_grad:
        return [None for _ in inputs]
    return list(torch.autograd.grad(result, inputs, upstream, allow_unused=True))


def _balanced_over_levels(result: Tensor) -> Tensor:
    """Return random upstream gradients. Their sum over each set of equal values in `result` is 0.

    A change of the scale changes equal values by equal amounts. For these upstream gradients, the gradient through the
    scale is therefore 0, and a nonzero gradient has passed through the rounding. If most values occur only once, the
    tensor has no levels or too many levels. The returned random gradients are then not balanced.
    """
    upstream = torch.randn_like(result)
    _, level, count = torch.unique(result, return_inverse=True, return_counts=True)
    if (count == 1).sum() > len(count) / 2:
        return upstream
    total = torch.zeros(len(count)).index_add(0, level.flatten(), upstream.flatten())
    mean: Tensor = total / count
    return upstream - mean[level]


def _arrived(name: str, what: str, grads: list[Tensor | None]) -> None:
    present = [grad for grad in grads if grad is not None]
    if not present:
        raise PropertyViolation(f"{name}: its {what} get no gradient: {HINTS[what]}")
    if not all(grad.isfinite().all() for grad in present):
        raise PropertyViolation(f"{name}: the gradient of its {what} is not finite")
    floor, scale = (0, "") if what == "learned parameters" else (FLOOR, " (apart from the gradient through a scale)")
    if not any((grad.abs() > floor).any() for grad in present):
        raise PropertyViolation(f"{name}: the gradient of its {what} is zero everywhere{scale}: {HINTS[what]}")


def learned_parameters(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that the gradients of learned parameters agree with finite differences.

    The gradients and the differences are computed in float64, with rounding switched off.
    """
    checked = 0
    for name, layer in subject.layers(bits):
        x = torch.rand(2, layer.weight.shape[1], 4, 4, dtype=torch.float64) * 1.5
        for quantizer, value in ((layer.weight_q, layer.weight.detach().double()), (layer.input_q, x)):
            double = copy.deepcopy(quantizer).double()
            for key, p in double.named_parameters():
                checked += 1
                _compare_with_differences(f"{name}: {key}", double, p, value, float(double.gradient_factor(value)))
    if not checked:
        raise NotApplicable("the method has no learned parameters")


def _compare_with_differences(name: str, quantizer: Quantizer, p: nn.Parameter, x: Tensor, factor: float) -> None:
    upstream = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with without_rounding():
        (grad,) = torch.autograd.grad((quantizer(x) * upstream).sum(), p)
        small, flat = 1e-6, p.data.view(-1)
        for i in range(min(flat.numel(), 8)):
            values = []
            for move in (small, -2 * small):
                flat[i] += move
                values.append((quantizer(x) * upstream).sum().item())
            flat[i] += small
            expected, got = factor * (values[0] - values[1]) / (2 * small), grad.view(-1)[i].item()
            if abs(got - expected) > TOLERANCE * max(1.0, abs(expected)):
                raise PropertyViolation(
                    f"{name}[{i}]: the gradient is {got:g}, but finite differences give {expected:g}"
                )
