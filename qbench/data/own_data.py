"""Turns what a user's function returns into a data set: tensors, arrays of NumPy, or torch data sets.

The function returns (train, test) or (train, val, test). Each part is (images, labels), or a map-style torch data set
of (image, label). Without a validation part, a share of the training images becomes the validation split.

Images uint8 are normalized by the mean and standard deviation of the training images. Float images are used as they
are, because a transform has normalized them already.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from qbench.data.dataset import Dataset, Split, split_validation
from qbench.data.drawn_split import DrawnSplit, MapDataset, own_random_state, read_item, seed_cpu, seem_channels_last
from qbench.data.normalize import MeanAndStd, mean_and_std
from qbench.errors import DataError

MAX_MEMORY = 2**32
"""Maximum size in bytes of a split of a torch data set that is kept in memory. Larger splits are read every epoch."""

STATISTICS_IMAGES = 1000
"""Number of images from which mean and standard deviation are computed, if the images are read in every epoch."""

COMPARED = 256
"""Largest number of images that are read twice with the same seeds. A transform may change a few images only."""

FORMS = "expected: a Dataset, or (train, test) or (train, val, test), each of them (images, labels) or a torch data set"


def has_validation(returned: object) -> bool:
    """Return whether a function has returned a validation split."""
    return isinstance(returned, Dataset) or (isinstance(returned, tuple | list) and len(returned) == 3)


def as_dataset(name: str, returned: object, val: float) -> Dataset:
    """Return the data set that a user's function has returned in one of several forms.

    Args:
        val: share of the training images in the validation split, if the function has not returned one.

    Raises:
        DataError: the function has returned something else. The message shows the expected forms.
        ValueError: `val` is out of range.
    """
    if isinstance(returned, Dataset):
        return returned
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3) or any(map(_is_array, returned)):
        raise DataError(f"returned {_in_words(returned)}\n{FORMS}")
    names = ("train", "test") if len(returned) == 2 else ("train", "val", "test")
    parts = {part: _split(part, value) for part, value in zip(names, returned, strict=True)}
    train, test = parts["train"], parts["test"]
    classes = int(train.labels.max()) + 1 if len(train) else 0
    _check_first_label(parts)
    if "val" in parts:
        validation = parts["val"]
    else:
        train, validation = split_validation(train, val)
    mean, std = _normalization(train)
    return Dataset(name=name, train=train, val=validation, test=test, classes=classes, mean=mean, std=std)


def _check_first_label(parts: Mapping[str, Split | DrawnSplit]) -> None:
    """Refuse labels that start above 0: the network would have outputs for classes that do not exist."""
    low = min((int(split.labels.min()) for split in parts.values() if len(split)), default=0)
    if low > 0:
        high = max(int(split.labels.max()) for split in parts.values() if len(split))
        raise DataError(f"labels are {low} to {high}: must start at 0\nto start at 0: labels - {low}")


def _split(part: str, value: object) -> Split | DrawnSplit:
    try:
        if isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_array, value)):
            return Split(_tensor(value[0], "images"), _tensor(value[1], "labels"))
        if not isinstance(value, str | tuple | list | Mapping | Tensor | np.ndarray) and isinstance(value, MapDataset):
            return _read(value)
    except DataError as error:
        raise DataError(f"{part}: {error}") from None
    hint = "; of a DataLoader, return its dataset" if isinstance(value, torch.utils.data.DataLoader) else ""
    raise DataError(f"{part} is {_in_words(value)}{hint}\n{FORMS}")


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _tensor(value: object, what: str) -> Tensor:
    """Return an array as a tensor: float images as float32, whole labels as int64, and others as they are."""
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    if what == "images":
        _check_layout(tensor)
        return tensor.float() if tensor.is_floating_point() else tensor
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.long() if whole else tensor


def _check_layout(images: Tensor) -> None:
    """Refuse images without channels, and images whose channels are last."""
    shape = tuple(images.shape)
    if images.dim() == 3:
        raise DataError(f"images are {shape}: must be (N, C, H, W)\nfor grey images: images[:, None]")
    if images.dim() == 4 and seem_channels_last(shape[1:]):
        fix = "images.permute(0, 3, 1, 2), in NumPy images.transpose(0, 3, 1, 2)"
        raise DataError(
            f"images are {shape}: must be (N, C, H, W)\n"
            f"to move the channels: {fix}; if they are right, return a Dataset"
        )


def _read(source: MapDataset) -> Split | DrawnSplit:
    """Return the split of a torch data set, in memory unless a transform is random or the images are too large.

    A transform is random if it takes numbers from the generators of torch, NumPy or Python.
    """
    if not len(source):
        raise DataError("contains no images")
    with own_random_state():
        _check_repeatable(source)
        first, _ = read_item(source, 0, 0)
        in_memory = first.numel() * first.element_size() * len(source) <= MAX_MEMORY
        seed_cpu(0)
        before = _generators()
        images = first.new_empty((len(source) if in_memory else 0, *first.shape))
        labels = []
        for place, (image, label) in enumerate(_items(source, first, seeded=False)):
            labels.append(label)
            if in_memory:
                images[place] = image
        if in_memory and _generators() == before:
            return Split(images, torch.tensor(labels))
        return _drawn(source, first, labels)


def _drawn(source: MapDataset, first: Tensor, labels: list[int]) -> DrawnSplit:
    """Return the split of a torch data set that is read in every epoch."""
    digests = []
    low, high = first.flatten(1).amin(1), first.flatten(1).amax(1)
    for image, _ in _items(source, first, seeded=True):
        digests.append(hashlib.sha256(image.contiguous().numpy().data).digest())
        low, high = low.minimum(image.flatten(1).amin(1)), high.maximum(image.flatten(1).amax(1))
    ends = tuple(low.tolist()), tuple(high.tolist())
    return DrawnSplit(source, torch.arange(len(labels)), torch.tensor(labels), first[None], tuple(digests), ends)


def _items(source: MapDataset, first: Tensor, *, seeded: bool) -> Iterator[tuple[Tensor, int]]:
    """Yield the images and labels of a torch data set. All images must have the shape and type of `first`."""
    for place in range(len(source)):
        image, label = read_item(source, place, place if seeded else None)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise DataError(
                f"image {place} is {image.dtype} {tuple(image.shape)}, image 0 is {first.dtype} {tuple(first.shape)}: "
                "must be equal\nadd to the transform: Resize and CenterCrop of one size"
            )
        yield image, label


def _check_repeatable(source: MapDataset) -> None:
    """Refuse a transform with a random generator of its own, because no run could be repeated or continued."""
    count = min(len(source), COMPARED)
    for place in (i * len(source) // count for i in range(count)):  # evenly spaced
        images = [read_item(source, place, place)[0] for _ in range(2)]
        if images[0].shape != images[1].shape or not bool(((images[0] == images[1]) | (images[0] != images[0])).all()):
            raise DataError(
                f"image {place} changes whenever it is read, even if torch, NumPy and Python have the same seed\n"
                "draw random numbers from torch's generator, so that a run can be repeated"
            )


def _generators() -> tuple[object, ...]:
    """Return the states of the generators of the CPU, to compare them."""
    _, keys, position, *_ = np.random.get_state()
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        np.asarray(keys).tobytes(),
        position,
        random.getstate(),
    )


def _normalization(train: Split | DrawnSplit) -> MeanAndStd:
    """Return the mean and standard deviation of uint8 images. For float images, return 0 and 1 per channel."""
    channels = train.shape[0]
    if train.dtype != torch.uint8:
        return (0.0,) * channels, (1.0,) * channels
    if isinstance(train, Split):
        return mean_and_std(train.images)
    chosen = torch.arange(0, len(train), max(1, len(train) // STATISTICS_IMAGES))[:STATISTICS_IMAGES]
    return mean_and_std(train.read(chosen, None))


def _in_words(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(one).__name__ for one in value)}"[:100]
    return f"a {type(value).__name__}"
