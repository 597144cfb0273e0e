"""Joins pointwise functions, such as batch normalization and ReLU, into one ramp per channel."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.kernel_parameters import LANES, NoKernel, whole
from qbench.deploy.network import FUNCTIONS, Argument, Ref, Step, Stored, refs

Constant = Tensor | float
"""One number, or one number per channel."""


class Ramp(NamedTuple):
    """The function slope * x + offset, clamped to [low, high]. All parameters are float64 vectors (C,)."""

    slope: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    @property
    def parts(self) -> tuple[bool, bool]:
        """Whether the ramp has a slope or an offset, and whether it has bounds."""
        slope, offset, low, high = (
            not torch.equal(*pair) for pair in zip(self, identity_ramp(len(self.slope)), strict=True)
        )
        return slope or offset, low or high

    def then(
        self, slope: Constant = 1.0, offset: Constant = 0.0, low: Constant = -torch.inf, high: Constant = torch.inf
    ) -> Self:
        """Return one ramp that is equal to this ramp followed by another ramp."""
        slope, offset, low, high = (
            torch.as_tensor(v, dtype=torch.float64).expand_as(self.slope) for v in (slope, offset, low, high)
        )
        # where the slope is 0, the value is the offset
        ends = [torch.where(slope == 0, offset, slope * end + offset) for end in (self.low, self.high)]
        lowest, highest = torch.minimum(*ends), torch.maximum(*ends)
        return type(self)(
            self.slope * slope, self.offset * slope + offset, lowest.clamp(low, high), highest.clamp(low, high)
        )  # fmt: skip

    def pack(self) -> np.ndarray:
        """Return the parameters as float32 (vectors of channels, 4, 16): slopes, offsets, lowest and highest values."""
        padded = np.zeros((4, whole(len(self.slope))), np.float32)
        padded[:, : len(self.slope)] = torch.stack(self).numpy()
        return np.ascontiguousarray(padded.reshape(4, -1, LANES).transpose(1, 0, 2))


def identity_ramp(channels: int) -> Ramp:
    """Return the ramp that does not change values."""
    one = torch.ones(channels, dtype=torch.float64)
    return Ramp(one, 0 * one, -torch.inf * one, torch.inf * one)


Tensors = Mapping[str, Tensor]


def is_pointwise(step: Step) -> bool:
    """Return whether each output value of a step depends only on the input value at the same position."""
    return step.function in _RAMPS and len(list(refs((step.args, tuple(step.kwargs.values()))))) == 1


def pointwise(steps: Sequence[Step], tensors: Tensors) -> Callable[[Tensor], Tensor]:
    """Return a function that computes a chain of pointwise steps."""

    def value(argument: Argument, x: Tensor) -> object:
        if isinstance(argument, Ref):
            return x
        if isinstance(argument, Stored):
            return tensors[argument.name]
        return argument

    def run(x: Tensor) -> Tensor:
        for step in steps:
            kwargs = {key: value(argument, x) for key, argument in step.kwargs.items()}
            result = FUNCTIONS[step.function](*(value(argument, x) for argument in step.args), **kwargs)
            assert isinstance(result, Tensor)
            x = result
        return x

    return run


def ramp_of(steps: Sequence[Step], start: Ramp, tensors: Tensors, rank: int) -> Ramp:
    """Return one ramp that is equal to a start ramp followed by a chain of pointwise steps.

    Args:
        rank: number of axes of the values: 4 for images, 2 for features.

    Raises:
        NoKernel: a step has constants that differ within a channel, or arguments that kernels do not support.
    """
    channels = len(start.slope)

    def constant(argument: Argument) -> object:
        """Return a constant as one number, or as one number per channel."""
        if not isinstance(argument, Stored):
            return argument
        tensor = tensors[argument.name].double()
        vector = step.function == "batch_norm"  # its constants are vectors of channels
        shape = [1, *tensor.shape] if vector else [1] * (rank - tensor.dim()) + list(tensor.shape)
        if tensor.numel() != 1 and not shape[1] == tensor.numel() == channels:
            raise NoKernel("constants that differ between pixels")
        return tensor.reshape(-1)

    ramp = start
    for step in steps:
        kwargs = {key: constant(argument) for key, argument in step.kwargs.items()}
        args = [argument if isinstance(argument, Ref) else constant(argument) for argument in step.args]
        if not isinstance(args[0], Ref):
            raise NoKernel(f"{step.function} of a constant")
        ramp = _RAMPS[step.function](ramp, *args[1:], **kwargs)
    return ramp


def _batch_norm(
    ramp: Ramp, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Ramp:  # fmt: skip
    if training:
        raise NoKernel("batch normalization without running statistics")
    slope = (1.0 if weight is None else weight) / torch.sqrt(var + eps)
    return ramp.then(slope, (0.0 if bias is None else bias) - mean * slope)


def _clamp(ramp: Ramp, min: float | None = None, max: float | None = None) -> Ramp:
    return ramp.then(low=-torch.inf if min is None else min, high=torch.inf if max is None else max)


def _hardtanh(ramp: Ramp, min_val: float = -1.0, max_val: float = 1.0) -> Ramp:
    return ramp.then(low=min_val, high=max_val)


_RAMPS: Mapping[str, Callable[..., Ramp]] = {
    "batch_norm": _batch_norm, "clamp": _clamp, "hardtanh": _hardtanh,
    "relu": lambda ramp: ramp.then(low=0.0), "relu6": lambda ramp: ramp.then(low=0.0, high=6.0),
    "add": lambda ramp, other: ramp.then(offset=other), "sub": lambda ramp, other: ramp.then(offset=-other),
    "mul": lambda ramp, other: ramp.then(other), "div": lambda ramp, other: ramp.then(1 / other),
    "neg": lambda ramp: ramp.then(-1.0), "rsub": lambda ramp, other: ramp.then(-1.0, other),
}  # fmt: skip
"""Maps the name of a pointwise function to a function that appends it to a ramp."""
