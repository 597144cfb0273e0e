"""Data sets of images in folders, for the tests of image files."""

from pathlib import Path

import pytest
import torch
from helpers import write_images
from torch import Tensor

from qbench.data import folder
from qbench.data.dataset import Dataset
from qbench.data.loader import Loader

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build_folder(root: Path, **options: object) -> Dataset:
    return folder.build(root=str(root), **({"size": 12, "resize": 16, "val": 0.0} | options))  # type: ignore[arg-type]


def all_batches(data: Dataset, workers: int = 0, start: int = 0, epoch: int = 1) -> list[tuple[Tensor, Tensor]]:
    return list(Loader(data, 4, 3, CPU, workers).train(epoch, start))


def equal(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def remove_folder(path: Path) -> None:
    for inner in sorted(path.rglob("*"), reverse=True):
        inner.rmdir() if inner.is_dir() else inner.unlink()
    path.rmdir()


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", count=8)


def expected_epoch_seed(seed: int, epoch: int) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:8]) >> 1


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
