"""Defines data sets and their splits.

A data set has a training, a validation and a test split. Images that fit into memory are kept in memory. Other images
are read for each batch, from their files or from a user's torch data set.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, TypeVar

import torch
from torch import Generator, Tensor

from qbench.data.augment import Augment
from qbench.data.drawn_split import DrawnSplit, Ends
from qbench.data.file_stream import FileSplit
from qbench.errors import DataError

# Shapes: N images, C channels, H height, W width.

HASHED = MOVED = 1000
"""Number of images that are hashed, or moved in memory, at once."""


@dataclass(frozen=True)
class Split:
    """A split in memory: images (N, C, H, W), uint8 or float32, and labels (N,), int64.

    Raises:
        DataError: the images or labels have a different type or shape.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_tensor(
            "images", self.images, (torch.uint8, torch.float32), 4, "images.to(torch.uint8) or images.float()"
        )
        _check_tensor("labels", self.labels, (torch.int64,), 1, "labels.long() or labels.argmax(1)")
        if len(self.images) != len(self.labels):
            raise DataError(
                f"a split has {len(self.images)} images but {len(self.labels)} labels; the numbers must be equal"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a stored image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        """uint8 or float32."""
        return self.images.dtype

    def to(self, device: torch.device) -> "Split":
        """Return the split on a device, with the images in the memory format channels_last."""
        return Split(self.images.to(device, memory_format=torch.channels_last), self.labels.to(device))

    def take(self, index: Tensor) -> Self:
        """Return a split with only the images that an index tensor (n,) selects."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def divide_(self, first: Tensor, second: Tensor) -> tuple["Split", "Split"]:
        """Reorder the images in their memory, and return two splits that share this memory.

        Args:
            first, second: indices (n,) in ascending order. Together they contain each index once.
        """
        labels = self.labels[torch.cat([first, second])]
        moved = self.images[second]
        start = 0
        for index in torch.split(first, MOVED):  # images only move forward, so none is overwritten before it has moved
            self.images[start : start + len(index)] = self.images[index]
            start += len(index)
        self.images[start:] = moved
        return Split(self.images[:start], labels[:start]), Split(self.images[start:], labels[start:])


def _check_tensor(name: str, value: object, dtypes: Collection[torch.dtype], dims: int, conversions: str) -> None:
    """Raise `DataError` if a tensor of a split has a wrong type or a wrong number of dimensions."""
    if isinstance(value, Tensor) and value.dtype in dtypes and value.dim() == dims:
        return
    found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    allowed = {
        "images": "uint8 (N, C, H, W) with values 0 to 255, or float32",
        "labels": "int64 (N,) with values from 0",
    }
    raise DataError(f"{name} of a split are {found}: must be {allowed[name]}\nto convert: {conversions}")


StoredSplit = Split | FileSplit | DrawnSplit
"""A split in memory, in image files, or in a user's torch data set."""

AnySplit = TypeVar("AnySplit", bound=StoredSplit)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set: three splits and their properties.

    Args:
        name: the data set's name.
        train, test: the training and the test split.
        val: the validation split, which is taken from the training images and is used to select the best weights. With
            `dataset.val=0`, it is empty.
        classes: number of classes.
        mean, std: the mean and standard deviation for normalization, per channel. They refer to uint8 images divided by
            255, or to float images as they are.
        augment: the augmentation of training images.
        synthetic: whether the images are rendered or random. Tables that compare runs with papers leave out synthetic
            data sets.
        files: facts about the image files. A run's manifest.json contains these facts.
        note: what a user should know before training. It is empty if there is nothing to report.
        class_names: the name of each class, or empty if the data set has no names.
    """

    name: str
    train: StoredSplit
    val: StoredSplit
    test: StoredSplit
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = field(default_factory=Augment)
    synthetic: bool = False
    files: Mapping[str, str | int] = field(default_factory=dict)
    note: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image as the network gets it."""
        channels, height, width = self.train.shape
        return channels, self.augment.size or height, self.augment.size or width

    @property
    def white(self) -> int:
        """The pixel value that becomes 1 before normalization: 255 for uint8 images, 1 for float images."""
        return 255 if self.train.dtype == torch.uint8 else 1

    @property
    def image_range(self) -> Ends:
        """Lowest and highest possible value of the network's input, per channel.

        For float images, the range is that of the training images.
        """
        pairs = list(zip(self.mean, self.std, strict=True))
        if self.white == 255:
            return tuple(-m / s for m, s in pairs), tuple((1 - m) / s for m, s in pairs)
        low, high = (zip(ends, pairs, strict=True) for ends in value_ends(self.train))
        return tuple((x - m) / s for x, (m, s) in low), tuple((x - m) / s for x, (m, s) in high)

    def fingerprint(self) -> dict[str, str | int]:
        """Return the number of images and the sha256 of each split.

        The hash covers the images (or the names of their files) and the labels, in the order of the split.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        counts: dict[str, str | int] = {f"{name}_images": len(split) for name, split in splits.items()}
        return counts | self._split_sha256 | dict(self.files)

    @cached_property
    def _split_sha256(self) -> dict[str, str]:
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {f"{name}_sha256": _sha256(split) for name, split in splits.items()}


def value_ends(split: StoredSplit) -> Ends:
    """Return the lowest and highest pixel value in a split, per channel."""
    if isinstance(split, FileSplit):
        return (0.0,) * 3, (255.0,) * 3
    if isinstance(split, DrawnSplit):
        return split.ends
    return tuple(split.images.amin((0, 2, 3)).tolist()), tuple(split.images.amax((0, 2, 3)).tolist())


def _sha256(split: StoredSplit) -> str:
    digest = hashlib.sha256()
    if isinstance(split, FileSplit):
        digest.update("\0".join(split.names).encode(errors="surrogateescape"))
    if isinstance(split, DrawnSplit):
        digest.update(b"".join(split.digests))
    for tensor in (split.images, split.labels) if isinstance(split, Split) else (split.labels,):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for part in torch.split(tensor, HASHED):  # images in channels_last are copied into the order (N, C, H, W)
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def evenly_spaced(count: int, images: int) -> Tensor:
    """Return `count` indices, ascending and evenly spaced among those of `images` images."""
    return torch.arange(count) * images // max(count, 1)


def few_images(data: Dataset, train: int, others: int) -> Dataset:
    """Return a smaller data set, with at most `train` training images and at most `others` images in each other split.

    The selected images are evenly spaced in each split. If a split is sorted by class, the selection therefore still
    contains several classes.
    """

    def few(split: StoredSplit, most: int) -> StoredSplit:
        return split.take(evenly_spaced(min(most, len(split)), len(split)))

    return replace(data, train=few(data.train, train), val=few(data.val, others), test=few(data.test, others))


def split_validation(split: AnySplit, val: float, *, in_place: bool = False) -> tuple[AnySplit, AnySplit]:
    """Divide a training split into (train, val), stratified by class.

    Equal arguments give equal results.

    Args:
        split: the training split.
        val: fraction of the images that becomes the validation split, 0 <= val < 1.
        in_place: whether images in memory are reordered instead of copied. The given split must not be used afterwards.

    Raises:
        ValueError: the training split would be empty, or `val` is above 0 and the validation split would be empty.
    """
    if not 0 <= val < 1:
        raise ValueError(f"val={val}: must be a fraction of the training images, from 0 to below 1")
    in_val = stratified_share(split.labels, val)
    train_index, val_index = torch.arange(len(split))[~in_val], torch.arange(len(split))[in_val]
    if not len(train_index) or (val and not len(val_index)):
        where = "to train on" if not len(train_index) else "to validate on"
        raise ValueError(f"val={val} leaves no images {where} out of {len(split)}; try val={0.1 if val != 0.1 else 0}")
    if in_place and isinstance(split, Split):
        return split.divide_(train_index, val_index)  # type: ignore[return-value]  # of the same kind
    return split.take(train_index), split.take(val_index)  # type: ignore[return-value]  # of the same kind


def stratified_share(labels: Tensor, share: float) -> Tensor:
    """Return a mask (N,) that selects the fraction `share` of the images of each class, the same in every call."""
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    chosen, in_order = torch.zeros(len(labels), dtype=torch.bool), labels[order]
    for label in range(int(labels.max()) + 1 if len(labels) else 0):
        members = order[in_order == label]
        chosen[members[: round(share * len(members))]] = True
    return chosen
