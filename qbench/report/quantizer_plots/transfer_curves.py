"""Defines the measured curves of quantizers: functions of single values, and codewords of vectors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 200
"""Number of evaluations of a stochastic quantizer."""
FEW_LEVELS = 17
"""Largest number of levels that a plot shows one by one."""


class TransferCurve(NamedTuple):
    """A measured function x -> y.

    Args:
        x: (n,) float values, ascending.
        y: (n,) function values, or their mean for a stochastic function.
        band: smallest and largest y, (n,) each; None for a deterministic function.
        levels: the levels that the quantizer declares, ascending.
        tensor: the float tensor for which the function was measured.
    """

    x: Tensor
    y: Tensor
    band: tuple[Tensor, Tensor] | None
    levels: Tensor
    tensor: Tensor

    @property
    def jumps(self) -> Tensor:
        """The indices after which y jumps. Empty for a stochastic function."""
        return self.y.diff().nonzero().flatten() if self.band is None else torch.zeros(0, dtype=torch.long)

    @property
    def thresholds(self) -> Tensor:
        """The x of the jumps, half way between the neighbouring points."""
        return (self.x[self.jumps] + self.x[self.jumps + 1]) / 2

    @property
    def heights(self) -> Tensor:
        """The y of every step. There is one more step than there are jumps."""
        return self.y[torch.cat([torch.zeros(1, dtype=torch.long), self.jumps + 1])]


@dataclass(frozen=True)
class QuantizerCurves:
    """The measured quantization of a layer's weights, inputs or outputs.

    Args:
        what: weights, inputs or outputs.
        bits: the width.
        forward: the curve float value -> quantized value.
        picks: (m,) indices into forward.x, spread evenly over its range.
        slope: (m,) derivative of the quantized value at the picks; None for outputs.
        backward: for outputs, the curve incoming gradient -> outgoing gradient.
        frozen: (n,) whether each value of forward.x is frozen. None if none or all are frozen.
        when: the phase of an incremental method.
        notes: remarks needed to read the curve correctly.
    """

    what: str
    bits: int
    forward: TransferCurve
    picks: Tensor
    slope: Tensor | None = None
    backward: TransferCurve | None = None
    frozen: Tensor | None = None
    when: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Codewords:
    """Codewords, each of which encodes s weights.

    Args:
        bits: the width.
        vectors: (n, s) groups of float weights.
        decoded: (n, s) the codeword of each group.
        points: (k, s) all codewords.
        fixed: whether no gradient reaches the float weights.
    """

    bits: int
    vectors: Tensor
    decoded: Tensor
    points: Tensor
    fixed: bool
