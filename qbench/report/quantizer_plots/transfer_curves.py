"""Defines measured curves of quantizers of single values, and codewords of quantizers of vectors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 200
"""Number of times that a stochastic quantizer is evaluated."""
FEW_LEVELS = 17
"""Largest number of levels that a plot shows individually."""


class TransferCurve(NamedTuple):
    """A measured function x -> y.

    Args:
        x: n float values in ascending order, of shape (n,).
        y: value of the function at each x, of shape (n,). For a stochastic function, this is the mean.
        band: smallest and largest value at each x, both of shape (n,), or None for a deterministic function.
        levels: the levels that the quantizer declares, in ascending order.
        tensor: the float tensor for which the function was measured.
    """

    x: Tensor
    y: Tensor
    band: tuple[Tensor, Tensor] | None
    levels: Tensor
    tensor: Tensor

    @property
    def jumps(self) -> Tensor:
        """Indices of the points directly before a jump of y. There are none for a stochastic function."""
        return self.y.diff().nonzero().flatten() if self.band is None else torch.zeros(0, dtype=torch.long)

    @property
    def thresholds(self) -> Tensor:
        """Positions of the jumps, each in the middle between the two neighbouring x."""
        return (self.x[self.jumps] + self.x[self.jumps + 1]) / 2

    @property
    def heights(self) -> Tensor:
        """Value y on each step of the staircase. The number of steps is the number of jumps plus one."""
        return self.y[torch.cat([torch.zeros(1, dtype=torch.long), self.jumps + 1])]


@dataclass(frozen=True)
class QuantizerCurves:
    """The measured quantization of a layer's weights, inputs or outputs.

    Args:
        what: "weights", "inputs" or "outputs".
        bits: the width in bits.
        forward: the curve from a float value to its quantized value.
        picks: m indices into `forward.x`, of shape (m,). The x values at these indices are spread evenly over the
            range.
        slope: derivative of the quantized value at each index in `picks`, of shape (m,), or None for outputs.
        backward: for outputs, the curve from the gradient before quantization to the quantized gradient. Otherwise
            None.
        frozen: whether each value of `forward.x` is frozen, of shape (n,), or None if no value or every value is
            frozen.
        when: the name of the phase of an incremental method.
        notes: remarks that are needed to read the curve correctly.
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
    """The k codewords of a product quantizer. Each codeword encodes a group of s weights.

    Args:
        bits: the width in bits.
        vectors: n groups of float weights, of shape (n, s).
        decoded: the codeword of each group, of shape (n, s).
        points: all codewords, of shape (k, s).
        fixed: whether no gradient reaches the float weights.
    """

    bits: int
    vectors: Tensor
    decoded: Tensor
    points: Tensor
    fixed: bool
