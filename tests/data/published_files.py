"""Small files in the formats of the published data sets."""

import gzip
import hashlib
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qbench.data import cifar10, cifar100, dataset_files, fashion_mnist, mnist, svhn
from qbench.data.dataset import Dataset
from qbench.system.torchvision import torchvision

Build = Callable[..., Dataset]
BUILDS: dict[str, Build] = {
    "cifar10": cifar10.build,
    "cifar100": cifar100.build,
    "mnist": mnist.build,
    "fashion_mnist": fashion_mnist.build,
    "svhn": svhn.build,
}
BUILD_MODULES = {"cifar10": cifar10, "cifar100": cifar100}
LABELS = {"cifar10": 10, "cifar100": 100, "mnist": 10, "fashion_mnist": 10, "svhn": 10}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test at any attempt to connect or to look up a name, even if the exception is
    caught.
    """
    attempts = []

    def refuse(*arguments: object, **options: object) -> None:
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts


@pytest.fixture
def datasets() -> ModuleType:
    return torchvision().datasets  # type: ignore[no-any-return]


def random_bytes(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# Python 2's pickle of a dictionary with an array, opcode by opcode, as in the CIFAR files.


def pickled_text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw


def _array(values: np.ndarray) -> bytes:
    kind = (
        b"cnumpy\ndtype\n("
        + pickled_text("u1")
        + b"K\x00K\x01tR(K\x03"
        + pickled_text("|")
        + b"NNN"
        + 2 * b"J\xff\xff\xff\xff"
    )
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values.shape) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + pickled_text("b") + b"tR"
    return empty + b"(K\x01" + shape + kind + b"K\x00tb" + b"\x89" + pickled_text(values.tobytes()) + b"tb"


def _pickle(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickle(k) + _pickle(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"(" + b"".join(map(_pickle, value)) + b"l"
    if isinstance(value, np.ndarray):
        return _array(value)
    return b"K" + bytes([value]) if isinstance(value, int) else pickled_text(str(value))


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, count: int = 40) -> dict[str, np.ndarray]:
    """Write the files of cifar10 or cifar100 with `count` images each.

    The md5 sums that qbench and torchvision expect are replaced by those of the written files.
    """
    module = BUILD_MODULES[name]
    published = getattr(module, name.upper())
    kind = getattr(torchvision().datasets, name.upper())
    folder = root / published.folder
    folder.mkdir(parents=True)
    classes, written, digests = LABELS[name], {}, {}
    for part in ("train", "test"):
        for i, file in enumerate(getattr(published, part)):
            pixels = written[file] = random_bytes(count, 3072, seed=i + 10 * (part == "test"))
            labels = [j % classes for j in range(count)]
            fine: dict[str, object] = {"fine_labels": labels, "coarse_labels": [0] * count}
            content = {"batch_label": file, "data": pixels} | (fine if name == "cifar100" else {"labels": labels})
            (folder / file).write_bytes(b"\x80\x02" + _pickle(content) + b".")
        digests[part] = {file: md5(folder / file) for file in getattr(published, part)}
        monkeypatch.setattr(kind, f"{part}_list", [[file, digest] for file, digest in digests[part].items()])
    (meta,) = (folder / file for file in published.names)
    meta.write_bytes(b"\x80\x02" + _pickle({kind.meta["key"]: [f"class {i}" for i in range(classes)]}) + b".")
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    monkeypatch.setattr(module, name.upper(), replace(published, **digests, names={meta.name: md5(meta)}))
    return written


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(folder: Path, packed: bool = False, count: int = 40) -> dict[str, np.ndarray]:
    """Write the four files of an MNIST data set, compressed with gzip if `packed` is true.

    The md5 sums that qbench expects are replaced by those of the written files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (part, n) in enumerate({"train": count, "t10k": count // 2}.items()):
        arrays[f"{part}-images-idx3-ubyte"] = random_bytes(n, 28, 28, seed=seed)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8) % 10
    for name, values in arrays.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
        for expected in dataset_files.MNIST_MD5.values():  # every test writes the files that it reads
            expected[name] = hashlib.md5(idx(values)).hexdigest()
    return arrays


def write_svhn(
    root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, **counts: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write the .mat files of the named parts, such as train=40 for 40 training images.

    A file contains images X (32, 32, 3, N) and labels y (N, 1) from 1 to 10.
    """
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    listed, written = dict(kind.split_list), {}
    for seed, (part, count) in enumerate(counts.items()):
        images, labels = random_bytes(count, 32, 32, 3, seed=seed), np.arange(count, dtype=np.uint8) % 10 + 1
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}, do_compression=True)
        listed[part] = [listed[part][0], path.name, md5(path)]
        written[part] = images, labels
    monkeypatch.setattr(kind, "split_list", listed)
    return written


def write(name: str, root: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a small version of the data set `name`."""
    if name.startswith("cifar"):
        write_cifar(root, name, monkeypatch, count=200 if name == "cifar100" else 40)
    elif name == "svhn":
        write_svhn(root, datasets.SVHN, monkeypatch, train=40, test=20)
    else:
        write_mnist(root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw")
