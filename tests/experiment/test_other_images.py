"""Runs, teachers and evaluations on other images than those of a run: refused, or named in the result."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import long_tier
from PIL import Image

import qbench
from qbench.analysis.evaluate import evaluate
from qbench.analysis.export import evaluate_file, export
from qbench.analysis.overrides import override_dataset
from qbench.config.compose import configurations
from qbench.data.dataset import Dataset, Split
from qbench.data.dataset_check import trained_images
from qbench.errors import CheckpointError, ConfigError
from qbench.experiment.builders import build_dataset
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import image_warnings
from qbench.runs.result import Result

SMOKE = ("experiment=smoke", "runtime.tensorboard=false", "optim.batch_size=8", "pretrain.optim.batch_size=8")
SIZES = ("dataset.resize=8", "dataset.size=8", "dataset.flip=false")


def write_photos(root: Path, parts: dict[str, int], names: tuple[str, ...] = ("bright", "dark")) -> None:
    """Write images of 16x16 pixels: `parts` maps a folder to its number of images per class."""
    noise = np.random.default_rng(0)
    for part, count in parts.items():
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(100 * label, 100 * label + 70, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that trains a run on photographs in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *words: qbench.run(*SMOKE, "dataset=folder", *SIZES, *words, out=tmp_path / "out")


@pytest.mark.parametrize("name", [long_tier("val"), "test", long_tier("holdout")])
def test_changed_test_images_are_noticed_whatever_their_folder_is_called(
    name: str, train: Callable[..., Result]
) -> None:
    write_photos(Path("photos"), {"train": 10, name: 4})
    words = ("dataset.root=photos", f"dataset.test={name}", "method=dorefa", "bits=w2a2")
    train(*words)
    first, second = Path("photos", name, "bright"), Path("photos", name, "dark")
    first.rename("moved")
    second.rename(first)
    Path("moved").rename(second)
    with pytest.raises(CheckpointError, match="the images of dataset=folder have changed"):
        train(*words)


def test_evaluation_on_a_copy_of_the_data_set_keeps_the_keys_of_the_run(train: Callable[..., Result]) -> None:
    write_photos(Path("photos"), {"train": 10, "val": 4})
    result = train("dataset.root=photos", "method=dorefa", "bits=w4a4")
    shutil.copytree("photos", "copy")
    run = Path(result.run)
    tables = [evaluate(run, words) for words in (["dataset=folder", "dataset.root=copy"], ["dataset.root=copy"])]
    assert result.final
    assert [table.values[0]["top1"] for table in tables] == [result.final.test.top1] * 2  # type: ignore[index]
    node = {"name": "folder", "root": "photos", "resize": 8, "size": 8}
    assert override_dataset(node, ["dataset=folder", "dataset.root=copy"]) == node | {"root": "copy"}


def test_problems_of_the_evaluated_images_are_named(train: Callable[..., Result]) -> None:
    """The images of the other folder are smaller than the crop, and those of the other split were trained on."""
    write_photos(Path("photos"), {".": 20})
    run = Path(train("dataset.root=photos", "dataset.test=0.2", "method=dorefa", "bits=w2a2").run)
    notes = evaluate(run, ["dataset.test=0.6"]).notes
    assert any(
        note.startswith("warning: the network was trained or selected on 16 of these 24 test images") for note in notes
    )
    assert not [note for note in evaluate(run).notes if note.startswith("warning")]
    shutil.copytree("photos", "small")
    for path in Path("small").rglob("*.png"):
        Image.open(path).resize((4, 4)).save(path)
    notes = evaluate(run, ["dataset.root=small"]).notes
    assert any(note.startswith("warning: images of 4x4 pixels are enlarged to 8 pixels") for note in notes)


@pytest.mark.parametrize("in_memory", ["trained", "tested"])
def test_seen_images_are_recognized_in_memory_and_in_files(
    in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set with one image of another size is not kept in memory, but read from its files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_photos(tmp_path / "photos", {"train": 10, "val": 4})
    shutil.copytree(tmp_path / "photos", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "val")
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "other" / "val")
    larger = Image.fromarray(np.full((20, 24, 3), 7, np.uint8))
    larger.save(tmp_path / ("other" if in_memory == "trained" else "photos") / "val" / "dark" / "more.png")
    node = {"name": "folder", "val": 0.1, "resize": 8, "size": 8}
    trained, tested = (build_dataset(node | {"root": str(tmp_path / name)}) for name in ("photos", "other"))
    assert isinstance(trained.train, Split) != isinstance(tested.test, Split)
    (message,) = trained_images(trained, tested)
    count = 20 + (in_memory == "trained")
    assert message.startswith(f"the network was trained or selected on 20 of these {count} test images")


def test_other_names_of_the_classes_are_named(train: Callable[..., Result]) -> None:
    """Accuracy counts class i as class i of the run, which is another class if the names have another order."""
    write_photos(Path("photos"), {"train": 10, "val": 4})
    write_photos(Path("renamed"), {"train": 10, "val": 4}, names=("z_bright", "dark"))
    run = Path(train("dataset.root=photos", "method=dorefa", "bits=w2a2").run)
    file, words = export(run, "packed").path, ["dataset.root=renamed"]
    warning = (
        "warning: 2 of 2 classes have other names than in training (class 0 is bright, here dark; class 1 is dark, "
        "here z_bright); if they are other classes, the accuracy of the trained network means nothing here"
    )
    assert warning in evaluate(run, words).notes
    assert warning in evaluate_file(file, words).notes
    assert not [note for note in evaluate(run, ["dataset.root=photos"]).notes if "other names" in note]


def test_only_images_of_training_and_validation_count_as_seen() -> None:
    digits = build_dataset({"name": "digits", "val": 0.1, "pad": 1})
    assert trained_images(digits, digits) == []
    swapped = replace(digits, train=digits.test, val=digits.val)
    (message,) = trained_images(swapped, digits)
    assert message.startswith("the network was trained or selected on 450 of these 450 test images")
    assert trained_images(replace(digits, val=digits.test), digits) == [message]


def test_initial_weights_from_a_run_on_another_split_are_named(train: Callable[..., Result]) -> None:
    write_photos(Path("photos"), {".": 20})
    words = ("dataset.root=photos", "method=lsq", "bits=w4a4")
    source = Path(train("dataset.root=photos", "dataset.test=0.2", "method=float").run)
    other = train(*words, "dataset.test=0.4", f"init={source}")
    assert any(f"init={source} was trained on other images or another split" in w for w in other.warnings)
    same = train(*words, "dataset.test=0.2", f"init={source}")
    assert not [w for w in same.warnings if "another split" in w]


@pytest.mark.full
def test_initial_weights_for_other_classes_or_other_numbers_are_named(train: Callable[..., Result]) -> None:
    """The file of weights need not be in the directory of its run."""
    write_photos(Path("photos"), {"train": 10, "val": 4})
    write_photos(Path("renamed"), {"train": 10, "val": 4}, names=("z_bright", "dark"))
    write_photos(Path("bright"), {"train": 10, "val": 4})
    for image in Path("bright").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(image)) // 2 + 100).save(image)
    words = ("method=ptq", "bits=w8a8", "dataset.normalize=own")
    first = Path(train("dataset.root=photos", "method=float", "dataset.normalize=own").run)
    shutil.copy(first / "best.pt", "weights.pt")

    def warnings(*more: str) -> list[str]:
        return [text for text in train(*words, *more).warnings if text.startswith("init=")]

    for seed, init in (("seed=0", str(first)), ("seed=1", "weights.pt")):
        classes = [text for text in warnings("dataset.root=renamed", f"init={init}", seed) if "classes have" in text]
        assert classes == [
            f"init={init}: 2 of 2 classes have other names than in training (class 0 is bright, here dark; class 1 is "
            "dark, here z_bright); if they are other classes, the accuracy of the trained network means nothing here; "
            "to train a new last layer, add model.head=new"
        ]
        brighter = warnings("dataset.root=bright", f"init={init}", seed)
        (numbers,) = (text for text in brighter if "reads other numbers" in text)
        assert numbers.startswith(f"init={init}: the weights were trained on images that are normalized with mean (0.")
        assert not warnings("dataset.root=photos", f"init={init}", seed)
    head = train("method=dorefa", "dataset.root=renamed", f"init={first}", "model.head=new", "dataset.normalize=own")
    assert not [text for text in head.warnings if "classes have" in text]


def test_the_warning_on_seen_images_is_passed_on(train: Callable[..., Result]) -> None:
    """The second run started from a network that was trained on some of its test images, and the third from the second.

    A run's file of weights is its directory in this respect.
    """
    write_photos(Path("photos"), {".": 20})
    words = ("dataset.root=photos", "method=dorefa")
    first = Path(train(*words, "bits=w4a4", "dataset.test=0.2").run)
    other = (*words, "dataset.test=0.6")
    second = train(*other, "bits=w3a3", f"init={first}")
    third = train(*other, "bits=w2a2", f"init={Path(second.run) / 'last.pt'}")
    text = f"init={first} was trained on other images or another split of dataset=folder; "
    for result, warning in ((second, text), (third, f"init={second.run}/last.pt: {text}")):
        assert [found for found in result.warnings if found.startswith(warning)], result.warnings
        assert [note for note in evaluate(Path(result.run)).notes if note.startswith(f"warning: {warning}")]
    for file, bits in (("best.pt", "bits=w8a8"), ("last.pt", "bits=w7a7")):
        started = train(*other, bits, f"init={first / file}")
        assert [found for found in started.warnings if found.startswith(f"init={first / file} was trained on other")]
    unseen = train(*words, "dataset.test=0.2", "bits=w2a2", f"init={first / 'last.pt'}")
    assert not image_warnings(unseen)


def folds(fold: int = 0) -> Dataset:
    """Return a data set whose name differs from that of this function, split in one of several ways."""
    images = torch.randint(256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = Split(images.roll(20 * fold, 0), (torch.arange(60) % 2).roll(20 * fold))
    parts = [data.take(torch.arange(*ends)) for ends in ((0, 30), (30, 40), (40, 60))]
    train, val, test = parts
    return Dataset(name="other name", train=train, val=val, test=test, classes=2, mean=(0.5,), std=(0.5,))


def test_the_warning_reaches_data_sets_with_a_name_of_their_own_and_the_students_of_a_network(
    tmp_path: Path,
) -> None:
    words = ("dataset=test_other_images:folds", "method=dorefa", "model=mlp", "model.width=4")
    train = partial(qbench.run, *SMOKE, *words, out=tmp_path / "out")
    first = train("bits=w4a4").run
    second = train("bits=w4a4", "dataset.fold=1", f"init={first}")
    text = f"init={first} was trained on other images or another split of dataset=test_other_images:folds; "
    assert [warning for warning in second.warnings if warning.startswith(text)]
    student = train("bits=w2a2", "dataset.fold=1", "distill=kd", f"distill.teacher={second.run}")
    assert [warning for warning in student.warnings if warning.startswith(f"distill.teacher={second.run}: {text}")]


def test_initial_weights_of_another_function_are_named(train: Callable[..., Result]) -> None:
    write_photos(Path("photos"), {".": 20})
    words = ("dataset.root=photos", "dataset.test=0.2", "method=dorefa", "bits=w2a2")
    first = train(*words)
    for key, then, now in (("model.shortcut", "A", "A_stride"), ("dataset.normalize", "imagenet", "half")):
        result = train(*words, f"{key}={now}", f"init={first.run}")
        assert f"init={first.run} was trained with {key}={then}, but this run has {key}={now}" in result.warnings
    again = train(*words, f"init={first.run}")
    assert not [warning for warning in again.warnings if "was trained with" in warning]


@pytest.mark.parametrize("key", [long_tier("init"), "distill.teacher"])
def test_weights_that_are_replaced_after_the_start_are_refused(key: str, train: Callable[..., Result]) -> None:
    """For example in a sweep, whose runs load the file one after another."""
    write_photos(Path("photos"), {".": 20})
    words = ("dataset.root=photos", "dataset.test=0.2", "method=dorefa")
    first, other = (Path(train(*words, bits).run) for bits in ("bits=w4a4", "bits=w3a3"))
    distilled = () if key == "init" else ("distill=kd",)
    (config,) = configurations(
        [*SMOKE, "dataset=folder", *SIZES, *words, "bits=w2a2", *distilled, f"{key}={first}", "out=late"]
    )
    planned = planned_run(config)
    for name in ("best.pt", "last.pt", "config.yaml", "result.json"):
        shutil.copy(other / name, first / name)
    with pytest.raises(CheckpointError, match=f"{key}={first} was replaced after this command had started"):
        run(planned)


def test_exported_files_say_that_their_training_images_are_not_known(train: Callable[..., Result]) -> None:
    write_photos(Path("photos"), {".": 20})
    run = Path(train("dataset.root=photos", "dataset.test=0.2", "method=dorefa", "bits=w2a2").run)
    file = export(run, "packed").path
    assert [note for note in evaluate_file(file, ["dataset.test=0.6"]).notes if "it is not known whether" in note]
    assert not [note for note in evaluate_file(file).notes if "it is not known whether" in note]


def test_a_teacher_with_other_classes_is_refused_and_one_with_other_images_is_named(
    train: Callable[..., Result],
) -> None:
    write_photos(Path("photos"), {"train": 10, "val": 4})
    write_photos(Path("renamed"), {"train": 10, "val": 4}, names=("z_bright", "a_dark"))
    teacher = train("dataset.root=photos", "method=float").run
    words = ("method=dorefa", "bits=w2a2", "distill=kd", f"distill.teacher={teacher}")
    with pytest.raises(ConfigError, match=r"trained on the classes bright, dark.* has the classes a_dark, z_bright"):
        train("dataset.root=renamed", *words)
    assert not [w for w in train("dataset.root=photos", *words).warnings if "teacher" in w]
    write_photos(Path("others"), {"train": 12, "val": 4})
    (warning,) = (w for w in train("dataset.root=others", *words).warnings if "teacher" in w)
    assert "was trained on other images of dataset=folder" in warning


def test_a_sweep_and_a_call_keep_the_message_on_initial_weights(tmp_path: Path) -> None:
    """Averaged weights beside the loaded ones are a warning, because they are usually the better network."""
    words = (*SMOKE[:2], "method=lsq", "bits=w4a4", f"init={tmp_path / 'weights.pt'}", f"out={tmp_path / 'out'}")
    network = torch.load(Path(qbench.run(*SMOKE[:2], "method=float", out=tmp_path / "float").run) / "best.pt")
    weights = {name: tensor for name, tensor in network["model"].items() if isinstance(tensor, torch.Tensor)}
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "weights.pt")
    (run,) = qbench.sweep(*words)
    assert run.result
    assert any("taken from the key state_dict; state_dict_ema not used" in note for note in run.result.notes)
    assert any("also contains state_dict_ema, not used here" in warning for warning in run.result.warnings)
    assert any("state_dict_ema, not used" in note for table in qbench.compare([run]) for note in table.notes)


def test_a_batch_that_is_larger_than_the_training_split_is_a_warning(tmp_path: Path) -> None:
    words = (*SMOKE[:2], "dataset.train=100", "dataset=synthetic", "init=scratch", "method=dorefa", "bits=w2a2")
    (run,) = qbench.sweep(*words, "dataset.val=0", "optim.batch_size=128", out=tmp_path)
    assert run.result
    assert "the batch size was 100, the number of training images, instead of 128" in run.result.warnings
    (run,) = qbench.sweep(*words, "dataset.val=0", "optim.batch_size=100", out=tmp_path)
    assert run.result
    assert not [warning for warning in run.result.warnings if "batch size" in warning]
