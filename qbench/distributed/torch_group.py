"""Uses torch.distributed to connect the processes that torchrun started.

NCCL transfers gradients on CUDA devices if each process has its own GPU. gloo transfers everything else.
"""

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from qbench.distributed.group import Group, Tensors
from qbench.distributed.launch import Launch, launch
from qbench.errors import ProcessLost, ResourceError

T = TypeVar("T")
SECONDS_FOR_ERROR = 2.0
"""Maximum time in seconds to wait for the error of a process that closed its connection."""

SECONDS_FOR_OTHERS = 10.0
"""Maximum time in seconds for which processes wait for each other at the end of a run."""


@contextmanager
def joined_group() -> Iterator[Group]:
    """Connect the processes that torchrun started, and yield their group.

    If there is only one process, its group has size 1.

    If one process raises an error inside the context, the other processes raise the same error. Without this, the other
    processes would only report a closed connection.
    """
    place = launch()
    if place is None:
        yield Group()
        return
    group = TorchGroup(place)
    lost = False
    try:
        yield group
    except BaseException as error:
        lost = isinstance(error, ProcessLost)
        group.publish(error)
        raise
    finally:
        group.leave(wait=not lost)


class TorchGroup(Group):
    """The processes that torchrun has started. Processes other than 0 print nothing.

    Args:
        place: the ranks of this process.
    """

    def __init__(self, place: Launch) -> None:
        self.rank, self.size = place.rank, place.size
        self._stderr = sys.stderr
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
        self._by_nccl = dist.is_nccl_available() and place.local_size <= torch.cuda.device_count()
        backend = "cpu:gloo,cuda:nccl" if self._by_nccl else "gloo"
        try:
            self._store, _, _ = next(rendezvous("env://"))
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)
        except RuntimeError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).partition("\n")[0]
            raise ResourceError(f"process {self.rank} cannot join the other processes by {address}: {reason}") from None

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on process 0 only, and return its result on all processes."""
        box: list[Any] = [make() if self.rank == 0 else None]
        with self._connected():
            dist.broadcast_object_list(box, src=0)
        value: T = box[0]
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        values: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(values, value)
        return values

    def largest(self, *numbers: int) -> list[int]:
        """Return, for each number, the largest value among all processes."""
        values = torch.tensor(numbers, dtype=torch.int64)
        with self._connected():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return [int(value) for value in values]

    def exchange(self, partner: int, tensors: Tensors, like: Sequence[Tensor]) -> Tensors:
        """Send tensors to another process, and return the tensors that the other process sends (`Group.exchange`)."""
        exist = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.uint8)
        theirs = self._swap(partner, exist, len(exist)).bool().tolist()
        sent = torch.cat([_bytes(tensor) for tensor in tensors if tensor is not None])
        sizes = [one.numel() * one.element_size() if there else 0 for one, there in zip(like, theirs, strict=True)]
        received = torch.split(self._swap(partner, sent, sum(sizes)), sizes)
        return [
            # a copy of the bytes starts at an address that every type accepts; the tensor gets the strides of `one`
            torch.empty_like(one).copy_(part.clone().view(one.dtype).view(one.shape)) if there else None
            for one, part, there in zip(like, received, theirs, strict=True)
        ]

    def publish(self, error: BaseException) -> None:
        """Pass an error on to the other processes. If another process has already passed on an error, do nothing."""
        error.add_note(f"on process {self.rank} of {self.size}:\n{''.join(traceback.format_exception(error))}")
        with suppress(Exception):  # the store may have ended with its process
            if self._store.add("qbench errors", 1) == 1:
                self._store.set("qbench error", _pickled(error).hex())

    def leave(self, *, wait: bool) -> None:
        """Close the connections.

        If `wait` is true, process 0 ends last, because it writes results and may host the store that connects the
        processes.
        """
        with suppress(Exception):
            dist.destroy_process_group()
        with suppress(Exception):  # the store may have ended with its process
            self._store.set(f"qbench left {self.rank}", "1")
            awaited = [f"qbench left {rank}" for rank in range(1, self.size)] if self.rank == 0 else ["qbench left 0"]
            if wait:
                self._store.wait(awaited, timedelta(seconds=SECONDS_FOR_OTHERS))

    def _swap(self, partner: int, sent: Tensor, size: int) -> Tensor:
        """Send bytes to another process, and return the `size` bytes that the other process sends."""
        device = sent.device
        if device.type == "cuda" and not self._by_nccl:
            sent = sent.cpu()
        received = torch.empty(size, dtype=torch.uint8, device=sent.device)
        with self._connected():
            swap = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
            for work in dist.batch_isend_irecv(swap):
                work.wait()
        return received.to(device)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Convert the error of a closed connection to the error that another process raised, or to `ProcessLost`."""
        try:
            yield
        except RuntimeError as error:
            raise self._error_of_another(str(error).partition("\n")[0]) from None

    def _error_of_another(self, reason: str) -> BaseException:
        deadline = time.monotonic() + SECONDS_FOR_ERROR
        while time.monotonic() < deadline:
            with suppress(Exception):
                if self._store.check(["qbench error"]):
                    error = pickle.loads(bytes.fromhex(self._store.get("qbench error").decode()))
                    if isinstance(error, BaseException):
                        return error
            time.sleep(0.05)
        self._print_alone()
        return ProcessLost(
            f"a process was lost; to continue, repeat the command\nprocess {self.rank} reports: {reason}"
        )

    def _print_alone(self) -> None:
        """Allow only the first process that calls this function to print messages."""
        first = True
        with suppress(Exception):
            first = self._store.add("qbench prints", 1) == 1
        sys.stderr = self._stderr if first else open(os.devnull, "w")  # noqa: SIM115


def _bytes(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as bytes (n,), in row-major order."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _pickled(error: BaseException) -> bytes:
    """Return an error as bytes. If the error cannot be pickled, a RuntimeError that contains its text replaces it."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data
