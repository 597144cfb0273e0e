"""One look at every image file of a set, remembered: is it a whole image, how large, and the sha256 of them all.

Reading all of a large set anew in every run would take longer than many runs. So a set of up to 4 GiB is read whole
once; of a larger one the size, the first and the last 4096 bytes of each file are read and hashed (11 GB in ImageNet's
1,331,167 files), and the fingerprint says which it was. The result lies in the user's cache folder, `qbench/data` below
$XDG_CACHE_HOME or ~/.cache, and holds as long as the names, sizes and times of all files stay the same.

A file passes if PIL knows its head and, as JPEG or PNG, it ends as such a file does; a PNG that is read whole must have
the right checksums too. Others are decoded. Damage in the middle of a file shows, if at all, when it is decoded.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qbench.data.images import damaged, reason, rgb

WHOLE = 2**32
"""Bytes of a set whose files are read whole."""

END = 4096
"""Bytes at both ends of a file that are read of larger sets."""

THREADS = 8
VERSION = 1
"""Counts changes of what is remembered."""

MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""What stands near the end of a file of PIL's formats."""


@dataclass(frozen=True)
class FileCheck:
    """What was found: the files' number, bytes and hash, what was hashed, and (height, width) if all have the same."""

    count: int
    size: int
    sha256: str
    hashed: str
    height: int
    width: int

    def facts(self) -> dict[str, str | int]:
        """Return what the manifest says of the files."""
        return {
            "files": self.count, "files_bytes": self.size, "files_sha256": self.sha256, "files_hashed": self.hashed,
        }  # fmt: skip


class _Look(NamedTuple):
    digest: bytes
    height: int
    width: int


def survey(root: str, names: Sequence[str]) -> FileCheck:
    """Look at all files, or remember having done so.

    Raises:
        DataError: files that are no whole images: all of them are named.
    """
    bad: list[tuple[str, str]] = []
    sizes, key = [], hashlib.sha256(f"{VERSION} {root}".encode(errors="surrogateescape"))
    for name in names:
        try:
            status = os.stat(os.path.join(root, name))
            sizes.append(status.st_size)
            key.update(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
        except OSError as error:  # a link to nothing
            sizes.append(0)
            bad.append((name, reason(error)))
    memory = _cache(root)
    if not bad and (known := _remembered(memory, key.hexdigest())):
        return known
    whole = sum(sizes) <= WHOLE
    found = _look_at_all(root, names, sizes, whole, bad)
    if not bad:
        _remember(memory, key.hexdigest(), found)
        return found
    raise damaged(dict(reversed(bad)).items(), len(names), root)


def _look_at_all(
    root: str, names: Sequence[str], sizes: Sequence[int], whole: bool, bad: list[tuple[str, str]]
) -> FileCheck:
    """Look at all files; what is wrong with some is added to `bad`."""
    total, shapes = hashlib.sha256(), set()

    def look(i: int) -> _Look | str:
        try:
            return _look(os.path.join(root, names[i]), sizes[i], whole)
        except Exception as error:  # whatever PIL raises for damaged files
            return reason(error)

    with ThreadPool(THREADS) as pool:
        for i, one in enumerate(pool.imap(look, range(len(names)), chunksize=64)):
            if isinstance(one, str):
                bad.append((names[i], one))
                continue
            total.update(f"{names[i]}\0{sizes[i]}\0".encode(errors="surrogateescape") + one.digest)
            shapes.add((one.height, one.width))
    height, width = shapes.pop() if len(shapes) == 1 else (0, 0)
    hashed = "names and whole files" if whole else f"names, sizes, first and last {END} bytes of each file"
    return FileCheck(len(names), sum(sizes), total.hexdigest(), hashed, height, width)


def _look(path: str, size: int, whole: bool) -> _Look:
    if not size:
        raise ValueError("empty")
    with open(path, "rb") as file:
        data = file.read() if whole else file.read(END)
        if not whole and size > END:
            file.seek(max(END, size - END))
            data += file.read()
        with Image.open(io.BytesIO(data) if whole else file) as image:
            width, height = image.size
            mark = MARKS.get(image.format or "")
            ends = mark is not None and mark in data[-END:]
            if image.format == "PNG" and (whole or not ends):
                image.verify()
            elif not ends:
                rgb(image)
        return _Look(hashlib.sha256(data).digest(), height, width)


def _cache(root: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(root.encode(errors="surrogateescape")).hexdigest()[:16]
    return Path(folder) / "qbench" / "data" / f"{name}.json"


def _remembered(path: Path, key: str) -> FileCheck | None:
    try:
        stored = json.loads(path.read_bytes())
        return FileCheck(**stored["found"]) if stored["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not ours: look again
        return None


def _remember(path: Path, key: str, found: FileCheck) -> None:
    """Write what was found; where that cannot be, the next run looks again."""
    new = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"key": key, "found": asdict(found)}), encoding="utf-8")
        os.replace(new, path)
