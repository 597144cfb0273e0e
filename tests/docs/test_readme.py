"""The README is short and complete, and its examples of own code work as printed."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from pages import commands
from PIL import Image
from torch import nn

import qbench
from qbench.cli.main import main as cli
from qbench.config import compose, groups

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")
MAX_LINES = 220
SECTIONS = (
    "Install", "Five minutes", "Results", "Methods", "Your own network, data and method", "Many runs, clusters, GPUs",
    "Limits", "Documentation", "Citation",
)  # fmt: skip


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the README's modules, and images for its data set, into the current folder."""
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for name in re.findall(r"\A# (my_\w+\.py): ", code):
            Path(name).write_text(code)
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 80, (120, 1, 8, 8), dtype=np.uint8)
    images[np.arange(120), 0, 2 * labels, :] = 255  # a line whose row is the class
    np.savez("my_data.npz", x=images[:90], y=labels[:90], x_test=images[90:], y_test=labels[90:])


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_sections_are_in_order() -> None:
    assert tuple(re.findall(r"^## (.*)$", README, re.MULTILINE)) == SECTIONS


def test_every_method_is_in_its_table() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == sorted(groups.option_names("method"))


def test_it_shows_the_first_commands() -> None:
    lines = [" ".join(words) for words in commands(PAGE)]
    assert lines[0] == "method=dorefa bits.w=2"
    assert any(line.startswith("-m ") and "bits=w2a2" in line and "seed=" in line for line in lines)
    assert "compare outputs --html report.html" in lines


@pytest.mark.full
def test_its_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example runs, with a thin network and one epoch."""
    (code,) = re.findall(r"```python\n(import qbench\n.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    short = partial(qbench.sweep, "experiment=smoke", "runtime.tensorboard=false")
    monkeypatch.setattr(qbench, "sweep", short, raising=False)
    Image.new("L", (30, 20)).save("image.png")
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["logits"], torch.Tensor)
    assert names["logits"].shape == (1, 10)
    assert len(re.findall(r"^(?:dorefa|lsq) .* 3 ", capsys.readouterr().out, re.MULTILINE)) == 4
    assert isinstance(names["model"], nn.Module)


@pytest.mark.usefixtures("own_code")
def test_a_network_and_data_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^qbench (dataset=my_data:build .*)$", README, re.MULTILINE)
    assert cli([*line.split(), "epochs=12", "pretrain.epochs=24", "runtime.tensorboard=false"]) == 0
    row = capsys.readouterr().out
    float_top1, top1 = map(float, re.findall(r"([\d.]+) %", row)[:2])
    assert min(float_top1, top1) > 60, "chance is 33 %"
    assert re.search(r"^lsq +2 +2 +32 +4 ", row, re.MULTILINE)
    (line,) = re.findall(r"^qbench (model=my_net:Net .*)$", README, re.MULTILINE)
    (config,) = compose.configurations(line.split())
    assert config.model["width"] == 32


@pytest.mark.usefixtures("own_code")
def test_the_network_of_ones_own_reads_the_images_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """The images of the folder have three channels, and those of my_data one."""
    rng = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        Path("photos", label).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(f"photos/{label}/{i}.png")
    (line,) = re.findall(r"^qbench (dataset=folder .*)$", README, re.MULTILINE)
    assert cli(["plan", *line.partition("#")[0].replace("size=64", "size=16").split()]) == 0
    assert re.search(r"^0\.0 +16x3x3x3 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.usefixtures("own_code")
def test_a_method_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["check", "my_method:build"]) == 0
    assert "properties hold" in capsys.readouterr().out
    (line,) = re.findall(r"^qbench (-m method=my_method:build.*)$", README, re.MULTILINE)
    words = line.partition("#")[0].split()
    assert {config.method["name"] for config in compose.configurations(words)} == {
        "my_method:build",
        "twn",
        "ttq",
    }
    assert cli(["describe", "my_method:build"]) == 0
    assert (
        "\nBits\n    w 2-8 or 32, a 32, g 32; by default w2a32g32\n\n"
        "Options, with their default values\n    method.factor=2.0\n"
    ) in capsys.readouterr().out
    (config,) = compose.configurations(["method=my_method:build", "method.factor=3"])
    assert config.method["factor"] == 3


@pytest.mark.usefixtures("own_code")
def test_a_refused_option_becomes_the_message_that_the_guide_states(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = '    if factor <= 0:\n        raise ValueError(f"factor={factor:g}: must be above 0")\n\n'
    code = Path("my_method.py").read_text(encoding="utf-8")
    Path("strict_method.py").write_text(code.replace("    def weight(", f"{refusal}    def weight("), encoding="utf-8")
    assert cli(["plan", "method=strict_method:build", "method.factor=-1"]) == 2
    assert capsys.readouterr().err == "qbench: method.factor=-1: must be above 0\n"
