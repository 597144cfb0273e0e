"""Provides fast tensor functions without gradient. The functions make few passes over memory.

The functions compare, mask, round stochastically, or process tensors block by block. On a CPU, three operations are
slow: a comparison whose result is a bool tensor, `where` with a bool tensor, and a search. Each takes as long as many
passes over floats (measured by scripts/bench/where.py). The functions here therefore write results of comparisons into
float tensors, and use the derivative of hardtanh as a mask. Only functions whose names end in an underscore modify
their inputs.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Generator, Tensor

from qbench.quant import elementwise
from qbench.quant.recording import recording

Fill = Callable[..., None]
"""Function (block of x, block of the result, *scratch) that computes one block of the result in `blockwise`.
"""

BLOCK = 2**18
"""Number of elements per block in `blockwise`. A block of floats takes one megabyte."""

MIXING = 0x2C1B3C6D
"""An odd factor. Multiplication of 32-bit integers by an odd factor maps different integers to different integers."""

MAX_EDGES = 31
"""With more edges than this number, a search is faster than a comparison with each edge."""


def scalar(x: Tensor) -> float | Tensor:
    """Return a one-element tensor as a number if it is on the CPU, else as a detached tensor.

    Reading a number from another device would make the CPU wait for that device. While a function is recorded
    (recording.py), the result is a float64 tensor, because Python's floats have this precision.
    """
    if recording.get():
        return x.detach().double()
    return x.item() if x.device.type == "cpu" else x.detach()


def next_float(value: float | Tensor, towards: float, dtype: torch.dtype) -> float | Tensor:
    """Return the first number of type `dtype` beyond `value` in the direction of `towards`.

    An open interval that ends at the returned number includes `value`.
    """
    if isinstance(value, Tensor):
        number = value.to(dtype)
        following = torch.nextafter(number, torch.full_like(number, towards))
        return torch.where((number - value) * towards > 0, number, following)
    return _next_float_of_number(value, towards, dtype)


@lru_cache
def _next_float_of_number(value: float, towards: float, dtype: torch.dtype) -> float:
    number = torch.tensor(value, dtype=dtype)
    if (number.item() - value) * towards > 0:  # `value` was rounded to a number beyond it
        return number.item()
    return torch.nextafter(number, torch.tensor(towards, dtype=dtype)).item()


def divide_codes_(codes: Tensor, n: float) -> Tensor:
    """Divide the integers 0 ... n by n, in place.

    Multiplication by 1/n is faster. It is used if it gives the same results as division for all codes.
    """
    return codes.mul_(1 / n) if n in (1, 3) else codes.div_(n)


def grad_between(grad: Tensor, x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return grad where low < x < high, else 0. If the bounds are numbers, one pass over memory is enough."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((x > low) & (x < high), grad, 0.0)
    masked: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return masked


def grad_within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return grad where low <= x <= high, else 0. This is the backward pass of clamp."""
    return grad_between(grad, x, next_float(low, -math.inf, x.dtype), next_float(high, math.inf, x.dtype))


def at_least(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return 1 where x >= bound, else 0, in x's own type."""
    return torch.ge(x.detach(), bound, out=torch.empty_like(x))


def above(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return 1 where x > bound, else 0, in x's own type."""
    return torch.gt(x.detach(), bound, out=torch.empty_like(x))


def lookup(x: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    """Return heights[i], where edges[i] is the largest edge below x, or 0 if no edge is below x. No gradient.

    Args:
        edges, heights: L numbers each, of shape (L,), ascending. The heights are at least 0.
    """
    x, table = x.detach(), torch.cat([heights.new_zeros(1), heights])
    if x.dim() == 4 and not x.is_contiguous():  # channels_last: search in the order of memory
        return table[torch.bucketize(x.movedim(1, 3).contiguous(), edges)].movedim(3, 1)
    return table[torch.bucketize(x.contiguous(), edges)]


def step_function(x: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    """Return the same result as `lookup`, but faster on a CPU if there are at most `MAX_EDGES` edges.

    In this case, x is compared with every edge, which is faster than a search.
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
    """Return random int16 integers of shape (count,), uniform from -32768 to 32767 and pairwise independent.

    The function draws only two sets of numbers, together about sqrt(count) 64-bit numbers. The results are xors of a
    number from the first set and a number from the second set. Such an xor is uniform, and any two xors are
    independent. There is therefore no bias, and sums have the same variance as sums of independent numbers. The
    function takes a tenth of the time of drawing all numbers. Its result does not depend on the number of threads.
    """
    # Make a table of rows x columns words. A word has 64 bits and contains four numbers.
    words = (count + 3) // 4
    rows = math.isqrt(words) + 1
    columns = -(-words // rows)
    draws = torch.empty(rows + columns, dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    # The xor of the four corners of a rectangle in this table is 0. A one-to-one map of each 32-bit half of a word
    # removes this relation. The numbers stay uniform and pairwise independent.
    mixed = (draws[:rows, None] ^ draws[rows:]).view(-1).view(torch.int32).mul_(MIXING)
    return mixed.view(torch.int16)[:count]


def _shared_bits(like: Tensor, generator: Generator | None) -> Tensor:
    """Return one random number from {0, 1/256, ..., 255/256}: the lower 8 of 24 random bits (see `uniform`)."""
    return torch.randint(256, (), generator=generator, device=like.device).to(like.dtype).div_(256)


def uniform(like: Tensor, generator: Generator | None = None) -> Tensor:
    """Return uniform random numbers in [0, 1) that are multiples of 2^-24.

    The result has the floating-point type, shape and strides of `like`.

    The numbers are meant for stochastic rounding. Each number has 24 random bits. The upper 16 bits are drawn for each
    number, and the lower 8 bits are drawn once for the whole tensor. A single number has the same distribution as a
    number from torch.rand, so there is no bias. The shared bits contribute less than 2^-16 to each number.
    """
    return with_noise(lambda x, noise: noise.add_(0.5), like, generator=generator)


def with_noise(function: Callable[..., Tensor], x: Tensor, *others: Tensor, generator: Generator | None) -> Tensor:
    """Return `function(x, noise, *others)`. The noise is `uniform` minus 1/2, and so lies in [-1/2, 1/2). No gradient.

    With the extra `fast`, the function is compiled on a CPU.

    Args:
        function: an elementwise function. It may change the noise in place, but not its other arguments.
        x: numbers of any shape. The noise has this shape too.
        others: tensors that can be broadcast to the shape of x.
        generator: the source of random numbers. If it is None, this is torch's global generator.
    """
    shared = _shared_bits(x, generator)
    draws = torch.empty_like(x, dtype=torch.int16)
    size = BLOCK if x.device.type == "cpu" else max(1, x.numel())
    for block in torch.split(draws.as_strided((x.numel(),), (1,)), size):  # in the order of memory
        block.copy_(uniform_16(len(block), x, generator))

    def from_draws(x: Tensor, draws: Tensor, shared: Tensor, *others: Tensor) -> Tensor:
        return function(x, draws.to(x.dtype).add_(shared).mul_(2**-16), *others)

    call = from_draws if torch.compiler.is_compiling() else partial(elementwise.call, from_draws)
    return call(x.detach(), draws, shared, *others)


def stochastic_round(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Round x to one of the two neighbouring integers at random, so that the mean is x. No gradient.

    Source: Gupta et al. 2015, section 3.

    Integers stay unchanged. The formula floor(x + u) with a random u in [0, 1) would not guarantee this, because
    floating point rounds the sum x + u for large x. The random numbers have the distribution that `uniform` describes.
    On the CPU, no random numbers are drawn for a block that contains only integers.
    """
    return blockwise(x, stochastic_rounding_fill(x, generator), scratch=2)


def stochastic_rounding_fill(like: Tensor, generator: Generator | None = None) -> Fill:
    """Return a function that rounds one block stochastically.

    Pass the returned function to `blockwise` as the argument `fill`, with `scratch=2`.
    """
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


def blockwise(x: Tensor, fill: Fill, scratch: int = 0, block: int = BLOCK) -> Tensor:
    """Compute a tensor with `fill`, block by block, and return the tensor. No gradient.

    The result has the shape and strides of x.

    On the CPU, blocks are one-dimensional and small enough to stay in the processor's cache between operations. On
    other devices, the whole tensor is one block.

    Args:
        fill: see `Fill`.
        scratch: number of additional tensors that `fill` may write to. Each has the size of a block.
        block: number of elements per block.
    """
    result = torch.empty_like(x)
    source = x.detach() if x.stride() == result.stride() else torch.empty_like(result).copy_(x.detach())
    size = min(block, x.numel()) if x.device.type == "cpu" else x.numel()
    # Make one-dimensional views in the order of memory, and cut the views into blocks.
    blocks = [torch.split(t.as_strided((x.numel(),), (1,)), max(1, size)) for t in (source, result)]
    spare = x.new_empty(scratch, size)
    full_size = tuple(spare)
    for source_block, result_block in zip(*blocks, strict=True):
        length = source_block.numel()
        fill(source_block, result_block, *(full_size if length == size else spare[:, :length]))
    return result
