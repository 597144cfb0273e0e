"""Loaders of the published data sets, on small files in the original formats, without network
access.
"""

import gzip
import hashlib
import http.server
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Configure

from qbench.cli.main import main as cli
from qbench.config import groups
from qbench.config.registry import create
from qbench.data import cifar10, cifar100, fashion_mnist, mnist, svhn
from qbench.data.augment import Augment
from qbench.data.dataset import Dataset
from qbench.data.normalize import mean_and_std
from qbench.errors import DataError, ResourceError
from qbench.system.torchvision import torchvision

Build = Callable[..., Dataset]
BUILDS: dict[str, Build] = {
    "cifar10": cifar10.build,
    "cifar100": cifar100.build,
    "mnist": mnist.build,
    "fashion_mnist": fashion_mnist.build,
    "svhn": svhn.build,
}
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


def _text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw


def _array(values: np.ndarray) -> bytes:
    kind = b"cnumpy\ndtype\n(" + _text("u1") + b"K\x00K\x01tR(K\x03" + _text("|") + b"NNN" + 2 * b"J\xff\xff\xff\xff"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values.shape) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + _text("b") + b"tR"
    return empty + b"(K\x01" + shape + kind + b"K\x00tb" + b"\x89" + _text(values.tobytes()) + b"tb"


def _pickle(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickle(k) + _pickle(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"(" + b"".join(map(_pickle, value)) + b"l"
    if isinstance(value, np.ndarray):
        return _array(value)
    return b"K" + bytes([value]) if isinstance(value, int) else _text(str(value))


def write_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, count: int = 40) -> dict[str, np.ndarray]:
    """Write the files of torchvision's class `kind`, `count` images each, and make their md5 the
    expected ones.
    """
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    hundred = kind.__name__ == "CIFAR100"
    classes, written = 100 if hundred else 10, {}
    for key in ("train_list", "test_list"):
        listed = []
        for i, (name, _) in enumerate(getattr(kind, key)):
            pixels = written[name] = random_bytes(count, 3072, seed=i + 10 * (key == "test_list"))
            labels = [j % classes for j in range(count)]
            fine: dict[str, object] = {"fine_labels": labels, "coarse_labels": [0] * count}
            content = {"batch_label": name, "data": pixels} | (fine if hundred else {"labels": labels})
            (folder / name).write_bytes(b"\x80\x02" + _pickle(content) + b".")
            listed.append([name, md5(folder / name)])
        monkeypatch.setattr(kind, key, listed)
    meta = folder / kind.meta["filename"]
    meta.write_bytes(b"\x80\x02" + _pickle({kind.meta["key"]: [f"class {i}" for i in range(classes)]}) + b".")
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    return written


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(folder: Path, packed: bool = False, count: int = 40) -> dict[str, np.ndarray]:
    """Write the four files; `packed` writes them with gzip."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (part, n) in enumerate({"train": count, "t10k": count // 2}.items()):
        arrays[f"{part}-images-idx3-ubyte"] = random_bytes(n, 28, 28, seed=seed)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8) % 10
    for name, values in arrays.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return arrays


def write_svhn(
    root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, **counts: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write the .mat files of the parts named, X (32, 32, 3, N) and y (N, 1) from 1 to 10."""
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
    """Write a small version of any of the data sets."""
    if name.startswith("cifar"):
        write_cifar(root, getattr(datasets, name.upper()), monkeypatch, count=200 if name == "cifar100" else 40)
    elif name == "svhn":
        write_svhn(root, datasets.SVHN, monkeypatch, train=40, test=20)
    else:
        write_mnist(root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw")


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.usefixtures("offline")
def test_every_loader_returns_three_splits(
    name: str, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, tmp_path, datasets, monkeypatch)
    data = BUILDS[name](root=str(tmp_path), val=0.5)
    whole = BUILDS[name](root=str(tmp_path), val=0.0)
    assert (data.name, data.classes, data.synthetic) == (name, LABELS[name], False)
    assert data.shape == ((1, 28, 28) if "mnist" in name else (3, 32, 32))
    for split in (data.train, data.val, data.test, whole.train, whole.val):
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous()
        assert split.labels.dtype == torch.int64
        assert len(split.images) == len(split.labels)
    assert len(data.train) == len(data.val) == len(whole.train) / 2
    assert len(whole.val) == 0
    assert data.train.labels.bincount().tolist() == data.val.labels.bincount().tolist()
    assert sorted(data.train.labels.unique().tolist()) == list(range(data.classes))
    assert data.fingerprint()["test_sha256"] == whole.fingerprint()["test_sha256"]
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


@pytest.mark.parametrize("name", BUILDS)
def test_the_yaml_gives_the_same_data_set(
    name: str, configure: Configure, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, tmp_path / "data", datasets, monkeypatch)
    node = configure(f"dataset={name}", f"dataset.root={tmp_path / 'data'}", "dataset.val=0.5").dataset
    assert set(node["recipe"]) == {"pretrain", "finetune", "lr", "lr_end"}
    assert create("dataset", node).augment == BUILDS[name](root=str(tmp_path / "data"), val=0.5).augment
    assert name in groups.option_names("dataset")


def test_default_augmentation(tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "cifar10": Augment(4, True), "cifar100": Augment(4, True), "svhn": Augment(4),
        "mnist": Augment(), "fashion_mnist": Augment(4, True),
    }  # fmt: skip
    for name, augment in expected.items():
        write(name, tmp_path, datasets, monkeypatch)
        assert BUILDS[name](root=str(tmp_path), val=0.0).augment == augment
    assert cifar10.build(root=str(tmp_path), val=0.5, pad=2, flip=False, replicate=True).augment == Augment(
        2, False, True
    )
    for pad in (-1, 32):
        with pytest.raises(ValueError, match=rf"pad={pad}: allowed are 0 to 31"):
            cifar10.build(root=str(tmp_path), pad=pad)
    with pytest.raises(ValueError, match=r"val=1\.0: allowed"):
        cifar10.build(root=str(tmp_path), val=1.0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pixels_stay_in_order(
    name: str, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files hold an image as 1024 red, 1024 green, 1024 blue values, row by row."""
    kind = getattr(datasets, name.upper())
    written = write_cifar(tmp_path, kind, monkeypatch, count=100)
    data = BUILDS[name](root=str(tmp_path), val=0.0)
    rows = np.concatenate([written[file] for file, _ in kind.train_list])
    assert len(data.train) == len(rows) == (500 if name == "cifar10" else 100)
    for i, c, y, x in ((0, 0, 0, 0), (7, 0, 0, 31), (len(rows) - 1, 1, 5, 2), (50, 2, 31, 30)):
        assert data.train.images[i, c, y, x] == rows[i, 1024 * c + 32 * y + x]
    assert torch.equal(data.test.images, torch.from_numpy(written[kind.test_list[0][0]]).reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == [j % LABELS[name] for j in range(100)]


@pytest.mark.parametrize("packed", [False, True], ids=["ubyte", "gz"])
def test_mnist_reads_packed_and_unpacked_files_and_writes_nothing(packed: bool, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / "MNIST" / "raw", packed)
    if not packed:  # unpacked files have priority, as in torchvision
        (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"half a download")
    before = sorted(tmp_path.rglob("*"))
    data = mnist.build(root=str(tmp_path), val=0.0)
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match="FashionMNIST/raw"):
        fashion_mnist.build(root=str(tmp_path))


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.usefixtures("offline")
def test_download_of_existing_files_does_nothing(
    name: str, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, tmp_path, datasets, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    BUILDS[name](root=str(tmp_path), download=True, val=0.0)
    assert sorted(tmp_path.rglob("*")) == before


def test_mnist_agrees_with_torchvision(tmp_path: Path, datasets: ModuleType) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    theirs, ours = datasets.MNIST(tmp_path), mnist.build(root=str(tmp_path), val=0.0)
    assert torch.equal(theirs.data, ours.train.images.squeeze(1))
    assert torch.equal(theirs.targets, ours.train.labels)


def test_parts_labels_and_axes_of_svhn(tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_svhn(tmp_path, datasets.SVHN, monkeypatch, train=30, extra=50, test=20)
    build = partial(svhn.build, root=str(tmp_path), val=0.0)
    assert [len(build(split=s).train) for s in ("train", "extra", "both")] == [30, 50, 80]
    both = build(split="both")
    images, labels = (np.concatenate(parts) for parts in zip(written["train"], written["extra"], strict=True))
    assert torch.equal(both.train.images, torch.from_numpy(images).movedim(3, 1))
    assert both.train.labels.tolist() == [int(y) % 10 for y in labels]
    assert both.test.labels[9] == 0, "the digit 0 is 10 in the files"
    assert {build(split=s).fingerprint()["test_sha256"] for s in svhn.SPLITS} == {both.fingerprint()["test_sha256"]}
    with pytest.raises(ValueError, match="split=all: allowed are train, extra, both"):
        build(split="all")


def test_svhn_as_in_dorefas_script(tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized to 40x40, brightness and contrast changed, divided by 256, no crop, no validation
    split.
    """
    write_svhn(tmp_path, datasets.SVHN, monkeypatch, train=30, extra=50, test=20)
    data = svhn.build(
        root=str(tmp_path), split="both", val=0.0, size=40, pad=0, brightness=30, contrast=0.5, normalize="by256"
    )
    assert (data.shape, len(data.train), len(data.val)) == ((3, 40, 40), 80, 0)
    assert data.augment == Augment(brightness=30, contrast=0.5)
    assert (data.mean, data.std) == ((0.0,) * 3, (256 / 255,) * 3)
    for key, value in (("size", 0), ("brightness", 256.0), ("contrast", 2.0)):
        with pytest.raises(ValueError, match=rf"^{key}={value}: allowed is"):
            svhn.build(root=str(tmp_path), **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BUILDS)
def test_named_normalizations(name: str, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    write(name, tmp_path, datasets, monkeypatch)
    half = BUILDS[name](root=str(tmp_path), val=0.0, normalize="half")
    channels = half.shape[0]
    assert (half.mean, half.std) == ((0.5,) * channels, (0.5,) * channels)
    with pytest.raises(ValueError, match="normalize=theirs: allowed are own, unit, half, by256, imagenet"):
        BUILDS[name](root=str(tmp_path), val=0.0, normalize="theirs")


def test_svhn_needs_only_the_files_of_the_split(
    tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_svhn(tmp_path, datasets.SVHN, monkeypatch, train=30, test=20)
    assert len(svhn.build(root=str(tmp_path), val=0.5).test) == 20
    with pytest.raises(DataError, match=r"1 of 3 files are missing in .*\nexpected there: extra_32x32\.mat\n"):
        svhn.build(root=str(tmp_path), split="both")


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("cifar10", "cifar-10-batches-py", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"]),
        ("cifar100", "cifar-100-python", ["train", "test", "meta"]),
        ("mnist", "MNIST/raw", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
        ("fashion_mnist", "FashionMNIST/raw", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
        ("svhn", "", ["train_32x32.mat", "test_32x32.mat"]),
    ],
)
@pytest.mark.usefixtures("offline")
def test_errors_name_missing_files(
    name: str, folder: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root, top in (("here", tmp_path / "here"), ("~/there", tmp_path / "home" / "there")):
        with pytest.raises(DataError) as raised:
            BUILDS[name](root=root)
        first, second, third = str(raised.value).splitlines()
        assert first.endswith(f" in {top / folder}")
        assert all(file in second for file in files)
        assert "dataset.root=DIR" in third
        assert "dataset.download=true" in third
        assert folder in third
        assert raised.value.status == 3
    assert not list(tmp_path.iterdir())


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "truncated": content[:middle],
        "longer": content + b"!",
        "empty": b"",
        "another": b"<!DOCTYPE html><html>sign in</html>",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "another", "flipped"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("cifar100", "cifar-100-python/test"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte.gz"),
        ("fashion_mnist", "FashionMNIST/raw/train-labels-idx1-ubyte"),
        ("svhn", "test_32x32.mat"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_errors_name_damaged_files(
    name: str, file: str, how: str, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, tmp_path, datasets, monkeypatch)
    if file.endswith(".gz"):
        plain = tmp_path / file.removesuffix(".gz")
        (tmp_path / file).write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    damage(tmp_path / file, how)
    if how == "flipped" and "mnist" in name and not file.endswith(".gz"):
        return  # one bit of an unpacked IDX file: the format has no checksum, and torchvision reads it too
    with pytest.raises(DataError) as raised:
        BUILDS[name](root=str(tmp_path))
    first, *rest = str(raised.value).splitlines()
    assert first == f"damaged or truncated: {tmp_path / file}"
    assert len(rest) == 2
    assert "dataset.download=true" in rest[1]


def test_a_pickle_with_another_md5_is_not_unpickled(
    tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    trap = tmp_path / "opened"
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"cpathlib\nPath\n(" + _text(str(trap)) + b"tRcos\nmkdir\n(" + _text(str(trap)) + b"tR.")
    with pytest.raises(DataError, match="md5"):
        cifar10.build(root=str(tmp_path))
    assert not trap.exists()


def test_errors_of_inconsistent_mnist_files(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(39, np.uint8)))
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte, {labels}\n40 images, 39 labels"):
        mnist.build(root=str(tmp_path))
    labels.write_bytes(idx(np.full(40, 10, np.uint8)))
    with pytest.raises(DataError, match=rf"damaged or truncated: {labels}\nValueError: label 10, expected"):
        mnist.build(root=str(tmp_path))
    labels.write_bytes(b"\0\0\x09" + idx(np.zeros(40, np.uint8))[3:])
    with pytest.raises(DataError, match="begins with 00000901, not with 00000801"):  # of signed bytes
        mnist.build(root=str(tmp_path))


def test_error_of_files_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    write_mnist(tmp_path / "MNIST" / "raw")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ResourceError, match=r"/MNIST/raw/train-images-idx3-ubyte: Permission denied$"):
        mnist.build(root=str(tmp_path))


class RecordingHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]


@pytest.fixture
def mirror(tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serve MNIST's packed files on this machine, as the mirror that torchvision downloads from."""
    served = tmp_path / "served"
    write_mnist(served, packed=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(RecordingHandler, directory=str(served))) as server:
        server.paths = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
        resources = [(name, md5(served / name)) for name, _ in datasets.MNIST.resources]
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.shutdown()


def test_files_are_downloaded_once(mirror: Any, tmp_path: Path) -> None:
    root = tmp_path / "new" / "data"
    data = mnist.build(root=str(root), download=True, val=0.0)
    assert len(data.train) == 40
    fetched = len(mirror.paths)
    assert fetched >= 4
    assert mnist.build(root=str(root), download=True, val=0.0).fingerprint() == data.fingerprint()
    assert mnist.build(root=str(root), val=0.0).fingerprint() == data.fingerprint()
    assert len(mirror.paths) == fetched


def test_error_of_a_failed_download_explains_the_manual_way(
    tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = tmp_path / "new"
    with pytest.raises(DataError) as raised:
        mnist.build(root=str(root), download=True)
    first, second, third = str(raised.value).splitlines()
    assert first.startswith("dataset.download=true: RuntimeError: Error downloading train-images-idx3-ubyte.gz")
    assert "t10k-labels-idx1-ubyte" in second
    assert str(root / "MNIST" / "raw") in third
    assert f"dataset.root={root}" in third


def test_error_of_a_download_without_disk_space(
    tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "t10k"))

    monkeypatch.setattr(datasets.MNIST, "download", full)
    with pytest.raises(ResourceError, match=f"{tmp_path}/t10k: No space left"):
        mnist.build(root=str(tmp_path), download=True)


def test_statistics_are_exact_for_any_layout_and_constant_images() -> None:
    images = torch.from_numpy(random_bytes(50, 6, 7, 3)).movedim(3, 1)
    mean, std = mean_and_std(images)
    for c in range(3):
        values = images[:, c].numpy().astype(np.float64) / 255
        assert mean[c] == pytest.approx(values.mean(), abs=1e-12)
        assert std[c] == pytest.approx(values.std(), abs=1e-12)
    assert mean_and_std(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)) == ((0.2,), (1 / 255,))


def test_the_command_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["dataset=cifar10"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) <= 3, shown.err
    assert lines[0].startswith("qbench: ")
    assert str(tmp_path / "data" / "cifar-10-batches-py") in lines[0]
    assert "data_batch_1" in shown.err
    assert "dataset.root=DIR" in shown.err
    assert not list(tmp_path.iterdir())
