"""Image files: layouts, damage, conversions, crops and colours against slow references, worker
processes.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Configure
from filelock import FileLock
from helpers import CLASSES, picture, write_images
from PIL import Image
from torch import Tensor

from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.config.registry import create
from qbench.data import file_check, folder, image_folders, imagenet, images, tiny_imagenet
from qbench.data.augment import Augment, random_box
from qbench.data.dataset import Dataset, Loader, Split
from qbench.data.file_stream import FileSplit
from qbench.data.normalize import FIXED, normalization
from qbench.errors import ConfigError, DataError
from qbench.system.torchvision import torchvision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build_folder(root: Path, **options: object) -> Dataset:
    return folder.build(root=str(root), **({"size": 12, "resize": 16, "val": 0.0} | options))  # type: ignore[arg-type]


def all_batches(data: Dataset, workers: int = 0, start: int = 0, epoch: int = 1) -> list[tuple[Tensor, Tensor]]:
    return list(Loader(data, 4, 3, CPU, workers).train(epoch, start))


def equal(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


# The layout


def test_classes_labels_and_ignored_files(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    (root / "train" / "ant" / "deeper").mkdir()
    picture(7, 20, 20).save(root / "train" / "ant" / "deeper" / "x.PNG")
    (root / "train" / "bee" / "notes.txt").write_text("no image")
    (root / "train" / "bee" / "._0.jpg").write_text("what another system leaves behind")
    (root / "train" / "readme.md").write_text("beside the classes")
    (root / "train" / ".hidden").mkdir()
    data = build_folder(root)
    assert isinstance(data.train, FileSplit)
    assert data.classes == 3
    assert data.shape == (3, 12, 12)
    assert data.train.labels.bincount().tolist() == [7, 6, 6]
    assert data.test.labels.bincount().tolist() == [3, 3, 3]
    assert len(data.val) == 0
    for name, label in zip(data.train.names, data.train.labels.tolist(), strict=True):
        assert name.startswith(f"train/{CLASSES[label]}/")
    assert "train/ant/deeper/x.PNG" in data.train.names
    assert list(data.train.names) == sorted(data.train.names)
    assert data.fingerprint()["files_ignored"] == 3
    assert data.fingerprint()["files"] == 28


def test_part_of_train_is_the_validation_split(tmp_path: Path) -> None:
    data = build_folder(write_images(tmp_path / "set"), val=0.5)
    assert data.train.labels.bincount().tolist() == data.val.labels.bincount().tolist() == [3, 3, 3]
    assert isinstance(data.train, FileSplit)
    assert isinstance(data.val, FileSplit)
    assert not set(data.train.names) & set(data.val.names)


def test_the_test_split_is_val_or_test(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", tested="test")
    assert len(build_folder(root).test) == 9
    write_images(tmp_path / "other", tested="val")
    (tmp_path / "other" / "val").rename(root / "val")
    with pytest.raises(DataError, match=r"holds val/ and test/\ntype dataset\.test=val or dataset\.test=test"):
        build_folder(root)
    assert build_folder(root, test="val").test.names[0].startswith("val/")  # type: ignore[union-attr]
    assert build_folder(root, test="test").test.names[0].startswith("test/")  # type: ignore[union-attr]


def _remove(path: Path) -> None:
    for inner in sorted(path.rglob("*"), reverse=True):
        inner.rmdir() if inner.is_dir() else inner.unlink()
    path.rmdir()


def _flatten(path: Path) -> None:
    for i, image in enumerate(sorted(path.rglob("*.jpg"))):
        image.rename(path / f"{i:02}.jpg")
    for inner in [p for p in path.iterdir() if p.is_dir()]:
        inner.rmdir()


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (_remove, r"train: no such folder; .* holds nothing: it does not exist"),
    "no train": (lambda root: _remove(root / "train"), r"train: no such folder; .* holds val/"),
    "no test": (lambda root: _remove(root / "val"), r"holds neither val/ nor test/, but train/"),
    "flat": (lambda root: _flatten(root / "train"), r"train holds no folders, but 00\.jpg, .* 04\.jpg and 13 more"),
    "flat test": (lambda root: _flatten(root / "val"), r"val holds no folders, but 00\.jpg"),
    "an empty class": (lambda root: (root / "train" / "elk").mkdir(), r"1 class folders of .*train hold no .*: elk"),
    "an unknown class": (lambda root: (root / "val" / "elk").mkdir(), r"val: no class of train is called elk"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_errors_name_the_expected_layout(case: str, tmp_path: Path) -> None:
    change, phrase = LAYOUTS[case]
    root = write_images(tmp_path / "set")
    change(root)
    with pytest.raises(DataError, match=phrase) as raised:
        build_folder(root)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert f"expected: train/CLASS/*.jpg and val/CLASS/*.jpg, or test/CLASS/*.jpg, in {root}" in lines[1]
    assert "dataset.root=DIR" in lines[2]


def test_an_empty_class_of_the_test_split_is_allowed(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    _remove(root / "val" / "bee")
    assert build_folder(root).test.labels.unique().tolist() == [0, 2]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"size": 17}, "size=17: allowed is 1 to resize=16"),
        ({"size": 0}, "size=0: allowed"),
        ({"augment": "heavy"}, "augment=heavy: allowed are plain, inception"),
        ({"augment": "inception", "pad": 1}, "pad=1 has no effect with augment=inception"),
        ({"pad": 12}, "pad=12: allowed are 0 to 11"),
        ({"jitter": 1.5}, r"jitter=1\.5: allowed is 0 to 1"),
        ({"normalize": "mine"}, "normalize=mine: allowed are own, unit, half, by256, imagenet"),
        ({"val": 1.0}, r"val=1\.0: allowed"),
    ],
)
def test_errors_name_values_out_of_range(options: dict[str, object], phrase: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    with pytest.raises(ConfigError, match=rf"^dataset\.{phrase}"):
        create("dataset", {"name": "folder", "root": str(root), "size": 12, "resize": 16} | options)


# One image


def test_resizing_and_centre_crop_equal_torchvision(tmp_path: Path) -> None:
    torchvision()
    from torchvision.transforms import functional as theirs

    for width, height in ((31, 20), (20, 31), (50, 17), (16, 16), (9, 13)):
        path = tmp_path / "image.png"
        picture(width, width, height).save(path)
        for side, size in ((16, 16), (16, 11), (17, 12), (18, 7)):
            expected = np.array(theirs.center_crop(theirs.resize(Image.open(path).convert("RGB"), side), size))
            assert np.array_equal(images.load_crop(path, side, Augment(size=size), None).numpy(), expected)


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("size", [(31, 20), (20, 31), (18, 18)])
def test_a_plain_crop_equals_the_reference(size: tuple[int, int], pad: int, tmp_path: Path) -> None:
    path, augment = tmp_path / "image.png", Augment(pad, flip=True, size=12)
    picture(1, *size).save(path)
    whole = torch.from_numpy(images.decode_image(path, 16)).movedim(2, 0)
    padded = torch.zeros(3, whole.shape[1] + 2 * pad, whole.shape[2] + 2 * pad, dtype=torch.uint8)
    padded[:, pad : pad + whole.shape[1], pad : pad + whole.shape[2]] = whole
    for draw in torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).tolist():
        top, left = int(draw[0] * (padded.shape[1] - 11)), int(draw[1] * (padded.shape[2] - 11))
        expected = torch.zeros(12, 12, 3, dtype=torch.uint8)
        for y in range(12):
            for x in range(12):
                expected[y, x] = padded[:, top + y, left + (11 - x if draw[2] < 0.5 else x)]
        assert torch.equal(images.load_crop(path, 16, augment, draw), expected)


def test_an_inception_crop_equals_torchvision_with_the_same_box(tmp_path: Path) -> None:
    torchvision()
    from torchvision.transforms import functional as theirs

    path, augment = tmp_path / "image.png", Augment(flip=True, size=12, area=0.08)
    picture(2, 40, 30).save(path)
    for draw in torch.rand(20, augment.draws, generator=torch.Generator().manual_seed(0)).tolist():
        top, left, rows, columns = random_box(30, 40, draw, 0.08)
        expected = theirs.resized_crop(Image.open(path), top, left, rows, columns, [12, 12])
        expected = theirs.hflip(expected) if draw[2] < 0.5 else expected
        assert np.array_equal(images.load_crop(path, 99, augment, draw).numpy(), np.array(expected))


CONVERTED = {
    "grey.png": lambda: (picture(0, 9, 8).convert("L"), picture(0, 9, 8).convert("L").convert("RGB")),
    "grey_alpha.png": lambda: (picture(0, 9, 8).convert("LA"), picture(0, 9, 8).convert("L").convert("RGB")),
    "alpha.png": lambda: (picture(0, 9, 8).convert("RGBA"), picture(0, 9, 8)),
    "bits.png": lambda: (picture(0, 9, 8).convert("1"), picture(0, 9, 8).convert("1").convert("RGB")),
    "plain.ppm": lambda: (picture(0, 9, 8), picture(0, 9, 8)),
    "plain.bmp": lambda: (picture(0, 9, 8), picture(0, 9, 8)),
    "plain.tif": lambda: (picture(0, 9, 8), picture(0, 9, 8)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_images_of_all_modes_become_rgb(name: str, tmp_path: Path) -> None:
    image, expected = CONVERTED[name]()
    image.save(tmp_path / name)
    assert np.array_equal(images.decode_image(tmp_path / name), np.array(expected))


def test_sixteen_bits_cmyk_palettes_and_orientation(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array_equal(images.decode_image(tmp_path / "deep.png"), np.repeat((values >> 8)[:, :, None], 3, 2))
    picture(0, 40, 30).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    found = images.decode_image(tmp_path / "cmyk.jpg").astype(int)
    assert np.abs(found - np.array(picture(0, 40, 30)).astype(int)).mean() < 6
    flat = picture(0, 9, 8).quantize(7)
    flat.save(tmp_path / "palette.png", transparency=bytes([0, 128] + [255] * 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(images.decode_image(tmp_path / "palette.png"), np.array(flat.convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(0, 40, 30).save(tmp_path / "turned.jpg", exif=exif)
    assert images.decode_image(tmp_path / "turned.jpg").shape == (30, 40, 3), "not rotated, as in torchvision"
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floats"):
        images.decode_image(tmp_path / "float.tiff")


# Batches


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", count=8)


@pytest.mark.parametrize("augment", ["plain", "inception"])
def test_batches_do_not_depend_on_the_number_of_workers(augment: str, streamed: Path) -> None:
    data = build_folder(streamed, augment=augment, jitter=0.4)
    assert isinstance(data.train, FileSplit)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = all_batches(data)
    for workers in (1, 2):
        assert equal(all_batches(data, workers), whole)
        assert equal(all_batches(data, workers, start=3), whole[3:])
    assert equal(all_batches(data, 0, start=3), whole[3:])
    assert all_batches(data, 0, start=len(whole)) == []
    assert not equal(all_batches(data, epoch=2), whole)
    one, two = (list(Loader(data, 4, 0, CPU, workers).unaugmented("test", 10, 3)) for workers in (0, 2))
    assert equal(one, two)
    assert [len(y) for _, y in one] == [3, 3, 3, 1]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not used"
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in whole + one)
    assert not multiprocessing.active_children()


def test_augmentation_of_an_image_does_not_depend_on_the_batch_size(streamed: Path) -> None:
    data = build_folder(streamed, augment="inception", jitter=0.2)
    wide, narrow = (torch.cat([x for x, _ in Loader(data, size, 0, CPU).train(0)]) for size in (12, 4))
    torch.testing.assert_close(wide, narrow, atol=1e-5, rtol=0)


def test_streamed_images_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set", suffix="png", size=(20, 18))
    kept = build_folder(root, pad=2, jitter=0.3, val=0.4)
    monkeypatch.setattr(image_folders, "MAX_MEMORY", 1000)
    files = build_folder(root, pad=2, jitter=0.3, val=0.4)
    assert isinstance(kept.train, Split)
    assert isinstance(files.train, FileSplit)
    assert kept.shape == files.shape == (3, 12, 12)
    assert kept.train.images.shape[2:] == (16, 17)
    assert equal(all_batches(kept), all_batches(files))
    for name in ("train", "val", "test"):
        assert equal(list(Loader(kept, 4, 0, CPU).unaugmented(name)), list(Loader(files, 4, 0, CPU).unaugmented(name)))
    own = build_folder(root, val=0.4, normalize="own")
    torch.testing.assert_close((own.mean, own.std), normalization("own", kept.train.images))


def test_a_batch_equals_the_reference(streamed: Path) -> None:
    """Compute order, draws, crop and normalization of the streamed batches again, image by
    image.
    """
    data = build_folder(streamed, normalize="half")
    assert isinstance(data.train, FileSplit)
    loader = Loader(data, 4, 7, CPU)
    generator = torch.Generator().manual_seed(_seed(7, 2))
    order, draws = torch.randperm(24, generator=generator), torch.rand(24, 3, generator=generator)
    place = 0
    for x, y in loader.train(2):
        for got, label in zip(x, y, strict=True):
            n = int(order[place])
            image = torch.from_numpy(images.decode_image(streamed / data.train.names[n], 16)).movedim(2, 0)
            _, height, width = image.shape
            top, left = int(draws[n, 0] * (height - 11)), int(draws[n, 1] * (width - 11))
            crop = image[:, top : top + 12, left : left + 12]
            crop = crop.flip(2) if draws[n, 2] < 0.5 else crop
            torch.testing.assert_close(got, crop / 127.5 - 1, atol=1e-6, rtol=0)
            assert label == data.train.labels[n]
            place += 1
    assert place == 24


def _seed(seed: int, epoch: int) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"order {seed} {epoch}".encode()).digest()[:8]) >> 1


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(streamed: Path) -> None:
    data, device = build_folder(streamed, augment="inception"), torch.device("cuda")
    for (x, y), (u, v) in zip(all_batches(data), Loader(data, 4, 3, device, 2).train(1), strict=True):
        assert u.device.type == "cuda"
        assert torch.equal(x, u.cpu())
        assert torch.equal(y, v.cpu())


# Processes


def test_an_interrupted_epoch_leaves_no_process(streamed: Path) -> None:
    batches = Loader(build_folder(streamed), 4, 0, CPU, 2).train(0)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_batches_continue_after_a_worker_was_killed(streamed: Path) -> None:
    data = build_folder(streamed)
    expected = all_batches(data)
    batches = Loader(data, 4, 3, CPU, 1).train(1)
    found = [next(batches)]
    (child,) = multiprocessing.active_children()
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match=r"ended .*; the main process decodes the rest"):
        found += list(batches)
    assert equal(found, expected)


SCRIPT = """
import os, signal, sys, torch
from filelock import FileLock
from qbench.data import folder
from qbench.data.dataset import Loader

if __name__ == "__main__":
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, lambda number, frame: None)
    with FileLock(sys.argv[2]), open(sys.argv[2] + ".log", "w"):
        data = folder.build(root=sys.argv[1], size=12, resize=16, val=0.0)
        batches = Loader(data, 2, 0, torch.device("cpu"), 2).train(0)
        next(batches)
        print("ready", flush=True)
        sys.stdin.readline()
        print(sum(1 for _ in batches), flush=True)
"""


def _processes(mark: str) -> list[int]:
    """Return the processes with this mark in their environment, which children inherit."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"QBENCH_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@contextmanager
def _running_script(root: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", Path, str]]:
    """Run a script until it has made one batch with two workers; yield its process, its lock and
    its mark.
    """
    script, lock, mark = tmp_path / "script.py", tmp_path / "lock", f"{os.getpid()}-{time.monotonic()}"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(root), str(lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "QBENCH_MARK": mark},
    ) as main:  # fmt: skip
        assert main.stdout
        assert main.stdout.readline() == "ready\n"
        yield main, lock, mark


def _all_ended(mark: str) -> bool:
    deadline = time.monotonic() + 20
    while _processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _processes(mark)


proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@proc
def test_workers_end_with_the_main_process_and_hold_no_lock(streamed: Path, tmp_path: Path) -> None:
    with _running_script(streamed, tmp_path) as (main, lock, mark):
        processes = _processes(mark)
        assert len(processes) >= 4, "the main process, two workers, the fork server"
        for file in (lock, lock.with_name("lock.log")):
            holders = [pid for pid in processes for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.resolve() == file]
            assert holders == [main.pid], "workers do not inherit open files"
        main.kill()
        main.wait(20)
        with FileLock(lock, timeout=0):
            pass
        assert _all_ended(mark)


@proc
def test_workers_ignore_signals_to_the_process_group(streamed: Path, tmp_path: Path) -> None:
    with _running_script(streamed, tmp_path) as (main, _, mark):
        for kind in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.killpg(main.pid, kind)
        time.sleep(0.5)
        assert len(_processes(mark)) >= 4
        out, errors = main.communicate("go\n", timeout=60)
        assert (main.returncode, out, errors) == (0, "11\n", "")
        assert _all_ended(mark)


# Damage


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (halved, ""),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html><html>sign in</html>"), "no image"),
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
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(_seed(seed, epoch)))
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


# ImageNet and Tiny ImageNet


def write_classes(root: Path, part: str, count: int, inner: str = "", side: int = 64) -> None:
    for i in range(count):
        path = root / part / f"n{i:08}" / inner
        path.mkdir(parents=True)
        Image.new("RGB", (side, side), (i % 256, i // 256, 99)).save(path / f"n{i:08}_0.JPEG")
        if inner:
            (root / part / f"n{i:08}" / f"n{i:08}_boxes.txt").write_text("n_0.JPEG\t0\t0\t63\t63\n")


def write_annotated(root: Path, count: int = 200) -> None:
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\tn{(7 * i) % 200:08}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def test_imagenet(tmp_path: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "CLASSES", 20)
    for part in ("train", "val"):
        write_classes(tmp_path, part, 20)
    data = imagenet.build(root=str(tmp_path), val=0.0)
    assert (data.name, data.classes, data.shape, len(data.train), len(data.test)) == (
        "imagenet",
        20,
        (3, 224, 224),
        20,
        20,
    )
    assert isinstance(data.train, FileSplit), "streams, though these fit into memory"
    assert data.augment == Augment(flip=True, size=224, area=0.08)
    assert imagenet.build(root=str(tmp_path), val=0.0, augment="plain").augment == Augment(flip=True, size=224)
    assert (data.mean, data.std) == FIXED["imagenet"]
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"holds 20 class folders; ImageNet has 1000\n.*dataset=folder dataset.root="):
        imagenet.build(root=str(tmp_path))
    with pytest.raises(ValueError, match=r"image-net\.org"):
        imagenet.build(root=str(tmp_path), download=True)


@pytest.mark.parametrize("annotated", [True, False])
def test_tiny_imagenet_in_both_layouts(annotated: bool, tmp_path: Path) -> None:
    write_classes(tmp_path, "train", 200, "images")
    write_annotated(tmp_path) if annotated else write_classes(tmp_path, "val", 200)
    data = tiny_imagenet.build(root=str(tmp_path), val=0.0)
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (200, (3, 64, 64), 200, 200)
    assert data.augment == Augment(8, True, size=64)
    assert data.train.labels.tolist() == list(range(200))
    assert sorted(data.test.labels.tolist()) == list(range(200))
    for i in (3, 150):
        assert abs(int(data.train.images[i, 0, 30, 30]) - i) <= 3, "JPEG's rounding"
    if annotated:
        assert data.test.labels.tolist() == [(7 * i) % 200 for i in range(200)]
    x, _ = next(iter(Loader(data, 10, 0, CPU).train(0)))
    assert x.shape == (10, 3, 64, 64)
    assert data.fingerprint()["files_ignored"] == 200, "the boxes"


def test_annotations_and_sizes_of_tiny_imagenet_are_checked(tmp_path: Path) -> None:
    write_classes(tmp_path, "train", 200, "images")
    write_annotated(tmp_path)
    notes = tmp_path / "val" / "val_annotations.txt"
    whole = notes.read_text()
    notes.write_text(whole.replace("n00000007", "n99999999"))
    with pytest.raises(DataError, match=r"val_annotations.txt, line 2: expected are"):
        tiny_imagenet.build(root=str(tmp_path))
    notes.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    with pytest.raises(DataError, match=r"lists 198 images, and does not list 2 others, such as val/images/val_198"):
        tiny_imagenet.build(root=str(tmp_path))
    notes.write_text(whole + "val_777.JPEG\tn00000001\n")
    with pytest.raises(DataError, match=r"1 of 401 .*\nval/images/val_777.JPEG \(No such file or directory\)"):
        tiny_imagenet.build(root=str(tmp_path))
    notes.write_text(whole)
    Image.new("RGB", (64, 48)).save(tmp_path / "val" / "images" / "val_3.JPEG")
    with pytest.raises(DataError, match=r"1 of 200 .*\nval/images/val_3.JPEG \(64x85 pixels, expected 64x64\)"):
        tiny_imagenet.build(root=str(tmp_path))
    _remove(tmp_path / "train" / "n00000000")
    with pytest.raises(DataError, match="Tiny ImageNet has 200"):
        tiny_imagenet.build(root=str(tmp_path))


# The command line


@pytest.mark.parametrize("name", ["folder", "imagenet", "tiny_imagenet"])
def test_the_yaml_has_the_defaults_of_the_function(name: str, configure: Configure) -> None:
    from qbench.config.registry import defaults

    written = configure(f"dataset={name}").dataset
    assert {**written, "recipe": None} == {**defaults("dataset", name), "recipe": None}


def test_which_keys_are_part_of_the_identity(configure: Configure) -> None:
    def place(*words: str) -> str:
        return run_identity(configure(*words)).directory

    assert place("dataset=folder", "dataset.root=a") != place("dataset=folder", "dataset.root=b")
    for name in ("imagenet", "tiny_imagenet"):
        assert place(f"dataset={name}", "dataset.root=a") == place(f"dataset={name}", "dataset.root=b")
    assert place("dataset=folder", "runtime.num_workers=0") == place("dataset=folder", "runtime.num_workers=8")
    with pytest.raises(ConfigError, match=r"runtime\.num_workers=-1: allowed"):
        compose.configurations(["runtime.num_workers=-1"])


def end_to_end(tmp_path: Path, size: tuple[int, int] | None) -> list[str]:
    """Write a data set; return the words of a short run with it."""
    root = write_images(tmp_path / "set", count=8, size=size)
    return [
        "dataset=folder", f"dataset.root={root}", "dataset.size=16", "dataset.resize=18", "dataset.val=0.25",
        "experiment=smoke", "method=dorefa", "bits=w2", "optim.batch_size=6", "pretrain.optim.batch_size=6",
        "runtime.tensorboard=false", f"out={tmp_path / 'out'}",
    ]  # fmt: skip


def check_manifests(out: Path) -> None:
    manifests = list(out.rglob("manifest.json"))
    assert len(manifests) == 2, "the float baseline and the run"
    for path in manifests:
        data = json.loads(path.read_text())["data"]
        assert (data["files"], data["train_images"], data["val_images"], data["test_images"]) == (36, 18, 6, 12)
        assert len(data["files_sha256"]) == 64


def test_a_run_with_images_in_memory(tmp_path: Path) -> None:
    assert cli(end_to_end(tmp_path, (20, 20))) == 0
    check_manifests(tmp_path / "out")


def test_a_command_that_streams_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = end_to_end(tmp_path, None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "qbench", *words],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_manifests(tmp_path / "out")
    (tmp_path / "set" / "train" / "bee" / "2.jpg").write_bytes(b"")
    assert cli([*words, "seed=1"]) == 3
    assert "train/bee/2.jpg (empty)" in capsys.readouterr().err
