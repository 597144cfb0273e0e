"""Checks the labels, images and normalization of data sets, including users' own data sets."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qbench.data.dataset import Dataset, Split, StoredSplit
from qbench.data.drawn_split import DrawnSplit
from qbench.data.file_stream import FileSplit, decoded_batches
from qbench.errors import DataError

MAX_NAMED = 5
"""Maximum number of classes that a message names."""

EXPECTED = 10
"""A class without images in a split is reported if at least this many images were expected.

The expected number is the size of the split times the fraction of training images in this class.
"""

SAMPLED, MIN_SAMPLED = 256, 8
"""Grey values of two splits are compared on samples of at most 256 images. With fewer than 8, they are not compared."""

MAX_SHIFT, STANDARD_ERRORS = 0.25, 5.0
"""Two limits for the difference of grey values between splits. A difference above both limits is reported.

The first limit is in standard deviations of all training pixels. The second limit is in standard errors of the
difference.
"""

CHECKED = 1000
"""Number of images whose lowest and highest value are computed at once."""

MAX_READ_BYTES = 2**32
"""Maximum total size in bytes of a split's image files for the search for repeated images."""


def check_dataset(data: Dataset, name: str) -> None:
    """Raise `DataError` if the labels, images or normalization of a data set are invalid.

    `name` is the value of `dataset` and appears in the message.

    Raises:
        DataError: a check failed. The message says what was found and what is allowed.
    """
    for problem in _problems(data):
        raise DataError(f"dataset={name}: {problem}")


def _problems(data: Dataset) -> Iterator[str]:
    """Yield the problems of a data set. Use only the first problem: later checks assume that earlier checks passed."""
    if type(data.classes) is not int or data.classes < 2:
        yield f"classes={data.classes!r}: must be an integer of 2 or more"
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
        yield f"train: all labels are {int(data.train.labels[0])}: there must be two or more classes"
    yield from _constant_problems(data)


def _label_problems(labels: Tensor, classes: int) -> Iterator[str]:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        from_one = "\nto convert: labels - 1" if low == 1 and high == classes else ""
        yield f"labels are {low} to {high}: must be 0 to {classes - 1}{from_one}"


def _image_problems(split: StoredSplit, data: Dataset) -> Iterator[str]:
    if split.dtype != data.train.dtype:
        yield f"images are {split.dtype}, but train images are {data.train.dtype}: must be equal"
    if isinstance(split, Split):
        if data.augment.area:
            yield "augment: area is for a FileSplit; images in memory are cropped by size and pad"
        yield from _value_problems(split.images, scaled=any(std != 1 for std in data.std))
    elif data.augment.replicate:
        yield "augment: replicate is for images in memory; a FileSplit is padded with black"
    shape, expected, crop = split.shape, data.train.shape, data.augment.size
    if shape[0] != expected[0] or (not crop and shape != expected):
        yield f"images are {shape}, but train images are {expected}: must be equal"
    if split.dtype != torch.uint8 and data.augment.changes_colours:
        yield "augment: brightness, contrast and jitter are for uint8 images; these images are float"
    if crop and min(shape[1:]) < crop:
        yield f"images are {shape}: must be at least {crop} x {crop} pixels, the size of a crop"


def _value_problems(images: Tensor, *, scaled: bool) -> Iterator[str]:
    """Yield what is wrong with pixel values. `scaled` says whether the data set has a deviation to divide by."""
    # torch may copy what it reduces, so only a part of the images is reduced at once
    ends = torch.stack([torch.stack(part.aminmax()) for part in torch.split(images, CHECKED)])
    low, high = ends[:, 0].min().item(), ends[:, 1].max().item()
    if images.dtype == torch.uint8:
        if high <= 1:
            yield f"the largest pixel value is {high}: must be 0 to 255\nto convert images from 0 to 1: 255 * images"
    elif not math.isfinite(high - low):  # also false for NaN
        yield "the images contain inf or nan"
    elif not scaled and low >= 0 and 1 < high <= 255 and bool((images == images.round()).all()):
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
    """Return warnings about problems of a data set that make its accuracies misleading.

    The function reads all images. Its result is therefore cached for later runs in the same process.
    """
    return (
        *filter(None, [data.note]),
        *repeated_images(data),
        *unseen_classes(data),
        *missing_classes(data),
        *other_scale(data),
    )


def unseen_classes(data: Dataset) -> list[str]:
    """Return messages about validation and test images of classes without training images, at most one per split."""
    trained = set(data.train.labels.tolist())
    notes = []
    for part, split in (("val", data.val), ("test", data.test)):
        unseen = [label for label in split.labels.tolist() if label not in trained]
        if unseen:
            classes = sorted(set(unseen))
            named = ", ".join(map(str, classes[:MAX_NAMED])) + (", ..." if len(classes) > MAX_NAMED else "")
            notes.append(
                f"{len(unseen):,} of {len(split):,} {part} images belong to classes without a training image ({named})"
            )
    return notes


def missing_classes(data: Dataset) -> list[str]:
    """Return messages that name classes without any image, and classes without validation or test images."""
    shares = data.train.labels.bincount(minlength=data.classes) / len(data.train)
    seen = torch.cat([data.train.labels, data.val.labels, data.test.labels]).bincount(minlength=data.classes)
    absent = (seen == 0).nonzero().flatten().tolist()
    notes = [f"{_of_classes(absent, data)} have no images"] if absent else []
    for part, split in (("val", data.val), ("test", data.test)):
        counts = split.labels.bincount(minlength=data.classes)
        missing = ((counts == 0) & (shares * len(split) >= EXPECTED)).nonzero().flatten().tolist()
        if len(split) > 1 and int(counts.max()) == len(split):
            notes.append(f"all {len(split):,} {part} images belong to class {int(counts.argmax())}")
        elif missing:
            notes.append(f"{_of_classes(missing, data)} have no {part} images")
    return notes


def _of_classes(missing: list[int], data: Dataset) -> str:
    named = ", ".join(map(str, missing[:MAX_NAMED])) + (", ..." if len(missing) > MAX_NAMED else "")
    return f"{len(missing)} of the {data.classes} classes ({named})"


def other_scale(data: Dataset) -> list[str]:
    """Return messages that name splits whose grey values differ from the training images.

    Such a difference arises, for example, if the images of one split were scaled by another factor. The function
    computes the mean and the standard deviation of each image in a sample, and compares the averages over the sample.
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
                f"{part} images have other grey values than train images: on average, an image has mean {mean} and "
                f"standard deviation {std}, but {' and '.join(of_train)} in train"
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
    """Return messages about validation and test images that an earlier split also contains, at most one per split.

    The order of the splits is train, val, test. Each message states the number of repeated images.

    Images in memory are equal if all their values are equal. If all splits are in files, images are equal if their
    files have the same bytes. Splits with more than 4 GiB of files are not checked.
    """
    seen: set[bytes] = set()
    notes = []
    of_splits = _digests((data.train, data.val, data.test))
    for part, digests, earlier in zip(("train", "val", "test"), of_splits, ("", "train", "train or val"), strict=True):
        repeated = sum(digest in seen for digest in digests)
        seen.update(digests)
        if earlier and repeated:
            notes.append(
                f"{repeated:,} of {len(digests):,} {part} images are also in {earlier}, so accuracy on {part} is "
                "not accuracy on unseen images"
            )
    return notes


def other_class_names(class_names: Sequence[str], tested: Dataset, advice: str = "") -> list[str]:
    """Return a message if classes of a network have other names in a data set, or an empty list.

    Args:
        class_names: the names of the network's classes, or an empty sequence if they are not known.
        tested: the data set on whose test split the network is evaluated.
        advice: a text at the end of the message.
    """
    pairs = enumerate(zip(class_names, tested.class_names, strict=False))
    differing = [f"class {label} is {there}, here {here}" for label, (there, here) in pairs if there != here]
    if not differing:
        return []
    named = "; ".join(differing[:MAX_NAMED]) + ("; ..." if len(differing) > MAX_NAMED else "")
    return [
        f"{len(differing)} of {tested.classes} classes have other names than in training ({named}); if they are other "
        f"classes, the accuracy of the trained network means nothing here{advice}"
    ]


def trained_images(trained: Dataset, tested: Dataset) -> list[str]:
    """Return a message if test images of one data set are training or validation images of another, or an empty list.

    Args:
        trained: the data set on which a network was trained.
        tested: the data set on whose test split the network is evaluated.
    """
    train, val, digests = _digests((trained.train, trained.val, tested.test))
    seen = {*train, *val}
    repeated = sum(digest in seen for digest in digests)
    if not repeated:
        return []
    return [
        f"the network was trained or selected on {repeated:,} of these {len(digests):,} test images, so this accuracy "
        "is not accuracy on unseen images"
    ]


def _digests(splits: Sequence[StoredSplit]) -> list[list[bytes]]:
    """Return the digest of each image of some splits. The list is empty for files that are too large to be read.

    The digests are of the files' bytes if the images of all splits are in files, and of the pixels otherwise.
    """
    decoded = not all(isinstance(split, FileSplit) for split in splits)
    return [_split_digests(split, decoded) for split in splits]


def _split_digests(split: StoredSplit, decoded: bool) -> list[bytes]:
    if isinstance(split, DrawnSplit):
        return list(split.digests)
    if isinstance(split, Split):
        return [sha256(image.contiguous().numpy().data).digest() for image in split.images]
    paths = [Path(split.root, name) for name in split.names]
    if sum(path.stat().st_size for path in paths) > MAX_READ_BYTES:
        return []
    if not decoded:
        return [sha256(path.read_bytes()).digest() for path in paths]
    from qbench.data.images import decode_image  # late: not all runs need PIL

    images = (decode_image(path, split.side).transpose(2, 0, 1) for path in paths)  # in the order of a split in memory
    return [sha256(np.ascontiguousarray(image).data).digest() for image in images]
