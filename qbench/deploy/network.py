"""Defines traced networks: lists of torch functions with their arguments.

A traced network runs without the classes of a method or a model. Its steps call only functions in `FUNCTIONS`, so a
file that describes a network cannot run other code.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.deploy.codes import Encoded


class Ref(NamedTuple):
    """Refers to the result of a step; step -1 is the image.

    If the result is a sequence, `item` is the index in this sequence.
    """

    step: int
    item: int | None = None


class Stored(NamedTuple):
    """Refers by name to a tensor of the network, such as weights or parameters of normalization."""

    name: str


class Batch(NamedTuple):
    """A size that is `factor` times the number of images in the batch."""

    factor: int


Argument = object
"""Argument of a step: `Ref`, `Stored`, `Batch`, a number, a text, None, a slice, or a tuple of arguments."""

Sizes = int | Sequence[int]
"""Argument of a torch function: one size for all axes, or one size per axis."""


class Step(NamedTuple):
    """One call of a function.

    Args:
        function: a name in `FUNCTIONS`.
        where: name of the module that made the call in the original network, for messages. Files do not store this
            name.
    """

    function: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]
    where: str = ""


@dataclass(frozen=True)
class Network:
    """A traced network in evaluation mode, on the CPU, in float32.

    Args:
        steps: the calls in order. A step refers only to earlier steps.
        output: reference to the logits (N, classes).
        tensors: float tensors by name.
        weights: quantized weights by name.
    """

    steps: Sequence[Step]
    output: Ref
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Encoded]

    def decoded(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return all tensors by name. Quantized weights are decoded to floats."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return tensors | {name: weight.decode(dtype) for name, weight in self.weights.items()}

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the shape of each step's result for two images of shape (C, H, W).

        The shape is empty if the result is not a single tensor.
        """
        found: list[tuple[int, ...]] = []
        self.function(lambda _, result: found.append(tuple(result.shape) if isinstance(result, Tensor) else ()))(
            torch.zeros(2, *shape)
        )
        return found

    def function(
        self, observe: Callable[[int, object], None] = lambda place, result: None, dtype: torch.dtype = torch.float32
    ) -> Callable[[Tensor], Tensor]:
        """Return the network as a function from normalized images (N, C, H, W) to logits (N, classes).

        Args:
            observe: callback that gets the index and the result of each step.
            dtype: the type of the images and of all results.
        """
        stored, last = self.decoded(dtype), _last_uses(self.steps, self.output)

        @torch.no_grad()
        def run(images: Tensor) -> Tensor:
            results: dict[int, object] = {-1: images}

            def value(argument: Argument) -> object:
                match argument:
                    case Ref(step, item):
                        result = results[step]
                        if item is None:
                            return result
                        assert isinstance(result, tuple | list)
                        return result[item]
                    case Stored(name):
                        return stored[name]
                    case Batch(factor):
                        return factor * len(images)
                    case tuple():
                        return tuple(map(value, argument))
                return argument

            for i, step in enumerate(self.steps):
                kwargs = {key: value(argument) for key, argument in step.kwargs.items()}
                results[i] = FUNCTIONS[step.function](*map(value, step.args), **kwargs)
                observe(i, results[i])
                for used in last.get(i, ()):
                    del results[used]
            logits = value(self.output)
            assert isinstance(logits, Tensor)
            return logits

        return run


def _last_uses(steps: Sequence[Step], output: Ref) -> dict[int, list[int]]:
    """Return, for each step, the results that are read for the last time in this step."""
    last = {ref.step: i for i, step in enumerate(steps) for ref in refs((step.args, tuple(step.kwargs.values())))}
    freed: dict[int, list[int]] = {}
    for used, step in last.items():
        if used != output.step:
            freed.setdefault(step, []).append(used)
    return freed


def refs(argument: Argument) -> Iterator[Ref]:
    """Yield all references to steps in nested arguments."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, tuple) and not isinstance(argument, Stored | Batch):
        for item in argument:
            yield from refs(item)


def quantize(x: Tensor, thresholds: Tensor, levels: Tensor) -> Tensor:
    """Return levels[k] for each element of x (N, C, ...), where k is the number of thresholds that are at most x.

    Args:
        thresholds: E ascending thresholds; (E,) for all channels, or (C, E) for each channel.
        levels: (E + 1,) for all channels, or (C, E + 1) for each channel.

    Raises:
        ValueError: x contains inf or nan.
    """
    if not isfinite(x.sum().item()) and not x.isfinite().all():
        raise ValueError("the input of a quantizer contains inf or nan")
    if thresholds.dim() == 1:
        values = levels[torch.bucketize(x.contiguous(), thresholds, right=True)]
    else:
        rows = x.movedim(1, 0)
        codes = torch.searchsorted(thresholds, rows.reshape(len(rows), -1), right=True)
        values = levels.gather(1, codes).reshape(rows.shape).movedim(0, 1)
    # Sums in later steps may depend on the strides. Image quantizers and most others call clamp, whose result can have
    # other strides than x if an axis has one element, such as the channels of grey images.
    return x.clamp(0, 1).copy_(values)


FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "quantize": quantize,
    "getitem": operator.getitem,
    "view": torch.Tensor.reshape,
    **{
        name: getattr(F, name)
        for name in (
            "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
            "batch_norm", "layer_norm", "group_norm", "local_response_norm", "normalize", "relu", "relu6", "hardtanh",
            "hardswish", "hardsigmoid", "silu", "gelu", "leaky_relu", "elu", "selu", "softplus", "mish",
            "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
            "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "pad",
            "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "scaled_dot_product_attention",
        )
    },
    **{
        name: getattr(torch.Tensor, name)
        for name in (
            "add", "sub", "mul", "div", "neg", "abs", "square", "sqrt", "rsqrt", "pow", "exp", "log", "sigmoid", "tanh",
            "clamp", "softmax", "log_softmax", "mean", "sum", "amax", "amin", "flatten", "reshape", "unflatten",
            "squeeze", "unsqueeze", "permute", "transpose", "movedim", "expand", "repeat", "chunk", "split", "unbind",
            "select", "narrow", "contiguous", "clone", "matmul", "repeat_interleave",
        )
    },
    **{name: getattr(torch, name) for name in ("cat", "stack", "rsub", "bmm")},
}  # fmt: skip
"""Maps the name of a step's function to the torch function."""
