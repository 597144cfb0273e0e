"""HWGQ-Net: binary weights, and activations on fixed levels that fit the positive half of a Gaussian.

Paper
    Cai, He, Sun, Vasconcelos, "Deep Learning with Low Precision by Half-wave Gaussian
    Quantization", CVPR 2017, arXiv 1702.00953. Authors' code: zhaoweicai/hwgq (Caffe).

Idea
    In every layer, batch normalization without scale and shift brings the input of the nonlinearity
    close to N(0, 1). All layers can therefore use the same levels, which are optimal for the
    positive half of N(0, 1). The backward pass replaces the derivative of the step function by a
    surrogate derivative. Deep networks can be trained only with a suitable surrogate.

Forward
    Activations: the positive levels are q_1 < ... < q_m, with m = 2^b - 1. Q(x) is 0 for x <= 0,
    and q_i for t_i-1 < x <= t_i. The threshold t_0 is 0, t_m is infinite, and every other t_i is
    halfway between q_i and q_i+1. The levels minimize E (Q(x) - x)^2 over the positive half of N(0,
    1). With uniform levels, q_i is i times a step.
    Weights, for each output filter: mean|w| sign(w), with sign(0) = +1.

Backward
    Activations: the option `backward` sets the derivative. vanilla: 1{x > 0}. clipped: 1{0 < x <=
    q_m}. log_tailed: 1{x > 0} up to q_m, and 1 / (x - (q_m - 1)) above q_m.
    With levels=sign, the derivative is 1{|x| <= 1}.
    Weights: dL/dw = dL/dw_hat, without clipping and without the factor alpha = mean|w|.

Schedule
    Training has one phase.

Sites
    weight, input.

State
    None, because the levels are constants.

Bits
    w 1 or 32, a 1-8 or 32, g 32; by default w1a2g32.

Protocol
    The authors train VGG-small on CIFAR-10 by SGD with momentum 0.9, batch size 100 and weight
    decay 5e-4. The learning rate falls linearly from 0.01 to 0 over 200 epochs. Images are padded
    by repeating their border pixels, and then cropped at random positions. The first and last
    layers are float, and the last layer's input is not quantized. The last layer's bias has twice
    the learning rate and no weight decay. In the running averages of batch normalization, a new
    batch has weight 0.05.

Choices
    levels: `uniform` (as in the paper's networks), `optimal` (non-uniform, Lloyd-Max) or `sign`.
    `sign` is a control experiment of the paper. It replaces the half-wave quantizer by the one-bit
    function sign(x), with the derivative of hard tanh.
    constants: `exact` computes the optimal levels. `authors` uses rounded constants. The constants
    for 2 bits are a step of 0.538, or the three non-uniform levels 0, 0.453 and 1.51. They come
    from the authors' code, which has no constants for other widths. The steps for 1, 3 and 4 bits
    (0.799, 0.3217 and 0.185) come from EdMIPS, later code by the same first author.
    threshold: `zero` is the paper's first threshold. `half_step` sets the first threshold to half a
    step, as in round(x / step). With constants=exact, the step is then the optimal step for this
    threshold. EdMIPS also has a first threshold of half a step, but its steps would be optimal only
    if this threshold were 0. constants=authors with threshold=half_step gives this combination.
    A ReLU before the quantizer changes nothing, because the quantizer maps x <= 0 to 0. qbench
    removes this ReLU if the network allows the removal.
    The released code does not contain the offset of log_tailed. qbench uses q_m - 1, because this
    offset makes the derivative continuous at q_m.

Deviations
    In the authors' CIFAR-10 network, the last batch normalization has scale and shift. ReLU and the
    linear layer follow this batch normalization. The networks vgg_small and hwgq_resnet have scale
    and shift in the same places as the authors' networks. In all other networks of qbench, this
    method uses batch normalization without scale and shift.

Results
    docs/results.md (digits, glyphs).
"""

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from qbench.bits import FLOAT, Bits
from qbench.methods.xnor import BinaryActivation, BinaryWeight, filter_scale
from qbench.quant.fused_kernels import (
    above,
    at_least,
    grad_between,
    grad_within,
    lookup,
    next_float,
    scalar,
    step_function,
)
from qbench.quant.method import Method, Requires, Unsupported
from qbench.quant.ops import Cells, fused_quantizer, in_float32, sign, straight_through, surrogate, wide_type
from qbench.quant.quantizer import Grid, Quantizer

BACKWARDS = ("vanilla", "clipped", "log_tailed")
AUTHORS_STEPS = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
"""Maps a width in bits to a rounded step.

The step for 2 bits is from the authors' code. The other steps are from zhaoweicai/EdMIPS,
models/quant_module.py.
"""
AUTHORS_OPTIMAL = {2: (0.453, 1.51)}
BACKWARD_TRAITS = {"vanilla": {"cells_input"}, "clipped": {"clipped_input", "cells_input"}, "log_tailed": set[str]()}
TRAITS = frozenset({"odd", "monotone", "idempotent", "monotone_input", "idempotent_input"})
NEWTON_STEPS, BISECTIONS = 50, 80


def half_wave_levels(bits: int, uniform: bool = True) -> Tensor:
    """Return the 2^bits - 1 positive levels that are optimal for the positive half of N(0, 1).

    The levels are ascending and float32. Zero, the level of x <= 0, is not included. Section 4.1,
    eq. 12-14.

    Args:
        bits: 1 to 8.
        uniform: true returns multiples of one step, false returns Lloyd-Max levels.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be 1 to 8")
    m = 2**bits - 1
    return torch.tensor([i * _step(m, 0.0) for i in range(1, m + 1)] if uniform else _lloyd_max(m))


def half_step_levels(bits: int) -> Tensor:
    """Return equally spaced positive levels that are optimal if the first threshold is half a step."""
    m = 2**bits - 1
    return torch.tensor([i * _step(m, 0.5) for i in range(1, m + 1)])


def quantize_activation(x: Tensor, levels: Tensor, backward: str = "clipped") -> Tensor:
    """Quantize activations (any shape) to 0 and the positive `levels` (m,), which are in ascending order.

    The thresholds are 0 and the midpoints between positive levels. A value equal to a threshold
    gets the lower level.

    Args:
        backward: vanilla, clipped or log_tailed; see the method card.
    """
    if backward not in BACKWARDS:
        raise ValueError(f"backward={backward}: must be one of {', '.join(BACKWARDS)}")
    levels = levels.to(x.device, wide_type(x))
    return _quantized(x, torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2]), levels, backward)


def quantize_activation_half_step(x: Tensor, levels: Tensor, backward: str = "clipped") -> Tensor:
    """Quantize activations to 0 and equally spaced positive `levels` (m,). The first threshold is half a step."""
    levels = levels.to(x.device, wide_type(x))
    return _quantized(x, torch.cat([levels[:1] / 2, (levels[1:] + levels[:-1]) / 2]), levels, backward)


def _quantized(x: Tensor, thresholds: Tensor, levels: Tensor, backward: str) -> Tensor:
    """Return levels[i] for the largest i with x > thresholds[i]. If x is above no threshold, return 0."""
    top = levels[-1]  # q_m

    def plain(x: Tensor) -> Tensor:
        return surrogate(x, lookup(x, thresholds, levels), _slope(x, top, backward))

    def derivative(grad: Tensor, x: Tensor) -> Tensor:
        if backward == "clipped":  # 0 < x <= q_m, as the open interval up to the next number after q_m
            return grad_between(grad, x, 0, next_float(scalar(top), math.inf, x.dtype))
        passed = grad_between(grad, x, 0, math.inf)
        # log tail: divide by x - (q_m - 1), which is 1 at q_m and is clamped to 1 for smaller x
        return passed if backward == "vanilla" else passed.div_(x.sub(top - 1).clamp_(min=1))

    cells = None if backward == "log_tailed" else _cells(thresholds, levels)
    value = partial(step_function, edges=thresholds, heights=levels)
    return fused_quantizer(x, plain=plain, value=value, backward=derivative, cells=cells, masks=backward == "clipped")


def _cells(thresholds: Tensor, levels: Tensor) -> Cells:
    """Return the cells of the quantizer. Cells are separated by the thresholds, by 0 and by the largest level."""
    edges = torch.unique(torch.cat([levels.new_zeros(1), thresholds, levels[-1:]]))
    numbers = torch.arange(1, len(edges) + 1, device=edges.device).to(edges)
    middles = torch.cat([(edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])

    def inside(c: Tensor) -> Tensor:
        return step_function(c, numbers - 0.5, middles)  # cell 0, x <= 0, gives 0

    return Cells(partial(step_function, edges=edges, heights=numbers), inside, len(edges) + 1)


@in_float32
def binarize_weight(w: Tensor) -> Tensor:
    """Return mean|w| sign(w) for each output filter of weights (O, ...). The gradient passes unchanged. Section 3."""
    return straight_through(w, filter_scale(w) * sign(w))


def binarize_activation(x: Tensor) -> Tensor:
    """Return sign(x) for activations (any shape), with sign(0) = +1. The gradient is 1 where |x| <= 1, else 0."""
    return fused_quantizer(
        x,
        plain=lambda x: surrogate(x, sign(x), x.detach().abs() <= 1),
        value=sign,
        backward=lambda grad, x: grad_within(grad, x, -1, 1),
        # four cells: x < -1, [-1, 0), [0, 1], x > 1; value and gradient are constant in each
        cells=Cells(lambda x: at_least(x, -1).add_(at_least(x, 0)).add_(above(x, 1)), lambda c: c.sub_(1.5), 4),
        masks=True,
    )


def _slope(x: Tensor, top: Tensor, backward: str) -> Tensor:
    """Return the surrogate derivative at x. `top` is the largest level."""
    if backward == "vanilla":
        return x > 0
    if backward == "clipped":
        return (x > 0) & (x <= top)
    return torch.where(x > top, 1 / (x - (top - 1)).clamp(min=1), (x > 0).to(x.dtype))


def _density(x: Tensor) -> Tensor:
    """Return the density of N(0, 1), which is 0 at infinity."""
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tail_probability(x: Tensor) -> Tensor:
    """Return the probability that a value from N(0, 1) is above x. The result is accurate for large x too."""
    return torch.erfc(x / math.sqrt(2)) / 2


@lru_cache
def _step(m: int, first: float) -> float:
    """Return the optimal step of m equally spaced levels. The thresholds are `first`, 1.5, 2.5, ... steps.

    Bisection finds the step at which the derivative of the mean squared error is 0.
    """
    i = torch.arange(1, m + 1, dtype=torch.float64)

    def slope(step: float) -> float:
        # cells between the thresholds; the last one extends to infinity
        edges = torch.cat([step * (i - 0.5), torch.tensor([math.inf], dtype=torch.float64)])
        edges[0] = step * first
        # probability and first moment of each cell
        density, tail = _density(edges), _tail_probability(edges)
        mass, moment = tail[:-1] - tail[1:], density[:-1] - density[1:]
        # minus half the derivative of the mean squared error with respect to the step
        return float((i * (moment - i * step * mass)).sum())

    low, high = 1e-4, 4.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


@lru_cache
def _lloyd_max(m: int) -> list[float]:
    """Return the m Lloyd-Max levels for the positive half of N(0, 1), computed by Newton's method.

    Each level is the centroid of its cell. Lloyd's iteration gives the same levels, but converges
    slowly if m is large.
    """
    # Start from the levels that are optimal in the limit of many levels. Their density is
    # proportional to the cube root of the Gaussian density (Panter and Dite 1951). This cube root
    # is a Gaussian of variance 3.
    ranks = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    q = math.sqrt(3) * math.sqrt(2) * torch.erfinv(ranks)
    zero, infinite = torch.zeros(1, dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        # thresholds, and the centroid of each cell
        t = torch.cat([zero, (q[1:] + q[:-1]) / 2, infinite])
        density, tail = _density(t), _tail_probability(t)
        mass = tail[:-1] - tail[1:]
        centroid = (density[:-1] - density[1:]) / mass
        # derivatives of the centroids with respect to the lower and the upper threshold
        down = density[:-1] * (centroid - t[:-1]) / mass
        up = torch.cat([density[1:-1] * (t[1:-1] - centroid[:-1]), zero]) / mass
        down[0] = 0  # the first threshold, 0, is fixed
        # each threshold depends on its two neighbouring levels, so the Jacobian of q - centroid(q) is tridiagonal
        jacobian = torch.diag(1 - (down + up) / 2) - torch.diag(down[1:], -1) / 2 - torch.diag(up[:-1], 1) / 2
        move = torch.linalg.solve(jacobian, centroid - q)
        q = (q + move).sort().values.clamp(min=1e-9)
        if move.abs().max() < 1e-13:
            break
    return q.tolist()


class HWGQWeight(BinaryWeight):
    """Binary quantizer of one layer's weights. The values are the same as in BWN, but the gradient passes unchanged."""

    def __init__(self) -> None:
        super().__init__("identity")

    def forward(self, w: Tensor) -> Tensor:
        """Return the binarized weights."""
        return binarize_weight(w)


class SignActivation(BinaryActivation):
    """Binary quantizer of one layer's input, for the paper's control experiment."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs of the activations."""
        return binarize_activation(x)


class HWGQActivation(Quantizer):
    """Half-wave Gaussian quantizer of one layer's input."""

    levels: Tensor

    def __init__(self, levels: Tensor, backward: str) -> None:
        super().__init__()
        self.backward = backward
        self.register_buffer("levels", levels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return quantize_activation(x, self.levels, self.backward)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: zero and the positive levels. The whole tensor is one scale group."""
        return Grid(torch.cat([self.levels.new_zeros(1), self.levels]).to(x.dtype).reshape(1, -1, 1))


class HalfStepHWGQActivation(HWGQActivation):
    """Half-wave Gaussian quantizer of one layer's input, with half a step as the first threshold."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return quantize_activation_half_step(x, self.levels, self.backward)


def _levels(bits: int, kind: str, constants: str, threshold: str) -> Tensor:
    """Return the positive levels that the options `levels`, `constants` and `threshold` select."""
    if constants == "authors":
        if kind == "uniform" and bits in AUTHORS_STEPS:
            return AUTHORS_STEPS[bits] * torch.arange(1, 2**bits, dtype=torch.float64).float()
        if kind == "optimal" and bits in AUTHORS_OPTIMAL:
            return torch.tensor(AUTHORS_OPTIMAL[bits])
        raise Unsupported(f"there are no published {kind} constants for bits.a={bits}; use method.constants=exact")
    return half_step_levels(bits) if threshold == "half_step" else half_wave_levels(bits, kind == "uniform")


def _sign_control(w: int, a: int) -> Method:
    """Return the `Method` of the paper's control experiment. Activations are binary, and weights are as in HWGQ."""
    return Method(
        name="hwgq",
        bits=Bits(w, a),
        supported_bits={"w": (1, FLOAT), "a": (1, FLOAT)},
        option_slots={"levels": "a"},
        requires=Requires(norm="no_affine", act="fused"),
        traits=TRAITS | {"clipped_input", "cells_input"},
        weight=lambda name, layer, bits: HWGQWeight(),
        input=lambda name, layer, bits: SignActivation(),
    )


def build(
    *,
    w: int = 1,
    a: int = 2,
    levels: str = "uniform",
    constants: str = "exact",
    threshold: str = "zero",
    backward: str = "clipped",
) -> Method:
    """Return the `Method` for HWGQ. The method card (module docstring) explains the options."""
    allowed = {
        "levels": ("uniform", "optimal", "sign"),
        "constants": ("exact", "authors"),
        "threshold": ("zero", "half_step"),
    }
    given = {"levels": levels, "constants": constants, "threshold": threshold, "backward": backward}
    for key, choices in (allowed | {"backward": BACKWARDS}).items():
        if given[key] not in choices:
            raise ValueError(f"{key}={given[key]}: must be one of {', '.join(choices)}")
    if levels == "sign":
        if (constants, threshold, backward) != ("exact", "zero", "clipped"):
            raise Unsupported("levels=sign does not use constants, threshold or backward; remove these keys")
        return _sign_control(w, a)
    if threshold == "half_step" and levels != "uniform":
        raise Unsupported("threshold=half_step needs levels=uniform")
    kind = HalfStepHWGQActivation if threshold == "half_step" else HWGQActivation
    return Method(
        name="hwgq",
        bits=Bits(w, a),
        supported_bits={"w": (1, FLOAT), "a": (*range(1, 9), FLOAT)},
        option_slots={"levels": "a", "constants": "a", "threshold": "a", "backward": "a"},
        requires=Requires(norm="no_affine", act="either"),
        traits=TRAITS | BACKWARD_TRAITS[backward],
        weight=lambda name, layer, bits: HWGQWeight(),
        input=lambda name, layer, bits: kind(_levels(bits, levels, constants, threshold), backward),
    )
