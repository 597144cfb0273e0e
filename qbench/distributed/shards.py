"""Divides a global batch into shards, and adds up the results of the shards in a fixed order.

The result of float addition depends on the order. The shards are therefore the leaves of a binary tree, and sums are
always computed along this tree. Each process computes the shards of one subtree. The results are therefore
bit-identical for every allowed number of processes.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from qbench.distributed.group import Group, Tensors
from qbench.errors import ConfigError

T = TypeVar("T")
Pass = Callable[[], tuple[Tensor, Tensor]]
"""Forward and backward pass over one shard. It returns scalars: the loss and the number of correct predictions."""


@dataclass(frozen=True)
class Shards:
    """The shards of every global batch.

    Args:
        count: number of shards, a power of two.
        seed: the seed of the run.
        group: the processes of the run. The number of processes must divide `count`.
    """

    count: int = 1
    seed: int = 0
    group: Group = field(default_factory=Group)

    @property
    def own(self) -> range:
        """Indices of the shards that this process computes."""
        each = self.count // self.group.size
        return range(self.group.rank * each, (self.group.rank + 1) * each)

    def draw_seed(self, purpose: str, step: int, shard: int = 0) -> int:
        """Return a 63-bit seed for random numbers of one step.

        The result is the same on all processes. It differs between purposes, runs, steps and shards.

        Args:
            purpose: what the random numbers are for.
            step: index of the training step.
            shard: index of the shard, or 0 for random numbers that all shards share.
        """
        name = f"{purpose} {self.seed} {step} {shard}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def sum_in_pairs(parts: Iterable[T], add: Callable[[T, T], T]) -> T:
    """Return the sum of 2^n parts in the order ((a + b) + (c + d)) + ... At most n + 1 partial sums exist at a time."""
    waiting: list[tuple[int, T]] = []  # (number of parts in a sum, the sum)
    for part in parts:
        total, size = part, 1
        while waiting and waiting[-1][0] == size:
            total, size = add(waiting.pop()[1], total), 2 * size
        waiting.append((size, total))
    ((_, total),) = waiting
    return total


class ShardedStep:
    """Adds up the results of the forward and backward passes over the shards of one global batch.

    Every pass starts from the buffers that the network had before the step. After the step, a float buffer is the mean
    over the shards. An integer or bool buffer is the maximum over the shards. A counter of batches therefore increases
    by one, and a flag is set if any shard has set it.

    Args:
        model: the network.
        shards: the shards of the batch.
    """

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self._model, self._shards = model, shards
        self._parameters = list(model.parameters())
        self._earlier = [parameter.grad for parameter in self._parameters]
        self._before = [buffer.clone() for buffer in model.buffers()]

    def compute(self, passes: Iterable[Pass]) -> tuple[Tensor, Tensor]:
        """Add the gradients of the global batch to the parameters' `.grad`, and set the buffers.

        Return the loss and the number of correct predictions of the global batch, as scalar tensors.

        Args:
            passes: the passes over the shards of this process, in order. Each pass divides its loss by the number of
                shards.

        Raises:
            ConfigError: a pass changes a parameter.
        """
        group = self._shards.group
        total = sum_in_pairs(map(self._tensors, passes), self._add)
        distance = 1
        while distance < group.size:  # the levels of the tree above the subtrees of single processes
            partner = group.rank ^ distance
            other = group.exchange(partner, total, self._like(total))
            total = self._add(total, other) if group.rank < partner else self._add(other, total)
            distance *= 2
        loss, hits, *rest = total
        assert loss is not None
        assert hits is not None
        gradients, buffers = rest[: len(self._parameters)], rest[len(self._parameters) :]
        for parameter, earlier, gradient in zip(self._parameters, self._earlier, gradients, strict=True):
            parameter.grad = earlier if gradient is None else gradient if earlier is None else earlier.add_(gradient)
        for buffer, after in zip(self._model.buffers(), buffers, strict=True):
            assert after is not None
            buffer.copy_(after / self._shards.count if after.is_floating_point() else after)
        return loss, hits

    def _tensors(self, run: Pass) -> Tensors:
        """Reset the buffers, and run a pass. Return loss, number of correct predictions, gradients, buffers."""
        for buffer, before in zip(self._model.buffers(), self._before, strict=True):
            buffer.copy_(before)
        self._model.zero_grad()
        versions = [parameter._version for parameter in self._parameters]
        loss, hits = run()
        if versions != [parameter._version for parameter in self._parameters]:
            raise ConfigError(self._changed_parameter(versions))
        gradients = [parameter.grad for parameter in self._parameters]
        return [loss, hits, *gradients, *(buffer.clone() for buffer in self._model.buffers())]

    def _add(self, first: Tensors, second: Tensors) -> Tensors:
        """Return the sum of the tensors of two subtrees. The tensors of the first subtree are overwritten."""
        buffers = 2 + len(self._parameters)
        total: Tensors = []
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            if a is None or b is None:  # a parameter without gradient
                total.append(b if a is None else a)
            elif i < buffers or a.is_floating_point():
                total.append(a.add_(b))
            else:
                total.append(torch.maximum(a, b))
        return total

    def _like(self, total: Tensors) -> list[Tensor]:
        """Return a tensor of the same shape, type and strides for each tensor in `total`."""
        numbers = [tensor for tensor in total[:2] if tensor is not None]
        return [*numbers, *self._parameters, *self._before]

    def _changed_parameter(self, versions: list[int]) -> str:
        named = zip(self._model.named_parameters(), versions, strict=True)
        name = next(name for (name, parameter), version in named if parameter._version != version)
        return (
            f"batch_shards={self._shards.count}: the forward pass changes the parameter {name} differently for each "
            "shard\nset the parameter in the method's function prepare or step, or use batch_shards=1"
        )
