"""Loaders of the published data sets, on small files in the original formats, without network
access.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import published_files
import pytest
import torch
from conftest import Configure
from published_files import BUILDS, LABELS, write, write_cifar, write_mnist, write_svhn

from qbench.config import groups
from qbench.config.registry import create
from qbench.data import cifar10, fashion_mnist, mnist, svhn
from qbench.data.augment import Augment
from qbench.data.cifar_files import CIFAR10, CIFAR100, CifarFiles
from qbench.data.dataset import Split
from qbench.data.loader import Loader
from qbench.errors import DataError

offline = published_files.offline
datasets = published_files.datasets


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
        assert split.images.is_contiguous(
            memory_format=torch.channels_last if "cifar" in name else torch.contiguous_format
        )
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
        with pytest.raises(ValueError, match=rf"pad={pad}: must be 0 to 31"):
            cifar10.build(root=str(tmp_path), pad=pad)
    with pytest.raises(ValueError, match=r"val=1\.0: must be"):
        cifar10.build(root=str(tmp_path), val=1.0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pixels_stay_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files hold an image as 1024 red, 1024 green, 1024 blue values, row by row."""
    written = write_cifar(tmp_path, name, monkeypatch, count=100)
    *train_files, test_file = written
    data = BUILDS[name](root=str(tmp_path), val=0.0)
    rows = np.concatenate([written[file] for file in train_files])
    assert len(data.train) == len(rows) == (500 if name == "cifar10" else 100)
    for i, c, y, x in ((0, 0, 0, 0), (7, 0, 0, 31), (len(rows) - 1, 1, 5, 2), (50, 2, 31, 30)):
        assert data.train.images[i, c, y, x] == rows[i, 1024 * c + 32 * y + x]
    assert torch.equal(data.test.images, torch.from_numpy(written[test_file]).reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == [j % LABELS[name] for j in range(100)]


@pytest.mark.parametrize("published", [CIFAR10, CIFAR100], ids=lambda published: published.kind)
def test_md5_and_names_of_cifar_files_are_those_of_torchvision(published: CifarFiles, datasets: ModuleType) -> None:
    theirs = getattr(datasets, published.kind)
    assert published.folder == theirs.base_folder
    assert dict(published.train) == dict(theirs.train_list)
    assert dict(published.test) == dict(theirs.test_list)
    assert dict(published.names) == {theirs.meta["filename"]: theirs.meta["md5"]}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_images_are_in_memory_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and validation share the memory of the images that were read, and the loader uses it too."""
    write_cifar(tmp_path, name, monkeypatch, count=200)
    data = BUILDS[name](root=str(tmp_path), val=0.5)
    storages = {split.images.untyped_storage().data_ptr() for split in (data.train, data.val)}
    assert len(storages) == 1
    loader = Loader(data, 8, 0, torch.device("cpu"))
    for part, split in (("train", data.train), ("val", data.val), ("test", data.test)):
        loaded = loader.splits[part]
        assert isinstance(loaded, Split)
        assert loaded.images.data_ptr() == split.images.data_ptr()


@pytest.mark.full
def test_peak_memory_of_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of the published size take 176 MiB. Reading, dividing and checking them adds less than half of that."""
    write_cifar(tmp_path, "cifar10", monkeypatch, count=10_000)
    code = f"""
from dataclasses import replace
from pathlib import Path
from qbench.data import cifar10
from qbench.data.dataset_check import check_dataset
cifar10.CIFAR10 = replace(cifar10.CIFAR10, train={cifar10.CIFAR10.train}, test={cifar10.CIFAR10.test},
                          names={cifar10.CIFAR10.names})
def peak():  # of this program; getrusage would include that of the program that started it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
data = cifar10.build(root={str(tmp_path)!r})
check_dataset(data, "cifar10")
data.fingerprint()
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 176 <= int(done.stdout) <= 264


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
    with pytest.raises(ValueError, match="split=all: must be one of train, extra, both"):
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
        with pytest.raises(ValueError, match=rf"^{key}={value}: must be"):
            svhn.build(root=str(tmp_path), **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BUILDS)
def test_named_normalizations(name: str, tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    write(name, tmp_path, datasets, monkeypatch)
    half = BUILDS[name](root=str(tmp_path), val=0.0, normalize="half")
    channels = half.shape[0]
    assert (half.mean, half.std) == ((0.5,) * channels, (0.5,) * channels)
    with pytest.raises(ValueError, match="normalize=theirs: must be one of own, unit, half, by256, imagenet"):
        BUILDS[name](root=str(tmp_path), val=0.0, normalize="theirs")


def test_svhn_needs_only_the_files_of_the_split(
    tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_svhn(tmp_path, datasets.SVHN, monkeypatch, train=30, test=20)
    assert len(svhn.build(root=str(tmp_path), val=0.5).test) == 20
    with pytest.raises(DataError, match=r"1 of 3 files are missing in .*\nmissing: extra_32x32\.mat\n"):
        svhn.build(root=str(tmp_path), split="both")
