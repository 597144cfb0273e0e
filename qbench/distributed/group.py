"""Defines the processes that share a run, and the ways in which they agree.

`Group` stands for a run in a single process. Every function then returns what this process alone has.
`qbench.distributed.torch_group` has the group of several processes. This module does not import torch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Tensors: TypeAlias = "list[Tensor | None]"
"""Tensors that are sent together. None stands for a tensor that does not exist, such as a missing gradient."""


class Group:
    """The processes of a run. All processes call the same functions in the same order.

    Attributes:
        rank: number of this process, from 0. Process 0 alone writes files and messages.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on process 0. The other processes do not call it."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return [value]

    def largest(self, *numbers: int) -> list[int]:
        """Return, for each of some numbers, the largest one among all processes."""
        return list(numbers)

    def exchange(self, partner: int, tensors: Tensors, like: "Sequence[Tensor]") -> Tensors:
        """Send tensors to a process, and return the tensors of this process.

        Args:
            partner: rank of the other process, which calls this function with the rank of this process.
            tensors: the tensors to send.
            like: one tensor for each of `tensors`, with the same shape, type and strides.
        """
        raise NotImplementedError("a single process has no partner")
