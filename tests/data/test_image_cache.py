"""Decoded images on disk: the same batches as from the files, content-addressed, sealed, and built again if damaged."""

import os
import shutil
import threading
from pathlib import Path

import image_sets
import numpy as np
import pytest
import torch
from conftest import Configure
from helpers import picture, write_images
from image_sets import CPU, all_batches, build_folder, equal, halved

from qbench.config.identity import run_identity
from qbench.data import image_cache, image_folders, images, tiny_imagenet
from qbench.data.augment import Augment
from qbench.data.dataset import Split
from qbench.data.file_stream import FileSplit
from qbench.data.image_cache import open_cache
from qbench.data.loader import Loader
from qbench.errors import DataError, ResourceError

temporary_cache = image_sets.temporary_cache
streamed = image_sets.streamed


@pytest.mark.parametrize("augment", ["plain", "inception"])
@pytest.mark.parametrize("shard_bytes", [2**30, 2000])
def test_batches_are_the_same_as_from_the_files(
    augment: str, shard_bytes: int, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "SHARD_BYTES", shard_bytes)
    words = {"augment": augment, "jitter": 0.2, "val": 0.25}
    files = build_folder(streamed, **words)
    build_folder(streamed, **words, cache=str(tmp_path / "decoded"))
    for name in ("decode_image", "load_crop"):
        monkeypatch.setattr(images, name, None)
    monkeypatch.setattr(image_cache, "decode_image", None)
    cached = build_folder(streamed, **words, cache=str(tmp_path / "decoded"))
    assert isinstance(cached.train, FileSplit)
    assert cached.train.cache is not None
    shards = list((tmp_path / "decoded").glob("*/*.u8"))
    assert len(shards) == 1 if shard_bytes == 2**30 else len(shards) > 3
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for workers in (0, 1):
        assert equal(all_batches(files), all_batches(cached, workers))
    for name in ("val", "test"):
        one, other = (list(Loader(data, 4, 0, CPU).unaugmented(name)) for data in (files, cached))
        assert equal(one, other), name
    assert files.fingerprint() == cached.fingerprint()


def test_images_in_memory_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set", size=(20, 18))
    kept = build_folder(root, val=0.4)
    build_folder(root, val=0.4, cache=str(tmp_path / "decoded"))
    monkeypatch.setattr(image_folders, "decode_image", None)
    cached = build_folder(root, val=0.4, cache=str(tmp_path / "decoded"))
    assert isinstance(cached.train, Split)
    assert kept.fingerprint() == cached.fingerprint()


@pytest.mark.parametrize("side", [12, 16, 20, 0])
@pytest.mark.parametrize("pad", [0, 3])
def test_a_crop_of_pixels_equals_that_of_the_file(side: int, pad: int, tmp_path: Path) -> None:
    """Also if the pixels are not resized yet, the crop leaves the image, or the area is random."""
    path = tmp_path / "image.png"
    picture(3, 31, 20).save(path)
    pixels = images.decode_image(path, side)
    for augment in (Augment(pad, flip=True, size=12), Augment(flip=True, size=12, area=0.08), Augment(size=12)):
        generator = torch.Generator().manual_seed(0)
        draws = [*torch.rand(20, augment.draws, generator=generator).tolist(), None]
        target = side or 16
        for draw in draws if not (augment.area and side) else ():
            expected = images.load_crop(path, target, augment, draw)
            assert torch.equal(images.crop_of_pixels(pixels, target, augment, draw), expected)


def test_the_place_of_a_crop_is_rounded_as_in_memory() -> None:
    """The product is a float32: the largest number below 1 times 2^24 + 1 is 2^24, not 2^24 - 1 + something."""
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    for length in (224, 2**24 + 223):
        expected = int((torch.tensor([largest]) * (length - 224 + 1)).long())
        assert images.fixed_crop(length, 224, Augment(size=224), [largest, 0.0, 0.9])[1] == expected


def test_other_files_or_sizes_have_another_cache(streamed: Path, tmp_path: Path) -> None:
    def built(**words: object) -> int:
        build_folder(streamed, cache=str(tmp_path / "decoded"), **words)
        return len(list((tmp_path / "decoded").glob("*/sealed.json")))

    assert built() == 1
    assert built(flip=False, size=8, pad=1) == 1, "these keys do not change what is stored"
    assert built(resize=18) == 2
    assert built(augment="inception") == 3
    assert built(augment="inception", resize=18) == 3, "images keep their size"
    picture(77, 30, 30).save(next(streamed.rglob("*.jpg")))
    assert built() == 4


@pytest.mark.parametrize("fault", ["index", "shard", "missing", "unsealed"])
def test_a_damaged_cache_is_built_again(
    fault: str, streamed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = build_folder(streamed, cache=str(tmp_path / "decoded"))
    expected = all_batches(data)
    (shard,) = (tmp_path / "decoded").glob("*/*.u8")
    if fault == "shard":
        values = bytearray(shard.read_bytes())
        values[100] ^= 1
        shard.write_bytes(values)
    elif fault == "index":
        halved(shard.parent / "index.npy")
    else:
        (shard if fault == "missing" else shard.parent / "sealed.json").unlink()
    capsys.readouterr()
    assert equal(expected, all_batches(build_folder(streamed, cache=str(tmp_path / "decoded"))))
    assert "is damaged; the cache is built again" in capsys.readouterr().err


def test_a_copied_cache_is_hashed_once(
    streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_folder(streamed, cache=str(tmp_path / "decoded"))
    shutil.copytree(tmp_path / "decoded", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.*"):
        os.utime(path, (1, 1))
    capsys.readouterr()
    build_folder(streamed, cache=str(tmp_path / "copy"))
    monkeypatch.setattr(image_cache.hashlib, "file_digest", None)
    build_folder(streamed, cache=str(tmp_path / "copy"))
    assert capsys.readouterr().err == "", "neither damaged nor decoded"


def test_damaged_images_are_named(streamed: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(streamed)) for path in sorted(streamed.rglob("*.jpg"))]
    (streamed / names[3]).write_bytes(b"no image")
    with pytest.raises(DataError, match=f"1 of {len(names)} image files") as raised:
        open_cache(tmp_path / "decoded", "0", streamed, names, 16)
    assert names[3] in str(raised.value)
    assert [path.suffix for path in (tmp_path / "decoded").iterdir()] == [".lock"], "nothing else is left"


def test_a_folder_that_cannot_be_written_is_reported(streamed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        build_folder(streamed, cache=str(tmp_path / "file" / "decoded"))


def test_processes_that_need_the_same_cache_build_it_once(
    streamed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(path.relative_to(streamed)) for path in sorted(streamed.rglob("*.jpg"))]

    def build() -> None:
        open_cache(tmp_path / "decoded", "0", streamed, names, 16)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err.count("decoding") == 1


def test_the_cache_is_no_part_of_the_identity(configure: Configure, tmp_path: Path) -> None:
    for name in ("folder", "imagenet", "tiny_imagenet"):
        one, other = (
            run_identity(configure(f"dataset={name}", f"dataset.cache={folder}")) for folder in ("''", tmp_path)
        )
        assert one.digest == other.digest, name
        assert one.protocol_hash == other.protocol_hash
        assert "cache" not in one.keys["dataset"]


def test_tiny_imagenet_takes_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 3)
    root = write_images(tmp_path / "set", size=(64, 64))
    plain = tiny_imagenet.build(root=str(root), val=0.2)
    cached = tiny_imagenet.build(root=str(root), val=0.2, cache=str(tmp_path / "decoded"))
    assert plain.fingerprint() == cached.fingerprint()
