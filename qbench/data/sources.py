"""Lists the files of each data set, and detects whether the files may have changed.

Reading all images takes seconds to minutes. The digest of a data set's images is therefore kept in the user's cache
folder, `qbench/data` below $XDG_CACHE_HOME or ~/.cache. The digest is reused as long as the names, sizes, modification
times and inodes of the image files and of the code that reads them stay the same. This module does not import torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from qbench.system import files

BELOW_ROOT = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "fashion_mnist": ("FashionMNIST/raw",),
    "folder": ("train", "val", "test"),
    "imagenet": ("train", "val"),
    "mnist": ("MNIST/raw",),
    "svhn": ("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"),
    "tiny_imagenet": ("train", "val"),
}
"""Maps the name of a data set to its files and folders below `dataset.root`."""
GENERATED = ("glyphs", "synthetic")


def source_paths(node: Mapping[str, object]) -> list[Path] | None:
    """Return the paths of the files and folders from which a data set is read. They need not exist.

    The list is empty if the images are generated. The result is None for a user's data set, because its files are not
    known.
    """
    name = str(node["name"])
    if name == "digits":
        spec = find_spec("sklearn")
        return [Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"] if spec and spec.origin else None
    if name in BELOW_ROOT:
        root = Path(os.path.abspath(os.path.expanduser(str(node["root"]))))
        test = node.get("test", "auto")
        if isinstance(test, int | float):  # root contains the classes
            return [root]
        own = [] if test == "auto" else [str(test)]  # a folder of test images with a name of its own
        return [root / part for part in dict.fromkeys([*BELOW_ROOT[name], *own])]
    return [] if name in GENERATED else None


def are_gone(node: Mapping[str, object]) -> bool:
    """Return whether a data set is read from files and none of these files exists."""
    paths = source_paths(node)
    return bool(paths) and not any(path.exists() for path in paths or ())


def stamp(node: Mapping[str, object]) -> str | None:
    """Return a digest of the names, sizes, times and inodes of a data set's files and of the code that reads them.

    The result is None if the files are not known.
    """
    paths = source_paths(node)
    if paths is None:
        return None
    digest = hashlib.sha256()
    code = sorted(map(str, Path(__file__).parent.glob("*.py")))
    for file in [*code, *(file for path in paths for file in _files(path))]:
        with suppress(OSError):  # a broken link
            status = os.stat(file)
            facts = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0"
            digest.update(facts.encode(errors="surrogateescape"))
    return digest.hexdigest()


def cached_sha256(node: Mapping[str, object]) -> str | None:
    """Return the digest that `remember_sha256` stored. Return None if the files may have changed since then."""
    now, stored = stamp(node), files.read_json(_cache_path(node)) or {}
    sha256 = stored.get("data_sha256")
    return sha256 if now and stored.get("stamp") == now and isinstance(sha256, str) else None


def remember_sha256(node: Mapping[str, object], before: str | None, sha256: str) -> None:
    """Store the digest of a data set's images. If the digest cannot be stored, the next run reads the images again.

    Args:
        before: the result of `stamp` before the images were read. It is stored next to the digest. If the files change
            while they are read, the stored digest is therefore not used later. If `before` is None, nothing is stored.
    """
    path = _cache_path(node)
    if before:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"stamp": before, "data_sha256": sha256}), encoding="utf-8")
            os.replace(temporary, path)


def _cache_path(node: Mapping[str, object]) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = json.dumps([[str(path) for path in source_paths(node) or ()], node], sort_keys=True)
    return Path(folder) / "qbench" / "data" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.sha256.json"


def _files(path: Path) -> Iterator[str]:
    """Yield the file at a path, or all files below a folder. Links are followed, but no folder is read twice."""
    if path.is_file():
        yield str(path)
    entered = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))
