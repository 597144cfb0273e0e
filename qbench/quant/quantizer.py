"""The base class of quantizers: what a module in a slot of a quantized layer says about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Storage(NamedTuple):
    """What a quantized weight tensor occupies.

    `codes` of `code_bits` each, and `extra_bytes` for scales and codebooks.
    """

    codes: int
    code_bits: int
    extra_bytes: int

    @property
    def ideal(self) -> float:
        """Bytes with every code at its nominal width."""
        return self.codes * self.code_bits / 8 + self.extra_bytes

    @property
    def packed(self) -> int:
        """Bytes with every code in a lane of 1, 2, 4, 8, 16 or 32 bits.

        No code crosses a byte boundary.
        """
        lane = 1 << (self.code_bits - 1).bit_length()
        return -(-self.codes * lane // 8) + self.extra_bytes


def one_group(values: Tensor) -> Tensor:
    """Arrange a whole tensor as one scale group of scalars: (1, n, 1)."""
    return values.reshape(1, -1, 1)


@dataclass(frozen=True)
class Grid:
    """The values that a quantized tensor may take.

    Args:
        points: (groups, levels, dimension), the allowed values of every scale group. Scalars are
            ascending. Groups with fewer levels are padded with NaN. The dimension is 1, and larger
            only for product codes.
        arrange: brings a tensor into (groups, elements, dimension), so that the elements of a group
            can be compared with the points of that group.
    """

    points: Tensor
    arrange: Callable[[Tensor], Tensor] = one_group


class Quantizer(nn.Module):
    """A module in a slot of a quantized layer; base class of all quantizers.

    `forward` depends on the slot:

        weights, input    forward(x) -> x_hat
        output            forward(y, x) -> y, where x is the layer's input; its backward pass may
                          quantize dL/dy

    A subclass overrides the declarations below where the defaults do not fit. Verification, costs,
    training and reports read these declarations, never the class.
    """

    __call__: Callable[..., Tensor]

    positive_parameters: tuple[str, ...] = ()
    """Names of parameters or buffers that must stay above 0; a run stops where one does not."""

    lr_scale: float = 1.0
    """Factor on the learning rate of this module's own parameters."""

    weight_decay: float = 0.0
    """Weight decay of this module's own parameters."""

    def grid(self, x: Tensor) -> Grid | None:
        """Return the values allowed for the result of quantizing x, or None if none are declared.

        x is what the quantizer reads: latent weights, a layer's input, or the gradient that arrives
        at the output.
        """
        return None

    @property
    def declares_grid(self) -> bool:
        """Whether the class says which values it allows."""
        return type(self).grid is not Quantizer.grid

    def bytes(self, w: Tensor) -> Storage:
        """Return what the quantized weights occupy when stored as codes.

        Weight quantizers must override this.

        Raises:
            NotImplementedError: the class does not say what it stores.
        """
        raise NotImplementedError(f"{type(self).__name__} declares no storage; define bytes(w) -> Storage")

    def report(self) -> Mapping[str, float]:
        """Return numbers about the state for the result, such as sparsity; empty by default."""
        return {}

    @property
    def complete(self) -> bool:
        """Whether all weights lie on the grid.

        False while an incremental method leaves some of them float.
        """
        return True

    def gradient_factor(self, x: Tensor) -> float:
        """Return the factor by which its parameters' gradients are scaled on purpose."""
        return 1.0


class IdentityQuantizer(Quantizer):
    """A slot that quantizes nothing: returns its first argument, as in a float layer."""

    def forward(self, value: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Return `value`."""
        return value
