"""Measured curves of a method's quantizers: maps of single values, and codewords of several values."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 200
"""Number of evaluations of a stochastic quantizer."""
FEW_LEVELS = 17
"""Number of levels up to which a plot shows each of them."""


class TransferCurve(NamedTuple):
    """A measured function x -> y.

    x: (n,) ascending. y: (n,), of a stochastic function the mean. band: smallest and largest y,
    (n,) each; None for a deterministic function. levels: values that the quantizer declares,
    ascending. tensor: the float tensor for which the function was measured.
    """

    x: Tensor
    y: Tensor
    band: tuple[Tensor, Tensor] | None
    levels: Tensor
    tensor: Tensor

    @property
    def jumps(self) -> Tensor:
        """The places before which y jumps; none for a stochastic function."""
        return self.y.diff().nonzero().flatten() if self.band is None else torch.zeros(0, dtype=torch.long)

    @property
    def thresholds(self) -> Tensor:
        """The x of the jumps, half way between neighbours."""
        return (self.x[self.jumps] + self.x[self.jumps + 1]) / 2

    @property
    def heights(self) -> Tensor:
        """The y of every step, one more than there are jumps."""
        return self.y[torch.cat([torch.zeros(1, dtype=torch.long), self.jumps + 1])]


@dataclass(frozen=True)
class QuantizerCurves:
    """What a method does to weights, inputs or outputs of a layer.

    Args:
        what: weights, inputs or outputs.
        bits: width.
        forward: float value -> quantized value.
        picks: (m,) places in forward.x, spread evenly over its range.
        slope: (m,) derivative of the quantized value at the picks; None for outputs.
        backward: for outputs: incoming gradient -> outgoing gradient.
        frozen: (n,) which of forward.x are frozen, in a phase where not all are.
        when: that phase, for incremental methods.
        notes: what a reader must know to read the curve correctly.
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
    """Codewords for s weights at once.

    Args:
        bits: width.
        vectors: (n, s) groups of float weights.
        decoded: (n, s) the codeword of each.
        points: (k, s) all codewords.
        fixed: no gradient reaches the float weights.
    """

    bits: int
    vectors: Tensor
    decoded: Tensor
    points: Tensor
    fixed: bool
