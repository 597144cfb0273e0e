"""Damaged image files and the fingerprint of the files."""

import io
import json
import os
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_sets
import numpy as np
import pytest
import torch
from helpers import picture, write_images
from image_sets import CPU, all_batches, build_folder, equal, expected_epoch_seed, halved
from PIL import Image

from qbench.data import file_check, images
from qbench.data.dataset import Dataset
from qbench.data.file_stream import FileSplit
from qbench.data.loader import Loader
from qbench.errors import DataError

temporary_cache = image_sets.temporary_cache
streamed = image_sets.streamed


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (halved, ""),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html><html>sign in</html>"), "not an image"),
    "zeros at the end": (lambda path: path.write_bytes(path.read_bytes()[:-200] + bytes(200)), ""),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file or directory"),
    "head only": (lambda path: path.write_bytes(path.read_bytes()[:30]), ""),
}


@pytest.mark.parametrize("read", ["whole", "ends"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
@pytest.mark.parametrize("how", DAMAGE)
def test_the_error_names_every_bad_file(
    how: str, suffix: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (how, suffix) == ("zeros at the end", "bmp"):
        return  # the pixels are zeros then: the format has no checksum
    change, why = DAMAGE[how]
    if read == "ends":
        monkeypatch.setattr(file_check, "MAX_WHOLE_BYTES", 0)
        monkeypatch.setattr(file_check, "END_BYTES", 300)
    root = write_images(tmp_path / "set", suffix=suffix)
    bad = [f"train/ant/1.{suffix}", f"train/cow/5.{suffix}", f"val/bee/0.{suffix}"]
    for name in bad:
        change(root / name)
    with pytest.raises(DataError) as raised:
        build_folder(root)
    first, second, third = str(raised.value).splitlines()
    assert first == f"3 of 27 image files in {root} cannot be used"
    assert [part.partition(" (")[0] for part in second.split("), ")] == bad
    assert second.count(why) >= 3
    assert "replace them by complete files" in third
    assert not (tmp_path / "cache").exists(), "nothing is cached for an unusable data set"


def test_the_error_names_twenty_files_and_counts_the_others(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", count=10)
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"^30 of 45 image files .*\n.*, and 10 more\n") as raised:
        build_folder(root)
    assert str(raised.value).count("(empty)") == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_by_decoding_is_collected(workers: int, tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", suffix="png")
    data = build_folder(root)
    for name in ("train/ant/1.png", "train/bee/2.png"):
        path = root / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(bytes(content))
    (root / "train/cow/3.png").unlink()
    loader = Loader(data, 3, 0, CPU, workers)
    with pytest.raises(DataError) as raised:
        list(loader.train(0))
    first, second, _ = str(raised.value).splitlines()
    assert first == f"3 of 18 image files in {root} cannot be used"
    for name in ("train/ant/1.png", "train/bee/2.png", "train/cow/3.png (No such file or directory)"):
        assert name in second
    with pytest.raises(DataError, match="1 of 6 image files"):  # a limit of 6 images
        list(loader.unaugmented("train", 6, 2))
    with pytest.raises(DataError, match="2 of 26 image files"):  # PNG's own checksums
        build_folder(root)


def test_no_batch_follows_damage_found_by_decoding(tmp_path: Path) -> None:
    """The batches before it are unchanged, so that a run resumes once the file is repaired."""
    root = write_images(tmp_path / "set")
    data = build_folder(root)
    assert isinstance(data.train, FileSplit)
    expected, found = all_batches(data), []
    order = [name for x in stream_order(data, 3, 1) for name in x]
    (root / order[9]).write_bytes(b"")  # in the third batch of four
    batches = Loader(data, 4, 3, CPU).train(1)
    found += [next(batches), next(batches)]
    with pytest.raises(DataError, match=f"1 of 16 image files .*\n{order[9]}"):
        next(batches)
    assert equal(found, expected[:2])


def stream_order(data: Dataset, seed: int, epoch: int) -> list[list[str]]:
    assert isinstance(data.train, FileSplit)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(expected_epoch_seed(seed, epoch)))
    return [[data.train.names[i] for i in part] for part in order.split(4)]


def test_errors_of_the_system_are_not_reported_as_damage(streamed: Path, monkeypatch: Any) -> None:
    def busy(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    data = build_folder(streamed)
    monkeypatch.setattr(images, "load_crop", busy)
    with pytest.raises(OSError, match="Too many open files"):
        all_batches(data)


# The fingerprint


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, checked = write_images(tmp_path / "set"), []
    check_file = file_check._check_file

    def recorded(path: str, size: int, whole: bool) -> file_check._FileFacts:
        checked.append(path)
        return check_file(path, size, whole)

    monkeypatch.setattr(file_check, "_check_file", recorded)
    first = build_folder(root).fingerprint()
    assert len(checked) == first["files"] == 27
    assert first["files_bytes"] == sum(path.stat().st_size for path in root.rglob("*.jpg"))
    assert first["files_hashed"] == "names and whole files"
    assert build_folder(root).fingerprint() == first
    assert len(checked) == 27, "cached"
    (memory,) = (tmp_path / "cache").rglob("*.json")
    memory.write_text("{")
    assert build_folder(root).fingerprint() == first
    assert len(checked) == 54, "the cached result is damaged"
    memory.write_text(json.dumps(json.loads(memory.read_text()) | {"check": {"count": 1}}))
    assert build_folder(root).fingerprint() == first
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(root), str(copy)], check=True)
    assert build_folder(copy).fingerprint() == first, "the same files elsewhere"
    picture(77, 20, 20).save(root / "val" / "ant" / "0.jpg")
    changed = build_folder(root).fingerprint()
    assert {key for key in first if first[key] != changed[key]} == {"files_bytes", "files_sha256"}


def test_only_the_ends_of_files_are_hashed_in_large_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_check, "MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr(file_check, "END_BYTES", 100)
    root = write_images(tmp_path / "set", suffix="bmp")
    first = build_folder(root).fingerprint()
    assert first["files_hashed"] == "names, sizes, first and last 100 bytes of each file"
    path = root / "train" / "ant" / "0.bmp"
    whole = path.read_bytes()
    for place, differs in ((60, True), (len(whole) // 2, False), (len(whole) - 50, True)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        os.utime(path, ns=(place, place))
        assert (build_folder(root).fingerprint()["files_sha256"] != first["files_sha256"]) == differs, place


def test_a_cache_folder_without_write_access_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build_folder(root).fingerprint() == build_folder(root).fingerprint()


def test_the_fingerprint_covers_the_split(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    first, second = (build_folder(root, val=val).fingerprint() for val in (0.2, 0.4))
    assert {key for key in first if first[key] != second[key]} == {
        "train_images", "val_images", "train_sha256", "val_sha256"
    }  # fmt: skip


def _deep_png(values: Any, color: int) -> bytes:
    """Return a PNG of 16 bits per channel; PIL writes grey ones only."""
    height, width = values.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _saved_by_pil(values: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


DEEP: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "grey PNG": ("png", lambda v: _deep_png(v, 0)),
    "RGB PNG": ("png", lambda v: _deep_png(np.stack([v] * 3, 2), 2)),
    "grey PNG with alpha": ("png", lambda v: _deep_png(np.stack([v, v * 0 + 65535], 2), 4)),
    "RGB PNG with alpha": ("png", lambda v: _deep_png(np.stack([v, v, v, v * 0 + 65535], 2), 6)),
    "16-bit TIFF": ("tif", lambda v: _saved_by_pil(v, "TIFF")),
    "32-bit TIFF": ("tif", lambda v: _saved_by_pil(v.astype(np.int32), "TIFF")),
}


@pytest.mark.parametrize("read", ["whole", "ends"])
@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_that_use_few_bits_are_refused(
    kind: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if read == "ends":
        monkeypatch.setattr(file_check, "MAX_WHOLE_BYTES", 0)
    suffix, encode = DEEP[kind]
    root, values = tmp_path / "set", np.arange(256, dtype=np.uint16).reshape(16, 16)

    def write(part: str, white: int) -> None:
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            (root / part / name / f"0.{suffix}").write_bytes(encode(values * (white // 255)))

    write("train", 65535)
    write("val", 65535)
    data = build_folder(root, size=16, val=0.0)
    assert torch.equal(data.train.images[0, 0], torch.arange(256).reshape(16, 16)), "all 256 levels"  # type: ignore[union-attr]
    for bits in (8, 10, 12, 15):
        write("val", 2**bits - 1)
        with pytest.raises(
            DataError, match=r"set/val: images of 16 bits in which no value is above .*\nwhite must have"
        ):
            build_folder(root, size=16, val=0.0)
    write("val", 65535)
    write("train", 1023)
    with pytest.raises(DataError, match=r"set/train: images of 16 bits in which no value is above 1023\n"):
        build_folder(root, size=16, val=0.0)


def test_integers_outside_16_bits_are_refused(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", suffix="tif")
    for low, high in ((0, 70_000), (-5, 60_000)):
        image = np.linspace(low, high, 256).astype(np.int32).reshape(16, 16)
        (root / "train" / "bee" / "2.tif").write_bytes(_saved_by_pil(image, "TIFF"))
        with pytest.raises(
            DataError, match=rf"train/bee/2.tif \(the pixel values are {low} to {high}: must be 0 to 65535\)"
        ):
            build_folder(root)


def test_a_dark_pgm_states_its_own_white_level(tmp_path: Path) -> None:
    root, values = tmp_path / "set", np.arange(256, dtype=np.uint16).reshape(16, 16)
    for part in ("train", "val"):
        (root / part / "ant").mkdir(parents=True)
        (root / part / "ant" / "0.pgm").write_bytes(b"P5 16 16 1023\n" + values.astype(">u2").tobytes())
    train = build_folder(root, size=16, val=0.0).train.images[0, 0].numpy()  # type: ignore[union-attr]
    assert train[0, 0] == 0
    assert np.abs(train - values / 1023 * 256).max() <= 1, "a quarter of white at most"
