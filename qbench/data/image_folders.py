"""Finds images in folders, one folder per class, and builds a data set from them.

The images are kept in memory, or they are read from their files when they are needed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split, evenly_spaced, split_validation, stratified_share
from qbench.data.file_check import THREADS, FileCheck, check_files
from qbench.data.file_stream import FileSplit
from qbench.data.image_cache import ImageCache, open_cache
from qbench.data.images import Pixels, damaged_files_error, decode_image, describe_error
from qbench.data.normalize import Normalize, normalization
from qbench.errors import DataError, ResourceError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, in lower case, as in torchvision's ImageFolder."""

MAX_MEMORY = 2**31
"""Maximum total size in bytes of images that are kept in memory (2 GiB). The limit is the same on every machine."""

STATISTICS_IMAGES = 1000
"""Number of images from which `normalize=own` computes the mean and the standard deviation of streamed images.

These images are evenly spaced in the training split.
"""

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
"""Usual names of folders that contain a split, in lower case."""

FolderId = tuple[int, int]
"""Device and inode of a folder. All paths to one folder have the same device and inode."""


@dataclass(frozen=True)
class ImageFiles:
    """The image files that were found for a split.

    Args:
        names: names of the files below the root, in order.
        labels: the labels of the images.
        ignored: number of files that are not images.
        folders: device and inode -> path, for each folder that was read.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    ignored: int = 0
    folders: Mapping[FolderId, Path] = field(default_factory=dict)


def classes_in(root: Path, part: str) -> list[str]:
    """Return the sorted names of the class folders in root/part. Hidden folders are ignored.

    The part `.` is the root itself.

    Raises:
        DataError: the folder does not exist or contains no folders.
    """
    folder = root / part
    if not folder.is_dir():
        raise _layout_error(
            root, part, f"{folder}: no such folder; {folder.parent} contains {_contents(folder.parent)}"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise _layout_error(root, part, f"{folder} contains no folders; it contains {_contents(folder)}")
    return classes


def classes_of_one_folder(root: Path) -> list[str]:
    """Return the sorted names of the class folders in `root`, which must not be divided into splits.

    Raises:
        DataError: `root` does not exist, contains no folders, or contains folders of splits, such as train.
    """
    classes = classes_in(root, ".")
    if splits := [name for name in classes if name.lower() in SPLIT_NAMES]:
        alone = "train" if "train" in splits else splits[0]
        raise DataError(
            f"{root} contains {_first_names([f'{name}/' for name in splits])}, which are splits and not classes\n"
            f"type dataset.test=auto, or dataset.test=NAME of the test split, or dataset.root={root / alone} to read "
            f"{alone}/"
        )
    return classes


def find_images(root: Path, part: str, classes: Sequence[str], train: ImageFiles | None = None) -> ImageFiles:
    """Return the files below root/part/CLASS, at any depth, that have the suffix of an image format.

    If `part` is `.`, the class folders are in `root` itself. In a search for test images, `train` contains the training
    images that were found before. A folder of training images must not be read again as a folder of test images.

    Raises:
        DataError: no image was found, a class folder of train contains no image, a folder is not in `classes`, or a
            link leads to a folder that was already read.
    """
    folders = classes_in(root, part)
    if unknown := sorted(set(folders) - set(classes)):
        raise _layout_error(
            root, part, f"{root / part}: contains folders that are not classes of train: {_first_names(unknown)}"
        )
    names: list[str] = []
    labels: list[int] = []
    ignored = sum(not entry.is_dir() for entry in os.scandir(root / part))
    empty = []
    known = {_folder_id(root): root} | dict(train.folders if train else {})
    _enter(root / part, known)
    for label, name in enumerate(classes):
        images, others = _images_below(root, f"{part}/{name}", known) if name in folders else ([], 0)
        names, labels, ignored = names + images, labels + [label] * len(images), ignored + others
        empty += [] if images else [name]
    if empty and (part in ("train", ".") or not names):
        raise _layout_error(
            root, part, f"{len(empty)} class folders of {root / part} contain no images: {_first_names(empty)}"
        )
    return ImageFiles(tuple(names), tuple(labels), ignored, known)


def find_test_folder(root: Path, part: str) -> str:
    """Return the name of the folder of test images.

    If `part` is auto, the folder is val or test, whichever exists. Otherwise, the folder is `part` itself.

    Raises:
        DataError: `part` is auto, and either both or none of the folders val and test exist.
    """
    if part != "auto":
        return part
    existing = [name for name in ("val", "test") if (root / name).is_dir()]
    if len(existing) == 2:
        raise DataError(
            f"{root} contains val/ and test/\ntype dataset.test=val or dataset.test=test (the other folder is not read)"
        )
    if not existing:
        raise _layout_error(root, part, f"{root} contains neither val/ nor test/; it contains {_contents(root)}")
    return existing[0]


def hold_out_test(files: ImageFiles, share: float) -> tuple[ImageFiles, ImageFiles]:
    """Divide the images of one folder into (train, test), stratified by class. Equal arguments give equal results.

    Args:
        share: fraction of the images of each class that becomes the test split, above 0 and below 1.

    Raises:
        ValueError: `share` is out of range, a class would have no training image, or there would be no test image.
    """
    if not 0 < share < 1:
        raise ValueError(f"test={share}: must be a fraction of the images, above 0 and below 1")
    in_test = stratified_share(torch.tensor(files.labels), share)
    classes, trained = (
        set(files.labels),
        {y for y, test in zip(files.labels, in_test.tolist(), strict=True) if not test},
    )
    if len(trained) < len(classes) or not in_test.any():
        without = f"{len(classes - trained)} classes without training images" if trained < classes else "no test images"
        raise ValueError(
            f"test={share}: leaves {without}; there are {len(files.labels)} images in {len(classes)} classes"
        )
    train, test = (
        replace(files, names=tuple(files.names[i] for i in places), labels=tuple(files.labels[i] for i in places))
        for places in ((~in_test).nonzero().flatten().tolist(), in_test.nonzero().flatten().tolist())
    )
    return train, replace(test, ignored=0)


def dataset_from_files(
    name: str, root: Path, train: ImageFiles, test: ImageFiles, *, classes: Sequence[str], val: float, side: int,
    augment: Augment, normalize: Normalize, shape: tuple[int, int] | None = None, cache: str = "",
) -> Dataset:  # fmt: skip
    """Return a data set of image files.

    Images are kept in memory if they all have the same size and take at most `MAX_MEMORY` bytes.

    Args:
        classes: names of the classes.
        side: size in pixels to which the shorter side of each image is resized.
        shape: (H, W) that all images must have, or None. If the shape is given, the images are always kept in memory.
        cache: folder in which decoded images are kept (`qbench.data.image_cache`), or '' to keep none. If crops have a
            random area, the images in this folder keep their original size.

    Raises:
        DataError: some files are not complete images. The message names them.
        ValueError: `side`, `val` or the augmentation is out of range.
    """
    if not 1 <= augment.size <= side:
        raise ValueError(f"size={augment.size}: must be 1 to resize={side} pixels")
    if not 0 <= augment.pad < augment.size:
        raise ValueError(f"pad={augment.pad}: must be 0 to {augment.size - 1} pixels")
    check = check_files(str(root), [*train.names, *test.names])
    memory_shape = shape or _common_shape(check, side, augment)

    decoded = None
    if cache:
        stored_side = 0 if augment.area else side
        top = Path(os.path.abspath(os.path.expanduser(cache)))
        decoded = open_cache(top, check.sha256, root, [*train.names, *test.names], stored_side)

    def load(images: ImageFiles, first: int) -> Split | FileSplit:
        if memory_shape:
            return _decode_all(root, images, side, memory_shape, decoded, first)
        split = FileSplit(str(root), images.names, torch.tensor(images.labels), side)
        return split.cached(decoded, first) if decoded else split

    all_train, test_split = load(train, 0), load(test, len(train.names))
    train_split, val_split = split_validation(all_train, val)
    sample = _statistics_images(train_split) if normalize == "own" else torch.empty(0, 3, 1, 1)
    mean, std = normalization(normalize, sample)
    return Dataset(
        name=name, train=train_split, val=val_split, test=test_split, classes=len(classes), mean=mean,
        std=std, augment=augment, files=check.manifest_entries() | {"files_ignored": train.ignored + test.ignored},
        note=_enlargement(check, side, augment.size), class_names=tuple(classes),
    )  # fmt: skip


def _enlargement(check: FileCheck, side: int, size: int) -> str:
    """Return a note if the images are enlarged before they are cropped, else an empty text.

    Images of different sizes get no note.
    """
    if not 0 < min(check.height, check.width) < size:
        return ""
    own = min(check.height, check.width)
    return (
        f"images of {check.height}x{check.width} pixels are enlarged to {side} pixels and cropped to {size}; "
        f"for crops without enlarging: dataset.resize={own} dataset.size={own}"
    )


def _common_shape(check: FileCheck, side: int, augment: Augment) -> tuple[int, int] | None:
    """Return (H, W) of the resized images. Return None if the images differ in size or do not fit into memory."""
    height, width = check.height, check.width
    if not height or augment.area:
        return None
    short, long = sorted((height, width))
    long = int(side * long / short)
    if check.count * side * long * 3 > MAX_MEMORY:
        return None
    return (side, long) if height <= width else (long, side)


def _decode_all(
    root: Path, files: ImageFiles, side: int, shape: tuple[int, int], cache: ImageCache | None, first: int
) -> Split:
    """Decode all images into a split in memory. Each image must have the shape (H, W) after resizing.

    Args:
        cache: cache with the decoded images of all files, or None. The first image of the split is in row `first`.
    """
    images = torch.empty(len(files.names), *shape, 3, dtype=torch.uint8)
    pixels = images.numpy()

    def read(i: int) -> tuple[str, str] | None:
        try:
            image = cache.pixels(first + i) if cache else decode_image(root / files.names[i], side)
            if image.shape[:2] != shape:
                height, width = image.shape[:2]
                return files.names[i], f"{height}x{width} pixels, expected {shape[0]}x{shape[1]}"
            pixels[i] = image
        except Exception as error:  # PIL raises many kinds of errors for damaged files
            return files.names[i], describe_error(error)
        return None

    with ThreadPool(THREADS) as pool:  # threads run in parallel, because PIL releases Python's lock when it decodes
        bad = [failure for failure in pool.imap(read, range(len(images)), chunksize=16) if failure]
    if bad:
        raise damaged_files_error(bad, len(images), str(root))
    return Split(images.movedim(3, 1), torch.tensor(files.labels))


def _statistics_images(split: Split | FileSplit) -> Tensor:
    """Return the images from which the mean and the standard deviation of the data set are computed.

    For a split in memory, these are all images. For a split in files, these are the pixels of `STATISTICS_IMAGES`
    images, in the shape (1, 3, 1, pixels).
    """
    if isinstance(split, Split):
        return split.images
    chosen = evenly_spaced(min(STATISTICS_IMAGES, len(split)), len(split))

    def read(path: str) -> Pixels | tuple[str, str]:
        try:
            return decode_image(path, split.side)
        except Exception as error:
            return os.path.relpath(path, split.root), describe_error(error)

    with ThreadPool(THREADS) as pool:
        results = list(pool.imap(read, split.paths(chosen), chunksize=16))
    if bad := [result for result in results if isinstance(result, tuple)]:
        raise damaged_files_error(bad, len(results), split.root)
    pixels = np.concatenate([image.reshape(-1, 3) for image in results if not isinstance(image, tuple)])
    return torch.from_numpy(pixels).T[None, :, None, :]


def _images_below(root: Path, folder: str, known: dict[FolderId, Path]) -> tuple[list[str], int]:
    """Return the sorted names of the images below root/folder, and the number of files that are not images."""
    names, others = [], 0
    for path, images, file_count in _walk(root / folder, known):
        others += file_count - len(images)
        names += [os.path.relpath(os.path.join(path, name), root) for name in images]
    return sorted(names), others


def _walk(folder: Path, known: dict[FolderId, Path]) -> Iterator[tuple[str, list[str], int]]:
    """Yield `folder` and every visible folder below it, each with the names of its images and its number of files."""
    for path, folders, files in os.walk(folder, onerror=_raise_resource_error, followlinks=True):
        _enter(Path(path), known)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield path, [n for n in files if n.lower().endswith(SUFFIXES) and not n.startswith(".")], len(files)


def _enter(folder: Path, known: dict[FolderId, Path]) -> None:
    """Add a folder to the known folders.

    Raises:
        DataError: the folder is already known under another path, because a link leads to it.
    """
    first = known.setdefault(_folder_id(folder), folder)
    if first != folder:
        raise DataError(
            f"{folder} is the folder {first}, which was already read\n"
            "remove the link: each image must have one label, and no test image may be a training image"
        )


def _folder_id(folder: Path) -> FolderId:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise_resource_error(error: OSError) -> None:
    raise ResourceError(f"{error.filename}: {error.strerror}")


def _layout_error(root: Path, part: str, found: str) -> DataError:
    """Return an error that describes the expected layout: class folders in `root` if `part` is `.`, else splits."""
    suffixes = f"one folder per class; IMAGE ends in {', '.join(SUFFIXES)}"
    if part == ".":
        expected, advice = "CLASS/IMAGE", "type dataset.root=DIR for the folder that contains the folders of classes"
    else:
        expected = "train/CLASS/IMAGE and val/CLASS/IMAGE (or test/CLASS/IMAGE)"
        advice = (
            "type dataset.root=DIR for the folder that contains train/, "
            "or dataset=folder dataset.test=0.2 for a folder that contains CLASS/IMAGE"
        )
    return DataError(f"{found}\nexpected in {root}: {expected}, {suffixes}\n{advice}")


def _contents(folder: Path) -> str:
    """Return a text with the first names in a folder, for a message."""
    if not folder.is_dir():
        return "nothing: it does not exist"
    entries = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder))
    return _first_names(entries) if entries else "nothing"


def _first_names(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
