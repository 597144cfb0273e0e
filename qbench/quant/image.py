"""Quantizes the network's input image to evenly spaced levels, in the layers that read the image."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.graph import IMAGE, Operation, between, eval_mode_keeping_rng, operations, recorded_calls
from qbench.quant.method import Unsupported
from qbench.quant.ops import levels_k, quantize_k
from qbench.quant.policy import Policy, image_width
from qbench.quant.quantizer import Grid, Quantizer

REARRANGING = frozenset(
    {
        "__getitem__", "cat", "channel_shuffle", "chunk", "clone", "concat", "contiguous", "data", "detach", "expand",
        "expand_as", "flatten", "flip", "float", "movedim", "mT", "narrow", "permute", "pixel_shuffle",
        "pixel_unshuffle", "repeat", "reshape", "reshape_as", "roll", "rot90", "select", "split", "squeeze", "stack",
        "swapaxes", "T", "t", "to", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
        "Flatten", "Identity", "PixelShuffle", "PixelUnshuffle", "Unflatten", "Unfold",
    }
)  # fmt: skip
"""torch functions and modules that only move or copy the values of an image."""


class ImageQuantizer(Quantizer):
    """Rounds the network's input to 2^bits evenly spaced levels over each channel's range.

    With images from 8-bit files and `bits` = 8, values change only by float rounding errors.

    Args:
        bits: width of the rounded values in bits.
        low, high: smallest and largest possible value of each channel.
        channel: for each value of the layer's input, the index of the image channel from which the value comes. The
            shape (1, ...) must be expandable to the shape of the input. None means that the input has the shape (N, C,
            H, W).
    """

    low: Tensor
    span: Tensor
    channel: Tensor

    def __init__(
        self, bits: int, low: tuple[float, ...], high: tuple[float, ...], channel: Tensor | None = None
    ) -> None:
        super().__init__()
        self.bits = bits
        channel = torch.arange(len(low)).reshape(1, -1, 1, 1) if channel is None else channel.cpu()
        self.register_buffer("channel", channel, persistent=False)
        self.register_buffer("low", torch.tensor(low)[channel], persistent=False)
        span = torch.tensor(high) - torch.tensor(low)
        span[span == 0] = 1  # a channel that has one value in all images
        self.register_buffer("span", span[channel], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded input of the layer, with the shape of the input."""
        scaled = ((x - self.low) / self.span).clamp(0, 1)
        return quantize_k(scaled, self.bits) * self.span + self.low

    def grid(self, x: Tensor) -> Grid:
        """Return the grid, with one scale group per channel."""
        channel, low, span = (t.expand(1, *x.shape[1:]).flatten() for t in (self.channel, self.low, self.span))
        places = [(channel == one).nonzero().flatten() for one in torch.unique(channel)]
        first = torch.stack([place[0] for place in places])
        points = levels_k(self.bits, x) * span[first].unsqueeze(1) + low[first].unsqueeze(1)
        # All channels must have equally many values: repeat values of the channels that have fewer.
        most = torch.arange(max(map(len, places)), device=x.device)
        index = torch.stack([place[most % len(place)] for place in places])
        return Grid(
            points.unsqueeze(-1), lambda t: t.reshape(len(t), -1)[:, index].movedim(1, 0).reshape(len(index), -1, 1)
        )


def image_quantizers(
    model: nn.Module, assigned: dict[str, Bits], policy: Policy, example: Tensor | None
) -> dict[str, ImageQuantizer]:
    """Return the image quantizer of each layer that reads the image and has quantized activations.

    Args:
        assigned: the widths of the layers, in execution order. For the layers that read the image, this function sets
            the activation width to the width of the rule `input`.
        example: see `install`.

    Raises:
        Unsupported: the first layer does not read the image, or the range of the image is not
            known.
    """
    first = next(iter(assigned))
    rounded = policy.input != "same" or any(bits.a < FLOAT for bits in assigned.values())
    graph = operations(model, example, assigned) if rounded and example is not None else []
    readers = [name for name in assigned if _reads_image(graph, name)]
    if policy.input != "same":
        for name in dict.fromkeys((first, *readers)):
            assigned[name] = assigned[name]._replace(a=image_width(policy.input))
    if assigned[first].a < FLOAT and first not in readers:
        raise Unsupported(
            f"{first}: the input of this layer is not known; call install with example=IMAGES, one batch of images"
            if example is None
            else f"{first}, the first layer, does not read the image but {_computed(graph, first)}\n"
            "leave its input float: layers.input=float"
        )
    return {
        name: _image_quantizer(model, graph, name, assigned[name].a, policy, example)
        for name in readers
        if assigned[name].a < FLOAT and example is not None
    }


def _image_like(graph: Sequence[Operation]) -> Collection[str]:
    """Return the operations whose results contain only values of the image."""
    image_like = {IMAGE}
    for operation in graph:
        if operation.kind in REARRANGING and operation.reads and image_like.issuperset(operation.reads):
            image_like.add(operation.name)
    return image_like


def _reads_image(graph: Sequence[Operation], layer: str) -> bool:
    reads = {read for operation in graph if operation.module == layer for read in operation.reads}
    return bool(reads) and reads <= set(_image_like(graph))


def _computed(graph: Sequence[Operation], layer: str) -> str:
    """Return a text that says what a layer reads instead of the image."""
    image_like = _image_like(graph)
    computed = [operation for operation in between(graph, IMAGE, layer) if operation.name not in image_like]
    if not computed:
        return "values of unknown origin"
    last = next((operation for operation in reversed(computed) if operation.kind not in REARRANGING), computed[-1])
    return f"the result of {last.kind}" + (f" {last.module}" if last.module else "")


def _image_quantizer(
    model: nn.Module, graph: Sequence[Operation], name: str, bits: int, policy: Policy, example: Tensor
) -> ImageQuantizer:
    if policy.image_range is None:
        raise Unsupported(
            f"{name} reads the image, and the range of the image is not known\n"
            "pass Policy(image_range=((LOW, ...), (HIGH, ...))), per channel, or Policy(input='float')"
        )
    channels = example.shape[1]
    low, high = (ends * channels if len(ends) == 1 else ends for ends in policy.image_range)
    if not len(low) == len(high) == channels:
        raise Unsupported(
            f"image_range has {len(low)} lowest and {len(high)} highest values, but images have {channels} channels"
        )
    direct = all(operation.reads == (IMAGE,) for operation in graph if operation.module == name)
    return ImageQuantizer(bits, low, high, None if direct else _channels(model, name, example))


def _channels(model: nn.Module, name: str, example: Tensor) -> Tensor:
    """Return the image channel of each value that a layer reads, for `ImageQuantizer`.

    To find the channels, the network runs on an image in which every value is the index of its channel.
    """
    shape = (1, -1, *[1] * (example.dim() - 2))
    numbers = torch.arange(example.shape[1], device=example.device).to(example.dtype).reshape(shape)
    with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, [name]) as calls:
        model(numbers.expand(1, *example.shape[1:]))
    channel = calls[0].input
    if channel.is_meta:
        return torch.zeros((1,) * channel.dim(), dtype=torch.long)
    read = [image for call in calls for image in call.input]
    if any(image.shape != read[0].shape or not torch.equal(image, read[0]) for image in read):
        raise Unsupported(
            f"{name} reads the image several times, each time with the image's channels in another order\n"
            "leave its input float: layers.input=float"
        )
    channel = channel[:1].long()
    for axis in range(1, channel.dim()):  # keep one value of an axis along which all values are equal
        if (channel == channel.narrow(axis, 0, 1)).all():
            channel = channel.narrow(axis, 0, 1)
    return channel
