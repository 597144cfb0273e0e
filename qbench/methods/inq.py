"""INQ: weights are rounded to powers of two, portion by portion. The free weights are trained to compensate the error.

Paper
    Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization: Towards Lossless CNNs with
    Low-Precision Weights", ICLR 2017, arXiv 1702.03044. Authors' code:
    AojunZhou/Incremental-Network-Quantization (Caffe).

Idea
    INQ quantizes and freezes the largest weights, and trains the other weights further. It repeats
    these two steps until all weights are quantized. The training of the free weights compensates
    the error of the frozen weights. Because quantized weights are powers of two, shifts replace
    multiplications.

Forward
    The levels of a layer are +-2^n1, ..., +-2^n2 and 0, with s = max|w|, n1 = floor(log2(4 s / 3)),
    n2 = n1 + 1 - 2^(b-1) / 2.
    Let l < h be the magnitudes of two neighbouring levels; the lowest magnitude is 0. A weight with
    |w| in [(l + h) / 2, 3 h / 2) gets the magnitude h and keeps its sign. A frozen weight keeps its
    level. Free weights are float.

Backward
    Free weights get their gradient dL/dw. Frozen weights get no gradient.

Schedule
    There is one phase per portion. A portion is the fraction of a layer's weights that is frozen
    after a phase. All phases have equal length. At the start of each phase, the learning-rate
    schedule restarts and momentum is set to zero. In the last phase (portion 1), only batch
    normalization, biases and float layers are trained. With variant=authors, the last phase consists of the last
    epoch only. In this epoch no parameter is trained, but the running averages of batch
    normalization are still updated.

Sites
    weight.

State
    frozen (bool, shape of the weights): which weights are frozen. value (float, shape of the
    weights): the values of the frozen weights. n1 (int scalar): the largest exponent, set when the
    first portion is frozen.

Bits
    w 2-8 or 32, a and g 32; by default w5a32g32. With b bits, there are 2^(b-1) + 1 levels. With 2
    bits, weights are therefore ternary.

Protocol
    The paper starts from published float networks for ImageNet. It trains by SGD with momentum 0.9
    and weight decay 5e-4 (2e-4 for GoogLeNet). The portions depend on the network. For ResNets with
    5 bits, the portions are 0.5, 0.75, 0.875 and 1. With fewer bits, the paper freezes fewer
    weights at a time and uses more portions. All layers are quantized, but biases and batch
    normalization are not. The paper does not state the learning rate and the number of epochs of
    each phase.

Choices
    portions: by default 0.5, 0.75, 0.875 and 1, as for the paper's ResNets.
    partition: `largest` freezes the largest weights first. `random` chooses the weights at random,
    as in the paper's ablation.
    variant: `paper` (default) follows the paper. `authors` copies three details of the authors'
    code. A weight halfway between two levels is rounded to the smaller magnitude. The number of
    weights in a portion is rounded up. After the last portion is frozen, nothing is trained,
    because the last solver file of the authors has max_iter: 1.
    n1 is computed for the first portion only. The authors' code computes n1 again for every
    portion. With partition=largest, the largest weight is frozen in the first portion. The two
    values of n1 then differ only if a free weight later becomes larger than this frozen weight.

Deviations
    By default, the first and last layers stay float (`layers.first`, `layers.last`). The paper
    quantizes both layers. To quantize both layers in qbench, type layers.first=same
    layers.last=same.

Results
    docs/results.md (digits).
"""

from collections.abc import Sequence
from math import floor, log2

import torch
from torch import Tensor

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import quantized_layers
from qbench.quant.masks import FrozenWeight, extend_mask, optimizer_step, stage, stage_borders
from qbench.quant.method import Method, factory_for
from qbench.quant.ops import in_float32
from qbench.quant.quantizer import Grid, Storage

PARTITIONS = ("largest", "random")
VARIANTS = ("paper", "authors")


def largest_exponent(w: Tensor) -> int:
    """Return a layer's largest exponent n1 = floor(log2(4 max|w| / 3)), or 0 if all weights are zero. Eq. 2."""
    s = w.detach().abs().max().item()
    if s == 0:
        return 0
    n = floor(log2(4 * s / 3))
    # log2 is rounded, so n may be one too high if 4 s / 3 is near a power of two; this comparison is exact
    return n - 1 if 3 * 2.0**n > 4 * s else n


def power_of_two_levels(w: Tensor, bits: int) -> Tensor:
    """Return the 2^(bits-1) + 1 levels of a layer's weights, in ascending order, with 0 in the middle. Eq. 1-3."""
    return levels_from_exponent(largest_exponent(w), bits).to(w)


def levels_from_exponent(n1: int, bits: int) -> Tensor:
    """Return the levels 0 and +-2^n2, ..., +-2^n1 in ascending order, for the largest exponent n1. Eq. 1-3."""
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    powers = torch.tensor([2.0**n for n in range(n2, n1 + 1)])
    return torch.cat([-powers.flip(0), torch.zeros(1), powers])


@in_float32
def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """Quantize a layer's weights (any shape) to the levels that follow from max|w|. Eq. 4. No gradient."""
    return round_to_levels(w, power_of_two_levels(w, bits))


def round_to_levels(w: Tensor, levels: Tensor, *, ties_up: bool = True) -> Tensor:
    """Round each weight to the nearest of `levels`. No gradient.

    A weight halfway between two levels gets the larger magnitude if `ties_up` is true, else the
    smaller magnitude. A weight outside the range of the levels gets the nearest end of the range.
    """
    magnitudes = levels[levels.numel() // 2 :].to(w)  # 0 and the positive levels
    borders = (magnitudes[1:] + magnitudes[:-1]) / 2
    w = w.detach()
    return magnitudes[torch.bucketize(w.abs().contiguous(), borders, right=ties_up)] * w.sign()


def select_largest(w: Tensor, portion: float, frozen: Tensor) -> Tensor:
    """Add the largest free weights to the mask `frozen`, until the mask covers the fraction `portion` of the layer."""
    return extend_mask(frozen, w.abs(), portion)


class INQWeight(FrozenWeight):
    """Quantizer of one layer's weights. Frozen weights are powers of two or zero."""

    n1: Tensor

    def __init__(self, weight: Tensor, bits: int, variant: str = "paper") -> None:
        super().__init__(weight)
        self.bits, self.variant = bits, variant
        self.register_buffer("n1", torch.tensor(0))

    @torch.no_grad()
    def freeze_next(self, w: Tensor, portion: float, partition: str) -> None:
        """Freeze further weights until the fraction `portion` of the layer is frozen."""
        if not self.frozen.any():  # the first portion fixes the levels
            self.n1.fill_(largest_exponent(w))
        portion = self.whole_portion(portion)
        effective = self(w)  # frozen values and free latent weights
        score = torch.rand_like(effective) if partition == "random" else effective.abs()
        self.freeze(extend_mask(self.frozen, score, portion), self.level(effective))

    def whole_portion(self, portion: float) -> float:
        """Return `portion`, rounded up to a whole number of weights in the authors' variant."""
        return rounded_up(portion, self.frozen.numel()) if self.variant == "authors" else portion

    def level(self, w: Tensor) -> Tensor:
        """Return the level of each weight, the value that the weight gets when it is frozen."""
        return round_to_levels(w, self._levels(w), ties_up=self.variant == "paper")

    def grid(self, w: Tensor) -> Grid:
        """Return the allowed values: zero and the powers of two. The whole tensor is one scale group."""
        return Grid(self._levels(w).reshape(1, -1, 1))

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage size of the codes and of the exponent, which takes one byte."""
        return Storage(w.numel(), self.bits, 1)

    def _levels(self, w: Tensor) -> Tensor:
        return levels_from_exponent(int(self.n1), self.bits).to(w)


def check_portions(portions: Sequence[float]) -> list[float]:
    """Return the portions as floats. Raise `ValueError` if they are not ascending numbers above 0 that end with 1."""
    checked = [float(p) for p in portions]
    if not checked or checked != sorted(set(checked)) or checked[0] <= 0 or checked[-1] != 1:
        raise ValueError(f"portions={checked}: must be ascending numbers above 0 that end with 1")
    return checked


def rounded_up(portion: float, count: int) -> float:
    """Return `portion`, increased so that the product of the result and `count` is an integer number of weights.

    The authors' code leaves int(rest * count) weights free, where rest is the decimal number
    1 - portion.
    """
    return 1 - int(round(1 - portion, 12) * count) / count


def short_end_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the step of `masks.optimizer_step` if some weights are not frozen. Otherwise, do nothing."""
    sites = [q for layer in quantized_layers(model).values() if isinstance(q := layer.weight_q, INQWeight)]
    if not all(site.complete for site in sites):
        optimizer_step(model, optimizer)


def build(
    *,
    w: int = 5,
    portions: Sequence[float] = (0.5, 0.75, 0.875, 1.0),
    partition: str = "largest",
    variant: str = "paper",
) -> Method:
    """Return the `Method` for INQ. `portions` are the fractions of a layer that are frozen after each phase."""
    stages = check_portions(portions)
    if partition not in PARTITIONS:
        raise ValueError(f"partition={partition}: must be one of {', '.join(PARTITIONS)}")
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant}: must be one of {', '.join(VARIANTS)}")
    short_end = variant == "authors"

    def on_epoch(model: torch.nn.Module, epoch: int, epochs: int, probe: object) -> None:
        portion = stages[stage(epoch, epochs, len(stages), short_end)]
        for layer in quantized_layers(model).values():
            if isinstance(layer.weight_q, INQWeight):
                layer.weight_q.freeze_next(layer.weight, portion, partition)

    return Method(
        name="inq",
        bits=Bits(w),
        supported_bits={"w": (*range(2, 9), FLOAT)},
        weight=factory_for(w, lambda name, layer, bits: INQWeight(layer.weight.detach(), bits, variant)),
        phases=(lambda epochs: stage_borders(epochs, len(stages), short_end)) if w < FLOAT else (lambda epochs: ()),
        on_epoch=on_epoch,
        step=None if w == FLOAT else short_end_step if short_end else optimizer_step,
    )
