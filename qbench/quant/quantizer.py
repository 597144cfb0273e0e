"""What a quantizer declares: its grid of allowed values and its storage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Storage(NamedTuple):
    """What a quantized weight tensor occupies: `codes` of `code_bits` each, and bytes for scales and codebooks."""

    codes: int
    code_bits: int
    extra_bytes: int

    @property
    def ideal(self) -> float:
        """Bytes with every code at its nominal width."""
        return self.codes * self.code_bits / 8 + self.extra_bytes

    @property
    def packed(self) -> int:
        """Bytes with every code in a lane of 1, 2, 4, 8, 16 or 32 bits, none across a byte's border."""
        lane = 1 << (self.code_bits - 1).bit_length()
        return -(-self.codes * lane // 8) + self.extra_bytes


def one_group(values: Tensor) -> Tensor:
    """Arrange a whole tensor as one scale group of scalars: (1, n, 1)."""
    return values.reshape(1, -1, 1)


@dataclass(frozen=True)
class Grid:
    """The values that a quantized tensor may take.

    `points` has shape (groups, levels, dimension): for every scale group its allowed values, ascending where scalar,
    padded with NaN where groups differ in count; dimension is 1 but for product codes. `arrange` brings a tensor into
    (groups, elements, dimension), so that element and points of a group can be compared.
    """

    points: Tensor
    arrange: Callable[[Tensor], Tensor] = one_group


class WeightQuantizer(Protocol):
    """A module for a layer's weights: `forward(w) -> w_hat`, plus what it promises about w_hat.

    Optional, for any quantizer: `complete` (bool), false while part of the weights is float; `report() -> dict` of
    numbers and words about its state that a reader of the result wants (sparsity, order, counts);
    `positive_parameters`, names of its parameters or buffers that must stay above 0: a run stops where one is not.
    """

    def grid(self, w: Tensor) -> Grid:
        """Return the values allowed for the latent weights w."""

    def bytes(self, w: Tensor) -> Storage:
        """Return what w_hat occupies when stored as codes."""


class InputQuantizer(Protocol):
    """A module for a layer's input: `forward(x) -> x_hat`, plus the values allowed."""

    def grid(self, x: Tensor) -> Grid:
        """Return the values allowed for x_hat."""


class OutputQuantizer(Protocol):
    """A module behind a layer: `forward(y, x) -> y`; its backward may quantize the gradient of y."""

    def grid(self, grad: Tensor) -> Grid:
        """Return the values allowed for the gradient of y, given the gradient that arrives."""
