"""Keeps decoded and resized images of a data set on disk, so that later runs do not decode them again.

With `dataset.cache=DIR`, the images are in `DIR/KEY`. The key is a hash of the content of the image files and of the
size to which images are resized. Different data sets can therefore share DIR, and changed files get a new cache.

The pixels of all images, uint8 (H, W, 3), are stored one after the other in files of 1 GiB (shards), which are mapped
into memory. `index.npy` has a row for each image: the shard, the first byte in the shard, the height and the width.
`sealed.json` is written last. It contains the size, the modification time and the sha256 of each file of the cache. If
the size or the time of a file has changed, the file is hashed again. If a hash differs, the cache is built again.
"""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qbench.data.images import Pixels, damaged_files_error, decode_image, describe_error
from qbench.system import files
from qbench.system.cores import own_cores
from qbench.system.locks import locked

VERSION = 1
SHARD_BYTES = 2**30
"""Size in bytes after which a new shard begins."""
MAX_MAPPED = 1024
"""Maximum number of shards that are mapped into memory at the same time."""
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageCache:
    """The decoded images of a data set. Processes that decode batches receive a copy of this object.

    Args:
        folder: the folder of the cache.
        side: size in pixels to which the shorter side of each image is resized, or 0 if images keep their size.
    """

    folder: str
    side: int

    def pixels(self, row: int) -> Pixels:
        """Return the image in a row of the index as uint8 (H, W, 3). The result is a view of the mapped file."""
        shard, start, height, width = (int(value) for value in _index(self.folder)[row])
        return _shard(self.folder, shard)[start : start + 3 * height * width].reshape(height, width, 3)

    def __len__(self) -> int:
        return len(_index(self.folder))


def open_cache(top: Path, sha256: str, root: Path, names: Sequence[str], side: int) -> ImageCache:
    """Return the cache of some image files. The cache is built if it does not exist or is damaged.

    If several processes need the same cache, one process builds the cache and the others wait.

    Args:
        top: the folder of all caches.
        sha256: the hash of the files.
        root, names: the folder of the image files, and the names of the files relative to this folder.
        side: size in pixels to which the shorter side of each image is resized, or 0 if images keep their size.

    Raises:
        DataError: some files cannot be decoded. The message names them.
        ResourceError: the cache cannot be written, for example because the disk is full.
    """
    listed = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()
    key = hashlib.sha256(f"{VERSION} {sha256} {listed} {side}".encode()).hexdigest()[:16]
    folder = top / key
    files.make_directory(top)
    with locked(top / f".{key}.lock"):
        if not _is_intact(folder, len(names)):
            if folder.exists():
                print(f"warning: {folder} is damaged; the cache is built again", file=sys.stderr)
            _build(folder, root, names, side)
            _index.cache_clear()  # the files of a damaged cache may still be mapped
            _shard.cache_clear()
    return ImageCache(str(folder), side)


def _build(folder: Path, root: Path, names: Sequence[str], side: int) -> None:
    """Decode all images into a temporary folder, write `sealed.json`, and rename the folder."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    gibibytes = len(names) * 3 * (4 * side * side / 3) / 2**30
    size = f", about {gibibytes:,.1f} GiB" if side and gibibytes > 1 else ""
    print(f"decoding {len(names):,} images into {folder}{size}", file=sys.stderr, flush=True)

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            sealed = _write_shards(temporary, root, names, side)
            files.write_json(temporary / "sealed.json", {"images": len(names), "files": sealed})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    files.convert_os_errors(write, folder)


def _write_shards(folder: Path, root: Path, names: Sequence[str], side: int) -> dict[str, list[str | int]]:
    """Write all shards and the index. Return [size, modification time, sha256] of each file by name."""
    index, bad = np.zeros((len(names), 4), np.int64), list[tuple[str, str]]()
    sealed: dict[str, list[str | int]] = {}

    def decode(name: str) -> Pixels | str:
        try:
            return decode_image(root / name, side)
        except Exception as error:  # PIL raises many kinds of errors for damaged files
            return describe_error(error)

    with ThreadPool(own_cores()) as pool, _Shards(folder, sealed) as shards:
        for i, found in enumerate(_bounded(pool, decode, names)):
            if isinstance(found, str):
                bad.append((names[i], found))
            elif not bad:
                index[i] = (*shards.add(found), *found.shape[:2])
    if bad:
        raise damaged_files_error(bad, len(names), str(root))
    buffer = io.BytesIO()
    np.save(buffer, index)
    files.write(folder / "index.npy", buffer.getvalue())
    sealed["index.npy"] = [*_facts(folder / "index.npy"), hashlib.sha256(buffer.getvalue()).hexdigest()]
    return sealed


def _bounded(
    pool: ThreadPool, decode: Callable[[str], Pixels | str], names: Sequence[str], ahead: int = 256
) -> Iterator[Pixels | str]:
    """Yield the decoded images in order. At most `ahead` decoded images are in memory."""
    for start in range(0, len(names), ahead):
        yield from pool.map(decode, names[start : start + ahead], chunksize=4)


class _Shards:
    """Writes images one after the other. When a shard is full, its size, time and sha256 are recorded."""

    def __init__(self, folder: Path, sealed: dict[str, list[str | int]]) -> None:
        self._folder, self._sealed = folder, sealed
        self._number, self._size, self._sha256 = 0, 0, hashlib.sha256()
        self._file = open(folder / _shard_name(0), "wb")  # noqa: SIM115  closed when the shard is full

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def add(self, pixels: Pixels) -> tuple[int, int]:
        """Write an image. Return the number of the shard and the position of the image's first byte in the shard."""
        if self._size >= SHARD_BYTES:
            self._close()
            self._number, self._size, self._sha256 = self._number + 1, 0, hashlib.sha256()
            self._file = open(self._folder / _shard_name(self._number), "wb")  # noqa: SIM115
        data, start = np.ascontiguousarray(pixels).data, self._size
        self._file.write(data)
        self._sha256.update(data)
        self._size += data.nbytes
        return self._number, start

    def _close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        path = self._folder / _shard_name(self._number)
        self._sealed[path.name] = [*_facts(path), self._sha256.hexdigest()]


def _is_intact(folder: Path, count: int) -> bool:
    """Return whether a cache is complete and its files still have the content that `sealed.json` records."""
    sealed = files.read_json(folder / "sealed.json") or {}
    if sealed.get("images") != count or "index.npy" not in sealed.get("files", {}):
        return False
    moved = False
    for name, (size, time, sha256) in sealed["files"].items():
        try:
            if [size, time] == _facts(folder / name):
                continue
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
        except OSError:
            return False
        sealed["files"][name] = [*_facts(folder / name), sha256]
        moved = True
    if moved:  # the files were copied; remember their new times
        with suppress(OSError):
            (folder / "sealed.json").write_text(json.dumps(sealed))
    return True


def _facts(path: Path) -> list[str | int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _shard_name(number: int) -> str:
    return f"images-{number:05}.u8"


@lru_cache(4)
def _index(folder: str) -> Index:
    index: Index = np.load(Path(folder) / "index.npy", mmap_mode="r")
    return index


@lru_cache(MAX_MAPPED)
def _shard(folder: str, number: int) -> Pixels:
    return np.memmap(Path(folder) / _shard_name(number), np.uint8, "r")
