"""What was read from a method's quantizers, for `panels` to draw: maps of single values, and codes of several."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 200
"""How often what draws at random is asked."""
FEW = 17
"""Levels that a picture can show one by one."""


class TransferCurve(NamedTuple):
    """A function read at points: x (n,) ascending -> y (n,), the mean where it draws, then with the least and the most.

    `levels` are the values that it declares, ascending; `tensor` is the float tensor that it was read for.
    """

    x: Tensor
    y: Tensor
    band: tuple[Tensor, Tensor] | None
    levels: Tensor
    tensor: Tensor

    @property
    def jumps(self) -> Tensor:
        """The places behind which y jumps; none where it draws."""
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
    """What a method does to weights, inputs or outputs.

    Args:
        what: weights, inputs, outputs.
        picks: (m,) places in forward.x, spread evenly over its range.
        slope: (m,) dx_hat/dx at the picks; None for outputs.
        backward: of outputs: gradient that arrives -> gradient that leaves.
        frozen: (n,) which of forward.x are frozen, in a phase in which not all are.
        when: that phase, of incremental methods.
        notes: what a reader must know to read the curve right.
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
    """Weights side by side, (n, s), the codeword of each, (n, s), all codewords, (k, s); `fixed`: without gradient."""

    bits: int
    vectors: Tensor
    decoded: Tensor
    points: Tensor
    fixed: bool
