"""The Python interface: it does what the command line does, and leaves the user's process as it was."""

import logging
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from conftest import ROOT, long_tier, tiered
from PIL import Image

import qbench
from qbench.analysis.description import description
from qbench.analysis.export import export, load_exported
from qbench.analysis.finished_run import load_finished_run
from qbench.api.words import command_words
from qbench.cli.compare import run_compare
from qbench.cli.main import main as cli
from qbench.config.compose import configurations
from qbench.data.augment import Augment
from qbench.data.dataset import Dataset, Split
from qbench.data.file_stream import FileSplit
from qbench.errors import CheckpointError, ConfigError, DataError, Diverged
from qbench.experiment import session
from qbench.experiment.device import REDUCING_VARIABLES
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.report.tables.table import Table
from qbench.training.evaluation import evaluate

SMOKE = (
    "experiment=smoke",
    "runtime.tensorboard=false",
    "epochs=2",
    "optim.batch_size=256",
    "pretrain.optim.batch_size=256",
)
WORDS = (*SMOKE, "method=dorefa", "bits=w2a2")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the four runs of a sweep, and their float baselines."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("out")
    runs = qbench.sweep(*SMOKE, out=folder, method=["dorefa", "lsq"], bits="w2a2", seed=range(2))
    assert [run.status for run in runs] == ["done"] * 4
    return folder


def test_importing_it_takes_no_time_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.process_time(); import qbench; took = time.process_time() - began;"
        "print(took, *[name for name in sys.modules if name.startswith(('qbench.', 'torch', 'numpy', 'hydra'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds, *imported = done.stdout.split()
    assert imported == []
    assert float(seconds) < 0.05


def test_every_name_is_found() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    for name in qbench.__all__:
        assert getattr(qbench, name).__name__ in (name, "fold_quantized_weights")
        assert name in page
    assert set(qbench.__all__) <= set(dir(qbench))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        qbench.trian  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_is_that_of_the_command_line_and_is_stored(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    drawn, deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    try:
        result = qbench.run(*WORDS, out=tmp_path)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), drawn)
    assert capsys.readouterr() == ("", "")
    (stored,) = qbench.load(out, method="dorefa", seed=0)
    assert stored.result is not None
    assert result.weights_sha256 == stored.result.weights_sha256, "the same weights as in a sweep"
    file = Path(result.run) / "result.json"
    written = file.stat().st_mtime_ns
    assert qbench.run(*WORDS, out=str(tmp_path)) == result
    assert cli([*WORDS, f"out={tmp_path}"]) == 0
    assert f"{result.top1:.2f} %" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == written, "the command line finds the run that Python has stored"


def test_progress_is_shown_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qbench.run(*SMOKE, "method=float", out=tmp_path, progress=True)
    assert "float  resnet8 on digits, seed 0: epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seed": 1, "bits.w": 2}, ["seed=1", "bits.w=2"]),
        ({"rerun": True, "optim.ema": None}, ["rerun=true", "optim.ema=null"]),
        ({"method": ["dorefa", "lsq"], "seed": range(3)}, ["method=dorefa,lsq", "seed=0,1,2"]),
        ({"optim.lr": np.float64(1e-5), "seed": np.int64(3)}, ["optim.lr=1e-05", "seed=3"]),
        ({"out": Path("it's, my=runs")}, [r"out='it\'s, my=runs'"]),
        ({"out": Path("x${seed}")}, [r"out='x\${seed}'"]),
    ],
)
def test_keywords_are_words(keys: dict[str, object], words: list[str]) -> None:
    assert command_words("run", [], keys) == words  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["it's, my=runs [1]", r"b\'s", "b\\", r"b\y", "$seed", "{x}"])
def test_any_directory_can_be_named(name: str, tmp_path: Path) -> None:
    (config,) = configurations(command_words("run", SMOKE, {"out": tmp_path / name}))
    assert Path(config.out) == tmp_path / name


@pytest.mark.parametrize("name", ["x${seed}", r"b\${seed}", "${oc.env:HOME}"])
def test_a_directory_that_looks_like_an_interpolation_is_refused(name: str, tmp_path: Path) -> None:
    """Its run could not be loaded again, because a stored configuration may not read the environment."""
    for out in (tmp_path / name, f"'{tmp_path}/x\\${{seed}}'"):
        with pytest.raises(ConfigError, match=r"out=.*\$.*: a configuration must contain values, not \$\{\.\.\.\}"):
            configurations(command_words("run", SMOKE, {"out": out}))


def test_a_run_in_a_directory_with_a_special_name_can_be_used_again(tmp_path: Path) -> None:
    folder = tmp_path / r"it's, my=runs [1] b\'s $seed"
    result = qbench.run(*SMOKE, "method=float", out=folder)
    assert Path(result.run).parents[1] == folder
    assert qbench.run(*SMOKE, "method=float", out=folder) == result
    qbench.load_model(result)
    assert str(folder) in description(Path(result.run))


@pytest.mark.parametrize(
    ("call", "words", "message"),
    [
        (qbench.run, ["method=dorfa"], "did you mean dorefa"),
        (qbench.run, ["method=dorefa,lsq"], "-m"),
        (qbench.run, ["-m", "method=dorefa,lsq"], "run -m: flags .*call qbench.sweep"),
        (qbench.run, ["--cfg", "job"], "run --cfg: flags of the command line are not allowed"),
        (qbench.run, ["method=dorefa", "lr_search=grid"], "a sweep of 5 runs; call qbench.sweep"),
        (qbench.run, ["method=twn", "bits.a=2"], "twn"),
        (qbench.sweep, ["method=dorefa,lqs"], "method=lqs: no such method"),
        (qbench.load, ["method=lsq"], "load needs a directory"),
        (qbench.load, ["nowhere"], "nowhere: no such directory"),
        (qbench.compare, [], "compare needs a directory"),
        (qbench.load_model, ["nowhere"], "not a run directory"),
    ],
)
def test_mistakes(
    call: Callable[..., object], words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qbench.QbenchError, match=message):
        call(*words)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".pt"]


def test_values_that_cannot_be_typed_are_refused() -> None:
    with pytest.raises(ConfigError, match="seed: its value is a set"):
        qbench.run(seed={1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="progres: no such key"):
        qbench.run(progres=True)


def test_a_failed_run_raises_and_a_failed_run_of_a_sweep_does_not(tmp_path: Path) -> None:
    lost = (*WORDS, "optim.lr=1e30", "optim.lr_end=1e30")
    with pytest.raises(Diverged, match=r"try a lower optim\.lr"):
        qbench.run(*lost, out=tmp_path)
    (run,) = qbench.sweep(*lost, out=tmp_path)
    assert (run.status, run.result and run.result.top1) == ("diverged", None)


def test_a_sweep_has_the_rows_of_the_command_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMOKE, "method=dorefa,lsq", "bits=w2a2", "seed=0,1"]
    runs = qbench.sweep(*words, out=out)
    assert cli(["-m", *words, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split()[:6] for line in str(qbench.compare(runs)).splitlines() if line.startswith(("dorefa", "lsq"))]
    assert len(lines) >= 2
    assert [line.split()[:6] for line in printed.splitlines() if line.startswith(("dorefa", "lsq"))][:2] == lines[:2]


def test_compare_prints_what_the_command_line_prints(out: Path, tmp_path: Path) -> None:
    assert str(qbench.compare(out)) == run_compare([str(out)])
    page = tmp_path / "page.html"
    made = qbench.compare(out, "method=lsq", seed=[0, 1], columns="accuracy", sort="method", margin=2, html=page)
    expected = run_compare([str(out), "method=lsq", "seed=0,1", "--columns=accuracy", "--sort=method", "--margin=2"])
    assert str(made) == expected
    assert repr(made) == expected
    assert page.is_file()
    everything = qbench.compare(qbench.load(out))
    assert str(everything) == run_compare([str(out)])
    assert str(qbench.compare(qbench.load(out, "method=lsq"))) == run_compare([str(out), "method=lsq"])
    (run,) = qbench.load(out, method="lsq", seed=1)
    assert run.result is not None
    of_result = str(qbench.compare(run.result))
    assert of_result == run_compare([str(out), "method=lsq", "seed=1"]), "also with the size of the float baseline"
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        qbench.compare(out, columns=["acuracy"])


def test_a_notebook_shows_tables(out: Path) -> None:
    tables = qbench.compare(out)
    html = tables._repr_html_()
    for cell in tables[0].rows[0]:
        assert f">{cell}</td>" in html
    assert qbench.Tables([Table(("<b>",), [("<i>",)])])._repr_html_().count("&lt;") == 2
    assert str(qbench.Tables()) == "no runs found"


def test_load_filters_and_lists(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(qbench.load(out)) == 6
    runs = qbench.load(out, "method=lsq,twn", seed=1)
    assert [(run.result.method, run.result.seed) for run in runs if run.result] == [("lsq", 1)]
    assert caplog.messages == ["no run has method=twn"]
    assert repr(runs) == f"done        {runs[0].path}  {runs[0].result.top1:.2f} %"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no run has this value; did you mean lsq"):
        qbench.load(out, method="lsqq")


def test_runs_as_rows(out: Path) -> None:
    rows = qbench.load(out, method=["dorefa", "lsq"]).to_dicts()
    assert [(row["method"], row["bits.w"], row["bits"], row["seed"]) for row in rows] == [
        ("dorefa", 2, "w2a2g32", 0), ("dorefa", 2, "w2a2g32", 1), ("lsq", 2, "w2a2g32", 0), ("lsq", 2, "w2a2g32", 1),
    ]  # fmt: skip
    for row in rows:
        (run,) = qbench.load(row["run"])
        assert run.result is not None
        assert run.result.final is not None
        assert run.result.final.val is not None
        assert (row["top1"], row["final.val.loss"]) == (run.result.top1, run.result.final.val.loss)
        assert row["baseline_top1"] == run.result.baseline_top1
        assert run.result.cost is not None
        assert row["bits_per_weight"] == run.result.cost.bits_per_weight
        assert "epochs" not in row, "all runs have the same"
    assert {row["init"] for row in qbench.load(out).to_dicts()} == {"float", "scratch"}


def test_runs_as_a_frame(out: Path) -> None:
    pytest.importorskip("pandas")
    frame = qbench.load(out, method="lsq").to_frame()
    assert frame.shape[0] == 2
    assert frame["top1"].mean() == np.mean([row["top1"] for row in qbench.load(out, method="lsq").to_dicts()])


def test_a_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        qbench.Runs().to_frame()


@pytest.mark.parametrize("precision", tiered(["fp32", "bf16"], ["fp32"]))
def test_a_loaded_network_has_the_accuracy_of_the_result(precision: str, tmp_path: Path) -> None:
    result = qbench.run(*WORDS, f"runtime.precision={precision}", out=tmp_path)
    network = qbench.load_model(result)
    assert not network.training
    batches = list(load_finished_run(Path(result.run)).setup.loader().unaugmented("test"))
    with torch.no_grad():
        logits = torch.cat([network(images) for images, _ in batches])
    assert result.final is not None
    assert evaluate(network, batches, network) == result.final.test
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.cat([network(images).float() for images, _ in batches])
    assert torch.equal(low, logits) is (precision == "bf16")


@pytest.mark.full
def test_the_page_predicts_the_class_of_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class names: those of the folders, without the data set. A network that learned dark and bright names both."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for i in range(40):
        for name, low in (("bright", 180), ("dark", 0)):
            Path("photos", name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(low, low + 70, (8, 8, 3), dtype=np.uint8)).save(f"photos/{name}/{i}.png")
    data = ("dataset=folder", "dataset.root=photos", "dataset.test=0.2", "dataset.resize=8", "dataset.size=8")
    words = (*SMOKE[:2], "method=lsq", "bits=w4a4", "epochs=3", "optim.batch_size=8", "pretrain.optim.batch_size=8")
    run = qbench.run(*words, *data)
    exported = Path("network.qbench")
    export(Path(run.run), "packed", exported)
    (code,) = re.findall(
        r"## Predict images.*?```python\n(.*?)```", (ROOT / "docs/reference/python.md").read_text("utf-8"), re.DOTALL
    )
    Path("photos/bright/0.png").rename("bright.png")
    Path("photos/dark/0.png").rename("dark.png")
    shutil.rmtree("photos")
    assert load_exported(exported)[1].class_names == ("bright", "dark")
    for name in ("bright", "dark"):
        Path(f"{name}.png").rename("image.png")
        exec(code, {"qbench": qbench, "run": run})
        assert capsys.readouterr().out == f"{name}\n"


@pytest.mark.parametrize("load", [qbench.load_model, qbench.load_finished_run])
def test_loading_a_run_leaves_torch_as_it_was(load: Callable[..., object], out: Path) -> None:
    (run,) = qbench.load(out, method="dorefa", seed=0)
    torch.manual_seed(5)
    drawn, deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    try:
        load(run)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("channels", [long_tier(1), 3])
def test_a_prepared_image_is_what_the_run_sees_of_it(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder: the shorter side is resized and the centre cropped. Without `resize`, the whole image is resized."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(noise.integers(0, 256, (20, 31 + i % 2, 3), dtype=np.uint8)).save(f"photos/{name}/{i}.png")
    data = ["dataset=folder", "dataset.root=photos", "dataset.test=0.2", "dataset.resize=12", "dataset.size=10"]
    words = data if channels == 3 else ["dataset=digits"]
    run = qbench.run(*SMOKE[:2], "method=dorefa", "bits=w4a4", "optim.batch_size=8", *words, out="out")
    model, finished = qbench.load_model(run), load_finished_run(Path(run.run))
    batch, _ = next(iter(finished.setup.loader().unaugmented("test")))
    split = finished.setup.data.test
    if isinstance(split, FileSplit):
        found = torch.cat([model.prepare(path) for path in split.paths(torch.arange(len(split)))])  # type: ignore[operator]
    else:
        assert isinstance(split, Split)
        images = [Image.fromarray(image[0].numpy()) for image in split.images[: len(batch)]]
        found = torch.cat([model.prepare(image) for image in images])  # type: ignore[operator]
    torch.testing.assert_close(found, batch[: len(found)])


def test_the_smaller_images_of_svhn_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run makes them smaller without averaging pixels, so an image that PIL makes smaller would be another one."""
    images = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = Split(images, torch.arange(40) % 10)
    monkeypatch.setattr("qbench.data.svhn.read_svhn", lambda parts, root, download: (split, split))
    words = (*SMOKE[:2], "method=dorefa", "bits=w4a4", "dataset=svhn", "dataset.val=0.25", "model=mlp")
    image = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    model = qbench.load_model(qbench.run(*words, "dataset.size=24", out=tmp_path))
    with pytest.raises(ValueError, match=r"32 x 32 pixels, but the network reads 24 x 24\n.*dataset=svhn"):
        model.prepare(image)  # type: ignore[operator]
    run = qbench.run(*words, "dataset.size=40", out=tmp_path)
    batch, _ = next(iter(qbench.load_finished_run(run).setup.loader().unaugmented("test")))
    prepared = qbench.load_model(run).prepare(image)  # type: ignore[operator]
    assert (prepared[0] - batch[0]).abs().max() < 2 / 255 / 0.2, "enlarged, it is the same but for rounding"


def cropped() -> Dataset:
    images = torch.randint(256, (60, 1, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    train, val, test = (Split(images[i : i + 20], torch.arange(20) % 2) for i in (0, 20, 40))
    crop = Augment(size=8)
    return Dataset(name="cropped", train=train, val=val, test=test, classes=2, mean=(0.5,), std=(0.5,), augment=crop)


def test_images_that_only_the_users_code_can_prepare_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run crops its images to 8 x 8 pixels. The whole image, made smaller, would be another image."""
    monkeypatch.chdir(tmp_path)
    run = qbench.run(*SMOKE[:2], "method=dorefa", "bits=w4a4", "dataset=test_api:cropped", "model=mlp", out="out")
    model = qbench.load_model(run, trust=True)
    whole = Image.fromarray(np.zeros((12, 12), np.uint8))
    with pytest.raises(ValueError, match=r"12 x 12 pixels, but the network reads 8 x 8\n.*dataset=test_api:cropped"):
        model.prepare(whole)  # type: ignore[operator]
    assert model.prepare(whole.crop((2, 2, 10, 10))).shape == (1, 1, 8, 8)  # type: ignore[operator]


def test_images_of_12_bits_are_refused_instead_of_prepared_as_black(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = qbench.load_model(qbench.run(*SMOKE[:2], "method=dorefa", "bits=w4a4", out="out"))
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    expected = model.prepare(Image.fromarray((255 * ramp).astype(np.uint8)))  # type: ignore[operator]
    for white, kind, name in ((65535, np.uint16, "a.png"), (65535, np.int32, "a.tif")):
        Image.fromarray((white * ramp).astype(kind)).save(name)
        torch.testing.assert_close(model.prepare(name), expected, atol=0.1, rtol=0)  # type: ignore[operator]
        assert model.prepare(Image.open(name)).shape == expected.shape  # type: ignore[operator]
    for white, kind, name in ((4095, np.uint16, "b.png"), (1020, np.uint16, "c.png"), (255, np.int32, "d.tif")):
        image = Image.fromarray((white * ramp).astype(kind))
        image.save(name)
        for given in (name, image, Image.open(name)):
            with pytest.raises(ValueError, match=f"no value is above {white | 255}.*12 bits"):
                model.prepare(given)  # type: ignore[operator]


@pytest.mark.parametrize("pixels", [torch.uint8, long_tier(torch.float32)])
def test_a_network_is_loaded_without_its_data_set(
    pixels: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(256, (200, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    content = {
        "images": images.to(pixels) if pixels == torch.uint8 else images / 100 - 0.7,
        "labels": images[:, 0, 0, 0] % 3,
    }
    torch.save(content, tmp_path / "content.pt")
    (tmp_path / "vanishing.py").write_text(
        "import torch\n\ndef build():\n"
        f"    content = torch.load({str(tmp_path / 'content.pt')!r})\n"
        "    return (content['images'], content['labels']), (content['images'][:50], content['labels'][:50])\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ("experiment=smoke", "dataset=vanishing:build", "method=dorefa", "bits=w2a2", "layers.input=4")
    result = qbench.run(*words, "model.form=post", out=tmp_path / "out")
    _, setup, with_data, _ = load_finished_run(Path(result.run))

    def missing(*args: object) -> None:
        raise DataError("the data set is missing")

    monkeypatch.setattr("qbench.experiment.setup.build_dataset", missing)
    with pytest.raises(DataError, match="the data set is missing"):
        load_finished_run(Path(result.run))
    network = qbench.load_model(result, trust=True)
    assert isinstance(network.image_mean, torch.Tensor)
    assert isinstance(network.image_std, torch.Tensor)
    white = 255 if pixels == torch.uint8 else 1
    normalized = (content["images"] / white - network.image_mean) / network.image_std
    expected, _ = next(iter(setup.loader().unaugmented("test")))
    torch.testing.assert_close(normalized[:50], expected[:50])
    with torch.no_grad():
        assert torch.equal(network(expected), with_data(expected))


def test_runs_stay_valid_if_the_working_directory_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = qbench.run(*WORDS)
    (record,) = qbench.load("outputs", method="dorefa")
    sweep = qbench.sweep(*WORDS, "seed=0")
    expected = str(qbench.compare(Path(result.run).parent))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(result.run) == record.path == sweep[0].path == tmp_path / Path(result.run).relative_to(tmp_path)
    assert not qbench.load_model(result).training
    assert str(qbench.compare(sweep)) == str(qbench.compare(record)) == expected
    assert "dorefa" in str(qbench.compare(result))


def test_a_result_does_not_load_the_weights_of_another_run(tmp_path: Path) -> None:
    """A relative path names another directory after os.chdir, and a repeated run replaces the weights."""
    first, second = (qbench.run(*WORDS, f"seed={seed}", out=tmp_path) for seed in (0, 1))
    (record,) = qbench.load(first.run)
    for own, other in (
        (first, replace(first, run=second.run)),
        (record, replace(record, path=Path(second.run))),
    ):
        assert not qbench.load_model(own).training
        with pytest.raises(CheckpointError, match="contains other weights than the result that was passed"):
            qbench.load_model(other)


def test_what_can_be_loaded(out: Path) -> None:
    (run,) = qbench.load(out, method="lsq", seed=0)
    a, b = qbench.load_model(run), qbench.load_model(str(run.path), weights="best")
    assert a.state_dict().keys() == b.state_dict().keys()
    with pytest.raises(ConfigError, match="weights=first: must be last or best"):
        qbench.load_model(run, weights="first")
    folded = qbench.fold(a)
    assert max(p.unique().numel() for n, p in folded.named_parameters() if n.endswith("0.conv2.weight")) <= 4


def test_threads(out: Path, tmp_path: Path) -> None:
    """Runs in two threads at the same time have the weights of runs in the main thread."""
    found: dict[int, str | None] = {}

    def work(seed: int) -> None:
        found[seed] = qbench.run(*WORDS, out=tmp_path, seed=seed).weights_sha256

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {row.result.seed: row.result.weights_sha256 for row in qbench.load(out, "method=dorefa") if row.result}
    assert found == alone


def test_ctrl_c_keeps_the_run_and_its_weights(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    save = session.TrainingSession.save

    def interrupted(self: session.TrainingSession, *arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        save(self, *arguments)  # type: ignore[arg-type]

    qbench.run(*SMOKE, "method=float", out=tmp_path)
    monkeypatch.setattr(session.TrainingSession, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qbench.run(*WORDS, out=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [run.status for run in qbench.load(tmp_path, method="dorefa")] == ["unfinished"]
    with pytest.raises(KeyboardInterrupt):
        qbench.sweep(*WORDS, out=tmp_path, seed=[0, 1])
    monkeypatch.undo()
    (alone,) = qbench.load(out, method="dorefa", seed=0)
    assert alone.result is not None
    assert qbench.run(*WORDS, out=tmp_path).weights_sha256 == alone.result.weights_sha256


def test_a_second_ctrl_c_is_obeyed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(session.TrainingSession, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qbench.run(*SMOKE, "method=float", out=tmp_path)
    assert [run.status for run in qbench.load(tmp_path)] == ["unfinished"], "not failed"


def test_torch_with_other_defaults_is_refused(tmp_path: Path) -> None:
    def refused(phrase: str) -> None:
        with pytest.raises(ConfigError, match=phrase):
            qbench.run(*WORDS, out=tmp_path)

    torch.set_default_dtype(torch.float64)
    try:
        refused("default dtype is torch.float64")
        with pytest.raises(ConfigError, match="default dtype"):
            qbench.load_model(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        refused("default device is meta")
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            refused("cannot be trained inside")
    assert not list(tmp_path.iterdir())


def test_a_network_is_loaded_in_a_program_that_reduces_the_precision(tmp_path: Path) -> None:
    """Training is refused there, but a loaded network belongs to the program."""
    result = qbench.run(*WORDS, out=tmp_path)
    torch.set_float32_matmul_precision("high")
    try:
        assert qbench.load_model(result).image_shape == (1, 8, 8)
        with pytest.raises(ConfigError, match="would change the results"):
            qbench.run(*WORDS, "seed=1", out=tmp_path)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["conv", "matmul", "rnn"])
def test_float32_with_fewer_bits_is_refused(name: str, tmp_path: Path) -> None:
    before, changed = torch.backends.cudnn.allow_tf32, attrgetter(f"mkldnn.{name}")(torch.backends)
    changed.fp32_precision = "bf16"
    try:
        with pytest.raises(ConfigError, match=rf"mkldnn.{name}.fp32_precision is bf16.*\n.*runtime.precision=bf16"):
            qbench.run(*WORDS, out=tmp_path)
    finally:
        changed.fp32_precision = "none"
    assert not list(tmp_path.iterdir())
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_module_of_the_user_that_reduces_the_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hasty.py").write_text(
        f"import torch\n{NET.format(width=8)}\ntorch.set_float32_matmul_precision('medium')\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"mkldnn\.matmul\.fp32_precision is bf16"):
            qbench.run(*WORDS, "model=hasty:build", out=tmp_path / "out")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", REDUCING_VARIABLES)
def test_variables_of_the_environment_that_reduce_the_precision_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1" if "TF32" in name else "BF16")
    with pytest.raises(ConfigError, match=f"{name}=.* would change the results.*\nunset {name}"):
        qbench.run(*WORDS, out=tmp_path)
    assert not list(tmp_path.iterdir())


NET = """from torch import nn

WIDTH = {width}

def build(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
"""


def width_of(model: str) -> int:
    """Return the width of a network of `NET`, as it is trained."""
    words = ["runtime.tensorboard=false", "epochs=1", "pretrain.epochs=1", "method=float", "rerun=true"]
    cost = qbench.run(*words, f"model={model}").cost
    assert cost is not None
    return (cost.params - 10) // (65 + 10)


@pytest.mark.parametrize("bytecode", [True, False])
def test_a_file_that_the_user_imported_first_is_read_as_it_is_now(
    bytecode: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", not bytecode)
    name = f"seen_{bytecode}".lower()
    Path(f"{name}.py").write_text(NET.format(width=2))
    theirs = import_module(name)
    Path(f"{name}.py").write_text(NET.format(width=12))
    assert width_of(f"{name}:build") == 12
    assert theirs.build((1, 8, 8), 10)[1].out_features == 2


def test_a_name_that_a_changed_file_no_longer_has_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("renamed.py")
    file.write_text(NET.format(width=3))
    assert width_of("renamed:build") == 3
    file.write_text(NET.format(width=3).replace("def build(", "def build2("))
    with pytest.raises(ConfigError, match="build is not in module renamed"):
        width_of("renamed:build")
    assert width_of("renamed:build2") == 3
    file.write_text(NET.format(width=3).replace("WIDTH = 3", ""))
    with pytest.raises(NameError, match="name 'WIDTH' is not defined"):
        width_of("renamed:build")


def test_after_a_change_of_folder_its_files_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, also for modules that the file imports, and for packages."""
    for folder, width in (("a", 3), ("b", 5)):
        (tmp_path / folder / "of_folder").mkdir(parents=True)
        (tmp_path / folder / "of_folder/__init__.py").write_text("")
        (tmp_path / folder / "of_folder/net.py").write_text(NET.format(width=width))
        (tmp_path / folder / "in_folder.py").write_text(NET.format(width=width))
        (tmp_path / folder / "width_of_folder.py").write_text(f"WIDTH = {width}")
        same = NET.replace("WIDTH = {width}", "from width_of_folder import WIDTH")
        (tmp_path / folder / "imports_another.py").write_text(same)
    for folder, width in (("a", 3), ("b", 5), ("a", 3)):
        monkeypatch.chdir(tmp_path / folder)
        assert [width_of(f"{name}:build") for name in ("in_folder", "of_folder.net", "imports_another")] == [width] * 3
    (tmp_path / "b/width_of_folder.py").unlink()
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ConfigError, match="No module named 'width_of_folder'"):
        width_of("imports_another:build")


@pytest.mark.parametrize("imported_by", ["qbench", "user"])
def test_a_changed_file_is_another_run_with_other_code(
    imported_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    code = (
        "from torch import nn\n\ndef build(shape, classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, {0}, 3), nn.ReLU(), nn.Conv2d({0}, {0}, 3), nn.ReLU(), nn.Flatten(),"
        " nn.Linear(16 * {0}, classes))\n"
    )
    name = f"net_of_{imported_by}"
    words = ["runtime.tensorboard=false", "epochs=1", "pretrain.epochs=1", f"model={name}:build", "method=float"]
    widths = []
    for width in (2, 12):  # another length of the file, so that Python's bytecode is not used again
        Path(f"{name}.py").write_text(code.format(width))
        if imported_by == "user" and not widths:
            import_module(name)
            widths.append(2)
            continue
        result = qbench.run(*words)
        assert result.cost is not None
        widths.append((result.cost.params - 10) // (16 * 10))
    assert widths[1] > 3 * widths[0], widths
    with pytest.raises(ConfigError, match="move it to a file"):
        qbench.run("model=__main__:build", "method=float")


def test_changed_images_are_noticed_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images_in_file.py").write_text(
        "import numpy as np, torch\nfrom qbench.data.dataset import Dataset, Split\n\ndef build():\n"
        "    x = torch.from_numpy(np.load('x.npy')); y = torch.arange(60) % 3\n"
        "    part = lambda i: Split(x[i::3], y[i::3].div(1).long())\n"
        "    y = torch.arange(180) % 4\n"
        "    return Dataset(name='mine', train=part(0), val=part(1), test=part(2), classes=4, mean=(.5,), std=(.5,))\n"
    )
    rng = np.random.default_rng(0)
    words = ["runtime.tensorboard=false", "epochs=1", "dataset=images_in_file:build", "model=mlp", "method=float"]
    np.save("x.npy", rng.integers(0, 255, (180, 1, 6, 6), dtype=np.uint8))
    qbench.run(*words, "init=scratch")
    np.save("x.npy", rng.integers(0, 255, (180, 1, 6, 6), dtype=np.uint8))
    with pytest.raises(CheckpointError, match="have changed since"):
        qbench.run(*words, "init=scratch")


def test_in_an_application_of_hydra(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("key: 1")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        with pytest.raises(ConfigError, match="did you mean dorefa"):
            qbench.run("method=dorfa")
        assert qbench.run(*SMOKE, "method=float", out=tmp_path).status == "done"
        assert hydra.compose("theirs").key == 1


def test_warnings_are_logged(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run,) = qbench.load(out, method="dorefa", seed=1)
    manifest = run.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"torch": "', '"torch": "0.'))
    with caplog.at_level(logging.WARNING, "qbench"):
        qbench.run(*WORDS, out=out, seed=1)
        qbench.sweep(*WORDS, out=out, seed=[0, 1])
    manifest.write_text(text)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("this result was computed with torch 0.")
    assert caplog.messages[1].startswith("of 2 stored results, some were computed differently: 1 with torch 0.")


WIDTH = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, shape, num_classes):
        width = {}
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8), nn.Linear(8, num_classes))
"""


def test_code_of_the_same_size_and_time_is_not_taken_from_the_bytecode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would execute the bytecode of the first file again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, widths = Path("same_time.py"), list[int]()
    for width in (4, 8):
        file.write_text(WIDTH.format(width))
        os.utime(file, (1_000_000_000, 1_000_000_000))
        py_compile.compile(str(file), doraise=True)
        file.write_text(WIDTH.format(12 - width))
        os.utime(file, (1_000_000_000, 1_000_000_000))
        monkeypatch.delitem(sys.modules, "same_time", raising=False)
        result = qbench.run(*SMOKE, "model=same_time:Net", "method=dorefa", "bits=w2", out=tmp_path / "out")
        widths.append(len(qbench.load_model(result, trust=True).get_submodule("1").weight))
    assert widths == [8, 4]


def test_a_file_that_is_edited_during_a_sweep_changes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the same process keep the code. A process that reads the file later refuses it."""
    monkeypatch.chdir(tmp_path)
    file = Path("edited.py")
    file.write_text(WIDTH.format(4))
    words = (*SMOKE, "model=edited:Net", "method=dorefa", "bits=w2", f"out={tmp_path / 'out'}")
    configs = [*configurations([*words, "seed=1"]), *configurations([*words, "seed=2"])]
    file.write_text(WIDTH.format(8))
    for config in configs:
        assert len(torch.load(Path(run(planned_run(config)).run) / "last.pt")["model"]["1.weight"]) == 4
    file.write_text(WIDTH.format(4))
    (config,) = configurations([*SMOKE, "model=edited:Net", "method=dorefa", f"out={tmp_path / 'out'}"])
    file.write_text(WIDTH.format(8))
    monkeypatch.delitem(sys.modules, "edited")
    with pytest.raises(ConfigError, match="edited was edited after this command had started"):
        run(planned_run(config))
    assert qbench.run(*SMOKE, "model=edited:Net", "method=dorefa", "bits=w2", out=tmp_path / "out").status == "done"
