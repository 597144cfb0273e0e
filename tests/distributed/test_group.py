"""What processes tell each other: numbers, objects and tensors of every type; a step shared by two processes."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_shards import SHARDS, images, network, passes
from torch import Tensor, nn

from qbench.distributed.group import Group
from qbench.distributed.shards import ShardedStep, Shards
from qbench.distributed.torch_group import joined_group
from qbench.training.evaluation import evaluate


def in_processes(work: Callable[[Group], None], size: int = 2) -> None:
    """Call a function in forked processes that form a group. An error in any of them fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        with joined_group() as group:
            work(group)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0] * size


def tensors(rank: int) -> list[Tensor | None]:
    """Return tensors of several types, shapes and strides. Some do not exist on some processes."""
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(4, 3, 5, 5, generator=generator)
    return [
        wide[0, 0, 0, 0].clone(),
        torch.tensor(7 + rank),
        wide.contiguous(memory_format=torch.channels_last),
        None if rank else wide,
        torch.tensor([True, bool(rank), False]),
        wide[..., 0].double(),
        wide.bfloat16() if rank else None,
        torch.empty(0),
    ]


def every_exchange(group: Group) -> None:
    assert group.largest(group.rank, -group.rank, 3) == [group.size - 1, 0, 3]
    assert group.from_first(lambda: {"rank": group.rank}) == {"rank": 0}
    assert group.gather(group.rank) == list(range(group.size))
    own, expected = tensors(group.rank), tensors(1 - group.rank)
    like = [a if a is not None else b for a, b in zip(own, expected, strict=True)]
    found = group.exchange(1 - group.rank, own, like)  # type: ignore[arg-type]
    for a, b, one in zip(found, expected, like, strict=True):
        if b is None:
            assert a is None
        else:
            assert a is not None
            assert one is not None
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, one.stride())


def shared_step(group: Group) -> None:
    """Share a step, and compare it with the same step in this process alone."""
    shared, single = network(), network()
    own = Shards(SHARDS, group=group).own
    parts = images()
    loss, hits = ShardedStep(shared, Shards(SHARDS, group=group)).compute(
        [run for i, run in enumerate(passes(shared, parts)) if i in own]
    )
    expected_loss, expected_hits = ShardedStep(single, Shards(SHARDS)).compute(passes(single, parts))
    assert torch.equal(loss, expected_loss)
    assert int(hits) == int(expected_hits)
    for (name, a), b in zip(shared.named_parameters(), single.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]
        assert a.grad.stride() == a.stride(), name
    for (name, x), y in zip(shared.named_buffers(), single.buffers(), strict=True):
        assert torch.equal(x, y), name


def test_exchanges_of_two_processes() -> None:
    def work(group: Group) -> None:
        every_exchange(group)
        shared_step(group)

    in_processes(work)


def test_a_step_of_four_processes() -> None:
    in_processes(shared_step, 4)


class Pieces(Group):
    """Stands for process 1 of 3, whose peers have measured the other batches."""

    rank, size = 1, 3

    def __init__(self, others: dict[int, list[Any]]) -> None:
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value if rank == self.rank else self.others[rank] for rank in range(self.size)]


class Kept(Group):
    """Keeps what a process tells."""

    def gather(self, value: Any) -> list[Any]:
        self.kept = value
        return [value]


def test_a_shared_evaluation_adds_in_the_order_of_the_batches() -> None:
    """Losses of very different size show the order of a float sum."""
    model = nn.Flatten()
    generator = torch.Generator().manual_seed(0)
    batches = [(10.0**i * torch.randn(5 + i, 4, 1, 1, generator=generator), torch.arange(5 + i) % 4) for i in range(7)]
    answers: list[Tensor] = []
    expected = evaluate(model, batches, predictions=answers)
    measured = {}
    for rank in range(3):
        evaluate(model, batches[rank::3], predictions=[], group=(kept := Kept()))
        measured[rank] = kept.kept
    shared: list[Tensor] = []
    assert evaluate(model, batches[1::3], predictions=shared, group=Pieces(measured)) == expected
    assert torch.equal(torch.cat(shared), torch.cat(answers))


@pytest.mark.parametrize("count", [1, 499, 500, 501, 1600])
def test_the_batches_of_all_processes_are_those_of_one(count: int) -> None:
    from qbench.data import synthetic
    from qbench.data.loader import Loader

    loader = Loader(synthetic.build(train=8, test=count, size=4, val=0), 4, 0, torch.device("cpu"))
    whole = [len(y) for _, y in loader.unaugmented("test")]
    parts = [[len(y) for _, y in loader.unaugmented("test", first=r, every=3)] for r in range(3)]
    assert loader.batch_count("test") == len(whole)
    assert [parts[i % 3][i // 3] for i in range(len(whole))] == whole
    assert sum(map(len, parts)) == len(whole)
