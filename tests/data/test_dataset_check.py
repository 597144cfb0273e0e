"""A data set of the user's own: its values are checked before any training."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import long_tier
from PIL import Image
from torch import Tensor

from qbench.cli.main import main as cli
from qbench.data import digits, glyphs, synthetic
from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split
from qbench.data.dataset_check import (
    check_dataset,
    dataset_notes,
    missing_classes,
    other_scale,
    repeated_images,
    unseen_classes,
)
from qbench.data.file_stream import FileSplit
from qbench.errors import DataError


def small() -> Dataset:
    return synthetic.build(train=40, test=20, classes=4, channels=1, size=8)


def with_labels(part: str, change: Callable[[Any], Any]) -> Callable[[Dataset], Dataset]:
    def changed(data: Dataset) -> Dataset:
        split = getattr(data, part)
        return replace(data, **{part: Split(split.images, change(split.labels))})

    return changed


def with_images(part: str, change: Callable[[Any], Any]) -> Callable[[Dataset], Dataset]:
    def changed(data: Dataset) -> Dataset:
        split = getattr(data, part)
        return replace(data, **{part: Split(change(split.images), split.labels)})

    return changed


def with_crops_of(size: int) -> Callable[[Dataset], Dataset]:
    return lambda data: replace(data, augment=Augment(size=size))


WRONG: dict[str, tuple[Callable[[Dataset], Dataset], str]] = {
    "a label out of range": (with_labels("train", lambda y: y * 2), "train: labels are 0 to 6: must be 0 to 3"),
    "a test label out of range": (with_labels("test", lambda y: y + 2), "test: labels are 2 to 5: must be 0 to 3"),
    "negative labels": (with_labels("train", lambda y: y - 1), "train: labels are -1 to 2: must be 0 to 3"),
    "labels from 1": (with_labels("train", lambda y: y + 1), "1 to 4: must be 0 to 3\nto convert: labels - 1"),
    "validation labels from 1": (with_labels("val", lambda y: y + 1), "val: labels are "),
    "one-hot labels": (with_labels("train", lambda y: torch.eye(4)[y].long()), "int64 (36, 4): must be int64 (N,)"),
    "int8 labels": (with_labels("test", lambda y: y.to(torch.int8)), "torch.int8 (20,): must be int64 (N,)"),
    "int32 labels": (with_labels("train", lambda y: y.int()), "torch.int32 (36,): must be int64 (N,)"),
    "float labels": (with_labels("train", lambda y: y.float()), "torch.float32 (36,): must be int64 (N,)"),
    "labels of numpy": (with_labels("train", lambda y: y.numpy()), "labels of a split are a ndarray: must be int64"),
    "labels in a list": (with_labels("train", lambda y: y.tolist()), "labels of a split are a list: must be int64"),
    "float images from 0 to 1": (with_images("train", lambda x: x / 255), "val: images are torch.uint8, but train"),
    "float test images": (with_images("test", lambda x: x.float()), "test: images are torch.float32, but train images"),
    "float images with NaN": (with_images("train", lambda x: x / 0.0), "train: the images contain inf or nan"),
    "images cut to 0 and 1": (with_images("train", lambda x: x // 128), "train: the largest pixel value is 1"),
    "int64 images": (with_images("train", lambda x: x.long()), "torch.int64 (36, 1, 8, 8): must be uint8"),
    "images without channels": (with_images("train", lambda x: x[:, 0]), "torch.uint8 (36, 8, 8): must be uint8 (N, C"),
    "images of numpy": (with_images("train", lambda x: x.numpy()), "images of a split are a ndarray: must be uint8"),
    "more images than labels": (with_labels("train", lambda y: y[:-1]), "36 images but 35 labels"),
    "test images of another size": (with_images("test", lambda x: x[..., 1:]), "test: images are (1, 8, 7), but train"),
    "test images in colour": (with_images("test", lambda x: x.repeat(1, 3, 1, 1)), "test: images are (3, 8, 8), but"),
    "crops larger than images": (with_crops_of(9), "train: images are (1, 8, 8): must be at least 9 x 9 pixels"),
    "crops of random area": (
        lambda data: replace(data, augment=Augment(size=8, area=0.5)),
        "augment: area is for a FileSplit; images in memory are cropped by size and pad",
    ),
    "files with repeated borders": (
        lambda data: replace(
            data, augment=Augment(1, replicate=True), test=FileSplit("/x", ("a.png",), torch.tensor([1]), 8)
        ),
        "test: augment: replicate is for images in memory; a FileSplit is padded with black",
    ),
    "float64 images": (with_images("train", lambda x: x.double()), "torch.float64 (36, 1, 8, 8): must be uint8 (N, C"),
    "std of 0": (lambda data: replace(data, std=(0.0,)), "std=(0.0,): must be above 0"),
    "std of NaN": (lambda data: replace(data, std=(float("nan"),)), "std=(nan,): must be above 0"),
    "mean of NaN": (lambda data: replace(data, mean=(float("nan"),)), "mean=(nan,): must be 0 to 1"),
    "mean of 0 to 255": (lambda data: replace(data, mean=(127.5,)), "mean=(127.5,): must be 0 to 1"),
    "mean of three channels": (lambda data: replace(data, mean=(0.5,) * 3), "must be 1 numbers, one per channel"),
    "one class": (lambda data: replace(data, classes=1), "classes=1: must be an integer of 2 or more"),
    "images of one class": (with_labels("train", torch.zeros_like), "train: all labels are 0: there must be two or"),
    "classes as float": (lambda data: replace(data, classes=4.0), "classes=4.0: must be an int"),
    "no training images": (lambda data: replace(data, train=data.train.take(torch.arange(0))), "train has no images"),
    "a split of torch": (
        lambda data: replace(data, test=torch.utils.data.TensorDataset(data.test.labels)),
        "test is a TensorDataset: must be a Split or a FileSplit",
    ),
    "files with labels out of range": (
        lambda data: replace(data, test=FileSplit("/x", ("a.png",), torch.tensor([4]), 8)),
        "test: labels are 4 to 4: must be 0 to 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_values_that_cannot_be_meant_are_refused(case: str) -> None:
    change, phrase = WRONG[case]
    with pytest.raises(DataError) as raised:
        check_dataset(change(small()), "mine:data")
    assert phrase in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 2


def test_usual_data_sets_pass() -> None:
    for data in (small(), replace(small(), val=small().val.take(torch.arange(0))), replace(small(), std=(256 / 255,))):
        check_dataset(data, "mine:data")
    check_dataset(replace(small(), augment=Augment(size=7)), "mine:data")


def test_images_of_two_types_end_with_status_3_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with_floats.py").write_text(
        "from dataclasses import replace\n"
        "from qbench.data import synthetic\n"
        "from qbench.data.dataset import Split\n"
        "def data(*, val: float = 0.1):\n"
        "    data = synthetic.build(train=40, test=20, size=8)\n"
        "    return replace(data, train=Split(data.train.images / 255, data.train.labels))\n"
    )
    assert cli(["dataset=with_floats:data", "epochs=1", "pretrain.epochs=1"]) == 3
    assert "val: images are torch.uint8, but train images are torch.float32" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(("largest", "dtype"), [(32_767, np.int16), (32_768, np.int32), (70_000, np.int32)])
def test_predictions_of_many_classes_are_stored_whole(largest: int, dtype: type, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from qbench.experiment.session import TrainingSession

    answers = torch.tensor([[0, 1], [largest, 2]])
    written = SimpleNamespace(write_artifact=lambda name, data: (tmp_path / name).write_bytes(data))
    TrainingSession.write_predictions(SimpleNamespace(directory=written), answers)  # type: ignore[arg-type]
    stored = np.load(tmp_path / "predictions.npy")
    assert stored.dtype == dtype
    assert stored.tolist() == answers.tolist()


def in_files(split: Split, root: Path) -> FileSplit:
    """Return the split with each image in a file. Files with equal images have equal content."""
    names = tuple(f"{root.name}{i}.png" for i in range(len(split)))
    for name, image in zip(names, split.images, strict=True):
        Image.fromarray(image.movedim(0, 2).expand(-1, -1, 3).numpy()).save(root.parent / name)
    return FileSplit(str(root.parent), names, split.labels, 8)


@pytest.mark.parametrize("files", [False, True])
def test_test_and_validation_images_that_are_training_images_are_counted(tmp_path: Path, files: bool) -> None:
    data = small()
    assert not repeated_images(data)
    train, val, test = data.train, data.val, data.test
    val = Split(torch.cat([val.images, train.images[:3]]), torch.cat([val.labels, train.labels[:3]]))
    known = torch.cat([train.images[5:7], val.images[:1]])
    test = Split(torch.cat([test.images, known]), torch.cat([test.labels, torch.zeros(3, dtype=torch.int64)]))
    splits: dict[str, Any] = {"train": train, "val": val, "test": test}
    if files:
        splits = {name: in_files(split, tmp_path / name) for name, split in splits.items()}
    assert [note.partition(",")[0] for note in repeated_images(replace(data, **splits))] == [
        f"3 of {len(val)} val images are also in train",
        f"3 of {len(test)} test images are also in train or val",
    ]


def test_classes_without_any_image_are_named() -> None:
    """As those of labels from 1, or of a class whose number was left out."""
    for change, absent in ((lambda y: y + 1, "0"), (lambda y: y * 2, "1, 3, 5"), (lambda y: y, "")):
        data = small()
        for part in ("train", "val", "test"):
            data = with_labels(part, change)(data)
        data = replace(data, classes=int(data.train.labels.max()) + 1)
        named = f"{len(absent.split(', '))} of the {data.classes} classes ({absent}) have no images"
        assert missing_classes(data) == ([named] if absent else [])
        assert not unseen_classes(data)


def test_images_of_classes_without_training_images_are_counted() -> None:
    data = small()
    assert not unseen_classes(data)
    labels = torch.tensor([3, 0, 3, 1, 2])
    changed = with_labels("train", lambda labels: labels.clamp(max=1))(data)
    changed = replace(changed, val=data.val.take(torch.tensor([], dtype=torch.int64)))
    changed = replace(changed, test=Split(data.test.images[:5], labels))
    assert unseen_classes(changed) == ["3 of 5 test images belong to classes without a training image (2, 3)"]


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (lambda y: torch.zeros_like(y) + 2, "all 80 test images belong to class 2"),
        (lambda y: torch.where(y == 3, 1, y), "1 of the 4 classes (3) have no test images"),
        (lambda y: y % 2 + 2, "2 of the 4 classes (0, 1) have no test images"),
        (lambda y: y, None),
    ],
)
def test_classes_without_test_images_are_named(labels: Callable[[Tensor], Tensor], note: str | None) -> None:
    data = with_labels("test", labels)(synthetic.build(train=80, test=80, classes=4, channels=1, size=8))
    assert missing_classes(data) == ([note] if note else [])


def test_a_class_that_is_rare_in_train_may_be_missing_in_test() -> None:
    data = synthetic.build(train=80, test=80, classes=4, channels=1, size=8)
    data = with_labels("test", lambda y: y.clamp(max=2))(data)
    rare = with_labels("train", lambda y: torch.where(torch.arange(len(y)) < 8, 3, y.clamp(max=2)))(data)
    assert missing_classes(rare) == []
    assert missing_classes(data) == ["1 of the 4 classes (3) have no test images"]


SCALES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "equal": (lambda x: x, False),
    "half": (lambda x: x // 2, True),
    "4 bits": (lambda x: x // 16, True),
    "0 to 3": (lambda x: x // 64, True),
    "brighter": (lambda x: x // 4 + 192, True),
    "less contrast around the same mean": (lambda x: x // 4 + 96, True),
    "inverted": (lambda x: 255 - x, True),
    "a tenth darker": (lambda x: (0.9 * x).to(torch.uint8), False),
}


def dark(n: int) -> Dataset:
    """Return images of which most pixels are dark, so that inversion is seen."""
    data = synthetic.build(train=n, test=n, classes=4, channels=1, size=8)
    for part in ("train", "val", "test"):
        data = with_images(part, lambda x: (x.float() ** 2 / 255).to(torch.uint8))(data)
    return data


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("part", ["val", "test"])
def test_images_on_another_scale_than_those_of_train_are_noted(case: str, part: str) -> None:
    change, noted = SCALES[case]
    notes = other_scale(with_images(part, change)(dark(300)))
    assert [note.partition(":")[0] for note in notes] == (
        [f"{part} images have other grey values than train images"] if noted else []
    )


def test_grey_values_of_files_are_compared_too(tmp_path: Path) -> None:
    data = dark(20)
    files = {part: in_files(getattr(data, part), tmp_path / part) for part in ("train", "val")}
    brighter = Split(data.test.images // 4 + 192, data.test.labels)
    data = replace(data, **files, test=in_files(brighter, tmp_path / "test"), augment=Augment(size=8))
    (note,) = other_scale(data)
    mean, train = brighter.images.float().mean(), dark(20).train.images.float().mean()
    start = "test images have other grey values than train images: on average, an image has mean"
    assert note.startswith(f"{start} {mean:.0f} and")
    assert f"but {train:.0f} and" in note


@pytest.mark.parametrize(
    "build", [synthetic.build, digits.build, partial(glyphs.build, train=3400, test=340), long_tier(glyphs.build)]
)
def test_data_sets_of_qbench_have_no_notes(build: Callable[[], Dataset]) -> None:
    assert dataset_notes(build()) == ()


def test_a_data_set_without_validation_images_has_no_notes() -> None:
    assert dataset_notes(digits.build(val=0)) == ()
