"""Defines the base class of quantizers and the properties that quantizers declare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Storage(NamedTuple):
    """The storage of a quantized weight tensor.

    It has `codes` codes of `code_bits` bits each, and `extra_bytes` for scales and codebooks.
    """

    codes: int
    code_bits: int
    extra_bytes: int

    @property
    def ideal(self) -> float:
        """The number of bytes if every code is stored at its nominal width."""
        return self.codes * self.code_bits / 8 + self.extra_bytes

    @property
    def packed(self) -> int:
        """The number of bytes if every code is stored in 1, 2, 4, 8, 16 or 32 bits.

        No code crosses a byte boundary.
        """
        lane = 1 << (self.code_bits - 1).bit_length()
        return -(-self.codes * lane // 8) + self.extra_bytes


def one_group(values: Tensor) -> Tensor:
    """Return a whole tensor as one scale group of scalars: (1, n, 1)."""
    return values.reshape(1, -1, 1)


@dataclass(frozen=True)
class Grid:
    """The values that a quantized tensor may take.

    Args:
        points: (groups, levels, dimension), the allowed values of every scale group. The dimension
            is 1 except for product codes. Scalars may be given in any order; they are sorted. Groups
            with fewer levels are padded with NaN.
        arrange: function that reshapes a tensor to (groups, elements, dimension), so that the
            elements of a group can be compared with the points of that group.
    """

    points: Tensor
    arrange: Callable[[Tensor], Tensor] = one_group

    def __post_init__(self) -> None:
        # the search for the nearest point bisects sorted scalars; NaN is sorted to the end
        if self.points.shape[2] == 1:
            object.__setattr__(self, "points", self.points.sort(1).values)


class Quantizer(nn.Module):
    """The base class of all quantizers: a module in a slot of a quantized layer.

    `forward` depends on the slot. For weights and inputs it is `forward(x) -> x_hat`. For outputs
    it is `forward(y, x) -> y`, where x is the layer's input; its backward pass may quantize dL/dy.

    A subclass overrides the declarations below if the defaults do not fit. Verification, costs,
    training and reports depend on these declarations, never on the class.
    """

    __call__: Callable[..., Tensor]

    positive_parameters: tuple[str, ...] = ()
    """Names of parameters or buffers that must stay above 0; otherwise the run stops."""

    lr_scale: float = 1.0
    """Factor on the learning rate of this module's own parameters."""

    weight_decay: float = 0.0
    """Weight decay of this module's own parameters."""

    def grid(self, x: Tensor) -> Grid | None:
        """Return the values that quantized x may take, or None if no grid is declared.

        x is the tensor to quantize: latent weights, a layer's input, or the gradient that arrives
        at the layer's output.
        """
        return None

    @property
    def declares_grid(self) -> bool:
        """Whether the class declares which values are allowed."""
        return type(self).grid is not Quantizer.grid

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage of the quantized weights as codes.

        Weight quantizers must override this.

        Raises:
            NotImplementedError: the class does not define this method.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not declare its storage; define the method bytes(w) -> Storage"
        )

    def report(self) -> Mapping[str, float]:
        """Return named numbers for the run's result, such as sparsity. The default is none."""
        return {}

    @property
    def complete(self) -> bool:
        """Whether all weights lie on the grid.

        The value is False while an incremental method leaves some weights in float.
        """
        return True

    def gradient_factor(self, x: Tensor) -> float:
        """Return the factor by which the method deliberately scales its parameters' gradients."""
        return 1.0


class IdentityQuantizer(Quantizer):
    """A quantizer that returns its first argument unchanged, as in a float layer."""

    def forward(self, value: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Return `value` unchanged."""
        return value
