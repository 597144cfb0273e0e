"""Finds the thresholds and levels of an activation quantizer. The quantizer can then run without its Python code.

In evaluation, an activation quantizer is a pointwise step function that is monotone below 0 and monotone above 0. If
such a function has equal values at both ends of an interval on one side of 0, it is constant in the interval. Bisection
over all floats therefore finds every level and every exact threshold.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LEVELS = 2**8 + 1
"""Largest number of levels on each side of 0."""

MAX_TABLES = 64
"""Largest number of different step functions in one layer."""

LARGEST = torch.finfo(torch.float32).max


class NotSteps(Exception):
    """Raised if a quantizer is not a pointwise step function. The message states the reason."""


@torch.no_grad()
def step_function(function: Callable[[Tensor], Tensor], example: Tensor) -> tuple[Tensor, Tensor]:
    """Return the thresholds and levels of a quantizer in the form that `qbench.deploy.network.quantize` takes.

    Args:
        function: the quantizer in evaluation mode.
        example: an input (N, C, ...) of the quantizer. Only its shape is used.

    Raises:
        NotSteps: the quantizer has too many levels, or is not a monotone step function on each side of 0.
    """
    shape = (example.shape[1], *[1] * (example.dim() - 2))

    def at(x: Tensor) -> Tensor:
        """Return the quantizer's results (n, C) for values (n,). Each value is the input of all channels."""
        places = x.reshape(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()
        if len(shape) == 1:
            return function(places)
        results = function(places).flatten(2)
        if results.shape[2] > 1:  # parameters of the quantizer have another axis than the second
            raise NotSteps("the levels differ along another axis than the channels")
        return results[..., 0]

    def of_channel(channel: int) -> Callable[[Tensor], Tensor]:
        return lambda x: at(x)[:, channel]

    tables: list[tuple[Tensor, Tensor]] = []
    table_of = torch.full((shape[0],), -1)
    while len(left := (table_of < 0).nonzero().flatten()):
        if len(tables) == MAX_TABLES:
            raise NotSteps("the channels have too many different levels")
        channel = int(left[0])
        edges = _edges(of_channel(channel))
        starts = torch.cat([edges.new_tensor([-LARGEST]), edges])
        ends = torch.cat([torch.nextafter(edges, edges.new_tensor(-torch.inf)), edges.new_tensor([LARGEST])])
        low, high = at(starts), at(ends)
        tables.append((edges, low[:, channel]))
        # the same steps in another channel
        same = (low == low[:, [channel]]).all(0) & (high == low[:, [channel]]).all(0)
        table_of[same & (table_of < 0)] = len(tables) - 1
        if table_of[channel] < 0:
            raise NotSteps("the quantizer is not a step function on each side of 0")
    if len(tables) == 1:
        return tables[0]
    most = max(len(edges) for edges, _ in tables)
    thresholds = torch.stack([F.pad(edges, (0, most - len(edges)), value=torch.inf) for edges, _ in tables])
    levels = torch.stack([F.pad(heights, (0, most - len(edges))) for edges, heights in tables])
    return thresholds[table_of], levels[table_of]


def _edges(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return all floats x, ascending, at which a step function jumps.

    A jump means that the value at x differs from the value at the next smaller float.
    """
    found = []
    low, high = ordered(torch.tensor([-LARGEST, 0.0])), ordered(torch.tensor([0.0, LARGEST]))
    at_low, at_high = function(float_of(low)), function(float_of(high))
    while True:
        # an interval with equal ends is constant
        differ = at_low != at_high
        low, high, at_low, at_high = low[differ], high[differ], at_low[differ], at_high[differ]
        if len(low) > 2 * MAX_LEVELS:
            raise NotSteps(f"the quantizer has more than {MAX_LEVELS - 1} levels")
        found.append(high[high - low == 1])
        wide = high - low > 1
        if not wide.any():
            return float_of(torch.cat(found).sort().values)
        low, high, at_low, at_high = low[wide], high[wide], at_low[wide], at_high[wide]
        middle = (low + high) >> 1
        at_middle = function(float_of(middle))
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
        at_low, at_high = torch.cat([at_low, at_middle]), torch.cat([at_middle, at_high])


def ordered(x: Tensor) -> Tensor:
    """Return the position of each float in x among all floats of this type, as an integer.

    Larger floats have larger positions, and the positions of neighbouring floats differ by one.
    """
    bits = x.view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits + 2**31))


def float_of(number: Tensor) -> Tensor:
    """Return the floats with the given numbers, as the inverse of `ordered`."""
    return torch.where(number >= 0, number, -number - 2**31).to(torch.int32).view(torch.float32)
