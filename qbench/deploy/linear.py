"""Expresses weights and activation levels as integers times a scale, for exports that compute in integers."""

import torch
from torch import Tensor

from qbench.deploy.codes import Encoded

OFF_INTEGER = 1e-4
"""Largest allowed distance between a level and an integer multiple of the step, as a fraction of the step."""


class NotLinear(Exception):
    """Raised if weights or levels are not integers times a scale.

    For weights, the message states what an export needs. For levels, it states what an export does not support.
    """


def integer_weights(weight: Encoded) -> tuple[Tensor, Tensor]:
    """Return weights as integers of the same shape, and their scale: (1,), or one per output channel.

    Raises:
        NotLinear: the weights are not equally spaced and symmetric, or a layer or channel has several scales.
    """
    levels = weight.levels
    if weight.layout not in ("tensor", "channel") or levels.form == "book" or len(levels.book):
        raise NotLinear("needs equally spaced weights with one scale per layer or channel")
    codes = weight.numbers()
    if levels.form == "steps":
        numbers, scale = codes * levels.step + levels.first, levels.scale
    else:
        # symmetric around 0: odd multiples of half a step
        n = levels.count - 1
        numbers, scale = 2 * codes - n, levels.scale / (2 * n)
        if not torch.equal(levels.low, -levels.scale / 2):
            raise NotLinear("needs weights that are symmetric around 0")
    return numbers.reshape(weight.shape), scale


def integer_levels(levels: Tensor) -> tuple[Tensor, float]:
    """Return activation levels as integers of the same shape, and the unit of these integers.

    Raises:
        NotLinear: the levels are not multiples of one unit.
    """
    distinct = torch.unique(levels.double())
    if len(distinct) < 2:
        raise NotLinear("activations with only one level")
    step = distinct.diff().min()
    largest = distinct[distinct.abs().argmax()]
    for unit in (step, step / 2):  # levels without 0 are odd multiples of half a step
        if (integer := (largest / unit).round()) == 0:
            continue
        exact = largest / integer  # the largest level has the smallest relative rounding error
        multiples = levels.double() / exact
        if bool(((multiples - multiples.round()).abs() <= OFF_INTEGER).all()):
            return multiples.round().long(), exact.item()
    raise NotLinear("activations whose levels are not multiples of one step")
