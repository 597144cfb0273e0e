"""Encodes quantized weights as integer codes, and decodes them to the same floats.

One encoder works for all methods. It reads the levels and the scale groups from the grid of each weight quantizer
(`qbench.quant.quantizer.Grid`).

All weights of a scale group share the same levels. A layout says which weights form a scale group:

    tensor       all weights
    channel      all weights with the same index along the first axis
    bucket:N     N consecutive weights of the flattened tensor
    subspace:D   all weights of D consecutive input channels; D weights share a code

Levels are stored in one of three forms. The encoder chooses a form whose decoded floats are bit-identical to the floats
that the quantizer returns:

    steps        (first + step * code) * scale, with one scale per group
    span         points[code] * scale + low, with one scale and one low per group
    book         table[code], with one table of levels per group

The points of the form `span` are code / (count - 1), or a table that all groups share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil, prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.quant.quantizer import Quantizer
from qbench.quant.verify import nearest_points

MAX_CODE_BITS = 16


class NotEncodable(Exception):
    """Raised if codes cannot represent the weights exactly. The message states the reason."""


@dataclass(frozen=True)
class Levels:
    """The levels of every scale group.

    Args:
        form: steps, span or book.
        count: number of levels in each group. Below, `dimension` is the number of weights that share a code.
        first, step: the integers of the form `steps`.
        scale: (groups,); empty for `book`.
        low: (groups,) for `span`, else empty.
        book: (groups, count, dimension) for `book`; (count,) or empty for `span`, else empty.
    """

    form: str
    count: int
    first: int = 0
    step: int = 1
    scale: Tensor = field(default_factory=lambda: torch.empty(0))
    low: Tensor = field(default_factory=lambda: torch.empty(0))
    book: Tensor = field(default_factory=lambda: torch.empty(0))

    def values(self) -> Tensor:
        """Return the levels (groups, count, weights per code)."""
        if self.form == "book":
            return self.book
        codes = torch.arange(self.count).to(self.scale.dtype)
        if self.form == "steps":
            return ((codes * self.step + self.first) * self.scale[:, None]).unsqueeze(-1)
        points = self.book if len(self.book) else codes / float(max(self.count - 1, 1))
        return (points * self.scale[:, None] + self.low[:, None]).unsqueeze(-1)

    def to(self, dtype: torch.dtype) -> "Levels":
        """Return the levels with all tensors converted to another type."""
        return replace(self, scale=self.scale.to(dtype), low=self.low.to(dtype), book=self.book.to(dtype))

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that an exported file stores."""
        return self.scale, self.low, self.book


@dataclass(frozen=True)
class Encoded:
    """Weights as codes.

    Args:
        shape: shape of the weights.
        order: the axes from the largest stride to the smallest. The rounding of sums in a convolution may depend on
            this order.
        layout: name of a layout from the module's docstring. The layout says which weights form a scale group.
        levels: the levels of the groups.
        codes: the codes as bytes, packed without gaps, lowest bit first. The codes of a group are consecutive. Padding
            has no codes.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    layout: str
    levels: Levels
    codes: np.ndarray

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return code_bits(self.levels.count)

    def numbers(self) -> Tensor:
        """Return the codes (groups, codes per group)."""
        groups, per_group, _ = places(self.layout, self.shape).shape
        count = code_count(self.layout, self.shape)
        codes = torch.from_numpy(unpack(self.codes, count, self.bits))
        # the last bucket may be padded
        return F.pad(codes, (0, groups * per_group - count)).reshape(groups, per_group)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights as floats, with the strides of the original tensor.

        Args:
            dtype: type of the result. With float64, the levels of the forms `steps` and `span` are computed with more
                digits.
        """
        place, values = places(self.layout, self.shape), self.levels.to(dtype).values()
        groups = torch.arange(len(place)).unsqueeze(1)
        vectors = values[groups, self.numbers()]
        flat = torch.empty(prod(self.shape) + 1, dtype=values.dtype)
        flat[place.flatten()] = vectors.flatten()  # the padding is written to the last place
        axes = [0] * len(self.order)
        for i, axis in enumerate(self.order):
            axes[axis] = i
        weights = flat[:-1].reshape(self.shape)
        return weights.permute(self.order).contiguous().permute(axes)


def code_bits(count: int) -> int:
    """Return the number of bits of a code for `count` levels."""
    return max(1, (count - 1).bit_length())


def code_count(layout: str, shape: tuple[int, ...]) -> int:
    """Return the number of codes of a tensor."""
    kind, _, size = layout.partition(":")
    if kind == "subspace":
        return prod(shape) // shape[1] * ceil(shape[1] / int(size))
    return prod(shape)


def places(layout: str, shape: tuple[int, ...]) -> Tensor:
    """Return the indices of each group's weights in the flattened tensor: (groups, codes, weights per code).

    Padding has the index after the last weight.
    """
    kind, _, size = layout.partition(":")
    count = prod(shape)
    index = torch.arange(count).reshape(shape)
    if kind == "tensor":
        return index.reshape(1, -1, 1)
    if kind == "channel":
        return index.reshape(shape[0], -1, 1)
    if kind == "bucket":
        width = min(int(size), count)
        return F.pad(index.flatten(), (0, -count % width), value=count).reshape(-1, width, 1)
    rows = F.pad(index.movedim(1, -1), (0, -shape[1] % int(size)), value=count)
    rows = rows.reshape(-1, rows.shape[-1] // int(size), int(size))
    return rows.transpose(0, 1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (n,) as bytes. Each code takes `bits` bits without gaps, lowest bit first."""
    planes = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little")


def unpack(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return `count` codes as int64 from the bytes that `pack` made."""
    planes = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return planes.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` packed codes need."""
    return -(-count * bits // 8)


@torch.no_grad()
def encode(quantizer: Quantizer, latent: Tensor, weights: Tensor) -> Encoded:
    """Encode the quantized weights that a quantizer computes from latent weights.

    Raises:
        NotEncodable: the quantizer declares no grid, or decoding would not give the same floats.
    """
    grid = quantizer.grid(latent)
    if grid is None:
        raise NotEncodable(f"{type(quantizer).__name__} declares no grid")
    if weights.dtype != torch.float32:
        raise NotEncodable(f"the weights are {weights.dtype}, not float32")
    shape = tuple(weights.shape)
    layout = _layout(grid.arrange(torch.arange(1, weights.numel() + 1).reshape(shape)), shape)
    vectors, points = grid.arrange(weights), grid.points.to(weights.dtype)
    if points.shape[1] > 2**MAX_CODE_BITS:
        raise NotEncodable(f"the quantizer has {points.shape[1]:,} levels; allowed are at most {2**MAX_CODE_BITS:,}")
    codes, _ = nearest_points(vectors, points)
    # the exact floats of the quantizer; a point of the grid may differ by a rounding error
    exact, used = points.clone(), torch.zeros(points.shape[:2], dtype=torch.bool)
    groups = torch.arange(len(points)).unsqueeze(1)
    exact[groups, codes], used[groups, codes] = vectors, True
    if not torch.equal(exact[groups, codes], vectors):
        raise NotEncodable("weights with the same level have different values")
    levels = _levels(quantizer, grid.arrange(latent), exact, used)
    order = tuple(sorted(range(weights.dim()), key=weights.stride, reverse=True))
    flat = codes.flatten()[: code_count(layout, shape)].numpy()
    encoded = Encoded(shape, order, layout, levels, pack(flat, code_bits(levels.count)))
    if not torch.equal(encoded.decode(), weights):
        raise NotEncodable("decoding would not give the same floats")
    return encoded


def _layout(found: Tensor, shape: tuple[int, ...]) -> str:
    """Return the name of the layout of a grid.

    The weights are numbered 1, 2, ... `found` contains these numbers in the order in which the grid arranges the
    weights. 0 means padding.
    """
    groups, per_group, dimension = found.shape
    candidates = ["tensor"] if groups == 1 else ["channel", f"bucket:{per_group}"]
    for layout in [f"subspace:{dimension}"] if len(shape) > 1 and dimension > 1 else [*candidates, "subspace:1"]:
        place = places(layout, shape) + 1
        padding = place > prod(shape)
        if place.shape == found.shape and torch.equal(place[~padding], found[~padding]):
            return layout
    raise NotEncodable("a scale group must be the whole tensor, a channel, a bucket or a subspace of channels")


def _levels(quantizer: Quantizer, latent: Tensor, exact: Tensor, used: Tensor) -> Levels:
    """Return the shortest form of the levels that reproduces all used levels exactly.

    Args:
        latent: the latent weights (G, n, D) of G groups, with n codes per group and D weights per code.
    """
    count = exact.shape[1]
    if exact.shape[2] == 1 and count > 1:
        for found in chain(_multiples(exact[..., 0]), _spans(quantizer, latent[..., 0], exact[..., 0], used)):
            if ((found.values() == exact) | ~used.unsqueeze(-1)).all():
                return found
    return Levels("book", count, book=exact.nan_to_num(0.0))


def _multiples(points: Tensor) -> Iterator[Levels]:
    """Yield candidates of the form `steps` for levels (groups, count): integers times a scale per group."""
    count = points.shape[1]
    zeros = (points[0] == 0).nonzero().flatten().tolist()
    # ..., -1, 0, 1, ..., or, without 0, odd integers ..., -1, 1, 3, ...
    for first, step in [(-place, 1) for place in zeros] or [(1 - count, 2)]:
        for unit in (1, -1):
            place, rest = divmod(unit - first, step)
            if rest == 0 and 0 <= place < count:
                yield Levels("steps", count, first, step, scale=points[:, place] * unit)


def _spans(quantizer: Quantizer, latent: Tensor, points: Tensor, used: Tensor) -> Iterator[Levels]:
    """Yield candidates of the form `span` for levels (groups, count): a shared table times a scale plus a lowest value.

    The scale and the lowest value of a group follow from a range. This range is the range of the group's latent weights
    or the range of the group's levels.
    """
    count, (low, high) = points.shape[1], latent.aminmax(dim=1)
    shared = [t.detach()[:count] for t in quantizer.state_dict().values() if t.dim() == 1 and len(t) >= count]
    books = [points.new_empty(0), *(t.to(points.dtype) for t in shared if t.is_floating_point())]
    ends = [(high - low, low), (torch.ones_like(low), low), (points[:, -1] - points[:, 0], points[:, 0])]
    for book in books:
        best = ends[0]
        done = torch.zeros(len(points), dtype=torch.bool)
        for scale, start in ends:
            found = Levels("span", count, scale=scale, low=start, book=book)
            fits = ((found.values()[..., 0] == points) | ~used).all(1) & ~done
            best = torch.where(fits, scale, best[0]), torch.where(fits, start, best[1])
            done |= fits
        yield Levels("span", count, scale=best[0], low=best[1], book=book)
