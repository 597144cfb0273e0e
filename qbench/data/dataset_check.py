"""Checks the values of data sets, including those of users."""

import math
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from qbench.data.dataset import Dataset, Split, StoredSplit
from qbench.data.drawn_split import DrawnSplit
from qbench.data.file_stream import decoded_batches
from qbench.errors import DataError

MAX_NAMED = 5
"""Maximum number of classes in a note."""

EXPECTED = 10
"""A missing class has a note if, by its share in train, the split should have at least this many of its images."""

SAMPLED, MIN_SAMPLED = 256, 8
"""Largest and smallest number of images of a split whose grey values are compared with those of train."""

MAX_SHIFT, STANDARD_ERRORS = 0.25, 5.0
"""Limits on the difference in grey values between splits, in standard deviations of train and in standard errors."""

CHECKED = 1000
"""Number of images whose lowest and highest value are computed at once."""

MAX_READ_BYTES = 2**32
"""Maximum size in bytes of the files of a split that are read to compare its images."""


def check_dataset(data: Dataset, name: str) -> None:
    """Refuse a data set whose labels, images or normalization cannot be right.

    `name` is the value of `dataset`, for the message.

    Raises:
        DataError: the message says what was found and what is allowed.
    """
    for problem in _problems(data):
        raise DataError(f"dataset={name}: {problem}")


def _problems(data: Dataset) -> Iterator[str]:
    """Yield the problems of a data set. Only the first is reliable, because later checks rely on earlier ones."""
    if type(data.classes) is not int or data.classes < 2:
        yield f"classes={data.classes!r}: must be an int from 2 on"
    splits = {"train": data.train, "val": data.val, "test": data.test}
    typed: dict[str, object] = {**splits}  # a user's function may have returned anything
    for part, value in typed.items():
        if not isinstance(value, StoredSplit):
            yield f"{part} is a {type(value).__name__}: must be a Split or a FileSplit"
    if not len(data.train):
        yield "train has no images"
    for part, split in splits.items():
        if len(split):
            yield from (f"{part}: {problem}" for problem in _label_problems(split.labels, data.classes))
            yield from (f"{part}: {problem}" for problem in _image_problems(split, data))
    if data.train.labels.min() == data.train.labels.max():
        yield f"train: all labels are {int(data.train.labels[0])}: must be of two or more classes"
    yield from _constant_problems(data)


def _label_problems(labels: Tensor, classes: int) -> Iterator[str]:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        from_one = "\nto start at 0: labels - 1" if low == 1 and high == classes else ""
        yield f"labels are {low} to {high}: must be 0 to {classes - 1}{from_one}"


def _image_problems(split: StoredSplit, data: Dataset) -> Iterator[str]:
    if split.dtype != data.train.dtype:
        yield f"images are {split.dtype}, those of train are {data.train.dtype}: must be equal"
    if isinstance(split, Split):
        yield from _value_problems(split.images)
    shape, expected, crop = split.shape, data.train.shape, data.augment.size
    if shape[0] != expected[0] or (not crop and shape != expected):
        yield f"images are {shape}, those of train are {expected}: must be equal"
    if split.dtype != torch.uint8 and data.augment.changes_colours:
        yield "augment: brightness, contrast and jitter are for uint8 images; these images are float"
    if crop and min(shape[1:]) < crop:
        yield f"images are {shape}: must be at least {crop} x {crop} pixels, the size of a crop"


def _value_problems(images: Tensor) -> Iterator[str]:
    # torch may copy what it reduces, so only a part of the images is reduced at once
    ends = torch.stack([torch.stack(part.aminmax()) for part in torch.split(images, CHECKED)])
    low, high = ends[:, 0].min().item(), ends[:, 1].max().item()
    if images.dtype == torch.uint8:
        if high <= 1:
            yield f"no value of the images is above {high}: must be 0 to 255\nfor images from 0 to 1: 255 * images"
    elif not math.isfinite(high - low):  # also false for NaN
        yield "the images contain inf or nan"
    elif low >= 0 and 1 < high <= 255 and bool((images == images.round()).all()):
        yield (
            f"the float images are whole numbers from {low:g} to {high:g}, which are not normalized\n"
            "return them as 8-bit images: images.to(torch.uint8), in NumPy images.astype('uint8')"
        )


def _constant_problems(data: Dataset) -> Iterator[str]:
    channels = data.train.shape[0]
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != channels:
            yield f"{key}={values}: must be {channels} numbers, one per channel"
    if not all(math.isfinite(x) and (0 <= x <= 1 or data.white == 1) for x in data.mean):
        yield f"mean={data.mean}: must be 0 to 1, for images scaled to 0 to 1"
    if not all(0 < x < math.inf for x in data.std):
        yield f"std={data.std}: must be above 0, for images scaled to 0 to 1"


@lru_cache(maxsize=2)
def dataset_notes(data: Dataset) -> tuple[str, ...]:
    """Return notes on a data set whose accuracy does not mean what a reader expects.

    All images are read, so runs of one process that share a data set share its notes.
    """
    return (
        *filter(None, [data.note]),
        *repeated_images(data),
        *unseen_classes(data),
        *missing_classes(data),
        *other_scale(data),
    )


def unseen_classes(data: Dataset) -> list[str]:
    """Return in words how many validation and test images are of classes without a training image."""
    trained = set(data.train.labels.tolist())
    notes = []
    for part, split in (("val", data.val), ("test", data.test)):
        unseen = [label for label in split.labels.tolist() if label not in trained]
        if unseen:
            classes = sorted(set(unseen))
            named = ", ".join(map(str, classes[:MAX_NAMED])) + (", ..." if len(classes) > MAX_NAMED else "")
            notes.append(
                f"{len(unseen):,} of {len(split):,} {part} images are of classes without a training image ({named})"
            )
    return notes


def missing_classes(data: Dataset) -> list[str]:
    """Return in words which classes no image is of, and which are missing among the validation and test images."""
    shares = data.train.labels.bincount(minlength=data.classes) / len(data.train)
    seen = torch.cat([data.train.labels, data.val.labels, data.test.labels]).bincount(minlength=data.classes)
    absent = (seen == 0).nonzero().flatten().tolist()
    notes = [f"no image is of {_of_classes(absent, data)}"] if absent else []
    for part, split in (("val", data.val), ("test", data.test)):
        counts = split.labels.bincount(minlength=data.classes)
        missing = ((counts == 0) & (shares * len(split) >= EXPECTED)).nonzero().flatten().tolist()
        if len(split) > 1 and int(counts.max()) == len(split):
            notes.append(f"all {len(split):,} {part} images are of class {int(counts.argmax())}")
        elif missing:
            notes.append(f"no {part} image is of {_of_classes(missing, data)}")
    return notes


def _of_classes(missing: list[int], data: Dataset) -> str:
    named = ", ".join(map(str, missing[:MAX_NAMED])) + (", ..." if len(missing) > MAX_NAMED else "")
    return f"{len(missing)} of the {data.classes} classes ({named})"


def other_scale(data: Dataset) -> list[str]:
    """Return in words which splits have other grey values than train, for example because they were scaled otherwise.

    The mean and the standard deviation of an image are compared, each averaged over a sample.
    """
    train = _grey_values(data.train, data)
    spread = (train[:, 1].square().mean() + train[:, 0].var(unbiased=False)).sqrt()  # of all pixels
    notes = []
    for part, split in (("val", data.val), ("test", data.test)):
        own = _grey_values(split, data)
        if min(len(own), len(train)) < MIN_SAMPLED:
            continue
        error = (own.var(0) / len(own) + train.var(0) / len(train)).sqrt()
        difference = (own.mean(0) - train.mean(0)).abs()
        if (difference > torch.maximum(MAX_SHIFT * spread, STANDARD_ERRORS * error)).any():
            digits = ".0f" if data.white == 255 else ".2f"
            mean, std, *of_train = (f"{value:{digits}}" for value in (*own.mean(0).tolist(), *train.mean(0).tolist()))
            notes.append(
                f"{part} images have other grey values than those of train: mean {mean} and standard deviation "
                f"{std} of an image, instead of {' and '.join(of_train)}"
            )
    return notes


def _grey_values(split: StoredSplit, data: Dataset) -> Tensor:
    """Return the mean and the standard deviation of each image of a sample, (n, 2), in grey values."""
    count = min(len(split), SAMPLED)
    if not count:
        return torch.empty(0, 2)
    index = torch.linspace(0, len(split) - 1, count).long()
    if isinstance(split, Split):
        images = split.images[index]
    elif isinstance(split, DrawnSplit):
        images = split.read(index, None)
    else:
        (images,) = decoded_batches(split, [index], None, data.augment, 0, torch.device("cpu"))
    values = images.reshape(count, -1).float()
    return torch.stack([values.mean(1), values.std(1, unbiased=False)], 1)


def repeated_images(data: Dataset) -> list[str]:
    """Return in words how many test and validation images are also images of an earlier split.

    Images in memory are compared by all their values, and files by their content. A split of more
    than 4 GiB of files is not compared.
    """
    seen: set[bytes] = set()
    notes = []
    for part, split, earlier in (
        ("train", data.train, ""),
        ("val", data.val, "of train"),
        ("test", data.test, "of train or val"),
    ):
        digests = _digests(split)
        repeated = sum(digest in seen for digest in digests)
        seen.update(digests)
        if earlier and repeated:
            notes.append(
                f"{repeated:,} of {len(digests):,} {part} images are also images {earlier}, so accuracy on {part} is "
                "not that on unseen images"
            )
    return notes


def _digests(split: StoredSplit) -> list[bytes]:
    """Return the digest of each image; an empty list if the files are too many to read."""
    if isinstance(split, DrawnSplit):
        return list(split.digests)
    if isinstance(split, Split):
        return [sha256(image.contiguous().numpy().data).digest() for image in split.images]
    paths = [Path(split.root, name) for name in split.names]
    if sum(path.stat().st_size for path in paths) > MAX_READ_BYTES:
        return []
    return [sha256(path.read_bytes()).digest() for path in paths]
