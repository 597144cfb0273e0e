"""Data sets in folders: layouts, ImageNet, Tiny ImageNet, and runs with them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_sets
import pytest
from conftest import ROOT, Configure
from helpers import CLASSES, picture, write_images
from image_sets import CPU, build_folder, remove_folder
from PIL import Image

from qbench.cli.main import main as cli
from qbench.config import compose
from qbench.config.identity import run_identity
from qbench.config.registry import create
from qbench.data import folder, imagenet, tiny_imagenet
from qbench.data.augment import Augment
from qbench.data.dataset import Split
from qbench.data.dataset_check import dataset_notes
from qbench.data.file_stream import FileSplit
from qbench.data.image_folders import SUFFIXES
from qbench.data.loader import Loader
from qbench.data.normalize import FIXED
from qbench.errors import ConfigError, DataError
from qbench.experiment.builders import build_dataset
from qbench.runs.directory import directory_name

temporary_cache = image_sets.temporary_cache


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
    with pytest.raises(DataError, match=r"contains val/ and test/\ntype dataset\.test=val or dataset\.test=test"):
        build_folder(root)
    assert build_folder(root, test="val").test.names[0].startswith("val/")  # type: ignore[union-attr]
    assert build_folder(root, test="test").test.names[0].startswith("test/")  # type: ignore[union-attr]


def _flatten(path: Path) -> None:
    for i, image in enumerate(sorted(path.rglob("*.jpg"))):
        image.rename(path / f"{i:02}.jpg")
    for inner in [p for p in path.iterdir() if p.is_dir()]:
        inner.rmdir()


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (remove_folder, r"train: no such folder; .* contains nothing: it does not exist"),
    "no train": (lambda root: remove_folder(root / "train"), r"train: no such folder; .* contains val/"),
    "no test": (lambda root: remove_folder(root / "val"), r"contains neither val/ nor test/; it contains train/"),
    "flat": (
        lambda root: _flatten(root / "train"),
        r"train contains no folders; it contains 00\.jpg, .* 04\.jpg and 13 more",
    ),
    "flat test": (lambda root: _flatten(root / "val"), r"val contains no folders; it contains 00\.jpg"),
    "an empty class": (lambda root: (root / "train" / "elk").mkdir(), r"1 class folders of .*train contain no .*: elk"),
    "an unknown class": (
        lambda root: (root / "val" / "elk").mkdir(),
        r"val: contains folders that are not classes of train: elk",
    ),
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
    assert f"expected in {root}: train/CLASS/IMAGE and val/CLASS/IMAGE (or test/CLASS/IMAGE)" in lines[1]
    assert "dataset.root=DIR" in lines[2]


def test_an_empty_class_of_the_test_split_is_allowed(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    remove_folder(root / "val" / "bee")
    assert build_folder(root).test.labels.unique().tolist() == [0, 2]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"size": 17}, "size=17: must be 1 to resize=16"),
        ({"size": 0}, "size=0: must be"),
        ({"augment": "heavy"}, "augment=heavy: must be one of plain, inception"),
        ({"augment": "inception", "pad": 1}, "pad=1 has no effect with augment=inception"),
        ({"pad": 12}, "pad=12: must be 0 to 11"),
        ({"jitter": 1.5}, r"jitter=1\.5: must be 0 to 1"),
        ({"normalize": "mine"}, "normalize=mine: must be one of own, unit, half, by256, imagenet, or"),
        ({"normalize": [[0.5] * 3, [0.5] * 2]}, r"normalize=.*: must be means and deviations"),
        ({"normalize": [[0.5] * 3, [0.5, 0.5, 0]]}, r"normalize=.*: must be means and deviations above 0"),
        ({"normalize": [0.5, 0.5]}, r"normalize=.*: must be means and deviations"),
        ({"normalize": [[0.5] * 2, [0.5] * 2]}, "normalize=.* is for 2 channels, but the images have 3"),
        ({"normalize": 3}, "normalize=3: must be a word, such as imagenet"),
        ({"val": 1.0}, r"val=1\.0: must be"),
    ],
)
def test_errors_name_values_out_of_range(options: dict[str, object], phrase: str, tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    with pytest.raises(ConfigError, match=rf"^dataset\.{phrase}"):
        create("dataset", {"name": "folder", "root": str(root), "size": 12, "resize": 16} | options)


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
    with pytest.raises(
        DataError, match=r"contains 20 class folders, but ImageNet has 1000\n.*dataset=folder dataset.root="
    ):
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
    with pytest.raises(DataError, match=r"val_annotations.txt, line 2: must be"):
        tiny_imagenet.build(root=str(tmp_path))
    notes.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    with pytest.raises(DataError, match=r"lists 198 images; 2 image files are not listed, such as val/images/val_198"):
        tiny_imagenet.build(root=str(tmp_path))
    notes.write_text(whole + "val_777.JPEG\tn00000001\n")
    with pytest.raises(DataError, match=r"1 of 401 .*\nval/images/val_777.JPEG \(No such file or directory\)"):
        tiny_imagenet.build(root=str(tmp_path))
    notes.write_text(whole)
    Image.new("RGB", (64, 48)).save(tmp_path / "val" / "images" / "val_3.JPEG")
    with pytest.raises(DataError, match=r"1 of 200 .*\nval/images/val_3.JPEG \(64x85 pixels, expected 64x64\)"):
        tiny_imagenet.build(root=str(tmp_path))
    remove_folder(tmp_path / "train" / "n00000000")
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
        return directory_name(run_identity(configure(*words)))

    assert place("dataset=folder", "dataset.root=a") != place("dataset=folder", "dataset.root=b")
    for name in ("imagenet", "tiny_imagenet"):
        assert place(f"dataset={name}", "dataset.root=a") == place(f"dataset={name}", "dataset.root=b")
    assert place("dataset=folder", "runtime.num_workers=0") == place("dataset=folder", "runtime.num_workers=8")
    with pytest.raises(ConfigError, match=r"runtime\.num_workers=-1: must be"):
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


LINKS = {  # link below the set -> what it leads to
    "to the folder above": ("train/ant/loop", ".."),
    "to itself": ("train/ant/loop", "."),
    "of two classes": ("train/ant/more", "../bee"),
    "to the root, as a class": ("train/zoo", ".."),
    "to the test images": ("train/ant/more", "../../val"),
    "to a folder outside, twice": ("train/ant/store", "../../../store"),
    "test images that are training images": ("val/ant/more", "../../train/ant"),
    "a test folder that is train": ("test", "train"),
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_cannot_make_an_image_count_twice(case: str, tmp_path: Path) -> None:
    link, target = LINKS[case]
    root = write_images(tmp_path / "set")
    options = {"test": "test"} if link == "test" else {}
    (tmp_path / "store").mkdir()
    picture(1, 20, 20).save(tmp_path / "store" / "x.png")
    (root / "train" / "cow" / "outside").symlink_to(tmp_path / "store")
    assert len(build_folder(root).train) == 19, "a single link to a folder outside is followed"
    (root / link).symlink_to(target)
    with pytest.raises(DataError, match=r"is the folder .*, which was already read\nremove the link"):
        build_folder(root, **options)


def one_folder(root: Path, counts: tuple[int, ...] = (5, 10, 20)) -> Path:
    """Write the images of three classes into one folder."""
    for c, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * c + i, 20, 20).save(root / name / f"{i}.png")
    return root


def test_a_share_of_one_folder_is_the_test_split(tmp_path: Path) -> None:
    """The split is stratified, and always the same."""
    root = one_folder(tmp_path / "photos")
    (root / "notes.txt").write_text("")
    options: dict[str, Any] = {"root": str(root), "size": 16, "resize": 18, "augment": "inception"}
    data = folder.build(test=0.2, val=0.25, **options)
    parts = {part: getattr(data, part) for part in ("train", "val", "test")}
    counts = {part: split.labels.bincount().tolist() for part, split in parts.items()}
    assert counts == {"train": [3, 6, 12], "val": [1, 2, 4], "test": [1, 2, 4]}
    names = [name for split in parts.values() for name in split.names]
    assert len(set(names)) == 35
    assert all((root / name).is_file() for name in names)
    assert all(CLASSES[label] in name for name, label in zip(parts["test"].names, parts["test"].labels, strict=True))
    assert data.fingerprint()["files_ignored"] == 1
    assert folder.build(test=0.2, val=0.25, **options).fingerprint() == data.fingerprint()
    assert folder.build(test=0.4, val=0.25, **options).test.names != parts["test"].names


@pytest.mark.parametrize(
    ("test", "counts", "divided", "message"),
    [
        (0.0, (5, 5, 5), False, "test=0.0: must be a fraction of the images, above 0 and below 1"),
        (1, (5, 5, 5), False, "test=1: must be a fraction"),
        (0.9, (1, 5, 5), False, "test=0.9: leaves 1 classes without training images; there are 11 images in 3 classes"),
        (0.1, (1, 2, 3), False, "test=0.1: leaves no test images; there are 6 images in 3 classes"),
        (0.2, (5, 5, 5), True, "contains train/, val/, which are splits and not classes\ntype dataset.test=auto"),
        ("auto", (5, 5, 5), False, "or dataset=folder dataset.test=0.2 for a folder that contains CLASS/IMAGE"),
    ],
)
def test_a_folder_that_cannot_be_divided_is_refused(
    test: Any, counts: tuple[int, ...], divided: bool, message: str, tmp_path: Path
) -> None:
    root = write_images(tmp_path) if divided else one_folder(tmp_path, counts)
    with pytest.raises((DataError, ValueError)) as raised:
        folder.build(root=str(root), test=test, size=16, resize=18)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_the_error_of_a_divided_folder_names_only_its_layout_and_every_suffix(tmp_path: Path) -> None:
    """dataset.test=0.2 is typed already: the message does not name it, nor a folder train."""
    (tmp_path / "set" / "ant").mkdir(parents=True)
    (tmp_path / "set" / "ant" / "0.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 class folders of .*set contain no images: ant") as raised:
        folder.build(root=str(tmp_path / "set"), test=0.2, size=16, resize=18)
    assert str(raised.value).splitlines()[1:] == [
        f"expected in {tmp_path / 'set'}: CLASS/IMAGE, one folder per class; IMAGE ends in .jpg, .jpeg, .png, .ppm, "
        ".bmp, .pgm, .tif, .tiff, .webp",
        "type dataset.root=DIR for the folder that contains the folders of classes",
    ]
    with pytest.raises(DataError, match="no such folder") as raised:
        folder.build(root=str(tmp_path / "sett"), test=0.2, size=16, resize=18)
    assert "train/" not in str(raised.value)
    assert ", ".join(SUFFIXES) in (ROOT / "conf/dataset/folder.yaml").read_text()


@pytest.mark.parametrize(
    "names",
    [("train", "valid", "test"), ("train", "dev"), ("Train", "Test"), ("training", "validation"), ("a", "b", "eval")],
)
def test_folders_of_splits_are_not_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name / "cat").mkdir(parents=True)
        for i in range(5):
            picture(i, 20, 20).save(tmp_path / name / "cat" / f"{i}.png")
    splits = ", ".join(f"{name}/" for name in sorted(names) if len(name) > 1)
    with pytest.raises(
        DataError, match=f"contains {splits}, which are splits and not classes\ntype dataset.test=auto, or"
    ):
        folder.build(root=str(tmp_path), test=0.2, size=16, resize=18)


def test_a_share_or_a_name_can_be_typed(tmp_path: Path, configure: Configure) -> None:
    words = ["dataset=folder", f"dataset.root={one_folder(tmp_path / 'photos')}", "dataset.size=16"]
    data = build_dataset(configure(*words, "dataset.resize=18", "dataset.test=0.2").dataset)
    assert (len(data.train), len(data.val), len(data.test)) == (25, 3, 7)
    for value in ("[val]", "true"):
        with pytest.raises(ConfigError, match=r"dataset\.test="):
            build_dataset(configure(*words, f"dataset.test={value}").dataset)


def test_images_that_are_smaller_than_the_crop_are_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", size=(24, 20))
    data = build_folder(root, size=32, resize=40)
    assert data.note == (
        "images of 20x24 pixels are enlarged to 40 pixels and cropped to 32; "
        "for crops without enlarging: dataset.resize=20 dataset.size=20"
    )
    assert data.note in dataset_notes(data)
    assert build_folder(root, size=20, resize=20).note == ""
