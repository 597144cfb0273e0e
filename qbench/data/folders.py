"""Images in one folder a class: finding them, and the data set that they make, in memory or streaming."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Files, Split, split_validation
from qbench.data.file_check import THREADS, FileCheck, survey
from qbench.data.images import Bytes, damaged, decoded, reason
from qbench.data.normalize import statistics
from qbench.errors import DataError, ResourceError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What counts as an image, in small letters: torchvision's list for ImageFolder."""

MEMORY = 2**31
"""Bytes of images that are kept in memory, at most: 2 GiB. Fixed, so that a set behaves alike on every machine."""

SAMPLE = 1000
"""Images of a streaming set whose mean and deviation `normalize=own` stands for, evenly spaced."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files: names below the root, in order, a label each, and how many files were passed over."""

    names: tuple[str, ...]
    labels: tuple[int, ...]
    ignored: int = 0


def classes_in(folder: Path) -> list[str]:
    """Return the class folders' names, sorted; hidden ones are none.

    Raises:
        DataError: there are none, or no such folder.
    """
    top = folder.parent
    if not folder.is_dir():
        raise _layout(top, f"{folder}: no such folder; {top} holds {_held(top)}")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise _layout(top, f"{folder} holds no folders, but {_held(folder)}")
    return found


def find_images(root: Path, part: str, classes: Sequence[str]) -> ImageFiles:
    """Return the images below root/part/CLASS, at any depth; their suffixes say which files are images.

    Raises:
        DataError: class folders without an image, where `part` is train; else none at all, or of an unknown class.
    """
    own = classes_in(root / part)
    if unknown := sorted(set(own) - set(classes)):
        raise _layout(root, f"{root / part}: no class of train is called {_some(unknown)}")
    names: list[str] = []
    labels: list[int] = []
    ignored = sum(not entry.is_dir() for entry in os.scandir(root / part))
    empty = []
    for label, name in enumerate(classes):
        images, others = _images_below(root, f"{part}/{name}") if name in own else ([], 0)
        names, labels, ignored = names + images, labels + [label] * len(images), ignored + others
        empty += [] if images else [name]
    if empty and (part == "train" or not names):
        raise _layout(root, f"{len(empty)} class folders of {root / part} hold no images: {_some(empty)}")
    return ImageFiles(tuple(names), tuple(labels), ignored)


def evaluated_part(root: Path, part: str) -> str:
    """Return the folder of the test images: what was asked for, else val or test, whichever is there.

    Raises:
        DataError: neither is there, or both.
    """
    if part != "auto":
        return part
    there = [name for name in ("val", "test") if (root / name).is_dir()]
    if len(there) == 2:
        raise DataError(
            f"{root} holds val/ and test/\ntype dataset.test=val or dataset.test=test: the other is not read"
        )
    if not there:
        raise _layout(root, f"{root} holds neither val/ nor test/, but {_held(root)}")
    return there[0]


def assembled_from_files(
    name: str, root: Path, train: ImageFiles, test: ImageFiles, *, classes: int, val: float, side: int,
    augment: Augment, normalize: str, shape: tuple[int, int] | None = None,
) -> Dataset:  # fmt: skip
    """Return the data set of image files; images all alike that fit into memory are kept there.

    Args:
        side: what the shorter side is resized to.
        shape: (H, W) that all images must have; such a set is kept in memory, however large.

    Raises:
        DataError: files that are no whole images: all of them are named.
        ValueError: `side`, `val` or the augmentation out of range.
    """
    if not 1 <= augment.size <= side:
        raise ValueError(f"size={augment.size}: allowed is 1 to resize={side} pixels")
    if not 0 <= augment.pad < augment.size:
        raise ValueError(f"pad={augment.pad}: allowed are 0 to {augment.size - 1} pixels")
    looked = survey(str(root), [*train.names, *test.names])
    stored = shape or _shape(looked, side, augment)
    make: Callable[[ImageFiles], Split | Files]
    if stored:
        make = lambda found: _in_memory(root, found, side, stored)  # noqa: E731
    else:
        make = lambda found: Files(str(root), found.names, torch.tensor(found.labels), side)  # noqa: E731
    whole, tested = make(train), make(test)
    kept, held = split_validation(whole, val)
    mean, std = statistics(normalize, _sample(kept) if normalize == "own" else torch.empty(0, 3, 1, 1))
    facts = looked.facts() | {"files_ignored": train.ignored + test.ignored}
    return Dataset(
        name=name, train=kept, val=held, test=tested, classes=classes, mean=mean, std=std, augment=augment, files=facts
    )  # fmt: skip


def _shape(looked: FileCheck, side: int, augment: Augment) -> tuple[int, int] | None:
    """Return (H, W) of the resized images if all are alike and fit into memory."""
    height, width = looked.height, looked.width
    if not height or augment.area:
        return None
    short, long = sorted((height, width))
    long = int(side * long / short)
    if looked.count * side * long * 3 > MEMORY:
        return None
    return (side, long) if height <= width else (long, side)


def _in_memory(root: Path, found: ImageFiles, side: int, shape: tuple[int, int]) -> Split:
    """Decode all images, each (H, W) after resizing."""
    images, bad = torch.empty(len(found.names), *shape, 3, dtype=torch.uint8), []

    def read(i: int) -> tuple[str, str] | None:
        try:
            image: Bytes = decoded(root / found.names[i], side)
            if image.shape[:2] != shape:
                height, width = image.shape[:2]
                return found.names[i], f"{height}x{width} pixels, expected {shape[0]}x{shape[1]}"
            images[i] = torch.from_numpy(image)
        except Exception as error:  # whatever PIL raises for damaged files
            return found.names[i], reason(error)
        return None

    with ThreadPool(THREADS) as pool:  # PIL decodes without Python's lock
        bad = [one for one in pool.imap(read, range(len(images)), chunksize=16) if one]
    if bad:
        raise damaged(bad, len(images), str(root))
    return Split(images.movedim(3, 1), torch.tensor(found.labels))


def _sample(split: Split | Files) -> Tensor:
    """Return images to take statistics of: those in memory, else the pixels of some, (1, 3, 1, pixels)."""
    if isinstance(split, Split):
        return split.images
    chosen = torch.arange(0, len(split), max(1, len(split) // SAMPLE))[:SAMPLE]

    def read(path: str) -> Bytes | tuple[str, str]:
        try:
            return decoded(path, split.side)
        except Exception as error:
            return os.path.relpath(path, split.root), reason(error)

    with ThreadPool(THREADS) as pool:
        found = list(pool.imap(read, split.paths(chosen), chunksize=16))
    if bad := [one for one in found if isinstance(one, tuple)]:
        raise damaged(bad, len(found), split.root)
    pixels = np.concatenate([one.reshape(-1, 3) for one in found if not isinstance(one, tuple)])
    return torch.from_numpy(pixels).T[None, :, None, :]


def _images_below(root: Path, folder: str) -> tuple[list[str], int]:
    """Return the names of the images below root/folder, sorted, and the number of other files."""
    found, others = [], 0
    for path, folders, files in os.walk(root / folder, onerror=_refused, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        others += len(files) - len(images)
        found += [os.path.relpath(os.path.join(path, name), root) for name in images]
    return sorted(found), others


def _refused(error: OSError) -> None:
    raise ResourceError(f"{error.filename}: {error.strerror}")


def _layout(root: Path, found: str) -> DataError:
    return DataError(
        f"{found}\nexpected: train/CLASS/*.jpg and val/CLASS/*.jpg, or test/CLASS/*.jpg, in {root}, a folder a class\n"
        f"type dataset.root=DIR, the folder that holds train/"
    )


def _held(folder: Path) -> str:
    """Return what a folder holds, in a few words."""
    if not folder.is_dir():
        return "nothing: it is not there"
    entries = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder))
    return _some(entries) if entries else "nothing"


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
