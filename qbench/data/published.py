"""Published data sets lie in files: finding them, fetching them where asked to, reading them, saying what is wrong.

Names of files, addresses and checksums are torchvision's, and so is the layout below `root`: what another program
downloaded with torchvision is found. What comes back is uint8 images (N, C, H, W) and int64 labels in memory. The
means and deviations are those of the images trained on, unless `normalize` names others.
"""

import errno
import gzip
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from qbench.data.dataset import Augment, Dataset, Split, split_validation
from qbench.data.normalize import statistics
from qbench.errors import DataError, ResourceError
from qbench.system.torchvision import torchvision

Files = Mapping[Path, str | None]
"""Paths, and the md5 that torchvision expects of them; None where it expects none."""

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def assembled(
    name: str, train: Split, test: Split, *, classes: int, val: float, augment: Augment, normalize: str = "own"
) -> Dataset:
    """Hold `val` of the training images out and return the data set.

    Raises:
        ValueError: `val`, `normalize` or the augmentation's `pad` out of range.
    """
    side = min(train.images.shape[2:])
    if not 0 <= augment.pad < side:
        raise ValueError(f"pad={augment.pad}: allowed are 0 to {side - 1} pixels")
    kept, held = split_validation(train, val)
    mean, std = statistics(normalize, kept.images)
    return Dataset(
        name=name, train=kept, val=held, test=test, classes=classes, mean=mean, std=std, augment=augment
    )  # fmt: skip


def cifar(kind: str, root: str, download: bool) -> tuple[Split, Split]:
    """Return (train, test) of torchvision's class `kind`, CIFAR10 or CIFAR100 with its fine labels.

    The files are Python pickles; torchvision unpickles them only if their md5 is that of the published ones.
    """
    source = getattr(torchvision().datasets, kind)
    top = absolute(root)
    listed = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    files: dict[Path, str | None] = {top / source.base_folder / name: md5 for name, md5 in listed}
    provide(files, top, download, lambda: source(top, download=True))
    with reading(files), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"dtype\(\): align")  # NumPy 2.4.0 to 2.4.4, of pickles as old as these
        parts = [source(top, train=part) for part in (True, False)]
    train, test = (split_of([x.data.transpose(0, 3, 1, 2)], [x.targets], list(files)) for x in parts)
    return train, test


def mnist(kind: str, root: str, download: bool) -> tuple[Split, Split]:
    """Return (train, test) of torchvision's class `kind`, MNIST or FashionMNIST.

    Read here, not by torchvision, which wants the files unpacked and takes an old format's where one lies beside them.
    """
    source = getattr(torchvision().datasets, kind)
    top = absolute(root)
    folder = top / kind / "raw"
    unpacked = [folder / name.removesuffix(".gz") for name, _ in source.resources]
    packed = [folder / name for name, _ in source.resources]
    files = [b if b.is_file() and not a.is_file() else a for a, b in zip(unpacked, packed, strict=True)]
    provide(dict.fromkeys(files), top, download, lambda: source(top, download=True))
    return _idx_split(*files[:2]), _idx_split(*files[2:])


def svhn(parts: Sequence[str], root: str, download: bool) -> tuple[Split, Split]:
    """Return (train, test) of the cropped digits, `parts` of train and extra being mixed; the digit 0 is class 0."""
    source = torchvision().datasets.SVHN
    top = absolute(root)
    files = {top / source.split_list[part][1]: source.split_list[part][2] for part in (*parts, "test")}

    def fetch() -> None:
        for part in (*parts, "test"):
            source(top, split=part, download=True)

    def read(*wanted: str) -> Split:
        with reading(files):
            found = [source(top, split=part) for part in wanted]
        return split_of([x.data for x in found], [x.labels for x in found], list(files))

    provide(files, top, download, fetch)
    return read(*parts), read("test")


def _idx_split(images: Path, labels: Path) -> Split:
    with reading({images: None}):
        x_NHW = read_idx(images, 3)
    with reading({labels: None}):
        y_N = read_idx(labels, 1)
        if (y_N > 9).any():
            raise ValueError(f"label {y_N.max()} where 0 to 9 are the classes")
    return split_of([x_NHW[:, None]], [y_N], [images, labels])


def absolute(root: str) -> Path:
    """Return the folder that `dataset.root` means: of the working directory, or of the home where it begins with ~."""
    return Path(os.path.abspath(os.path.expanduser(root)))


def provide(files: Files, root: Path, download: bool, fetch: Callable[[], object]) -> None:
    """See to it that the files are there; `fetch` writes them below `root`, and is called only if they are not.

    Raises:
        DataError: files are missing and were not to be fetched, or could not be.
        ResourceError: there is no room for them, or no permission.
    """
    missing = [path for path in files if not path.is_file()]
    if not download:
        if missing:
            raise DataError(_expected(files, missing, root))
        return
    if not missing and not _damaged(files):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):  # the runs of a sweep that start together fetch once
            fetch()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED:
            raise ResourceError(f"dataset.download=true: {error.filename or root}: {error.strerror}") from None
        raise DataError(
            f"dataset.download=true: {_reason(error)}\n"
            f"put these files there by hand: {_listed(files)}\n"
            f"in {_folder(files)}; dataset.root={root} finds them"
        ) from None


@contextmanager
def reading(files: Files) -> Iterator[None]:
    """Turn whatever reading some files raises into an error that names the damaged ones."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED:
            raise ResourceError(f"{error.filename or _folder(files)}: {error.strerror}") from None
        damaged = _damaged(files)
        reason = "its md5 is not that of the published file" if damaged else _reason(error)
        raise DataError(_says_damaged(damaged or list(files), reason)) from None


def read_idx(path: Path, axes: int) -> torch.Tensor:
    """Return the bytes of an IDX file as a tensor with `axes` axes, unpacked if the name ends in .gz.

    Raises:
        ValueError: another kind of file, or not as long as its head says; struct, gzip and zlib raise their own errors.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    head = (0, 8, axes)  # 8 is for unsigned bytes
    if struct.unpack_from(">HBB", data) != head:
        raise ValueError(f"begins with {data[:4].hex()}, not with {struct.pack('>HBB', *head).hex()}")
    shape = struct.unpack_from(f">{axes}I", data, 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def split_of(images: Sequence[Any], labels: Sequence[Any], paths: Sequence[Path]) -> Split:
    """Join arrays of images (N, C, H, W) and of labels, copying once; refuse counts that differ."""
    split = Split(
        torch.cat([torch.as_tensor(x) for x in images]).contiguous(),
        torch.cat([torch.as_tensor(y, dtype=torch.int64) for y in labels]),
    )
    if len(split.images) != len(split.labels) or not len(split):
        raise DataError(_says_damaged(paths, f"{len(split.images)} images, {len(split.labels)} labels"))
    return split


def _damaged(files: Files) -> list[Path]:
    intact = torchvision().datasets.utils.check_integrity
    return [path for path, md5 in files.items() if not intact(path, md5)]


def _expected(files: Files, missing: Sequence[Path], root: Path) -> str:
    below = _folder(files).relative_to(root)
    holder = "a folder that holds them" if below == Path() else f"a folder that holds {below}/"
    return (
        f"{len(missing)} of {len(files)} files are missing in {_folder(files)}\n"
        f"expected there: {_listed(missing)}\n"
        f"type dataset.root=DIR, {holder}, or dataset.download=true to fetch them"
    )


def _says_damaged(paths: Sequence[Path], reason: str) -> str:
    return (
        f"damaged or truncated: {', '.join(map(str, paths))}\n"
        f"{reason}\n"
        "delete it and type dataset.download=true, or type dataset.root=DIR where intact files lie"
    )


def _folder(files: Files) -> Path:
    return next(iter(files)).parent


def _listed(paths: Files | Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
