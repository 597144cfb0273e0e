"""Deviations of public code from INQ's paper."""

from dataclasses import replace

import torch
from torch import Tensor

from qbench.bits import FLOAT
from qbench.deviations.registry import Deviation, recast
from qbench.methods.inq import INQWeight, largest_exponent, round_to_levels
from qbench.quant.masks import extend_mask
from qbench.quant.method import Method, Unsupported


def zero_beyond(w: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest level of each weight, or 0 if |w| is at least 1.5 times the largest level."""
    return torch.where(w.detach().abs() >= 1.5 * levels[-1], 0.0, round_to_levels(w, levels)).to(w.dtype)


class SmallestFirst(INQWeight):
    """Weight quantizer that freezes the smallest magnitudes first."""

    @torch.no_grad()
    def freeze_next(self, w: Tensor, portion: float, partition: str) -> None:
        """Freeze more weights, smallest magnitudes first, until a fraction `portion` of all weights is frozen."""
        _check_partition("smallest_first", partition)
        if not self.frozen.any():
            self.n1.fill_(largest_exponent(w))
        effective = self(w)
        self.freeze(extend_mask(self.frozen, -effective.abs(), self.whole_portion(portion)), self.level(effective))


class OutlierToZero(INQWeight):
    """Weight quantizer that freezes weights at zero if their magnitude is at least 1.5 times the largest level."""

    def level(self, w: Tensor) -> Tensor:
        """Return the level that each weight would get if it were frozen."""
        return zero_beyond(w, self._levels(w))


class RemadeMasks(INQWeight):
    """Weight quantizer that selects each portion among all weights, so that frozen weights can become free again."""

    @torch.no_grad()
    def freeze_next(self, w: Tensor, portion: float, partition: str) -> None:
        """Freeze the fraction `portion` of all weights that has the largest magnitudes, and free all other weights.

        Nothing changes if this fraction is already frozen.
        """
        _check_partition("remade_masks", partition)
        if not self.frozen.any():
            self.n1.fill_(largest_exponent(w))
        portion = self.whole_portion(portion)
        if round(portion * w.numel()) <= int(self.frozen.sum()):
            return
        effective = self(w)
        mask = extend_mask(torch.zeros_like(self.frozen), effective.abs(), portion)
        w.copy_(torch.where(self.frozen & ~mask, effective, w))  # a weight that becomes free starts from its level
        self.value.copy_(torch.where(mask, self.level(effective), 0.0))
        self.frozen.copy_(mask)


def _check_partition(name: str, partition: str) -> None:
    if partition != "largest":
        raise Unsupported(f"deviation={name} needs method.partition=largest, not {partition}")


def _with_weights(kind: type[INQWeight], method: Method) -> Method:
    """Return the method with weight quantizers of the class `kind`."""
    return replace(method, weight=recast(method.weight, kind))


DEVIATIONS = {
    "smallest_first": Deviation(
        "The smallest magnitudes are quantized first.",
        "Mxbonn/INQ-pytorch, inq/quantization_scheduler.py at 1c04930e, and its issue 1",
        lambda method: _with_weights(SmallestFirst, method),
        acts=lambda bits: bits.w < FLOAT, bits="w3",
    ),
    "outlier_to_zero": Deviation(
        "A weight of 1.5 times the largest level or more is quantized to 0.",
        "Mxbonn/INQ-pytorch, inq/quantization_scheduler.py, whose levels are fixed at the start",
        lambda method: _with_weights(OutlierToZero, method),
        acts=lambda bits: bits.w < FLOAT, bits="w3",
    ),
    "remade_masks": Deviation(
        "Each portion's mask is computed from the current magnitudes, so frozen weights can become free again.",
        "Mxbonn/INQ-pytorch, inq/quantization_scheduler.py, and its issue 13; also the authors' code",
        lambda method: _with_weights(RemadeMasks, method),
        acts=lambda bits: bits.w < FLOAT, bits="w3",
    ),
}  # fmt: skip
