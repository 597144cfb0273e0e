"""Finds, downloads and reads the files of published data sets.

File names, download addresses, checksums and folders below `root` are the same as in torchvision. Files that another
program downloaded with torchvision are therefore found. The readers return uint8 images (N, C, H, W) and int64 labels
in memory. The mean and the standard deviation are computed from the training images, unless `normalize` selects fixed
values.
"""

import errno
import gzip
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split, split_validation
from qbench.data.normalize import Normalize, normalization
from qbench.errors import DataError, ResourceError
from qbench.system.locks import locked
from qbench.system.torchvision import torchvision

OTHER_MD5 = "the md5 differs from the md5 of the published file"
ExpectedFiles = Mapping[Path, str | None]
"""Maps the path of a file to the md5 that torchvision expects. None means that torchvision does not check the file."""

MNIST_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
"""md5 of the unpacked files.

torchvision lists md5 sums of the .gz files only, and these change if a file is compressed again.
"""

ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Error numbers for missing permissions or disk space. These errors do not mean that a file is damaged."""


def dataset_from_splits(
    name: str, train: Split, test: Split, *, classes: int, val: float, augment: Augment, normalize: Normalize = "own"
) -> Dataset:
    """Return a data set of images in memory. The fraction `val` of the training images becomes the validation split.

    The images of `train` are reordered in their memory. Both splits share this memory, so no image is copied.

    Raises:
        ValueError: `val`, `normalize` or the augmentation's `pad` is out of range.
    """
    side = min(train.images.shape[2:])
    if not 0 <= augment.pad < side:
        raise ValueError(f"pad={augment.pad}: must be 0 to {side - 1} pixels")
    train_split, val_split = split_validation(train, val, in_place=True)
    mean, std = normalization(normalize, train_split.images)
    return Dataset(
        name=name, train=train_split, val=val_split, test=test, classes=classes, mean=mean, std=std, augment=augment
    )  # fmt: skip


def read_mnist(kind: str, root: str, download: bool) -> tuple[Split, Split]:
    """Return (train, test) of MNIST or FashionMNIST. `kind` is the name of torchvision's class.

    This function reads the files itself, because torchvision needs unpacked files and prefers files of an old format.
    """
    source = getattr(torchvision().datasets, kind)
    top = absolute_root(root)
    folder = top / kind / "raw"
    unpacked = [folder / name.removesuffix(".gz") for name, _ in source.resources]
    packed = [folder / name for name, _ in source.resources]
    files = [b if b.is_file() and not a.is_file() else a for a, b in zip(unpacked, packed, strict=True)]
    ensure_files(dict.fromkeys(files), top, download, lambda: source(top, download=True))
    splits = _idx_split(*files[:2]), _idx_split(*files[2:])
    others = [path for path in files if _content_md5(path) != MNIST_MD5[kind][path.name.removesuffix(".gz")]]
    if others:
        raise DataError(_damage_message(others, OTHER_MD5))
    return splits


def read_svhn(parts: Sequence[str], root: str, download: bool) -> tuple[Split, Split]:
    """Return (train, test) of the cropped SVHN digits. The digit 0 is class 0.

    Args:
        parts: names of the parts (train, extra) that form the training split.
    """
    source = torchvision().datasets.SVHN
    top = absolute_root(root)
    files = {top / source.split_list[part][1]: source.split_list[part][2] for part in (*parts, "test")}

    def fetch() -> None:
        for part in (*parts, "test"):
            source(top, split=part, download=True)

    def read(*names: str) -> Split:
        with report_damaged(files):
            loaded = [source(top, split=part) for part in names]
        return join_arrays([x.data for x in loaded], [x.labels for x in loaded], list(files))

    ensure_files(files, top, download, fetch)
    return read(*parts), read("test")


def _idx_split(images: Path, labels: Path) -> Split:
    with report_damaged({images: None}):
        x_NHW = read_idx(images, 3)
    with report_damaged({labels: None}):
        y_N = read_idx(labels, 1)
        if (y_N > 9).any():
            raise ValueError(f"label {y_N.max()}, expected 0 to 9")
    return join_arrays([x_NHW[:, None]], [y_N], [images, labels])


def absolute_root(root: str) -> Path:
    """Return the absolute path of `dataset.root`. `root` may be relative or begin with ~."""
    return Path(os.path.abspath(os.path.expanduser(root)))


def ensure_files(files: ExpectedFiles, root: Path, download: bool, fetch: Callable[[], object]) -> None:
    """Ensure that all files exist. If `download` is true, download files that are missing or damaged.

    For a download, the function calls `fetch`, which writes the files below `root`.

    Raises:
        DataError: files are missing and `download` is false, or the download failed.
        ResourceError: the disk is full, or qbench may not write below `root`.
    """
    missing = [path for path in files if not path.is_file()]
    if not download:
        if missing:
            raise DataError(_missing_message(files, missing, root))
        return
    if not missing and not _damaged_files(files):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".fetching.lock"):  # if runs of a sweep start at the same time, only one of them downloads
            fetch()
    except ResourceError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in ACCESS_ERRORS:
            raise ResourceError(f"dataset.download=true: {error.filename or root}: {error.strerror}") from None
        raise DataError(
            f"dataset.download=true: {_describe_error(error)}\n"
            f"download these files by hand: {_file_names(files)}\n"
            f"put them into {_folder_of(files)} (dataset.root={root})"
        ) from None


@contextmanager
def report_damaged(files: ExpectedFiles) -> Iterator[None]:
    """Convert any error in reading the files to an error that names the damaged files."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in ACCESS_ERRORS:
            raise ResourceError(f"{error.filename or _folder_of(files)}: {error.strerror}") from None
        damaged = _damaged_files(files)
        reason = OTHER_MD5 if damaged else _describe_error(error)
        raise DataError(_damage_message(damaged or list(files), reason)) from None


def read_idx(path: Path, axes: int) -> Tensor:
    """Return the bytes of an IDX file as a tensor with `axes` axes.

    If the name ends in .gz, the file is unpacked while it is read.

    Raises:
        ValueError: the file is of another kind, or its length does not match its header. Damaged files can also raise
            errors of struct, gzip and zlib.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    header = (0, 8, axes)  # 8 means unsigned bytes
    if struct.unpack_from(">HBB", data) != header:
        raise ValueError(f"begins with {data[:4].hex()}, not with {struct.pack('>HBB', *header).hex()}")
    shape = struct.unpack_from(f">{axes}I", data, 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def _content_md5(path: Path) -> str:
    """Return the md5 of the unpacked content of an IDX file."""
    data = path.read_bytes()
    return hashlib.md5(gzip.decompress(data) if path.suffix == ".gz" else data).hexdigest()


def join_arrays(
    images: Sequence[Tensor | npt.NDArray[np.uint8]],
    labels: Sequence[Tensor | npt.NDArray[np.int64] | Sequence[int]],
    paths: Sequence[Path],
) -> Split:
    """Join arrays of images (N, C, H, W) and arrays of labels (N,) into one split, with a single copy.

    Raises:
        DataError: the numbers of images and labels differ, or there are no images.
    """
    images_NCHW = torch.cat([torch.as_tensor(x) for x in images]).contiguous()
    labels_N = torch.cat([torch.as_tensor(y, dtype=torch.int64) for y in labels])
    if len(images_NCHW) != len(labels_N) or not len(labels_N):
        raise DataError(_damage_message(paths, f"{len(images_NCHW)} images, {len(labels_N)} labels"))
    return Split(images_NCHW, labels_N)


def _damaged_files(files: ExpectedFiles) -> list[Path]:
    """Return the files that are missing or have another md5 than expected."""
    return [path for path, md5 in files.items() if not path.is_file() or (md5 and _file_md5(path) != md5)]


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _missing_message(files: ExpectedFiles, missing: Sequence[Path], root: Path) -> str:
    below = _folder_of(files).relative_to(root)
    content = "them" if below == Path() else f"{below}/"
    return (
        f"{len(missing)} of {len(files)} files are missing in {_folder_of(files)}\n"
        f"missing: {_file_names(missing)}\n"
        f"type dataset.download=true, or dataset.root=DIR for a folder that contains {content}"
    )


def _damage_message(paths: Sequence[Path], reason: str) -> str:
    return (
        f"damaged or truncated: {', '.join(map(str, paths))}\n{reason}\n"
        "delete the damaged files and type dataset.download=true, or type dataset.root=DIR for a folder with "
        "intact files"
    )


def _folder_of(files: ExpectedFiles) -> Path:
    return next(iter(files)).parent


def _file_names(paths: ExpectedFiles | Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
