"""Properties of the backward pass: what is trained gets a gradient, and learned parameters the right one."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qbench.bits import Bits
from qbench.check.subject import MethodUnderTest, NotApplicable, PropertyViolation, batches
from qbench.quant.graph import recorded_calls
from qbench.quant.layers import IdentityOutput, QLayer, quantized_layers
from qbench.quant.ops import without_rounding

FLOOR = 1e-4
"""Of the gradient that arrives: what passes below this is zero, a sum that cancels out but for its rounding."""

STRAIGHT = "rounding has no gradient of its own, see `round_ste` and `straight_through` in qbench/quant/ops.py"
HINTS = {
    "outputs": STRAIGHT,
    "weights": f"{STRAIGHT}; weights meant to stay want `requires_grad_(False)`",
    "inputs": STRAIGHT,
    "learned parameters": "the result must be computed from them, outside of rounding and not detached",
}


def reaching(subject: MethodUnderTest, bits: Bits) -> None:
    """In the first epoch, weights, inputs and learned parameters get gradients, finite and not zero everywhere.

    Quantizers are asked one by one: one that stops the gradient is not blamed on the layers before it. Not asked:
    post-training methods, weights that require no gradient, layers whose weights are all frozen already.
    """
    if not subject.make(bits).needs_training:
        raise NotApplicable("it trains no epoch")
    model = subject.network(bits, epoch=0).train()
    layers = quantized_layers(model)
    torch.manual_seed(6)
    with torch.no_grad(), recorded_calls(model, list(layers)) as calls:
        model(batches()[0][0])
    asked = 0
    for name, x, y in calls:
        for what, grads in _gradients(layers[name], x, y):
            asked += 1
            _arrived(name, what, grads)
    if not asked:
        raise NotApplicable("its weights are fixed before the first step, and nothing else wants a gradient")


def _gradients(layer: QLayer, x: Tensor, y: Tensor) -> Iterator[tuple[str, list[Tensor | None]]]:
    """Yield what must get a gradient from each of a layer's quantizers, and the gradients that it gets."""
    complete = getattr(layer.weight_q, "complete", None)  # None: no part of the weights is ever left float
    fixed = not layer.weight.requires_grad or complete
    cases: list[tuple[str, nn.Module, Callable[[Tensor], Tensor], Tensor]] = [
        ("outputs", layer.output_q, lambda value: layer.output_q(value, x), y),
        ("weights", layer.weight_q, layer.weight_q, layer.weight),
        ("inputs", layer.input_q, layer.input_q, torch.cat([x, torch.randn_like(x)])),  # x may be zero all over
    ]
    for what, site, function, value in cases:
        if isinstance(site, nn.Identity | IdentityOutput):
            continue
        value = value.detach().clone()
        if what != "weights" or not fixed:
            value.requires_grad_()
            result = function(value)
            free = what == "weights" and complete is False
            up = torch.randn_like(result) if free else _past_levels(result.detach())
            yield what, _derived(result, up, [value])
            value = value.detach()
        if learned := [p for p in site.parameters() if p.requires_grad]:
            wide = torch.cat([function(value), function(100 * torch.randn_like(value))])  # beyond a learned range too
            yield "learned parameters", _derived(wide, torch.randn_like(wide), learned)


def _derived(result: Tensor, up: Tensor, of: Sequence[Tensor]) -> list[Tensor | None]:
    if not result.requires_grad:
        return [None for _ in of]
    return list(torch.autograd.grad(result, of, up, allow_unused=True))


def _past_levels(result: Tensor) -> Tensor:
    """Return random numbers whose sum over equal values is 0, so that what moves whole levels, a scale, gets nothing.

    They are left as drawn where most values occur once: such a tensor has no levels, or more of them than elements.
    """
    up = torch.randn_like(result)
    _, level, count = torch.unique(result, return_inverse=True, return_counts=True)
    if (count == 1).sum() > len(count) / 2:
        return up
    total = torch.zeros(len(count)).index_add(0, level.flatten(), up.flatten())
    mean: Tensor = total / count
    return up - mean[level]


def _arrived(name: str, what: str, grads: list[Tensor | None]) -> None:
    there = [grad for grad in grads if grad is not None]
    if not there:
        raise PropertyViolation(f"{name}: no gradient arrives at its {what}: {HINTS[what]}")
    if not all(grad.isfinite().all() for grad in there):
        raise PropertyViolation(f"{name}: the gradient of its {what} is not finite")
    floor, scale = (0, "") if what == "learned parameters" else (FLOOR, ", a scale's part left out")
    if not any((grad.abs() > floor).any() for grad in there):
        raise PropertyViolation(f"{name}: the gradient of its {what} is zero everywhere{scale}: {HINTS[what]}")


def learned_parameters(subject: MethodUnderTest, bits: Bits) -> None:
    """Gradients of learned parameters agree with finite differences in float64, with rounding out of the way."""
    asked = 0
    for name, layer in subject.layers(bits):
        x = torch.rand(2, layer.weight.shape[1], 4, 4, dtype=torch.float64) * 1.5
        for site, value in ((layer.weight_q, layer.weight.detach().double()), (layer.input_q, x)):
            own = copy.deepcopy(site).double()
            for key, p in own.named_parameters():
                asked += 1
                factor = own.gradient_factor(value) if hasattr(own, "gradient_factor") else 1.0  # type: ignore[operator]
                _differences(f"{name}: {key}", own, p, value, float(factor))
    if not asked:
        raise NotApplicable("it learns no parameters of its own")


def _differences(name: str, site: nn.Module, p: nn.Parameter, x: Tensor, factor: float) -> None:
    up = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with without_rounding():
        (grad,) = torch.autograd.grad((site(x) * up).sum(), p)
        small, flat = 1e-6, p.data.view(-1)
        for i in range(min(flat.numel(), 8)):
            there = []
            for move in (small, -2 * small):
                flat[i] += move
                there.append((site(x) * up).sum().item())
            flat[i] += small
            expected, got = factor * (there[0] - there[1]) / (2 * small), grad.view(-1)[i].item()
            if abs(got - expected) > 1e-4 * max(1.0, abs(expected)):
                raise PropertyViolation(f"{name}[{i}]: gradient {got:g}, finite differences {expected:g}")
