"""Checks the forward pass: levels, the traits that a method declares, and the bias of stochastic rounding."""

import math
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qbench.bits import FLOAT, Bits, LevelCount
from qbench.check.subject import SHAPE, MethodUnderTest, NotApplicable, PropertyViolation, batches, gradient_of
from qbench.cost.count import storage
from qbench.quant.layers import QLayer
from qbench.quant.ops import activation_memory
from qbench.quant.quantizer import Grid, Quantizer
from qbench.quant.verify import NotQuantized, verify

DRAWS = 400
"""Number of times that each tensor is stochastically rounded."""

CHANCE = 1e-9
"""Probability that the mean error of unbiased rounding exceeds Hoeffding's bound by chance (Hoeffding 1963)."""


def levels(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that all values are on the declared levels, and that there are not more levels than the width allows."""
    level_counts = verified(subject.network(bits))
    if not level_counts:
        raise PropertyViolation("no layer is quantized")
    for key, width in bits._asdict().items():
        if width == FLOAT:
            continue
        limit = 2**width + 1
        counts = [layer[key] for layer in level_counts.values() if key in layer]
        if not counts:
            raise PropertyViolation(f"bits.{key}={width} quantizes nothing")
        mean = sum(count.allowed for count in counts) / len(counts)
        if mean > limit and not _has_vector_levels(subject, bits, key):
            raise PropertyViolation(
                f"{key}: the quantizers allow {mean:g} levels on average, but {bits} allows at most {limit} levels"
            )
        if key == "w":
            if max(count.found for count in counts) < 2:
                raise PropertyViolation("in every layer, all weights have the same value")
            _codes_hold_levels(subject, bits)


def _codes_hold_levels(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that the declared codes have enough bits for the declared levels. Codes determine the size of a network."""
    for name, layer in subject.layers(bits):
        count = int((~declared_grid(layer.weight_q, layer.weight).points.isnan().any(2)).sum(1).max())
        code_bits = storage(layer).code_bits
        if count > 2**code_bits:
            raise PropertyViolation(
                f"{name}: the quantizer declares {count} levels, but its function bytes declares codes of {code_bits} "
                f"bits, which have {2**code_bits} values"
            )


def _has_vector_levels(subject: MethodUnderTest, bits: Bits, key: str) -> bool:
    """Return whether each level is a vector of several weights, as in product quantization.

    A codebook of such vectors may have more entries than the width of one weight allows.
    """
    _, layer = next(subject.layers(bits))
    return key == "w" and declared_grid(layer.weight_q, layer.weight).points.shape[-1] > 1


def declared_grid(quantizer: Quantizer, x: Tensor) -> Grid:
    """Return the grid that a quantizer declares for the values x. If there is no grid, raise `PropertyViolation`."""
    if (grid := quantizer.grid(x)) is None:
        raise PropertyViolation(f"{type(quantizer).__name__} declares no grid")
    return grid


def verified(model: nn.Module) -> dict[str, dict[str, LevelCount]]:
    """Verify the values of a network, and return its level counts by layer and tensor.

    Raises:
        PropertyViolation: a value is not on its grid.
    """
    shape = SHAPE if isinstance(next(iter(model.children())), nn.Conv2d) else (1, 1, 1)
    try:
        return verify(model, batches(shape)[0][0])
    except NotQuantized as error:
        raise PropertyViolation(str(error)) from None


def _declared_traits(subject: MethodUnderTest, bits: Bits, *traits: str) -> frozenset[str]:
    declared = subject.make(bits).traits.intersection(traits)
    if not declared:
        raise NotApplicable(f"the method does not declare {' or '.join(traits)}")
    return declared


def function_of_weights(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that weight quantizers have the declared traits: odd, monotone and idempotent within each scale group."""
    traits = _declared_traits(subject, bits, "odd", "monotone", "idempotent")
    for name, layer in subject.layers(bits):
        w, quantize = layer.weight.detach(), layer.weight_q
        if "odd" in traits and not torch.equal(quantize(-w), -quantize(w)):
            raise PropertyViolation(f"{name}: weights are declared odd, but Q(-w) is not -Q(w)")
        if "monotone" in traits:
            _monotone(name, quantize, w)
        if "idempotent" in traits and not torch.allclose(quantize(quantize(w)), quantize(w), rtol=1e-5, atol=1e-7):
            raise PropertyViolation(f"{name}: weights are declared idempotent, but Q(Q(w)) is not Q(w)")


def function_of_inputs(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that input quantizers have the declared traits: monotone, idempotent, and clipped gradients."""
    traits = _declared_traits(subject, bits, "monotone_input", "idempotent_input", "clipped_input")
    for name, layer in subject.layers(bits):
        quantize, channels = layer.input_q, layer.weight.shape[1]
        x = torch.linspace(-4, 4, 64 * channels).reshape(channels, 1, 8, 8).transpose(0, 1).contiguous()
        if "monotone_input" in traits:
            _monotone(name, quantize, x)
        if "idempotent_input" in traits and not torch.allclose(
            quantize(quantize(x)), quantize(x), rtol=1e-5, atol=1e-7
        ):
            raise PropertyViolation(f"{name}: inputs are declared idempotent, but Q(Q(x)) is not Q(x)")
        if "clipped_input" in traits:
            _clipped(name, quantize, x)


def _clipped(name: str, quantize: Quantizer, x: Tensor) -> None:
    """Check that the gradient is 0 for all x beyond the outermost levels, and nonzero for all other x."""
    points = declared_grid(quantize, x).points.detach().flatten().nan_to_num(0)
    low, high = float(points.min()), float(points.max())
    _, slope = gradient_of(quantize, x)
    margin = 1e-3 * (high - low)  # at the lowest and at the highest level, any gradient is correct
    beyond, inside = (x < low - margin) | (x > high + margin), (x > low + margin) & (x < high - margin)
    if (slope[beyond] != 0).any():
        raise PropertyViolation(
            f"{name}: the gradient is nonzero for some inputs outside the levels {low:g} to {high:g}"
        )
    if inside.any() and not (slope[inside] != 0).all():
        raise PropertyViolation(f"{name}: the gradient is zero for some inputs within the levels {low:g} to {high:g}")


def _monotone(name: str, quantize: Quantizer, x: Tensor) -> None:
    grid = declared_grid(quantize, x)
    before, after = grid.arrange(x)[..., 0], grid.arrange(quantize(x))[..., 0]
    steps = after.gather(1, before.argsort(1)).diff(dim=1)
    if (steps < 0).any():
        raise PropertyViolation(f"{name}: declared monotone, but the output falls at {int((steps < 0).sum())} places")


def compressed_inputs(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that a method with the trait `cells_input` saves integers, not float inputs, for the backward pass."""
    _declared_traits(subject, bits, "cells_input")
    if bits.a > 8:
        raise NotApplicable("above 8 bits, inputs are not saved as integers")
    sizes: list[int] = []  # number of elements of each float tensor that was saved

    def keep(t: Tensor) -> Tensor:
        sizes.append(t.numel() if t.is_floating_point() else 0)
        return t

    for name, layer in subject.layers(bits):
        x = torch.linspace(-4, 4, 64 * layer.weight.shape[1]).reshape(1, layer.weight.shape[1], 8, 8)
        sizes.clear()
        with activation_memory("codes"), saved_tensors_hooks(keep, lambda t: t):
            compressed = gradient_of(layer.input_q, x)
        if max(sizes) >= x.numel():
            raise PropertyViolation(f"{name}: cells_input is declared, but inputs are saved as floats")
        if not all(map(torch.equal, compressed, gradient_of(layer.input_q, x))):
            raise PropertyViolation(f"{name}: results computed from the saved integers differ from the usual results")


def unbiased_rounding(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that stochastic rounding is unbiased.

    Each tensor is rounded `DRAWS` times. The mean of the results may differ from the tensor by at most Hoeffding's
    bound.
    """
    random = False
    for name, layer in islice(subject.layers(bits), 2):
        layer.train()
        x = torch.rand(4, layer.weight.shape[1], 3, 3) * 0.9 + 0.05
        y = torch.randn(4, layer.weight.shape[0], 3, 3)
        cases: list[tuple[str, Callable[[], Tensor], Tensor]] = [
            ("weights", partial(layer.weight_q, layer.weight), layer.weight.detach()),
            ("inputs", partial(layer.input_q, x), x),
            ("gradients", partial(_gradient_behind, layer, y, x), y),
        ]
        for what, draw, expected in cases:
            random |= _unbiased(f"{name}: {what}", draw, expected)
    if not random:
        raise NotApplicable("the method's rounding is deterministic")


def _gradient_behind(layer: QLayer, grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the output quantizer's input. `grad` is the gradient of the quantizer's output."""
    y = torch.zeros_like(grad).requires_grad_()
    return torch.autograd.grad(layer.output_q(y, x), y, grad)[0]


def _unbiased(name: str, draw: Callable[[], Tensor], expected: Tensor) -> bool:
    """Return whether `draw` rounds stochastically. If this rounding is biased, raise `PropertyViolation`.

    Args:
        name: the tensor's name in messages.
        draw: function that rounds the tensor and returns the result.
        expected: the tensor before rounding. If rounding is unbiased, the expectation of the result is this tensor.
    """
    torch.manual_seed(7)
    first = draw().detach()
    if torch.equal(first, draw().detach()):
        return False
    draws = torch.stack([draw().detach().double() for _ in range(DRAWS)])
    step = (draws.amax(0) - draws.amin(0)).max().item()  # each result is one of two neighbouring levels
    error = draws.mean(0) - expected.double().clamp(draws.min(), draws.max())
    # Hoeffding: P(|mean - expectation| > t) <= 2 exp(-2 n t² / step²).
    bound = step * math.sqrt(math.log(2 / CHANCE) / (2 * DRAWS)) + 1e-6
    if error.abs().max() > bound:
        raise PropertyViolation(
            f"{name}: the mean of {DRAWS} roundings is off by up to {error.abs().max() / step:.2f} steps"
        )
    if error.mean().abs() > bound / math.sqrt(error.numel()) + 1e-6:
        raise PropertyViolation(
            f"{name}: the mean of {DRAWS} roundings is off by {error.mean() / step:.3f} steps on average"
        )
    return True
