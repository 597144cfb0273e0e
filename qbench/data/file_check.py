"""Checks that every image file of a data set is complete, and hashes the files.

Reading all files of a large data set takes longer than many runs, so the check is done only once. Its result is stored
in the user's cache folder, `qbench/data` below $XDG_CACHE_HOME or ~/.cache. The result remains valid while the names,
sizes, modification times and inodes of all files stay the same.

If a data set has up to 4 GiB, all bytes are read and hashed. In a larger data set, only the size and the first and last
4096 bytes of each file are read and hashed. For ImageNet, these bytes are 11 GB in 1,331,167 files. The data set's
fingerprint states whether all bytes were hashed.

A JPEG or PNG file passes if PIL recognizes its header and if the last bytes contain the format's end marker. A PNG file
that is read completely must also have correct checksums. Files of other formats are decoded. Damage in the middle of a
JPEG or PNG file may remain undetected until a run decodes the file.

Images with more than 8 bits per channel are also decoded. In these images, the value 65535 must mean white. A data set
that stores 10-bit or 12-bit values is refused. Its largest values are much smaller, so its images would become almost
black.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from qbench.data.images import MAX_DEEP, damaged_files_error, describe_error, is_deep, to_rgb
from qbench.errors import DataError

MAX_WHOLE_BYTES = 2**32
"""Maximum size in bytes of a data set whose files are read completely."""

END_BYTES = 4096
"""Number of bytes that are read at each end of a file in larger data sets."""

THREADS = 8
VERSION = 3
"""Version number of the format of the cached result."""

END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""Maps PIL's name of an image format to the end marker, which is near the end of every complete file."""


@dataclass(frozen=True)
class FileCheck:
    """The result of checking all files of a data set.

    It contains the number of files, their total size in bytes, their hash, and a text that says which bytes were
    hashed. `height` and `width` are the size of every image in pixels, or 0 if the images differ in size.
    """

    count: int
    size: int
    sha256: str
    hashed: str
    height: int
    width: int

    def manifest_entries(self) -> dict[str, str | int]:
        """Return the entries of a run's manifest that describe the files."""
        return {
            "files": self.count, "files_bytes": self.size, "files_sha256": self.sha256, "files_hashed": self.hashed,
        }  # fmt: skip


class _FileFacts(NamedTuple):
    """The result of checking one file: hash of the file, size in pixels and largest value of the image.

    For images with more than 8 bits, the largest value is that of the upper 8 of 16 bits. For 8-bit images, it is None.
    """

    digest: bytes
    height: int
    width: int
    brightest: int | None


def check_files(root: str, names: Sequence[str]) -> FileCheck:
    """Check all files below `root`, or return the cached result of an earlier check.

    Raises:
        DataError: some files are not complete images. The message names these files.
    """
    bad: list[tuple[str, str]] = []
    sizes, key = [], hashlib.sha256(f"{VERSION} {root}".encode(errors="surrogateescape"))
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))
            sizes.append(status.st_size)
            key.update(
                f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}".encode(errors="surrogateescape")
            )
        except OSError as error:  # a broken link
            sizes.append(0)
            bad.append((name, describe_error(error)))
    cache = _cache_path(root)
    if not bad and (cached := _load_cached(cache, key.hexdigest())):
        return cached
    check, unreadable = _check_all(root, names, sizes)
    bad += unreadable
    if bad:
        raise damaged_files_error(dict(reversed(bad)).items(), len(names), root)
    _store(cache, key.hexdigest(), check)
    return check


def _check_all(root: str, names: Sequence[str], sizes: Sequence[int]) -> tuple[FileCheck, list[tuple[str, str]]]:
    """Return the result of the check, and a pair (name, reason) for each file that is not a complete image."""
    whole = sum(sizes) <= MAX_WHOLE_BYTES
    total, shapes = hashlib.sha256(), set()
    brightest: dict[str, int] = {}  # part of the data set, such as train -> largest value of its 16-bit images
    bad: list[tuple[str, str]] = []

    def check(i: int) -> _FileFacts | str:
        try:
            return _check_file(os.path.join(root, names[i]), sizes[i], whole)
        except Exception as error:  # PIL raises many kinds of errors for damaged files
            return describe_error(error)

    with ThreadPool(THREADS) as pool:
        for i, facts in enumerate(pool.imap(check, range(len(names)), chunksize=64)):
            if isinstance(facts, str):
                bad.append((names[i], facts))
                continue
            total.update(f"{names[i]}\0{sizes[i]}\0".encode(errors="surrogateescape") + facts.digest)
            shapes.add((facts.height, facts.width))
            if facts.brightest is not None:
                part = names[i].partition("/")[0]
                brightest[part] = max(brightest.get(part, 0), facts.brightest)
    _refuse_dark(root, brightest)
    height, width = shapes.pop() if len(shapes) == 1 else (0, 0)
    hashed = "names and whole files" if whole else f"names, sizes, first and last {END_BYTES} bytes of each file"
    return FileCheck(len(names), sum(sizes), total.hexdigest(), hashed, height, width), bad


def _refuse_dark(root: str, brightest: Mapping[str, int]) -> None:
    """Raise `DataError` if the largest value of all 16-bit images in a part of the data set is below half of 65535.

    Args:
        brightest: maps each part of the data set to the largest value of the upper 8 bits of its 16-bit images.
    """
    for part, value in brightest.items():
        if value < 128:
            raise DataError(
                f"{os.path.join(root, part)}: images of 16 bits in which no value is above {(value << 8) + 255}\n"
                f"white must have the value {MAX_DEEP}: scale all images by one factor, or write them with 8 bits"
            )


def _check_file(path: str, size: int, whole: bool) -> _FileFacts:
    """Return the facts about one image file. If the file is not a complete image, raise an exception of any type."""
    if not size:
        raise ValueError("empty")
    with open(path, "rb") as file:
        data = file.read() if whole else file.read(END_BYTES)
        if not whole and size > END_BYTES:
            file.seek(max(END_BYTES, size - END_BYTES))
            data += file.read()
        with Image.open(io.BytesIO(data) if whole else file) as image:
            width, height = image.size
            mark = END_MARKS.get(image.format or "")
            has_end = mark is not None and mark in data[-END_BYTES:]
            brightest = None
            if is_deep(image):
                brightest = int(np.asarray(to_rgb(image)).max())
            elif image.format == "PNG" and (whole or not has_end):
                image.verify()
            elif not has_end:
                to_rgb(image)
        return _FileFacts(hashlib.sha256(data).digest(), height, width, brightest)


def _cache_path(root: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(root.encode(errors="surrogateescape")).hexdigest()[:16]
    return Path(folder) / "qbench" / "data" / f"{name}.json"


def _load_cached(path: Path, key: str) -> FileCheck | None:
    try:
        stored = json.loads(path.read_bytes())
        return FileCheck(**stored["check"]) if stored["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):  # the cached result is missing or corrupt: check again
        return None


def _store(path: Path, key: str, check: FileCheck) -> None:
    """Write a result to the cache. If writing fails, the next run repeats the check."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"key": key, "check": asdict(check)}), encoding="utf-8")
        os.replace(temporary, path)
