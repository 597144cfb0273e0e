"""Trained Ternary Quantization: weights have three values per layer, and two of the values are learned.

Paper
    Zhu, Han, Mao, Dally, "Trained Ternary Quantization", ICLR 2017, arXiv 1612.01064. Authors'
    code: czhu95/ternarynet (tensorpack).

Idea
    The latent weights determine which quantized weights are positive, zero or negative. Each layer
    has two trained scales: the value of its positive weights, and the magnitude of its negative
    weights.

Forward
    w_hat = Wp where w > delta, -Wn where w < -delta, else 0.
    threshold=max: delta = t max|w|. threshold=sparsity: delta is the quantile t of the layer's |w|,
    so the fraction t of the weights becomes zero. No gradient passes through delta.

Backward
    dL/dWp = sum of dL/dw_hat over w > delta. dL/dWn = minus the sum of dL/dw_hat over w < -delta.
    The authors' code has this minus sign. Eq. 7 of the paper and ports of the code leave out the
    minus sign. Both gradients are sums, not means.
    Latent weights: dL/dw is Wp dL/dw_hat where w > delta, Wn dL/dw_hat where w < -delta, and
    dL/dw_hat between the thresholds. Weights between the thresholds therefore get a gradient too,
    and can become nonzero.

Schedule
    Training has one phase and starts from a float network.

Sites
    weight.

State
    positive, negative (scalars): Wp and Wn of a layer.

Bits
    w 2 (three values) or 32, a and g 32; by default w2a32g32.

Protocol
    According to their log, the authors train on CIFAR-10 for 400 epochs, by SGD with momentum 0.9.
    The weight decay of weights and scales is 2e-4. The learning rate is 0.0002 in the first epoch,
    then 0.1, 0.01 from epoch 83, 0.001 from epoch 124 and 0.0002 from epoch 301. The networks are
    pre-activation ResNets with 20 to 56 layers. Their first layer is float.

Choices
    t: the number t in the formulas of delta. The default 0.05 is the paper's value.
    initial: the initial scales. With `mean` (default), Wp starts at the mean of |w| over w > delta,
    and Wn at the mean of |w| over w < -delta. With `one`, both scales start at 1, as in the
    authors' code. In networks without batch normalization, activations explode with `one`.
    decay: weight decay of the scales, 0 by default. The authors decay the scales like the weights.
    As in the authors' code, weights are not divided by max|w| before they are quantized.

Deviations
    qbench keeps the scales at 1e-8 or more. If one scale became negative, all nonzero weights would
    have the same sign. Accuracy dropped in runs in which a scale became negative.
    By default, the last layer stays float (`layers.last`). In the paper, the last layer is float
    too. In the authors' CIFAR code, the last layer is ternary.

Results
    docs/results.md (digits).
"""

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import FloatLayer, clamp_min_
from qbench.quant.method import Method
from qbench.quant.ops import in_float32, surrogate
from qbench.quant.quantizer import Grid, Quantizer, Storage

SMALLEST = 1e-8
THRESHOLDS, INITIALS = ("max", "sparsity"), ("mean", "one")


@in_float32
def ternarize_weight(w: Tensor, positive: Tensor, negative: Tensor, threshold: Tensor | float) -> Tensor:
    """Ternarize a layer's weights: `positive` where w > `threshold`, -`negative` where w < -`threshold`, else 0.

    Args:
        positive, negative: the scales Wp and Wn, scalars above 0. Both get gradients.
        threshold: delta, a scalar without gradient.
    """
    latent = w.detach()
    above, below = latent > threshold, latent < -threshold
    one, zero = torch.ones_like(latent), torch.zeros_like(latent)
    # factor of the latent weights' gradient: Wp, Wn or 1, depending on the zone
    slope = torch.where(above, positive.detach(), torch.where(below, negative.detach(), one))
    # autograd sums the gradients of Wp and Wn over their zones; -negative gives Wn's gradient its minus sign
    values = torch.where(above, positive, torch.where(below, -negative, zero))
    # surrogate(...) has the value 0, and passes the gradient to w
    return values + surrogate(w, zero, slope)


def mean_within(zone: Tensor, w: Tensor) -> Tensor:
    """Return the mean of |w| where the mask `zone` is true, or 1 if the mask is empty. The result is a scalar."""
    mean = (w.abs() * zone).sum() / zone.sum()
    return torch.where(zone.any(), mean, torch.ones_like(mean))


class TTQWeight(Quantizer):
    """Ternary quantizer of one layer's weights, with learned scales."""

    positive_parameters: tuple[str, ...] = ("positive", "negative")

    def __init__(self, layer: FloatLayer, threshold: str, t: float, initial: str, decay: float) -> None:
        super().__init__()
        self.threshold, self.t, self.weight_decay = threshold, t, decay
        w = layer.weight.detach()
        delta = self.delta(w)
        starts = [mean_within(zone, w) if initial == "mean" else w.new_ones(()) for zone in (w > delta, w < -delta)]
        self.positive, self.negative = (nn.Parameter(start) for start in starts)

    def delta(self, w: Tensor) -> Tensor:
        """Return the scalar threshold for the latent weights w."""
        magnitude = w.detach().abs().flatten()
        if self.threshold == "max":
            return self.t * magnitude.amax()
        zeros = round(self.t * magnitude.numel())
        return magnitude.kthvalue(zeros).values if zeros else magnitude.new_zeros(())

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        return ternarize_weight(w, self.positive, self.negative, self.delta(w))

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: -Wn, 0 and Wp. The whole tensor is one scale group."""
        return Grid(torch.stack([-self.negative, torch.zeros_like(self.positive), self.positive]).reshape(1, 3, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of two bits per weight and of both scales."""
        return Storage(w.numel(), 2, 8)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer, then keep the scales above zero."""
    optimizer.step()
    clamp_min_(model, {TTQWeight: ("positive", "negative")}, SMALLEST)


def build(*, w: int = 2, threshold: str = "max", t: float = 0.05, initial: str = "mean", decay: float = 0.0) -> Method:
    """Return the `Method` for TTQ. The method card (module docstring) explains the options."""
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold={threshold}: must be one of {', '.join(THRESHOLDS)}")
    if initial not in INITIALS:
        raise ValueError(f"initial={initial}: must be one of {', '.join(INITIALS)}")
    if not 0 <= t < 1:
        raise ValueError(f"t={t}: must be at least 0 and below 1")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: must be at least 0 and below 1")
    return Method(
        name="ttq",
        bits=Bits(w),
        supported_bits={"w": (2, FLOAT)},
        traits=frozenset({"monotone"}),
        weight=lambda name, layer, bits: TTQWeight(layer, threshold, t, initial, decay),
        step=optimizer_step,
    )
