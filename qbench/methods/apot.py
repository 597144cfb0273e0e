"""APoT: quantization levels are sums of powers of two, weights are normalized, and clipping levels are learned.

Paper
    Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
    for Neural Networks", ICLR 2020, arXiv 1909.13144. The formulas are taken from the authors'
    CIFAR code, yhhhli/APoT_Quantization at commit 13204f1.

Idea
    The values of weights and activations have bell-shaped distributions, so levels should be dense
    near zero. If levels are single powers of two, the gaps between the largest levels are wide.
    Sums of a few powers of two are dense near zero and have no such wide gaps. A multiplication by
    such a sum still needs only shifts and additions. The weights are normalized before they are
    quantized, so that one clipping level suits the weights throughout training.

Forward
    With B bits, there are 2^B levels in [0, 1]. Each level is the sum of one element of each set
    below, divided by the largest of these sums. B = 2: {0, 1/2, 1/4, 1/8}. B = 3: {0, 1/2, 1/4,
    1/16} + {0, 1/8}. B = 4: {0, 1/2, 1/8, 1/32} + {0, 1/4, 1/16, 1/64}. B = 5: {0, 1/2, 1/8, 1/64}
    + {0, 1/4, 1/16, 1/128} + {0, 1/32}. The function project(v) returns the level nearest to v.
    Weights of b bits: w = (W - mean(W)) / std(W), w_hat = alpha sign(w) project(clip(|w| / alpha,
    0, 1)). Here B = b - 1, because the sign takes one bit. Including the negative levels, there are
    2^b - 1 levels. With 2 bits, the levels are -alpha, 0, alpha. The layer does not multiply w_hat
    by std(W), because the following batch normalization removes the scale.
    Activations of b bits: x_hat = alpha project(clip(x / alpha, 0, 1)), with B = b.
    Weights of 8 bits, which the authors use for the first and last layers: w_hat = round(127 W / m) m / 127, with m =
    max|W|.

Backward
    Weights: dL/dw = dL/dw_hat for all weights, including clipped weights. mean(W) and std(W) are
    treated as constants.
    Activations: dL/dx = dL/dx_hat where 0 <= x <= alpha, else 0.
    Let v be w / alpha or x / alpha. The derivative of w_hat or x_hat with respect to alpha is
    sign(v) where v is clipped, else project(v) - v.

Schedule
    Training has one phase and starts from a float network. The authors start the training of each
    width from the trained network of the next larger width, with its clipping levels. In qbench,
    init=RUN, where RUN is the directory of the run with the next larger width, loads the latent
    weights. The clipping levels start again at initial_weight and initial_input.

Sites
    weight, input.

State
    alpha (scalar): the clipping level. A layer has one alpha for its weights and another alpha for
    its input.

Bits
    w 2-6, 8 or 32, a 2-5 or 32, g 32; by default w4a4g32.

Protocol
    The authors train ResNet-20 with 1x1 convolutions as shortcuts on CIFAR-10. They train for 300
    epochs by SGD with momentum 0.9 and batch size 128. The learning rate is 0.04, and is divided by
    10 at epochs 150 and 225. Weight decay is 1e-4 (3e-5 with 2 bits). The weights of the first and
    last layers have 8 bits, and the inputs of these layers are float. To do the same in qbench,
    type layers.first=w8 layers.last=w8. The authors keep the weights with the best test accuracy.

Choices
    initial_weight, initial_input: initial alpha of the weights (3 by default) and of the input (8
    by default). Both defaults come from the authors' CIFAR code. In the authors' logs, the trained
    alphas are between 1 and 2.5.
    decay: weight decay of alpha. The default 1e-4 comes from the authors' script. That script also
    has separate learning rates for alpha. In qbench, alpha has the same learning rate as the
    weights.
    edge_scale: the scale m of 8-bit weights. `abs` (default) uses m = max|W|. `max` uses m =
    max(W), as in the authors' code. For the authors' checkpoints, type method.edge_scale=max. The
    lowest code in these checkpoints is then -145, which does not fit into 8 bits.
    A value halfway between two levels is rounded to the lower level. In the authors' code, the
    rounding of such a value depends on the order of a Python set.

Deviations
    Inputs below 0 become 0 and get no gradient. The authors' code clips only at the upper end,
    because its networks have a ReLU before the quantizer. qbench keeps alpha at 1e-3 or more.
    If std(W) is 0, qbench does not divide the weights by std(W).

Results
    docs/results.md (CIFAR-10). docs/guides/checkpoints.md has the accuracy of the authors'
    checkpoints.
"""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.methods.pact import SMALLEST, LearnedClip, optimizer_step
from qbench.quant.fused_kernels import grad_between, grad_within, next_float, step_function
from qbench.quant.layers import quantized_layers
from qbench.quant.method import Method, Requires
from qbench.quant.ops import fused_quantizer, in_float32, straight_through
from qbench.quant.quantizer import Grid, Quantizer, Storage

EDGE_BITS = 8
"""Bits of the weights of the first and last layers. These weights have equally spaced levels."""

SETS: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((0, 1),),
    2: ((0, 1 / 2, 1 / 4, 1 / 8),),
    3: ((0, 1 / 2, 1 / 4, 1 / 16), (0, 1 / 8)),
    4: ((0, 1 / 2, 1 / 8, 1 / 32), (0, 1 / 4, 1 / 16, 1 / 64)),
    5: ((0, 1 / 2, 1 / 8, 1 / 64), (0, 1 / 4, 1 / 16, 1 / 128), (0, 1 / 32)),
}
"""Maps B to the sets for B bits. A level is a sum of one element per set, divided by the largest such sum.

Ternary weights use B = 1.
"""


@lru_cache
def levels(code: int) -> tuple[float, ...]:
    """Return the 2^B levels for B = `code` bits, in ascending order from 0 to 1. Section 2.2 of the paper."""
    sums = sorted({sum(terms) for terms in product(*SETS[code])})
    return tuple(value / sums[-1] for value in sums)


def project(v: Tensor, code: int) -> Tensor:
    """Round each value of v (any shape) to the nearest level; values outside [0, 1] are clipped first. No gradient."""
    points = torch.tensor(levels(code), dtype=v.dtype, device=v.device)
    return step_function(v, (points[1:] + points[:-1]) / 2, points[1:])


def normalized(w: Tensor) -> Tensor:
    """Return (w - mean) / std. Mean and std are taken over the whole tensor and treated as constants."""
    fixed = w.detach()
    std = fixed.std() if fixed.numel() > 1 else torch.zeros_like(fixed.sum())
    return (w - fixed.mean()) / torch.where(std > 0, std, torch.ones_like(std))


@in_float32
def quantize_weight(w: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Normalize weights (any shape), then quantize the normalized weights to 2^bits - 1 levels from -alpha to alpha.

    `alpha` is a scalar above 0 and gets a gradient. With 32 bits, return w itself.
    """
    if bits == FLOAT:
        return w
    scaled = normalized(w)
    v = scaled.detach() / alpha
    sign, size = v.detach().sign(), v.detach().abs()
    inside = straight_through(v, project(size, bits - 1) * sign)
    quantized = torch.where(size > 1, sign, inside) * alpha
    return quantized + (scaled - scaled.detach())  # adds 0, so that clipped weights get a gradient


@in_float32
def quantize_edge_weight(w: Tensor, edge_scale: str = "abs") -> Tensor:
    """Quantize the weights of a first or last layer to 8 bits, with the scale `_top`. The gradient passes unchanged."""
    top = _top(w, edge_scale)
    return straight_through(w, (w.detach() / top * 127).round() / 127 * top)


def _top(w: Tensor, edge_scale: str) -> Tensor:
    """Return max(w) if edge_scale=max and max(w) > 0, else max|w|. If all weights are 0, return 1."""
    fixed = w.detach()
    largest, highest = fixed.abs().amax(), fixed.amax()
    top = torch.where(highest > 0, highest, largest) if edge_scale == "max" else largest
    return torch.where(top > 0, top, torch.ones_like(top))


def quantize_activation(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Quantize activations (any shape) to 2^bits levels from 0 to alpha.

    `alpha` is a scalar above 0 and gets a gradient. With 32 bits, return x itself.
    """
    if bits == FLOAT:
        return x

    def plain(x: Tensor, alpha: Tensor) -> Tensor:
        v = x / alpha
        inside = straight_through(v, project(v, bits))
        ends = (v > 1).to(v.dtype)
        return torch.where((v >= 0) & (v <= 1), inside, ends) * alpha

    def value(x: Tensor, alpha: Tensor) -> Tensor:
        return project(x / alpha, bits).mul_(alpha)

    def backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        v = x / alpha
        inside = grad_within(grad, v, 0, 1)
        # the gradient of alpha: grad where v is clipped at the top, (project(v) - v) grad inside
        above = grad - grad_between(grad, v, -torch.inf, next_float(1, torch.inf, v.dtype))
        return inside, project(v, bits).sub_(v).mul_(inside).add_(above).sum()

    return fused_quantizer(x, alpha, plain=plain, value=value, backward=backward)


class APoTWeight(LearnedClip):
    """Quantizer of one layer's weights. It normalizes the weights before it rounds them."""

    def forward(self, w: Tensor) -> Tensor:
        """Normalize and quantize the weights. The result is not multiplied by the standard deviation of w."""
        return quantize_weight(w, self.alpha, self.bits)

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: alpha times each signed level. The whole tensor is one scale group."""
        points = torch.tensor(levels(self.bits - 1), device=w.device, dtype=self.alpha.dtype)
        return Grid((torch.cat([-points[1:].flip(0), points]) * self.alpha).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of alpha."""
        return Storage(w.numel(), self.bits, 4)


class APoTEdgeWeight(Quantizer):
    """8-bit quantizer of the weights of a first or last layer. The levels are equally spaced."""

    def __init__(self, edge_scale: str) -> None:
        super().__init__()
        self.edge_scale = edge_scale

    def forward(self, w: Tensor) -> Tensor:
        """Return the quantized weights."""
        return quantize_edge_weight(w, self.edge_scale)

    def grid(self, w: Tensor) -> Grid:
        """Return the 255 allowed values from -m to m. With edge_scale=max, add the values below -m that w needs."""
        top = _top(w, self.edge_scale)
        lowest = min(-127, int((w.detach().min() / top * 127).round()))
        return Grid((torch.arange(lowest, 128, device=w.device) / 127 * top).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of the scale."""
        return Storage(w.numel(), EDGE_BITS, 4)


class APoTActivation(LearnedClip):
    """Quantizer of one layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized activations."""
        return quantize_activation(x, self.alpha, self.bits)

    def grid(self, x: Tensor) -> Grid:
        """Return the allowed values: the levels times alpha. The whole tensor is one scale group."""
        points = torch.tensor(levels(self.bits), device=x.device, dtype=self.alpha.dtype)
        return Grid((points * self.alpha).reshape(1, -1, 1))


def unused_options(model: nn.Module) -> dict[str, str]:
    """Return the options that have no effect because no layer has 8-bit weights, or other quantized weights."""
    widths = {layer.bits.w for layer in quantized_layers(model).values()} - {FLOAT}
    reasons = {} if EDGE_BITS in widths else {"edge_scale": f"no layer has {EDGE_BITS}-bit weights"}
    return reasons | ({} if widths - {EDGE_BITS} else {"initial_weight": "no layer has weights of 2 to 6 bits"})


def build(
    *,
    w: int = 4,
    a: int = 4,
    initial_weight: float = 3.0,
    initial_input: float = 8.0,
    decay: float = 1e-4,
    edge_scale: str = "abs",
) -> Method:
    """Return the `Method` for APoT.

    Args:
        initial_weight, initial_input: initial clipping level of weights, and of layer inputs.
        decay: weight decay of the clipping levels.
        edge_scale: scale of 8-bit weights, abs or max; see the method card.
    """
    if edge_scale not in ("abs", "max"):
        raise ValueError(f"edge_scale={edge_scale}: must be abs (max|W|) or max (max(W), as in the authors' code)")
    for name, initial in (("initial_weight", initial_weight), ("initial_input", initial_input)):
        if initial <= SMALLEST:
            raise ValueError(f"{name}={initial}: must be a number above {SMALLEST}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: must be at least 0 and below 1")
    return Method(
        name="apot",
        bits=Bits(w, a),
        supported_bits={"w": (*range(2, 7), EDGE_BITS, FLOAT), "a": (*range(2, 6), FLOAT)},
        unused_options=unused_options,
        option_slots={"initial_weight": "w", "edge_scale": "w", "initial_input": "a"},
        requires=Requires(act="keep"),
        traits=frozenset({"odd", "monotone", "monotone_input", "idempotent_input", "clipped_input"}),
        weight=lambda name, layer, bits: (
            APoTEdgeWeight(edge_scale) if bits == EDGE_BITS else APoTWeight(bits, initial_weight, decay)
        ),
        input=lambda name, layer, bits: APoTActivation(bits, initial_input, decay),
        step=optimizer_step,
        foreign_names={"act_alpha": "input_q.alpha", "weight_quant.wgt_alpha": "weight_q.alpha"},
    )
