"""Tensor functions without gradient that take few passes over memory: comparisons, masks, rounding at random, blocks.

On a CPU a comparison that makes a bool tensor, `where` over one, or a search costs many passes over floats: measured by
scripts/bench/where.py.
These functions compare into floats and mask by hardtanh's derivative. None writes to its input.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor

Fill = Callable[..., Any]
"""What fills a piece of a tensor in `blockwise`."""
BLOCK = 2**18
"""Elements of a piece in `blockwise`: a megabyte of floats."""
MIXING = 0x2C1B3C6D
"""An odd number, so that multiplying 32 bits by it is one to one."""
MOST_EDGES = 31
"""Above so many, searching is faster than comparing with each."""


def scalar(x: Tensor) -> float | Tensor:
    """Return the number in a tensor of one element; x itself on other devices than the CPU, which would stop for it."""
    return x.item() if x.device.type == "cpu" else x.detach()


def beside(value: float | Tensor, towards: float, dtype: torch.dtype) -> float | Tensor:
    """Return the number of a type next to `value`: as a bound that does not count, it lets `value` itself count."""
    if isinstance(value, Tensor):
        return torch.nextafter(value, torch.full_like(value, towards))
    return _beside(value, towards, dtype)


@lru_cache
def _beside(value: float, towards: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(towards, dtype=dtype)).item()


def divided(codes: Tensor, n: float) -> Tensor:
    """Divide the whole numbers 0 ... n by n, in place; by multiplication, the faster, where each comes out the same."""
    return codes.mul_(1 / n) if n in (1, 3) else codes.div_(n)


def grad_between(grad: Tensor, x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return grad where low < x < high, else 0, in one pass where the bounds are numbers."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((x > low) & (x < high), grad, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)  # type: ignore[no-any-return]


def grad_within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return grad where low <= x <= high, else 0: the derivative of clamp."""
    return grad_between(grad, x, beside(low, -math.inf, x.dtype), beside(high, math.inf, x.dtype))


def at_least(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return 1 where x >= bound, else 0, in x's own type."""
    return torch.ge(x.detach(), bound, out=torch.empty_like(x))


def above(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return 1 where x > bound, else 0, in x's own type."""
    return torch.gt(x.detach(), bound, out=torch.empty_like(x))


def lookup(x: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    """Return heights[i] where x is above edges[i], the last such i; 0 where it is above none. No gradient.

    Args:
        edges, heights: (L,), both ascending, heights not below 0.
    """
    x, table = x.detach(), torch.cat([heights.new_zeros(1), heights])
    if x.dim() == 4 and not x.is_contiguous():  # channels_last: search along memory
        return table[torch.bucketize(x.movedim(1, 3).contiguous(), edges)].movedim(3, 1)
    return table[torch.bucketize(x.contiguous(), edges)]


def step_function(x: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    """Return what `lookup` does; on the CPU by comparing with every edge, up to some 30 of them much faster."""
    if x.device.type != "cpu" or len(edges) > MOST_EDGES:
        return lookup(x, edges, heights)
    steps = list(zip(edges.tolist(), heights.tolist(), strict=True))

    def fill(piece: Tensor, made: Tensor) -> None:
        made.zero_()
        for edge, height in steps:
            torch.maximum(made, above(piece, edge).mul_(height), out=made)

    return blockwise(x, fill)


def uniform_16(count: int, like: Tensor, generator: Generator | None = None) -> Tensor:
    """Return integers (count,), int16, each evenly spread over -32768 ... 32767 and any two independent.

    The xor of every one of some 64-bit numbers with every one of others has both properties, so that about
    sqrt(count) draws do; without bias, and sums have the variance that independent numbers give them. What holds
    between four of them, in the corners of a rectangle, is broken by a one-to-one mixing of each 32 bits, which keeps
    both. A tenth of the time that drawing all of them takes; the same whatever the number of threads.
    """
    words = (count + 3) // 4
    rows = math.isqrt(words) + 1
    columns = -(-words // rows)
    draws = torch.empty(rows + columns, dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    mixed = (draws[:rows, None] ^ draws[rows:]).view(-1).view(torch.int32).mul_(MIXING)
    return mixed.view(torch.int16)[:count]


def _shift(like: Tensor, generator: Generator | None) -> Tensor:
    """Return one number out of 0, 1/256, ... 255/256."""
    return torch.randint(256, (), generator=generator, device=like.device).to(like.dtype).div_(256)


def uniform(like: Tensor, generator: Generator | None = None) -> Tensor:
    """Return numbers evenly spread over [0, 1), multiples of 2^-24, of `like`'s floating-point type, shape and strides.

    For rounding: of each number's 24 bits 16 are its own and 8 are the whole tensor's. Every number for itself has
    the distribution of torch.rand's, so that there is no bias; what they share is below 2^-16.
    """
    shift = _shift(like, generator).add_(32768)

    def fill(piece: Tensor, made: Tensor) -> None:
        made.copy_(uniform_16(len(made), like, generator)).add_(shift).div_(65536)

    return blockwise(like, fill)


def round_up_or_down(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Round to a neighbouring integer at random, so that the mean is x (Gupta et al. 2015, section 3). No gradient.

    Integers stay: this is not floor(x + u), a sum that is rounded where x is large. Random numbers as in `uniform`;
    on the CPU none are drawn for a block of integers.
    """
    return blockwise(x, rounding_up_or_down(x, generator), scratch=2)


def rounding_up_or_down(like: Tensor, generator: Generator | None = None) -> Fill:
    """Return what `round_up_or_down` does with each piece of a tensor, for `blockwise` with scratch=2."""
    bound = scalar(32768 - _shift(like, generator))

    def fill(piece: Tensor, made: Tensor, rest: Tensor, draws: Tensor) -> None:
        torch.sub(piece, torch.floor(piece, out=made), out=rest)
        if rest.device.type != "cpu" or rest.sum():
            draws.copy_(uniform_16(rest.numel(), like, generator))
            made.add_(draws.add_(rest, alpha=65536).ge_(bound))

    return fill


def blockwise(x: Tensor, fill: Fill, scratch: int = 0) -> Tensor:
    """Return a tensor of x's shape and strides that `fill(piece of x, same piece of the result, ...)` has filled.

    On the CPU the pieces are one-dimensional and stay in the cache from one operation to the next. No gradient.

    Args:
        scratch: how many tensors of a piece's size `fill` gets besides, to write to as it likes.
    """
    made = torch.empty_like(x)
    source = x.detach() if x.stride() == made.stride() else torch.empty_like(made).copy_(x.detach())
    size = min(BLOCK, x.numel()) if x.device.type == "cpu" else x.numel()
    pieces = [torch.split(t.as_strided((x.numel(),), (1,)), max(1, size)) for t in (source, made)]
    spare = x.new_empty(scratch, size)
    whole = tuple(spare)
    for piece, result in zip(*pieces, strict=True):
        fill(piece, result, *(whole if piece.numel() == size else spare[:, : piece.numel()]))
    return made
