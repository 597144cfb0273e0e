"""Defines splits whose images stay in files. Worker processes decode each batch when it is needed.

A batch depends only on the paths of its images and on the random numbers of their augmentation (draws). The number of
workers therefore does not change the batches.

The workers are processes of torch's DataLoader, and a fork server starts them. The fork server is a fresh process, so
the workers inherit no locks, open files or CUDA state. Workers end when the epoch or the main process ends. Workers
ignore signals such as Ctrl-C, because the main process handles them.
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
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from qbench.data.augment import Augment
from qbench.system.cores import own_cores
from qbench.system.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from qbench.data.image_cache import ImageCache

START_METHOD = "forkserver"


@dataclass(frozen=True)
class FileSplit:
    """A split of N images that stay in their files.

    Args:
        root: the folder of the files.
        names: names of the files relative to `root`.
        labels: the labels, (N,) int64.
        side: size in pixels to which the shorter side of an image is resized before a crop of fixed size.
        cache: cache of decoded images, or None.
        rows: row of each image in the cache, (N,) int64, or None without a cache.
    """

    root: str
    names: tuple[str, ...]
    labels: Tensor
    side: int
    cache: "ImageCache | None" = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Smallest possible shape (C, H, W) of an image after resizing."""
        return 3, self.side, self.side

    @property
    def dtype(self) -> torch.dtype:
        """uint8, the type of decoded images."""
        return torch.uint8

    def to(self, device: torch.device) -> "FileSplit":
        """Return the split with its labels on a device. The images stay in their files."""
        return replace(self, labels=self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return a split with only the images that an index tensor (n,) selects."""
        names, rows = tuple(self.names[i] for i in index.tolist()), self.rows
        return replace(self, names=names, labels=self.labels[index], rows=None if rows is None else rows[index])

    def cached(self, cache: "ImageCache", first: int) -> Self:
        """Return the split with its images in a cache. `first` is the row of the first image."""
        return replace(self, cache=cache, rows=torch.arange(first, first + len(self)))

    def job(self, index: Tensor, draws: Tensor | None) -> "DecodeJob":
        """Return the job that decodes the images of an index tensor (n,)."""
        rows = None if self.rows is None else self.rows[index].tolist()
        return DecodeJob(self.paths(index), rows, None if draws is None else draws[index].tolist())

    def paths(self, index: Tensor) -> list[str]:
        """Return the paths of the images that an index tensor (n,) selects."""
        return [os.path.join(self.root, self.names[i]) for i in index.tolist()]


class DecodeJob(NamedTuple):
    """The paths of the images of a batch, their rows in the cache, and one row of random numbers per image.

    The rows are None if there is no cache. The random numbers are None if the images get centre crops.
    """

    paths: list[str]
    rows: list[int] | None
    draws: list[list[float]] | None


class DecodedBatch(NamedTuple):
    """The images of a batch, uint8 (n, size, size, 3), and (path, reason) of each file that cannot be read."""

    images: Tensor
    bad: list[tuple[str, str]]


class Decoder:
    """Decodes the files of a job into a batch of images.

    The DataLoader takes this object as its data set, so each worker gets a copy of the object.
    """

    def __init__(self, side: int, augment: Augment, cache: "ImageCache | None" = None) -> None:
        self.side, self.augment, self.cache = side, augment, cache

    def __getitem__(self, job: DecodeJob) -> DecodedBatch:
        from qbench.data.images import crop_of_pixels, describe_error, load_crop  # late: not all runs need PIL

        size = self.augment.size
        images, bad = torch.zeros(len(job.paths), size, size, 3, dtype=torch.uint8), []
        for i, path in enumerate(job.paths):
            try:
                draws = job.draws[i] if job.draws else None
                if self.cache and job.rows:
                    images[i] = crop_of_pixels(self.cache.pixels(job.rows[i]), self.side, self.augment, draws)
                else:
                    images[i] = load_crop(path, self.side, self.augment, draws)
            except Exception as error:  # PIL raises many kinds of errors for damaged files
                bad.append((path, describe_error(error)))
        return DecodedBatch(images, bad)


def decoded_batches(
    split: FileSplit, indices: Sequence[Tensor], draws: Tensor | None, augment: Augment, workers: int,
    device: torch.device,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield one batch of decoded images for each index tensor, in order.

    Args:
        split: the split of N images.
        indices: one tensor per batch, with the indices of its n images.
        draws: uniform random numbers in [0, 1) for the augmentation, of shape (N, k): k numbers for each of the split's
            N images. None means centre crops.
        augment: the augmentation.
        workers: number of worker processes. At most one worker is started per core that this process may use. With 0
            workers, the calling process decodes the images.
        device: the device of the batches.

    Raises:
        DataError: some images cannot be decoded. The function yields no batch after the first bad image, but it still
            reads the remaining files, so that the message can name all bad files.
    """
    bad: list[tuple[str, str]] = []
    for batch in _decode_with_fallback(
        split, indices, draws, Decoder(split.side, augment, split.cache), workers, device
    ):
        bad += batch.bad
        if not bad:
            yield batch.images.to(device, non_blocking=True).movedim(3, 1)
    if bad:
        from qbench.data.images import damaged_files_error

        bad = [(os.path.relpath(path, split.root), why) for path, why in bad]
        raise damaged_files_error(bad, sum(map(len, indices)), split.root)


def _decode_with_fallback(
    split: FileSplit, indices: Sequence[Tensor], draws: Tensor | None, decoder: Decoder, workers: int,
    device: torch.device,
) -> Iterator[DecodedBatch]:  # fmt: skip
    """Yield the decoded batches.

    If a worker process is killed, the main process decodes the remaining batches. The batches do not change.
    """
    done, workers = 0, min(workers, own_cores(), len(indices))
    while True:
        jobs = (split.job(i, draws) for i in indices[done:])
        try:
            for batch in _data_loader(decoder, jobs, workers, device):
                done += 1
                yield batch
            return
        except (RuntimeError, EOFError, OSError) as error:
            if not workers:
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"a process that decodes images ended ({reason}); the main process will decode the rest of this epoch",
                RuntimeWarning,
                stacklevel=2,
            )
            workers = 0


def _data_loader(
    decoder: Decoder, jobs: Iterator[DecodeJob], workers: int, device: torch.device
) -> "DataLoader[DecodedBatch]":
    context = None
    if workers:
        context = multiprocessing.get_context(START_METHOD)
        context.set_forkserver_preload(["qbench.data.images"])  # the server imports torch once for all workers
        _ensure_fork_server()
    return DataLoader(
        decoder,  # type: ignore[arg-type]  # a data set is anything with __getitem__
        sampler=jobs,
        batch_size=None,  # a job is a batch
        collate_fn=_identity,  # type: ignore[arg-type]
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_end_with_main_process if workers else None,
        pin_memory=device.type == "cuda",
        generator=Generator(),  # without this argument, the loader would use the global random generator
    )


def _identity(batch: DecodedBatch) -> DecodedBatch:
    return batch


def _ensure_fork_server() -> None:
    """Ensure that the fork server is running.

    Signals that stop a run are blocked while the fork server starts. The fork server and the workers inherit this
    block, so these signals never reach them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        # the resource tracker is started first, because its start unblocks the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_main_process(worker: int) -> None:
    """Start a thread that ends the worker when the main process ends."""
    main = multiprocessing.parent_process()
    assert main is not None
    threading.Thread(target=_exit_after, args=(main.sentinel,), daemon=True).start()


def _exit_after(process: int) -> None:
    """Wait until the process with the given handle ends, then end the current process."""
    wait([process])
    os._exit(0)
