"""Images that stay in files: a split of paths, decoded by processes of torch's DataLoader as batches are wanted.

What a batch holds depends on its paths and draws alone, so any number of processes makes the same. They come from a
fork server, a fresh process: they inherit neither locks nor files nor CUDA's state. They end with the epoch, or as soon
as the process that they work for is gone, however it went; signals sent to the whole group are left to that process.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any, NamedTuple, Self

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from qbench.data.augment import Augment

METHOD = "forkserver"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Files:
    """Images in files below `root`, with labels int64 (N,).

    Args:
        side: what the shorter side is resized to before a crop of fixed size.
    """

    root: str
    names: tuple[str, ...]
    labels: Tensor
    side: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the least image that a crop is taken from."""
        return 3, self.side, self.side

    def to(self, device: torch.device) -> "Files":
        """Return the split with its labels on a device."""
        return replace(self, labels=self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return the images of an index tensor (n,)."""
        return replace(self, names=tuple(self.names[i] for i in index.tolist()), labels=self.labels[index])

    def paths(self, index: Tensor) -> list[str]:
        """Return the paths of some images."""
        return [os.path.join(self.root, self.names[i]) for i in index.tolist()]


class Job(NamedTuple):
    """A batch to decode: paths, and the draws of each image; None asks for centre crops."""

    paths: list[str]
    draws: list[list[float]] | None


class Batch(NamedTuple):
    """Images uint8 (n, size, size, 3), and the files that could not be read, with the reasons."""

    images: Tensor
    bad: list[tuple[str, str]]


class Decoder:
    """What a process needs to know: it gets jobs, and returns batches."""

    def __init__(self, side: int, augment: Augment) -> None:
        self.side, self.augment = side, augment

    def __getitem__(self, job: Job) -> Batch:
        from qbench.data.images import cropped, reason  # and PIL, which sets in memory do without

        size = self.augment.size
        images, bad = torch.zeros(len(job.paths), size, size, 3, dtype=torch.uint8), []
        for i, path in enumerate(job.paths):
            try:
                images[i] = cropped(path, self.side, self.augment, job.draws[i] if job.draws else None)
            except Exception as error:  # whatever PIL raises for damaged files
                bad.append((path, reason(error)))
        return Batch(images, bad)


def batches(
    split: Files, indices: Sequence[Tensor], draws: Tensor | None, augment: Augment, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield images uint8 (n, 3, size, size) in channels_last for every index tensor, in order.

    Args:
        draws: (N, k) of the whole split, to augment with; None for centre crops.
        workers: processes, at most one a core; 0 decodes in this one.

    Raises:
        DataError: images that cannot be decoded. After the first, no more batches come, but the rest is looked at, so
            that all are named.
    """
    bad: list[tuple[str, str]] = []
    for batch in _decoded(split, indices, draws, Decoder(split.side, augment), workers, device):
        bad += batch.bad
        if not bad:
            yield batch.images.to(device, non_blocking=True).movedim(3, 1)
    if bad:
        from qbench.data.images import damaged

        bad = [(os.path.relpath(path, split.root), why) for path, why in bad]
        raise damaged(bad, sum(map(len, indices)), split.root)


def _decoded(
    split: Files, indices: Sequence[Tensor], draws: Tensor | None, decoder: Decoder, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Yield batches; where a process was killed, go on without any: the batches are the same, errors come again."""
    done, workers = 0, min(workers, _cores(), len(indices))
    while True:
        jobs = (Job(split.paths(i), None if draws is None else draws[i].tolist()) for i in indices[done:])
        try:
            for batch in _loader(decoder, jobs, workers, device):
                done += 1
                yield batch
            return
        except (RuntimeError, EOFError, OSError) as error:
            if not workers:
                raise
            why = str(error).partition("\n")[0] or type(error).__name__
            what = "a process that decodes images was lost"
            warnings.warn(f"{what} ({why}); this one decodes the rest of the epoch", RuntimeWarning, stacklevel=2)
            workers = 0


def _loader(decoder: Decoder, jobs: Iterator[Job], workers: int, device: torch.device) -> "DataLoader[Any]":
    context = None
    if workers:
        context = multiprocessing.get_context(METHOD)
        context.set_forkserver_preload(["qbench.data.images"])  # torch is imported once, not by every process
        _start_server()
    return DataLoader(
        decoder,  # type: ignore[arg-type]
        sampler=jobs,
        batch_size=None,  # a job is a batch
        collate_fn=_unchanged,  # type: ignore[arg-type]
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_begin if workers else None,
        pin_memory=device.type == "cuda",
        generator=Generator(),  # else a number is drawn from the global one
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


def _start_server() -> None:
    """See to it that the fork server runs; it and what it forks inherit that signals are blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # starting the tracker has lifted it
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(worker: int) -> None:
    """Begin a process's work: the end of the one that it works for is its own."""
    first = multiprocessing.parent_process()
    assert first is not None
    threading.Thread(target=_leave_with, args=(first.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
