"""Provides tensor functions without gradient that make few passes over memory.

The functions compare, mask, round at random, and work block by block. On a CPU, three operations are slow: comparing
into a bool tensor, `where` with a bool tensor, and searching. Each costs as much as many passes over floats (measured
by scripts/bench/where.py). These functions compare into float tensors and mask by the derivative of hardtanh instead.
Only functions whose name ends in an underscore write to their input.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor

Fill = Callable[..., None]
"""Fills one block of a tensor in `blockwise`: (block of x, block of the result, *scratch) -> None.
"""

BLOCK = 2**18
"""Number of elements per block in `blockwise`: a megabyte of floats."""

MIXING = 0x2C1B3C6D
"""An odd factor, so that multiplying 32-bit integers by it is one to one."""

MAX_EDGES = 31
"""Number of edges above which a search is faster than comparing with each edge."""


def scalar(x: Tensor) -> float | Tensor:
    """Return a one-element CPU tensor as a number, and a tensor on another device as a detached tensor.

    Reading a number from another device would wait for that device.
    """
    return x.item() if x.device.type == "cpu" else x.detach()


def next_float(value: float | Tensor, towards: float, dtype: torch.dtype) -> float | Tensor:
    """Return the number of type `dtype` next to `value`, in the direction of `towards`.

    An open interval with the returned number as its bound contains `value`.
    """
    if isinstance(value, Tensor):
        return torch.nextafter(value, torch.full_like(value, towards))
    return _next_float_of_number(value, towards, dtype)


@lru_cache
def _next_float_of_number(value: float, towards: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(towards, dtype=dtype)).item()


def divide_codes_(codes: Tensor, n: float) -> Tensor:
    """Divide the integers 0 ... n by n, in place.

    Multiplication by 1/n is faster. It is used if it gives the same results for all codes.
    """
    return codes.mul_(1 / n) if n in (1, 3) else codes.div_(n)


def grad_between(grad: Tensor, x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return grad where low < x < high, else 0, in one pass if the bounds are numbers."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((x > low) & (x < high), grad, 0.0)
    masked: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return masked


def grad_within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return grad where low <= x <= high, else 0: the derivative of clamp."""
    return grad_between(grad, x, next_float(low, -math.inf, x.dtype), next_float(high, math.inf, x.dtype))


def at_least(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return 1 where x >= bound, else 0, in x's own type."""
    return torch.ge(x.detach(), bound, out=torch.empty_like(x))


def above(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return 1 where x > bound, else 0, in x's own type."""
    return torch.gt(x.detach(), bound, out=torch.empty_like(x))


def lookup(x: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    """Return heights[i] for the last edges[i] below x, and 0 if no edge is below x. No gradient.

    Args:
        edges, heights: (L,) each, ascending; heights are at least 0.
    """
    x, table = x.detach(), torch.cat([heights.new_zeros(1), heights])
    if x.dim() == 4 and not x.is_contiguous():  # channels_last: search in the order of memory
        return table[torch.bucketize(x.movedim(1, 3).contiguous(), edges)].movedim(3, 1)
    return table[torch.bucketize(x.contiguous(), edges)]


def step_function(x: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    """Return the result of `lookup`, computed faster on the CPU for up to about 30 edges.

    In that case x is compared with every edge.
    """
    if x.device.type != "cpu" or len(edges) > MAX_EDGES:
        return lookup(x, edges, heights)
    steps = list(zip(edges.tolist(), heights.tolist(), strict=True))

    def fill(block: Tensor, result: Tensor) -> None:
        result.zero_()
        for edge, height in steps:
            torch.maximum(result, above(block, edge).mul_(height), out=result)

    return blockwise(x, fill)


def uniform_16(count: int, like: Tensor, generator: Generator | None = None) -> Tensor:
    """Return random integers (count,), int16, uniform over -32768 ... 32767, pairwise independent.

    Only about sqrt(count) 64-bit numbers are drawn, in two sets. The xor of a number from one set
    with a number from the other is uniform, and any two such xors are independent. So there is no
    bias, and sums have the same variance as sums of independent numbers. This takes a tenth of the
    time of drawing all numbers, and the result does not depend on the number of threads.
    """
    # A table of rows x columns words of 64 bits; each word contains four numbers.
    words = (count + 3) // 4
    rows = math.isqrt(words) + 1
    columns = -(-words // rows)
    draws = torch.empty(rows + columns, dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    # The xor of the four corners of a rectangle in this table is 0. A one-to-one map of each 32 bits removes this
    # relation. The numbers stay uniform and pairwise independent.
    mixed = (draws[:rows, None] ^ draws[rows:]).view(-1).view(torch.int32).mul_(MIXING)
    return mixed.view(torch.int16)[:count]


def _shared_bits(like: Tensor, generator: Generator | None) -> Tensor:
    """Return one random number from 0, 1/256, ... 255/256: the lower 8 of 24 random bits."""
    return torch.randint(256, (), generator=generator, device=like.device).to(like.dtype).div_(256)


def uniform(like: Tensor, generator: Generator | None = None) -> Tensor:
    """Return uniform random numbers in [0, 1), multiples of 2^-24.

    The result has `like`'s floating-point type, shape and strides.

    The numbers are meant for rounding. Of the 24 bits of each number, the upper 16 are drawn per
    number, and the lower 8 are the same for the whole tensor. Each number alone has the
    distribution of torch.rand, so there is no bias. The shared part is below 2^-16.
    """
    shift = _shared_bits(like, generator).add_(32768)

    def fill(block: Tensor, result: Tensor) -> None:
        result.copy_(uniform_16(len(result), like, generator)).add_(shift).div_(65536)

    return blockwise(like, fill)


def stochastic_round(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Round to a neighbouring integer at random, so that the mean is x. No gradient.

    Gupta et al. 2015, section 3.

    Integers stay unchanged. floor(x + u) would not guarantee this, because the sum x + u is rounded
    for large x. The random numbers are made as in `uniform`. On the CPU, no numbers are drawn for a
    block that contains only integers.
    """
    return blockwise(x, stochastic_rounding_fill(x, generator), scratch=2)


def stochastic_rounding_fill(like: Tensor, generator: Generator | None = None) -> Fill:
    """Return a function that rounds one block at random, for `blockwise` with `scratch=2`."""
    bound = scalar(32768 - _shared_bits(like, generator))

    def fill(block: Tensor, result: Tensor, fraction: Tensor, draws: Tensor) -> None:
        # Split x into floor and fraction.
        torch.sub(block, torch.floor(block, out=result), out=fraction)
        if fraction.device.type != "cpu" or fraction.sum():
            # Round up where u + fraction >= 1, for u in [0, 1) from the draws. Both sides are
            # multiplied by 65536 and shifted to the range of the signed draws.
            draws.copy_(uniform_16(fraction.numel(), like, generator))
            result.add_(draws.add_(fraction, alpha=65536).ge_(bound))

    return fill


def blockwise(x: Tensor, fill: Fill, scratch: int = 0) -> Tensor:
    """Return a tensor of x's shape and strides that `fill` has filled block by block. No gradient.

    On the CPU the blocks are one-dimensional and stay in the cache from one operation to the next.
    On other devices there is a single block.

    Args:
        fill: see `Fill`.
        scratch: number of additional tensors, each of a block's size, that `fill` may write to.
    """
    result = torch.empty_like(x)
    source = x.detach() if x.stride() == result.stride() else torch.empty_like(result).copy_(x.detach())
    size = min(BLOCK, x.numel()) if x.device.type == "cpu" else x.numel()
    # One-dimensional views in the order of memory, cut into blocks.
    blocks = [torch.split(t.as_strided((x.numel(),), (1,)), max(1, size)) for t in (source, result)]
    spare = x.new_empty(scratch, size)
    full_size = tuple(spare)
    for source_block, result_block in zip(*blocks, strict=True):
        length = source_block.numel()
        fill(source_block, result_block, *(full_size if length == size else spare[:, :length]))
    return result
