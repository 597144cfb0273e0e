"""Defines the base class of quantizers, and the properties that a quantizer declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Storage(NamedTuple):
    """The storage of a quantized weight tensor.

    The storage consists of `codes` codes of `code_bits` bits each, and of `extra_bytes` bytes for scales and codebooks.
    """

    codes: int
    code_bits: int
    extra_bytes: int

    @property
    def ideal(self) -> float:
        """Number of bytes if every code takes exactly `code_bits` bits."""
        return self.codes * self.code_bits / 8 + self.extra_bytes

    @property
    def packed(self) -> int:
        """Number of bytes if every code takes 1, 2, 4, 8, 16 or 32 bits.

        With these widths, codes of up to 8 bits never cross a byte boundary.
        """
        lane = 1 << (self.code_bits - 1).bit_length()
        return -(-self.codes * lane // 8) + self.extra_bytes


def one_group(values: Tensor) -> Tensor:
    """Return a tensor of n elements as one scale group of scalars, of shape (1, n, 1)."""
    return values.reshape(1, -1, 1)


@dataclass(frozen=True)
class Grid:
    """The values that a quantized tensor may take.

    Args:
        points: allowed values of every scale group (elements that share a scale), of shape (groups, levels, dimension).
            The dimension is 1 except in product quantization. Scalars may be given in any order and are sorted. Groups
            with fewer levels are padded with NaN.
        arrange: function that reshapes a tensor to (groups, elements, dimension), so that the
            elements of a group can be compared with the points of that group.
    """

    points: Tensor
    arrange: Callable[[Tensor], Tensor] = one_group

    def __post_init__(self) -> None:
        # the search for the nearest point needs sorted scalars; sorting puts NaN at the end
        if self.points.shape[2] == 1:
            object.__setattr__(self, "points", self.points.sort(1).values)


class Quantizer(nn.Module):
    """Base class of all quantizers. A quantizer is a module in a quantized layer's slot for weights, input or output.

    The arguments of `forward` depend on the slot. A quantizer of weights or inputs has `forward(x) -> x_hat`. A
    quantizer of outputs has `forward(y, x) -> y`, where x is the layer's input, and its backward pass may quantize
    dL/dy.

    A subclass overrides the declarations below if the defaults do not fit. Verification, cost counts, training and
    reports use only these declarations, not the class of a quantizer.
    """

    __call__: Callable[..., Tensor]

    positive_parameters: tuple[str, ...] = ()
    """Names of parameters and buffers that must stay above 0. The run stops if one of them is not above 0."""

    lr_scale: float = 1.0
    """Factor by which the learning rate of this module's parameters is multiplied."""

    weight_decay: float = 0.0
    """Weight decay of this module's parameters."""

    def grid(self, x: Tensor) -> Grid | None:
        """Return the values that quantized x may take, or None if no grid is declared.

        x is the tensor that is quantized: latent weights, a layer's input, or the gradient of the layer's output.
        """
        return None

    @property
    def declares_grid(self) -> bool:
        """Whether the class overrides `grid`."""
        return type(self).grid is not Quantizer.grid

    def bytes(self, w: Tensor) -> Storage:
        """Return the storage that the quantized weights need: codes, scales and codebooks.

        Weight quantizers must override this method.

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
        """Whether all weights are on the grid.

        The value is False while an incremental method leaves some weights in float.
        """
        return True

    def gradient_factor(self, x: Tensor) -> float:
        """Return the factor by which the method deliberately scales the gradients of learned parameters."""
        return 1.0


class IdentityQuantizer(Quantizer):
    """A quantizer that returns its first argument unchanged, as in a float layer."""

    def forward(self, value: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Return `value` unchanged."""
        return value
