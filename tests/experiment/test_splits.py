"""Which split is read where: a data set whose splits differ, and a network that records what it gets.

The first pixel of an image names the split, and the second pixel its label. The labels of validation and test are
other ones than those of the same pictures in training, so that training lowers the validation accuracy.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch
from conftest import Configure, tiered
from helpers import write_images
from torch import Tensor, nn

from qbench.analysis.finished_run import load_finished_run, probe_batches, validation_batches
from qbench.config.schema import Config
from qbench.data import digits, folder, glyphs, synthetic
from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split
from qbench.data.dataset_files import dataset_from_splits
from qbench.data.file_stream import FileSplit
from qbench.data.normalize import mean_and_std
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.quant.probe import Batch
from qbench.runs.result import Result

CLASSES, SIDE = 3, 8
COUNTS = {"train": 60, "val": 7, "test": 11}
MARKS = {"train": 10, "val": 120, "test": 240}
MEAN, STD = 0.4, 0.2


@dataclass(frozen=True)
class Call:
    """One forward pass: the split of its images, whether in training mode, and how many were right."""

    split: str
    training: bool
    images: int
    hits: int


CALLS: list[Call] = []


def _split(name: str) -> Split:
    generator = torch.Generator().manual_seed(COUNTS[name])
    pattern = torch.arange(COUNTS[name]) % CLASSES
    images = torch.randint(60, 90, (COUNTS[name], 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for row in range(CLASSES):
        images[pattern == row, :, 2 * row + 1 : 2 * row + 3] = 200
    labels = (pattern + list(COUNTS).index(name)) % CLASSES
    images[:, 0, 0, 0], images[:, 0, 0, 1] = MARKS[name], labels.to(torch.uint8)
    return Split(images, labels)


def three_splits() -> Dataset:
    splits = {name: _split(name) for name in COUNTS}
    return Dataset(name="marked", **splits, classes=CLASSES, mean=(MEAN,), std=(STD,))  # type: ignore[arg-type]


def read_marks(images: Tensor) -> tuple[str | None, Tensor]:
    """Return the split of a batch, which must be one for all images, and the labels.

    The split is None for random images, by which the network is looked at.
    """
    pixels = (255 * (images[:, 0, 0, :2] * STD + MEAN)).round().long()
    names = {value: name for name, value in MARKS.items()}
    splits = {names.get(mark) for mark in pixels[:, 0].unique().tolist()}
    if None in splits:
        return None, pixels[:, 1]
    (split,) = splits
    return split, pixels[:, 1]


class Recording(nn.Module):
    """A small network that adds a `Call` for every batch of marked images."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * SIDE, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h)).relu()
        logits: Tensor = self.fc(h.mean(3).flatten(1))
        split, labels = read_marks(x)
        if split is not None and x.count_nonzero():  # not the example that `install` traces
            CALLS.append(Call(split, self.training, len(x), int((logits.argmax(1) == labels).sum())))
        return logits


def recording(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Recording(shape[0], classes)


WORDS = (
    "dataset=test_splits:three_splits", "model=test_splits:recording", "epochs=4", "pretrain.epochs=2",
    "optim.batch_size=15", "pretrain.optim.batch_size=15", "pretrain.optim.lr=0.05", "optim.lr=0.01",
    "runtime.tensorboard=false",
)  # fmt: skip


def finished(configure: Configure, *words: str) -> tuple[Config, Result, list[Call]]:
    """Run the float baseline, then a configuration; return what the configuration's own run saw."""
    config = configure(*WORDS, *words)
    if config.method_name != "float":
        run(planned_run(configure(*WORDS, "method=float")))
    CALLS.clear()
    result = run(planned_run(config))
    assert result.status == "done", result.reason
    return config, result, list(CALLS)


def epochs_of(result: Result) -> list[dict[str, float]]:
    lines = (Path(result.run) / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "epoch"]


METHODS = ["float", "dorefa", "lsq", "slq", "mlq", "ptq", "qcnn", "dq", "inq"]


@pytest.mark.parametrize("method", tiered(METHODS, ["dorefa", "slq", "ptq", "qcnn"]))
def test_training_and_measurements_of_methods_see_training_images_alone(configure: Configure, method: str) -> None:
    """Also `Probe` (lsq, slq, mlq, dq), calibration (ptq), fits of responses (qcnn) and the check of the levels."""
    _, result, calls = finished(configure, f"method={method}")
    assert {call.split for call in calls if call.training} <= {"train"}
    order = [split for split, _ in groupby(call.split for call in calls)]
    first_test = order.index("test")
    assert "test" not in order[:first_test]
    assert set(order[first_test:]) <= {"test", "val", "train"}
    after = calls[[call.split for call in calls].index("test") :]
    assert not any(call.training for call in after), "the test split is read after training"
    evaluations = 2 if result.best else 1
    assert sum(call.images for call in calls if call.split == "test") == evaluations * COUNTS["test"]
    assert sum(call.images for call in calls if call.split == "val") == (
        (len(epochs_of(result)) + evaluations) * COUNTS["val"]
    )


@pytest.mark.parametrize("method", ["float", "dorefa"])
def test_every_recorded_accuracy_is_that_of_its_split(configure: Configure, method: str) -> None:
    _, result, calls = finished(configure, f"method={method}")
    by_split = {name: [call for call in calls if call.split == name and not call.training] for name in COUNTS}
    validated = [100 * call.hits / COUNTS["val"] for call in by_split["val"]]
    tested = [100 * call.hits / COUNTS["test"] for call in by_split["test"]]
    epochs = epochs_of(result)
    assert [epoch["val_top1"] for epoch in epochs] == pytest.approx(validated[: len(epochs)])
    assert result.best is not None
    assert result.best.val is not None
    assert result.final is not None
    assert result.final.val is not None
    assert [result.best.val.top1, result.final.val.top1] == pytest.approx(validated[-2:])
    assert [result.best.test.top1, result.final.test.top1] == pytest.approx(tested)
    first = next(i for i, call in enumerate(calls) if call.training)
    steps = calls[first + 2 :]  # without the two passes of `unsteady_training`
    trained = [sum(c.hits for c in group) for training, group in groupby(steps, lambda c: c.training) if training]
    assert [epoch["train_top1"] for epoch in epochs] == pytest.approx(
        [100 * hits / COUNTS["train"] for hits in trained]
    )


def test_validation_selects_the_best_epoch_and_stops_training(configure: Configure) -> None:
    """Training lowers the validation accuracy: the first epoch is the best one, and `final` is another."""
    _, result, _ = finished(configure, "method=float")
    epochs = epochs_of(result)
    ranks = [(epoch["val_top1"], -epoch["val_loss"]) for epoch in epochs]
    assert result.best is not None
    assert result.final is not None
    assert result.best.val is not None
    assert result.final.val is not None
    assert result.best.epoch == ranks.index(max(ranks)) == 0
    assert result.final.epoch == len(epochs) - 1 > 0
    assert result.final.val.loss == pytest.approx(epochs[-1]["val_loss"])
    assert result.best.val.loss == pytest.approx(epochs[0]["val_loss"])
    assert result.final.val.loss > result.best.val.loss
    *_, stopped, _ = finished(configure, "method=dorefa", "optim.patience=1", "epochs=9")
    assert len(epochs_of(stopped)) < 9
    assert stopped.best is not None
    assert stopped.best.epoch == len(epochs_of(stopped)) - 2


def test_analyses_of_a_run_read_validation_images_and_measure_on_training_images(configure: Configure) -> None:
    _, result, _ = finished(configure, "method=dorefa")
    setup = load_finished_run(Path(result.run)).setup

    def read(batches: list[Batch]) -> list[tuple[str, int]]:
        return [(read_marks(images)[0], len(images)) for images, _ in batches]

    validated, note = validation_batches(setup, 100)
    assert read(validated) == [("val", COUNTS["val"])]
    assert note == "measured on 7 validation images; the test split is not used"
    assert read(probe_batches(setup)) == [("train", COUNTS["train"])]


def _published_files(root: Path) -> Dataset:
    return dataset_from_splits("x", _split("train"), _split("test"), classes=CLASSES, val=0.2, augment=Augment())


def _folder(root: Path) -> Dataset:
    write_images(root, size=(16, 16))
    return folder.build(root=str(root), size=12, resize=16, val=0.3, normalize="own")


BUILT_IN: dict[str, Callable[[Path], Dataset]] = {
    "digits": lambda root: digits.build(),
    "glyphs": lambda root: glyphs.build(train=340, test=40),
    "synthetic": lambda root: synthetic.build(train=50, test=30),
    "published_files": _published_files,
    "folder": _folder,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_mean_and_deviation_are_those_of_the_training_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = BUILT_IN[name](tmp_path / "set")
    assert isinstance(data.train, Split)
    assert isinstance(data.val, Split)
    assert isinstance(data.test, Split)
    assert (data.mean, data.std) == mean_and_std(data.train.images)
    whole = torch.cat([data.train.images, data.val.images])
    assert mean_and_std(whole) != (data.mean, data.std), "validation images do not count"
    assert mean_and_std(data.test.images) != (data.mean, data.std)
    if name == "folder":  # the same images, decoded when they are needed
        streamed = folder.build(
            root=str(tmp_path / "set"), size=12, resize=16, val=0.3, normalize="own", augment="inception"
        )
        assert isinstance(streamed.train, FileSplit)
        assert (streamed.mean, streamed.std) == (data.mean, data.std)
