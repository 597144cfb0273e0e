"""Reads the published files of CIFAR-10 and CIFAR-100 directly into the memory layout that the loader uses.

File names and md5 are those of the Python versions at https://www.cs.toronto.edu/~kriz/cifar.html. torchvision is
imported only for a download.

The files are Python pickles, which can execute code. A file is unpickled only if its md5 is that of the published file.
"""

import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbench.data.dataset import Split
from qbench.data.dataset_files import OTHER_MD5, absolute_root, ensure_files, report_damaged
from qbench.system.torchvision import torchvision

PIXELS = (3, 32, 32)
"""Shape (C, H, W) of an image. A file stores each image as a row of 1024 red, 1024 green and 1024 blue values."""


@dataclass(frozen=True)
class CifarFiles:
    """The files of one data set.

    Args:
        kind: the name of torchvision's class, which downloads the files.
        folder: the folder of the files, below `dataset.root`.
        train, test, names: each maps the files of one part to their md5. The part `names` contains the names of the
            classes.
        labels: the key of the labels in a file.
    """

    kind: str
    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    names: Mapping[str, str]
    labels: bytes


CIFAR10 = CifarFiles(
    kind="CIFAR10",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    names={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    labels=b"labels",
)
CIFAR100 = CifarFiles(
    kind="CIFAR100",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    names={"meta": "7973b15100ade9c7d40fb424638fde48"},
    labels=b"fine_labels",
)


def read_cifar(published: CifarFiles, root: str, download: bool) -> tuple[Split, Split]:
    """Return (train, test) with the images in channels_last.

    Raises:
        DataError: files are missing or damaged, or a download failed.
        ResourceError: the disk is full, or qbench may not write below `root`.
    """
    top = absolute_root(root)
    folder = top / published.folder
    listed = {**published.train, **published.test, **published.names}
    files = {folder / name: md5 for name, md5 in listed.items()}

    def fetch() -> None:
        getattr(torchvision().datasets, published.kind)(top, download=True)

    ensure_files(files, top, download, fetch)
    with report_damaged(files):
        for name, md5 in published.names.items():  # qbench has no use for the names, but a damaged copy is reported
            with _intact(folder / name, md5):
                pass
        return _read(folder, published.train, published.labels), _read(folder, published.test, published.labels)


def _read(folder: Path, part: Mapping[str, str], labels_key: bytes) -> Split:
    """Read the files of a part one after another, into one array of images."""
    channels, height, width = PIXELS
    # The file sizes give an upper bound on the number of images. Memory that is never written to takes no space.
    most = sum(os.path.getsize(folder / name) for name in part) // (channels * height * width)
    images_NHWC = np.empty((most, height, width, channels), np.uint8)
    labels: list[int] = []
    for name, md5 in part.items():
        entry = _unpickle(folder / name, md5)
        pixels_NCHW = entry[b"data"].reshape(-1, *PIXELS)
        start, count = len(labels), len(pixels_NCHW)
        labels += entry[labels_key]
        if not count or len(labels) != start + count:
            raise ValueError(f"{count} images, {len(labels) - start} labels")
        for channel in range(channels):  # five times faster than one assignment with permuted axes
            images_NHWC[start : start + count, ..., channel] = pixels_NCHW[:, channel]
        del entry, pixels_NCHW  # before the next file is read
    return Split(torch.from_numpy(images_NHWC[: len(labels)]).permute(0, 3, 1, 2), torch.tensor(labels))


def _unpickle(path: Path, md5: str) -> dict[bytes, Any]:
    """Return the dictionary in a file. Strings of Python 2 stay bytes, so that the pixels are not decoded as text."""
    with _intact(path, md5) as content, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"dtype\(\): align")  # NumPy 2.4.0 to 2.4.4 warns about pickles of this age
        entry: dict[bytes, Any] = pickle.loads(content, encoding="bytes")
    return entry


@contextmanager
def _intact(path: Path, md5: str) -> Iterator[mmap]:
    """Map a file into memory. The mapping ends with the `with` block.

    Raises:
        ValueError: the file is empty, or its md5 is not that of the published file.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ValueError(OTHER_MD5)
        yield content
