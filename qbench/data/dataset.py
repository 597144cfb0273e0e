"""What a data set is: three splits of uint8 images, and how a batch of them becomes the network's input.

What fits into memory lies there and is augmented a batch at a time; what does not streams from its files.

The order of the training images is a function of (seed, epoch), the augmentation of (seed, epoch, index): a run that
stops anywhere resumes with the same images, however they are fetched.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import torch
from torch import Generator, Tensor

from qbench.data.augment import Augment, augmented, centred, coloured
from qbench.data.normalize import mean_and_std
from qbench.data.stream import Files, batches

__all__ = (
    "Augment",
    "Dataset",
    "Files",
    "Loader",
    "Split",
    "augmented",
    "batches_of",
    "mean_and_std",
    "split_validation",
)

# Shapes: N images, C channels, H height, W width.

PIXELS = 2**23
"""Pixels of a batch that is evaluated, at most: 500 images of 129x129, 167 of 224x224."""


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a stored image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device, its images in channels_last."""
        return Split(self.images.to(device, memory_format=torch.channels_last), self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return the images of an index tensor (n,)."""
        return replace(self, images=self.images[index], labels=self.labels[index])


AnySplit = TypeVar("AnySplit", bound=Split | Files)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits and what a network must know of them.

    Args:
        val: held out of the training images, for selection; empty where `dataset.val=0`.
        mean, std: per channel, of images scaled to [0, 1].
        made: rendered or random images, to be kept out of tables of papers.
        files: what is known of the files that the images come from, for the manifest.
    """

    name: str
    train: Split | Files
    val: Split | Files
    test: Split | Files
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = field(default_factory=Augment)
    made: bool = False
    files: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image as the network gets it."""
        channels, height, width = self.train.shape
        return channels, self.augment.size or height, self.augment.size or width

    @property
    def image_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lowest and highest value per channel that the network can get."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return tuple(-m / s for m, s in pairs), tuple((1 - m) / s for m, s in pairs)

    def fingerprint(self) -> dict[str, str | int]:
        """Return counts and sha256 of the splits: images, or the files' names, with labels, in their order."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        counts: dict[str, str | int] = {f"{name}_images": len(split) for name, split in splits.items()}
        return counts | {f"{name}_sha256": _sha256(split) for name, split in splits.items()} | dict(self.files)


def _sha256(split: Split | Files) -> str:
    digest = hashlib.sha256()
    if isinstance(split, Files):
        digest.update("\0".join(split.names).encode(errors="surrogateescape"))
    for tensor in (split.labels,) if isinstance(split, Files) else (split.images, split.labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def split_validation(split: AnySplit, val: float) -> tuple[AnySplit, AnySplit]:
    """Part a training split into (train, val), stratified, always the same way.

    Args:
        val: the part held out, 0 <= val < 1.

    Raises:
        ValueError: nothing would be left to train on, or nothing held out although val > 0.
    """
    if not 0 <= val < 1:
        raise ValueError(f"val={val}: allowed is a part of the training images, from 0 to below 1")
    order = torch.randperm(len(split), generator=Generator().manual_seed(0))
    held, labels = torch.zeros(len(split), dtype=torch.bool), split.labels[order]
    for label in split.labels.unique():  # type: ignore[no-untyped-call]
        members = order[labels == label]
        held[members[: round(val * len(members))]] = True
    train, rest = torch.arange(len(split))[~held], torch.arange(len(split))[held]
    if not len(train) or (val and not len(rest)):
        where = "to train on" if not len(train) else "to validate on"
        raise ValueError(f"val={val} leaves no image {where} out of {len(split)}; try val={0.1 if val != 0.1 else 0}")
    return split.take(train), split.take(rest)  # type: ignore[return-value]  # of the same kind


class Loader:
    """Makes batches: the network's input float32 (N, C, H, W) in channels_last, and labels.

    Args:
        data: the data set; what of it is in memory is moved to `device` whole, copied unless it is there in
            channels_last.
        batch_size: images per training batch; images beyond the last full batch of an epoch wait for the next one.
        seed: the order and the augmentation follow from (seed, epoch).
        workers: processes that decode images where these stream from files; the batches are the same with any number.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, device: torch.device, workers: int = 0) -> None:
        self.splits: dict[str, Split | Files] = {
            name: getattr(data, name).to(device) for name in ("train", "val", "test")
        }
        self.augment = data.augment
        self.batch_size, self.steps = batches_of(data, batch_size)
        self.seed, self.device, self.workers = seed, device, workers
        # Whole images: numbers per channel, broadcast in channels_last, are eight times slower.
        channels, height, width = data.shape
        mean, std = (torch.tensor(v, device=device).expand(height, width, channels) for v in (data.mean, data.std))
        self._mean = (255 * mean).contiguous().movedim(2, 0)
        self._scale = (1 / (255 * std)).contiguous().movedim(2, 0)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the epoch's training batches from number `start` on."""
        split, size = self.splits["train"], self.batch_size
        generator = Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(len(split), generator=generator)
        draws = torch.rand(len(split), self.augment.draws, generator=generator)  # by image, whatever its place
        home = self.device if isinstance(split, Split) else torch.device("cpu")
        order, draws = order.to(home), draws.to(home)
        indices = [order[step * size : (step + 1) * size] for step in range(start, self.steps)]
        for index, images in zip(indices, self._crops(split, indices, draws), strict=True):
            images = coloured(images, draws[index].to(self.device), self.augment)
            yield self.normalize(images), split.labels[index]

    def plain(self, name: str, limit: int | None = None, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a split's images (the first `limit`) in order, not augmented; `size` at a time, fewer of large ones."""
        split, (_, height, width) = self.splits[name], self._mean.shape
        count = len(split) if limit is None else min(limit, len(split))
        size = min(size, max(1, PIXELS // (height * width)))
        parts = [torch.arange(start, min(start + size, count)) for start in range(0, count, size)]
        for part, images in zip(parts, self._crops(split, parts, None), strict=True):
            yield self.normalize(images), split.labels[part[0] : part[-1] + 1]

    def _crops(self, split: Split | Files, indices: list[Tensor], draws: Tensor | None) -> Iterator[Tensor]:
        """Yield uint8 images as large as the network gets them, augmented by their draws where there are any."""
        if isinstance(split, Files):
            yield from batches(split, indices, draws, self.augment, self.workers, self.device)
            return
        for index in indices:
            if draws is None:  # neighbours
                yield centred(split.images[index[0] : index[-1] + 1], self.augment.size)
            else:  # rows of memory, copied whole
                images = split.images.movedim(1, 3).index_select(0, index).movedim(3, 1)
                yield augmented(images, draws[index], self.augment)

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """Return (x / 255 - mean) / std as float32 in channels_last."""
        floats = images_NCHW.to(torch.float32, memory_format=torch.channels_last)
        return floats.sub_(self._mean).mul_(self._scale)


def batches_of(data: Dataset, batch_size: int) -> tuple[int, int]:
    """Return the images of a training batch, no more than there are, and the full batches of an epoch."""
    size = min(batch_size, len(data.train))
    return size, len(data.train) // size


def _mix(seed: int, epoch: int) -> int:
    """Return a 63-bit generator seed that (seed, epoch) alone decide; neighbouring pairs give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:8]) >> 1
