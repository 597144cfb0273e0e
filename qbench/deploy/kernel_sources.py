"""Plans the sources of kernels (`qbench.deploy.kernel_layers`): convolutions, linear layers and pooling."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.deploy.kernel_addresses import At
from qbench.deploy.kernel_formats import Format
from qbench.deploy.kernel_memory import Map, Memory
from qbench.deploy.kernel_parameters import (
    FLOAT_NUMBERS,
    LANES,
    BitWeights,
    IntegerLevels,
    NoKernel,
    Numbers,
    bit_weights,
    pack_floats,
    pack_integers,
)
from qbench.deploy.kernel_ramps import Ramp, identity_ramp
from qbench.deploy.network import Network, Ref, Sizes, Step, Stored
from qbench.deploy.steps import float_of

Size = tuple[int, int, int]
Pair = tuple[int, int]


class Operand(NamedTuple):
    """The result of a planned step.

    It is a map of codes and their levels, or a map of floats and a chain of pending steps. Pending steps are pointwise
    steps that no planned layer has applied to the map yet.
    """

    map: Map
    chain: tuple[Step, ...] = ()
    levels: IntegerLevels | None = None


class Geometry(NamedTuple):
    """How a convolution moves over its input, in the form of torch's arguments."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


class Computed(NamedTuple):
    """The source of a layer, and a description of the values that it computes.

    Args:
        source: Python text of the call that makes the source, such as `pool(...)`.
        at: addresses that the source reads.
        size: channels, height and width of the values.
        ramp: ramp from the computed numbers to the values of the step.
        numbers: numbering of the computed values. Thresholds are searched among these numbers.
        integers: whether the computed values are integers.
    """

    source: str
    at: At
    size: Size
    ramp: Ramp
    numbers: Numbers
    integers: bool = False


class Planner(Protocol):
    """Interface of `qbench.deploy.kernel_plan.Planner` that this module uses. The docstrings are in that class."""

    network: Network
    shapes: Sequence[tuple[int, ...]]
    memory: Memory
    format: Format

    def operand(self, ref: Ref) -> Operand: ...  # noqa: D102
    def floats(self, ref: Ref) -> Map: ...  # noqa: D102
    def copied(self, ref: Ref) -> Computed: ...  # noqa: D102
    def alias(self, i: int, ref: Ref) -> None: ...  # noqa: D102
    def quantize(self, i: int, x: Ref) -> None: ...  # noqa: D102
    def layer(self, i: int, computed: Computed, residual: Map | None = None) -> None: ...  # noqa: D102
    def padded(self, i: int, x: Ref, front: int, back: int) -> None: ...  # noqa: D102


def pooled(x: Map, kernel: Pair, stride: Pair, padding: Pair, size: Size, mean: bool) -> Computed:
    """Return the source of max pooling or average pooling."""
    reach = tuple((count - 1) * step + length for count, step, length in zip(size[1:], stride, kernel, strict=True))
    inside = padding == (0, 0) and reach[0] <= x.height and reach[1] <= x.width  # ceil_mode=True can exceed the map
    source = f"pool({x.windows(kernel, stride)}, {x.height}, {x.width}, {stride}, {padding}, {mean}, {inside})"
    return Computed(source, At(input=x.start(padding)), size, identity_ramp(size[0]), FLOAT_NUMBERS)


def _conv2d(
    planner: Planner, i: int, x: Ref, weight: Stored, bias: Stored | None = None, stride: Sizes = 1,
    padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1,
) -> None:  # fmt: skip
    _convolution(planner, i, x, weight, bias, Geometry(_pair(stride), _pair(padding), _pair(dilation), groups))


def _linear(planner: Planner, i: int, x: Ref, weight: Stored, bias: Stored | None = None) -> None:
    if len(planner.shapes[i]) != 2:
        raise NoKernel("linear layers whose input is not (N, C)")
    _convolution(planner, i, x, weight, bias, Geometry())


def _convolution(planner: Planner, i: int, x: Ref, weight: Stored, bias: Stored | None, geometry: Geometry) -> None:
    """Plan a convolution. A linear layer is a convolution whose filter is as large as the map."""
    network = planner.network
    operand = planner.operand(x)
    outputs, height, width = (*planner.shapes[i], 1, 1)[1:4]
    encoded = network.weights.get(weight.name)
    shape = encoded.shape if encoded else tuple(network.tensors[weight.name].shape)
    if len(shape) == 2:
        shape = (shape[0], *operand.map.size)
    if geometry.groups > 1 and outputs // geometry.groups % LANES:
        raise NoKernel(f"groups of {outputs // geometry.groups} output channels; must be a multiple of {LANES}")
    offset = network.tensors[bias.name] if bias else torch.zeros(outputs)
    size = (outputs, height, width)
    if operand.levels is None:
        weights = encoded.decode() if encoded else network.tensors[weight.name]
        computed = _float_convolution(planner, planner.floats(x), weights.reshape(shape), offset, geometry, size)
    elif encoded:
        computed = _code_convolution(planner, operand, bit_weights(encoded, shape), offset, geometry, size)
    else:
        raise NoKernel("float weights with quantized activations")
    planner.layer(i, computed)


def _float_convolution(
    planner: Planner, x: Map, weights: Tensor, bias: Tensor, geometry: Geometry, size: Size
) -> Computed:
    part = x.parts((weights.shape[2], weights.shape[3]), geometry.stride, geometry.dilation, geometry.groups, size[0])
    lanes = weights.shape[1] if geometry.groups > 1 else x.strides.pixel // 4
    at = At(input=x.start(geometry.padding), weights=planner.memory.place(pack_floats(weights, lanes)))
    return Computed(
        f"floats({part.window}, {part.bytes // 4})", at, size,
        identity_ramp(size[0]).then(offset=bias), Numbers(FLOAT_NUMBERS.last, lambda n: float_of(n) + bias),
    )  # fmt: skip


def _code_convolution(
    planner: Planner, x: Operand, weights: BitWeights, bias: Tensor, geometry: Geometry, size: Size
) -> Computed:
    """Plan a convolution of codes.

    The sum of products is `constant + sign * number`, where `number` is the integer that the kernel computes.
    """
    assert x.levels
    inputs, *kernel = weights.integers.shape[1:]
    if geometry.groups > 1 and inputs % LANES:
        raise NoKernel(f"groups of {inputs} input channels; must be a multiple of {LANES}")
    low, unit, a_scale, _ = x.levels
    # activations are (low + unit * code) inside the map, and 0 in the border; `inside` sums low * weight inside the map
    ones = torch.ones(1, *x.map.size, dtype=torch.float64)
    inside = low * F.conv2d(ones, weights.integers.double(), None, *geometry)[0].long()
    w_bits, a_bits = len(weights.planes), x.levels.bits
    most = (2**w_bits - 1) * (2**a_bits - 1) * weights.integers[0].numel()
    sign, constant = 1, torch.zeros(size[0], dtype=torch.long)
    if weights.odd:
        sign = -1
        constant = unit * (most + (2**a_bits - 1) * weights.integers.sum((1, 2, 3))) // 2
    part = x.map.parts((kernel[0], kernel[1]), geometry.stride, geometry.dilation, geometry.groups, size[0])
    packed = planner.format.weights(weights, part)
    at = At(input=x.map.start(geometry.padding), weights=planner.memory.place(packed))
    if low:
        at = at._replace(correction=planner.memory.place(pack_integers(sign * inside)))
    scale = weights.scale * a_scale
    source = planner.format.source(x.map, part)
    return Computed(
        f"{source}, {w_bits}, {a_bits}, {weights.odd}, {unit}, {low != 0})",
        at, size, identity_ramp(size[0]).then(sign * scale, constant * scale.double() + bias),
        Numbers(unit * most + int(inside.abs().max()), lambda n: (constant + sign * n) * scale + bias), integers=True,
    )  # fmt: skip


def _max_pool2d(
    planner: Planner, i: int, x: Ref, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
    dilation: Sizes = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> None:  # fmt: skip
    if _pair(dilation) != (1, 1) or return_indices:
        raise NoKernel("max pooling with dilation or indices")
    _add_pool(planner, i, x, _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), mean=False)


def _avg_pool2d(
    planner: Planner, i: int, x: Ref, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> None:  # fmt: skip
    if divisor_override or (count_include_pad and _pair(padding) != (0, 0)):
        raise NoKernel("average pooling with divisor_override, or with padding that counts in the mean")
    _add_pool(planner, i, x, _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), mean=True)


def _add_pool(planner: Planner, i: int, x: Ref, kernel: Pair, stride: Pair, padding: Pair, mean: bool) -> None:
    source = planner.floats(x)
    if source.is_dense:
        raise NoKernel("pooling of the image")
    channels, rows, columns = (*planner.shapes[i], 1, 1)[1:4]
    size = channels, rows, columns
    planner.layer(i, pooled(source, kernel, stride, padding, size, mean))


def _adaptive(planner: Planner, i: int, x: Ref, output_size: int | Sequence[int | None]) -> None:
    _, height, width = planner.operand(x).map.size
    rows, columns = planner.shapes[i][2:]
    if height % rows or width % columns:
        raise NoKernel(
            f"adaptive pooling from {(height, width)} to {(rows, columns)}, because the sizes do not divide evenly"
        )
    kernel = height // rows, width // columns
    _add_pool(planner, i, x, kernel, kernel, (0, 0), mean=True)


def _mean(planner: Planner, i: int, x: Ref, dim: Sizes | None = None, keepdim: bool = False) -> None:
    rank = len(planner.shapes[x.step])
    if rank != 4 or not isinstance(dim, tuple) or {d % rank for d in dim} != {2, 3}:
        raise NoKernel("means over axes other than height and width")
    kernel = planner.operand(x).map.size[1:]
    _add_pool(planner, i, x, kernel, kernel, (0, 0), mean=True)


def _getitem(planner: Planner, i: int, x: Ref, index: object) -> None:
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not Ellipsis]
    slices = [part for part in parts if isinstance(part, slice)]
    if len(slices) != len(parts) or any(part.start or part.stop is not None for part in slices):
        raise NoKernel("indexing other than with slices such as [::2]")
    steps = ([part.step or 1 for part in slices] + [1] * 4)[:4]
    if steps[:2] != [1, 1]:
        raise NoKernel("indexing of images or channels")
    _add_pool(planner, i, x, (1, 1), (steps[2], steps[3]), (0, 0), mean=False)


def _pad(
    planner: Planner, i: int, x: Ref, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> None:
    if mode != "constant" or value or any(pad[:4]) or len(pad) > 6 or min(pad) < 0:
        raise NoKernel("padding, except with channels of zeros")
    front, back = (*pad, 0, 0, 0, 0, 0, 0)[4:6]
    planner.padded(i, x, front, back)


def _add(planner: Planner, i: int, x: Ref, other: Ref, *, alpha: float = 1) -> None:
    if alpha != 1 or planner.shapes[x.step] != planner.shapes[other.step]:
        raise NoKernel("sums of tensors of different shapes, or with alpha")
    planner.layer(i, planner.copied(x), residual=planner.floats(other))


def _reshape(planner: Planner, i: int, x: Ref, *args: object, **kwargs: object) -> None:
    before, after = planner.shapes[x.step], planner.shapes[i]
    if (len(after) == 2 and after[0] == before[0]) or after == before:
        planner.alias(i, x)
    else:
        raise NoKernel(f"reshaping from {before[1:]} to {after[1:]}")


def _quantize(planner: Planner, i: int, x: Ref, thresholds: Stored, levels: Stored) -> None:
    planner.quantize(i, x)


PLANNERS: Mapping[str, Callable[..., None]] = {
    "conv2d": _conv2d, "linear": _linear, "quantize": _quantize, "add": _add, "pad": _pad, "getitem": _getitem,
    "max_pool2d": _max_pool2d, "avg_pool2d": _avg_pool2d, "adaptive_avg_pool2d": _adaptive, "mean": _mean,
    "flatten": _reshape, "reshape": _reshape, "view": _reshape, "squeeze": _reshape,
    "contiguous": _reshape, "clone": _reshape,
}  # fmt: skip
"""Maps the name of a function to the function that adds its layers to a plan.

The second function takes a planner and the index of the step, followed by the parameters of the torch function.
"""


def _pair(value: Sizes | str) -> Pair:
    if isinstance(value, str):
        raise NoKernel(f"padding={value}")
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
