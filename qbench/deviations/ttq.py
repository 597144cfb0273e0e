"""Deviations of public code, mostly ports to PyTorch, from TTQ's paper and from the authors' code."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qbench.bits import Bits
from qbench.deviations.registry import Deviation, recast
from qbench.methods.ttq import SMALLEST, TTQWeight, ternarize_weight
from qbench.quant.layers import clamp_min_
from qbench.quant.method import Method
from qbench.quant.ops import in_float32, on_backward
from qbench.quant.quantizer import Grid, Storage


@in_float32
def weights_for_gradient(w: Tensor, positive: Tensor, negative: Tensor, threshold: Tensor) -> Tensor:
    """Ternarize weights. The gradient of a latent weight is the weight itself times a scale, instead of dL/dw_hat.

    The scale is Wp for weights above the threshold, Wn for weights below minus the threshold, and 1 for all other
    weights.
    """
    latent = w.detach()
    one = torch.ones_like(latent)
    below = torch.where(latent < -threshold, negative.detach(), one)
    scale = torch.where(latent > threshold, positive.detach(), below)
    return ternarize_weight(on_backward(w, lambda grad: scale * latent), positive, negative, threshold)


class MissingMinus(TTQWeight):
    """Ternary quantizer in which the gradient of the negative scale has the wrong sign."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        return ternarize_weight(w, self.positive, on_backward(self.negative, lambda g: -g), self.delta(w))


class MeanGradient(TTQWeight):
    """Ternary quantizer in which the gradients of the scales are divided by the number of weights."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        scales = [on_backward(scale, lambda g: g / w.numel()) for scale in (self.positive, self.negative)]
        return ternarize_weight(w, scales[0], scales[1], self.delta(w))


class Unclamped(TTQWeight):
    """Ternary quantizer whose scales may become negative. Negative scales reverse the order of the levels."""

    positive_parameters: tuple[str, ...] = ()

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group, whose levels are -Wn, 0 and Wp in ascending order."""
        return Grid(super().grid(w).points.sort(1).values)


class UnscaledTies(TTQWeight):
    """Ternary quantizer that sets weights whose magnitude equals the threshold to +-1."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        delta, latent = self.delta(w), w.detach()
        ties = torch.where(latent.abs() == delta, latent.sign(), torch.zeros_like(latent))
        return ternarize_weight(w, self.positive, self.negative, delta) + ties

    def grid(self, w: Tensor) -> Grid:
        """Return a grid with one group, whose levels are -Wn, 0, Wp, -1 and 1 in ascending order."""
        points = super().grid(w).points
        return Grid(torch.cat([points, points.new_tensor([-1.0, 1.0]).reshape(1, 2, 1)], 1).sort(1).values)

    def bytes(self, w: Tensor) -> Storage:
        """Return the size of the codes and both scales in bytes. A code of five levels needs three bits."""
        return Storage(w.numel(), 3, 8)


class WeightsForGradient(TTQWeight):
    """Ternary quantizer in which the gradient of a latent weight is the weight itself times a scale."""

    def forward(self, w: Tensor) -> Tensor:
        """Return the ternarized weights."""
        return weights_for_gradient(w, self.positive, self.negative, self.delta(w))


def _with_weights(kind: type[TTQWeight], method: Method) -> Method:
    """Return the method with weight quantizers of the class `kind`. Training steps keep all scales above zero."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        clamp_min_(model, {kind: ("positive", "negative")}, SMALLEST)

    return replace(method, weight=recast(method.weight, kind), step=step)


def _ternary(bits: Bits) -> bool:
    return bits.w == 2


DEVIATIONS = {
    "missing_minus": Deviation(
        "The gradient of Wn lacks its minus sign. The paper's eq. 7 also lacks this sign.",
        "TropComplique/trained-ternary-quantization, utils/quantization.py, and its issue 6",
        lambda method: _with_weights(MissingMinus, method),
        acts=_ternary, bits="w2",
    ),
    "mean_gradient": Deviation(
        "The gradients of Wp and Wn are divided by the layer's number of weights.",
        "csyhhu/Awesome-Deep-Neural-Network-Compression, Codes/utils/TTQ.py, and its issue 1",
        lambda method: _with_weights(MeanGradient, method),
        acts=_ternary, bits="w2",
    ),
    "unclamped_scales": Deviation(
        "Wp and Wn may become negative.",
        "czhu95/ternarynet, examples/Ternary-Net/ternary.py; observed in its issue 7",
        lambda method: replace(method, weight=recast(method.weight, Unclamped), step=None),
        acts=_ternary, bits="w2",
    ),
    "unscaled_ties": Deviation(
        "Weights whose magnitude equals the threshold become +-1, not 0.",
        "czhu95/ternarynet, examples/Ternary-Net/ternary.py",
        lambda method: _with_weights(UnscaledTies, method),
        acts=_ternary, bits="w2",
    ),
    "weights_for_gradient": Deviation(
        "The gradient of the latent weights is computed from the weights themselves instead of dL/dw_hat.",
        "vinsis/ternary-quantization, quantification.py, before its issue 1 was fixed",
        lambda method: _with_weights(WeightsForGradient, method),
        acts=_ternary, bits="w2",
    ),
}  # fmt: skip
