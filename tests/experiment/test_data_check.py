"""Images that changed after a run: no stored figure, baseline or checkpoint is used in silence."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import Configure, long_tier
from helpers import plant, write_images

from qbench.cli.main import main as cli
from qbench.data import sources
from qbench.errors import CheckpointError, ConfigError, Interrupted
from qbench.experiment import builders
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.report.comparison.compare import compare
from qbench.runs.progress import ProgressReporter
from qbench.runs.reader import read
from qbench.runs.result import load_result
from qbench.system.caches import clear_caches

OTHER = " have changed since "


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clear_caches()


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Return the words of a short run on a folder of images."""
    root = write_images(tmp_path / "set", count=8, size=(18, 18), suffix="bmp")
    return [
        "dataset=folder", f"dataset.root={root}", "dataset.size=16", "dataset.resize=18", "dataset.val=0.25",
        "experiment=smoke", "runtime.tensorboard=false", "optim.batch_size=6", "pretrain.optim.batch_size=6",
        f"out={tmp_path / 'out'}", "method=dorefa", "bits=w2",
    ]  # fmt: skip


def swap(root: Path, parts: tuple[str, ...] = ("train", "val")) -> None:
    """Exchange the images of two classes, as if the folders had been named wrongly."""
    for part in parts:
        first, second, other = (root / part / name for name in ("ant", "bee", "moved"))
        first.rename(other)
        second.rename(first)
        other.rename(second)
    clear_caches()


def command(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli(words)
    return status, *capsys.readouterr()


def digests(out: Path) -> dict[str, str | None]:
    """Return the method of every finished run -> digest of its images."""
    found = [load_result(path.parent) for path in out.rglob("result.json")]
    return {r.method: r.data_sha256 for r in found if r and r.status == "done"}


def test_every_use_of_a_run_with_other_images_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(words) == 0
    (path,) = tmp_path.glob("out/*/dorefa-*")
    row = command(words, capsys)[1]
    taught = [*words[:-2], "distill=kd", f"distill.teacher={path}", "method=twn"]
    status, _, error = command([*taught, "dataset.normalize=half"], capsys)
    assert status == ConfigError.status
    assert "use the same dataset.normalize for both" in error, "the teacher would read images on another scale"
    before = digests(tmp_path / "out")
    swap(tmp_path / "set")
    new = [*words[:-1], "bits=w3"]
    for typed, named in {
        "stored row": (words, "dorefa-w2"),
        "sweep": (["-m", *words], "dorefa-w2"),
        "settle": (["settle", str(path), " ".join([*words[:-2], "method=uniform", "bits=w2"])], "dorefa-w2"),
        "child": (new, "float-w32"),
        "evaluate": (["evaluate", str(path)], "dorefa-w2"),
        "inspect": (["inspect", str(path)], "dorefa-w2"),
        "teacher": (taught, "dorefa-w2"),
    }.values():
        status, out, error = command(typed, capsys)
        assert (status, OTHER in error, named in error) == (CheckpointError.status, True, True), (typed, error)
        assert "%" not in out, typed
        assert len(error.strip().splitlines()) <= 3, error
    assert digests(tmp_path / "out") == before
    swap(tmp_path / "set")
    assert command(words, capsys)[:2] == (0, row)
    swap(tmp_path / "set")
    assert cli([*new, "rerun=true"]) == 0, "it trains the float baseline again too"
    assert cli([*words, "rerun=true"]) == 0
    assert len({*digests(tmp_path / "out").values()}) == 1
    assert digests(tmp_path / "out") != before


@pytest.mark.parametrize(
    "change",
    [
        "one image",
        "streamed, equal size and time",
        *map(long_tier, ("labels of test", "equal size and time", "a new image", "fewer")),
    ],
)
def test_which_changes_are_noticed(
    words: list[str], tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    for path in root.rglob("*.bmp"):
        os.utime(path, (1, 1))
    words = [
        *words[:-2],
        "method=float",
        "bits=w32a32g32",
        *(["dataset.augment=inception"] if "streamed" in change else []),
    ]
    assert cli(words) == 0
    image = root / "train" / "ant" / "0.bmp"
    if change == "one image":
        data = bytearray(image.read_bytes())
        data[-9] ^= 1
        image.write_bytes(data)
    elif change == "labels of test":
        swap(root, ("val",))
    elif change.endswith("equal size and time"):
        swap(root, ("train",))
        assert {os.stat(path).st_mtime for path in root.rglob("*.bmp")} == {1}
    elif change == "a new image":
        (image.parent / "more.bmp").write_bytes(image.read_bytes())
    else:
        image.unlink()
    clear_caches()
    status, _, error = command(words, capsys)
    assert (status, OTHER in error) == (CheckpointError.status, True), error


def test_equal_images_in_files_that_changed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    float_run = [*words[:-2], "method=float", "bits=w32a32g32"]
    assert cli(float_run) == 0
    for path in (tmp_path / "set").rglob("*.bmp"):
        os.utime(path, (2, 2))
    (tmp_path / "set" / "train" / "ant" / "notes.txt").write_text("not an image")
    clear_caches()
    assert cli(float_run) == 0, "the images are read and found equal"
    clear_caches()
    monkeypatch.setattr(builders, "_dataset", lambda node: pytest.fail("the images are read again"))
    assert cli(float_run) == 0
    monkeypatch.undo()
    (tmp_path / "set").rename(tmp_path / "away")
    clear_caches()
    status, out, error = command(float_run, capsys)
    assert status == 0
    assert "%" in out
    assert "cannot check the images of stored results" in error


def test_an_interrupted_run_goes_on_with_its_own_images_only(
    words: list[str], tmp_path: Path, configure: Configure
) -> None:
    config = configure(*words, "method=float", "bits=w32a32g32", "runtime.checkpoint_seconds=0")
    quiet, polls = ProgressReporter(quiet=True), iter([0, 0, 15, 15, 15])
    with pytest.raises(Interrupted):
        run(planned_run(config), RunContext(quiet, lambda: next(polls)))
    assert planned_run(config).directory.checkpoints()
    swap(tmp_path / "set")
    with pytest.raises(CheckpointError, match=OTHER):
        run(planned_run(config), RunContext(quiet))
    assert planned_run(config).directory.checkpoints(), "they are kept, in case the images are restored"
    swap(tmp_path / "set")
    assert run(planned_run(config), RunContext(quiet)).status == "done"


def test_an_interrupted_rerun_starts_over_on_other_images(
    words: list[str], tmp_path: Path, configure: Configure
) -> None:
    config = configure(*words, "method=float", "bits=w32a32g32", "runtime.checkpoint_seconds=0", "rerun=true")
    quiet, polls = ProgressReporter(quiet=True), iter([0, 0, 15, 15, 15])
    with pytest.raises(Interrupted):
        run(planned_run(config), RunContext(quiet, lambda: next(polls)))
    swap(tmp_path / "set")
    assert run(planned_run(config), RunContext(quiet)).status == "done"


MINE = """
import torch
from qbench.data.dataset import Dataset, Split

def data(*, val: float = 0.1):
    images = torch.arange(48 * 64).remainder(251).to(torch.uint8).reshape(48, 1, 8, 8)
    split = Split(images, LABELS)
    return Dataset(name="mine", train=split, val=split, test=split, classes=3, mean=(0.5,), std=(0.5,))
"""


def test_a_data_set_of_the_users_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tmp_path / "labels.npy"
    np.save(values, np.arange(48) % 3)
    (tmp_path / "mine_images.py").write_text(
        MINE.replace("LABELS", f"torch.from_numpy(__import__('numpy').load({str(values)!r}))")
    )
    monkeypatch.syspath_prepend(tmp_path)
    typed = [
        "dataset=mine_images:data", "method=float", "experiment=smoke", "runtime.tensorboard=false",
        "pretrain.optim.batch_size=16", f"out={tmp_path}",
    ]  # fmt: skip
    assert cli(typed) == 0
    clear_caches()
    assert cli(typed) == 0
    np.save(values, np.arange(48)[::-1] % 3)
    clear_caches()
    status, _, error = command(typed, capsys)
    assert (status, OTHER in error) == (CheckpointError.status, True), error


def test_the_stamp_of_published_files(tmp_path: Path, configure: Configure) -> None:
    node = configure("dataset=mnist", f"dataset.root={tmp_path}").dataset
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    assert sources.are_gone(configure("dataset=svhn", f"dataset.root={tmp_path}").dataset)
    with gzip.open(raw / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"one")
    sources.remember_sha256(node, sources.stamp(node), "a" * 64)
    assert sources.cached_sha256(node) == "a" * 64
    (tmp_path / "unrelated.bin").write_bytes(b"other")
    assert sources.cached_sha256(node) == "a" * 64
    (raw / "train-labels-idx1-ubyte").write_bytes(b"two")
    assert sources.cached_sha256(node) is None
    before = sources.stamp(node)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"three")
    sources.remember_sha256(node, before, "b" * 64)
    assert sources.cached_sha256(node) is None, "a file changed while the images were read"


def test_tables_do_not_mix_images(configure: Configure, tmp_path: Path) -> None:
    def table_of(*digests: str | None) -> list[tuple[str, list[int]]]:
        for seed, sha256 in enumerate(digests):
            config = configure("method=dorefa", "bits=w2", f"seed={seed}", f"out={tmp_path / str(len(digests))}")
            plant(config, 90.0 + seed, baseline=91.0, data_sha256=sha256)
        tables = compare(read([str(tmp_path / str(len(digests)))]))
        return [(t.title, [len(s.runs) for s in t.values if not s.name.startswith("float")]) for t in tables]

    assert table_of("a" * 64, "a" * 64, None) == [("resnet8 on digits", [3])]
    separate = table_of("a" * 64, "b" * 64, "b" * 64, None)
    assert sorted(separate) == [
        ('resnet8 on digits; protocol with data="aaaaaaaa"', [1]),
        ('resnet8 on digits; protocol with data="bbbbbbbb"', [2]),
        ('resnet8 on digits; protocol with data="unknown"', [1]),
    ]
    twin = tmp_path / "twin"
    for place, sha256 in (("x", "a" * 64), ("y", "b" * 64)):
        plant(configure("method=dorefa", "bits=w2", f"out={twin / place}"), 90.0, 91.0, data_sha256=sha256)
    assert len(compare(read([str(twin)]))) == 2, "one identity, but other images: no duplicates"
