"""Defines the group of processes that share a run, and how they exchange values.

The class `Group` is the group of a single process. Its functions return only values of this process.
`qbench.distributed.torch_group` defines the group of several processes. This module does not import torch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Tensors: TypeAlias = "list[Tensor | None]"
"""Tensors that are sent together. None means that a tensor does not exist, for example a missing gradient."""


class Group:
    """The processes of a run. All processes must call the same functions in the same order.

    Attributes:
        rank: index of this process, from 0. Only process 0 writes files and messages.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on process 0 only, and return its result on all processes."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return [value]

    def largest(self, *numbers: int) -> list[int]:
        """Return, for each number, the largest value among all processes."""
        return list(numbers)

    def exchange(self, partner: int, tensors: Tensors, like: "Sequence[Tensor]") -> Tensors:
        """Send tensors to another process, and return the tensors that the other process sends.

        Args:
            partner: rank of the other process. The other process must call this function with the rank of this process.
            tensors: the tensors to send.
            like: one tensor for each received tensor, with the same shape, type and strides.
        """
        raise NotImplementedError("a single process has no partner")
