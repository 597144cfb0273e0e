"""INQ: weights become powers of two, part after part, the rest trained on to make up for it.

Paper
    Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights",
    ICLR 2017, arXiv 1702.03044. Authors' code: AojunZhou/Incremental-Network-Quantization (Caffe).

Idea
    Quantize the largest weights first and freeze them, retrain the others, and repeat until nothing is left: each loss
    is made up for by weights that are still free. Multiplications become shifts.

Forward
    Per layer: levels +-2^n1, ..., +-2^n2 and 0, with s = max|w|, n1 = floor(log2(4 s / 3)), n2 = n1 + 1 - 2^(b-1) / 2.
    |w| in [(l + h) / 2, 3 h / 2) goes to h for neighbouring magnitudes l < h, 0 the lowest; frozen weights keep their
    level, free ones are float.

Backward
    dL/dw of free weights; none of frozen ones.

Schedule
    One phase a portion, of equal length; the learning rate starts anew and momentum is cleared in each. In the last,
    portion 1, batch normalization and biases alone are trained.

Sites
    weight.

State
    frozen (bool, as the weights): the mask; value (float, as the weights): frozen values; n1 (int scalar): the largest
    exponent, set when the first portion is frozen.

Bits
    w 2-8 or 32 for 2^(b-1) + 1 levels, 2 being ternary; a and g 32; by default w5a32g32.

Protocol
    ImageNet from published float networks: SGD with momentum 0.9, decay 5e-4 (GoogLeNet 2e-4), accumulated portions by
    network, 0.5 0.75 0.875 1 for ResNets at 5 bits, finer for fewer bits; all layers quantized, biases and batch
    normalization not. Rates and epochs of each portion are not in the paper.

Choices
    portions: 0.5 0.75 0.875 1 (ResNets). partition: `largest` first, or `random`, the paper's ablation.
    n1 stays as the first portion found it. The authors' code computes it anew for each portion, from a maximum that is
    frozen by then: the same unless free weights outgrow it.

Deviations
    First and last layer stay float by the layer policy; the paper quantizes them (layers.first=same layers.last=same).

Results
    README (digits).
"""

from collections.abc import Sequence
from math import floor, log2

import torch
from torch import Tensor

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import quantized_layers
from qbench.quant.masks import FrozenWeight, extend_mask, stage, stage_borders
from qbench.quant.method import Method
from qbench.quant.ops import in_float32
from qbench.quant.quantizer import Grid, Storage

PARTITIONS = ("largest", "random")


def largest_exponent(w: Tensor) -> int:
    """Return n1 of a layer's weights; 0 where they are all zero. Eq. 2."""
    s = w.detach().abs().max().item()
    if s == 0:
        return 0
    n = floor(log2(4 * s / 3))  # rounded: beside a border it may be one too high
    return n - 1 if 3 * 2.0**n > 4 * s else n


def power_of_two_levels(w: Tensor, bits: int) -> Tensor:
    """Return the 2^(bits-1) + 1 levels of a layer's weights, ascending, 0 in the middle. Eq. 1-3."""
    return levels_from(largest_exponent(w), bits).to(w)


def levels_from(n1: int, bits: int) -> Tensor:
    """Return the levels for a largest exponent n1."""
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    powers = torch.tensor([2.0**n for n in range(n2, n1 + 1)])
    return torch.cat([-powers.flip(0), torch.zeros(1), powers])


@in_float32
def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Return a layer's weights on the levels that they define. Eq. 4. No gradient."""
    return snapped(w, power_of_two_levels(w, bits))


def snapped(w: Tensor, levels: Tensor) -> Tensor:
    """Return the weights on given levels; half way goes up in magnitude, beyond the largest to the largest."""
    magnitudes = levels[levels.numel() // 2 :].to(w)
    borders = (magnitudes[1:] + magnitudes[:-1]) / 2
    w = w.detach()
    return magnitudes[torch.bucketize(w.abs().contiguous(), borders, right=True)] * w.sign()


def select_largest(w: Tensor, portion: float, frozen: Tensor) -> Tensor:
    """Return the mask `frozen` grown by the largest free magnitudes to the accumulated `portion` of the layer."""
    return extend_mask(frozen, w.abs(), portion)


class INQWeight(FrozenWeight):
    """A layer's weights, part of them powers of two."""

    n1: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight)
        self.bits = bits
        self.register_buffer("n1", torch.tensor(0))

    @torch.no_grad()
    def freeze_next(self, w: Tensor, portion: float, partition: str) -> None:
        """Freeze the layer up to an accumulated portion."""
        if not self.frozen.any():
            self.n1.fill_(largest_exponent(w))
        effective = self(w)
        score = torch.rand_like(effective) if partition == "random" else effective.abs()
        self.freeze(extend_mask(self.frozen, score, portion), self.level(effective))

    def level(self, w: Tensor) -> Tensor:
        """Return the values at which weights are frozen."""
        return snapped(w, self._levels(w))

    def grid(self, w: Tensor) -> Grid:
        """One group: the powers of two and zero."""
        return Grid(self._levels(w).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Codes and the exponent."""
        return Storage(w.numel(), self.bits, 1)

    def _levels(self, w: Tensor) -> Tensor:
        return levels_from(int(self.n1), self.bits).to(w)


def build(*, w: int = 5, portions: Sequence[float] = (0.5, 0.75, 0.875, 1.0), partition: str = "largest") -> Method:
    """Return INQ; `portions` are accumulated, ascending, the last one 1."""
    steps = [float(p) for p in portions]
    if not steps or steps != sorted(set(steps)) or steps[0] <= 0 or steps[-1] != 1:
        raise ValueError(f"portions={steps}: allowed are ascending parts above 0, the last one 1")
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition}: allowed are {', '.join(PARTITIONS)}")

    def on_epoch(model: torch.nn.Module, epoch: int, epochs: int, probe: object) -> None:
        for layer in quantized_layers(model).values():
            if isinstance(layer.weight_q, INQWeight):
                layer.weight_q.freeze_next(layer.weight, steps[stage(epoch, epochs, len(steps))], partition)

    return Method(
        name="inq",
        bits=Bits(w),
        supported_bits={"w": (*range(2, 9), FLOAT)},
        weight=lambda name, layer, bits: INQWeight(layer.weight.detach(), bits),
        phases=(lambda epochs: stage_borders(epochs, len(steps))) if w < FLOAT else (lambda epochs: ()),
        on_epoch=on_epoch,
    )
