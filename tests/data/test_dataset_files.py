"""Missing, damaged and downloaded files of the published data sets."""

import gzip
import http.server
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import published_files
import pytest
import torch
from published_files import BUILDS, idx, md5, pickled_text, random_bytes, write, write_cifar, write_mnist

from qbench.cli.main import main as cli
from qbench.data import cifar10, mnist
from qbench.data.normalize import mean_and_std
from qbench.errors import DataError, ResourceError

offline = published_files.offline
datasets = published_files.datasets


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
    with pytest.raises(DataError) as raised:
        BUILDS[name](root=str(tmp_path))
    first, *rest = str(raised.value).splitlines()
    assert first == f"damaged or truncated: {tmp_path / file}"
    assert len(rest) == 2
    assert "dataset.download=true" in rest[1]


def test_a_pickle_with_another_md5_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    trap = tmp_path / "opened"
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(
        b"cpathlib\nPath\n(" + pickled_text(str(trap)) + b"tRcos\nmkdir\n(" + pickled_text(str(trap)) + b"tR."
    )
    with pytest.raises(DataError, match="md5"):
        cifar10.build(root=str(tmp_path))
    assert not trap.exists()


def test_error_of_a_cifar_file_whose_images_have_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes().replace(b"labels(K\x00", b"labels(", 1))
    monkeypatch.setattr(cifar10, "CIFAR10", replace(cifar10.CIFAR10, test={"test_batch": md5(path)}))
    with pytest.raises(DataError, match="40 images, 39 labels"):
        cifar10.build(root=str(tmp_path))


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
