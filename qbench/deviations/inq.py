"""INQ as public code has it otherwise than the paper."""

from dataclasses import replace

import torch
from torch import Tensor

from qbench.bits import FLOAT
from qbench.deviations.registry import Deviation, recast
from qbench.methods.inq import INQWeight, largest_exponent, snapped
from qbench.quant.masks import extend_mask
from qbench.quant.method import Method, Unsupported


def zero_beyond(w: Tensor, levels: Tensor) -> Tensor:
    """Return the weights on given levels; 0 from 1.5 times the largest on, where no interval is."""
    return torch.where(w.detach().abs() >= 1.5 * levels[-1], 0.0, snapped(w, levels)).to(w.dtype)


class SmallestFirst(INQWeight):
    """Freezes the smallest magnitudes first."""

    @torch.no_grad()
    def freeze_next(self, w: Tensor, portion: float, partition: str) -> None:
        """Freeze the layer up to an accumulated portion."""
        _by_magnitude("smallest_first", partition)
        if not self.frozen.any():
            self.n1.fill_(largest_exponent(w))
        effective = self(w)
        self.freeze(extend_mask(self.frozen, -effective.abs(), portion), self.level(effective))


class OutlierToZero(INQWeight):
    """Weights that outgrew the largest level are frozen at zero."""

    def level(self, w: Tensor) -> Tensor:
        """Return the values at which weights are frozen."""
        return zero_beyond(w, self._levels(w))


class RemadeMasks(INQWeight):
    """Every portion is chosen anew from all weights: a frozen one that others have outgrown is free again."""

    @torch.no_grad()
    def freeze_next(self, w: Tensor, portion: float, partition: str) -> None:
        """Freeze the layer's largest `portion`, and that alone; once a portion."""
        _by_magnitude("remade_masks", partition)
        if not self.frozen.any():
            self.n1.fill_(largest_exponent(w))
        if round(portion * w.numel()) <= int(self.frozen.sum()):
            return
        effective = self(w)
        mask = extend_mask(torch.zeros_like(self.frozen), effective.abs(), portion)
        w.copy_(torch.where(self.frozen & ~mask, effective, w))  # it goes on from the level that it had
        self.value.copy_(torch.where(mask, self.level(effective), 0.0))
        self.frozen.copy_(mask)


def _by_magnitude(name: str, partition: str) -> None:
    if partition != "largest":
        raise Unsupported(f"deviation={name} is about method.partition=largest, not {partition}")


def _with(kind: type[INQWeight], method: Method) -> Method:
    return replace(method, weight=recast(method.weight, kind))


DEVIATIONS = {
    "smallest_first": Deviation(
        "The smallest magnitudes are quantized first.",
        "Mxbonn/INQ-pytorch, inq/quantization_scheduler.py at 1c04930e, and its issue 1",
        lambda method: _with(SmallestFirst, method),
        acts=lambda bits: bits.w < FLOAT, bits="w3",
    ),
    "outlier_to_zero": Deviation(
        "A weight that has grown to 1.5 times the largest level or more is quantized to 0.",
        "Mxbonn/INQ-pytorch, inq/quantization_scheduler.py, whose levels are fixed at the start",
        lambda method: _with(OutlierToZero, method),
        acts=lambda bits: bits.w < FLOAT, bits="w3",
    ),
    "remade_masks": Deviation(
        "Each portion's mask is made anew from the magnitudes, so that frozen weights can be free again.",
        "Mxbonn/INQ-pytorch, inq/quantization_scheduler.py, and its issue 13; the authors' code too",
        lambda method: _with(RemadeMasks, method),
        acts=lambda bits: bits.w < FLOAT, bits="w3",
    ),
}  # fmt: skip
