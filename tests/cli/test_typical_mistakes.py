"""Mistakes of a first hour: each gives at most three lines that hold the fix, no traceback, and an exit status."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import long_tier
from helpers import write_images

from qbench.cli.main import main as cli

NETWORKS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

class TenOfTwelve(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 12))

class ForMnist(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))

def deep(depth, num_classes):
    return Net()

net = Net()
"""
DATA = """
import torch
X, Y = torch.arange(40 * 64).reshape(40, 1, 8, 8).to(torch.uint8), torch.arange(40) % 4

def one_split():
    return X, Y

def channels_last():
    return (X.expand(40, 3, 8, 8).movedim(1, 3), Y), (X, Y)

def labels_from_one():
    return (X, Y), (X, Y + 1)

def loaders():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y))
    return loader, loader

def of_folder(folder):
    return (X, Y), (X, Y)
"""

MISTAKES: list[tuple[str, int, str]] = [
    # keys that do not exist, in four groups
    ("model.widht=3", 2, "did you mean model.width?"),
    ("dataset.vall=0.2", 2, "did you mean dataset.val?"),
    ("optim.learning_rate=0.1", 2, "did you mean optim.lr?"),
    ("method=lsq method.chanel=true", 2, "did you mean method.channel?"),
    ("methd=dorefa", 2, "did you mean method?"),
    ("lr=0.1", 2, "did you mean optim.lr?"),
    ("device=cuda", 2, "did you mean runtime.device?"),
    # names that do not exist
    ("method=dorfa", 2, "did you mean dorefa?"),
    ("describe dorfa", 2, "did you mean dorefa?"),
    ("dataset=cifar", 2, "did you mean cifar10?"),
    ("experiment=lsq/resnet18", 2, "did you mean lsq/resnet18_w"),
    ("activation=relu", 2, "allowed: none, apot, bwn, dorefa"),
    # wrong types, and lists where one value is wanted
    ("epochs=ten", 2, "epochs=ten: must be a whole number"),
    ("model.width=wide", 2, "model.width=wide: must be a whole number, such as 16"),
    ("bits=2", 2, "must be like w2, w2a2 or w2a2g6, with widths from 1 to 32\nor type bits.w=2 bits.a=2"),
    ("bits.w=[2,4]", 2, "one run for each value: -m bits.w=2,4"),
    ("seed=0,1,2", 2, "for a sweep, put -m first"),
    ("method=dorefa,lsq bits=w2a2", 2, "for a sweep, put -m first"),
    ("optim.lr=[0.1,0.01]", 2, "one run for each value: -m optim.lr=0.1,0.01"),
    ("layers.rules=conv1:8 method=dorefa", 2, "allowed: layer-name patterns and widths, such as {layer1.*: 8}"),
    ("layers.rules={conv9:8} method=dorefa", 2, "matches no layer; the layers are conv1, layer1.0.conv1"),
    # widths that nobody supports
    ("method=dorefa bits.w=33", 2, "bits.w=33: must be a number from 1 to 32"),
    ("method=lsq bits=w1a1", 2, "lsq does not support bits.w=1 for weights; allowed: 2-16 or 32"),
    ("method=twn bits=w2a2", 2, "twn does not support bits.a=2 for activations; allowed: 32"),
    # a network of the user's own
    ("model=nets.py:Net", 2, "type model=nets:Net"),
    ("model=nets.Net", 2, "for your own code, type model=nets:Net"),
    ("model=./nets.py", 2, "for your own code, type model=nets:FUNCTION"),
    ("model=net:Net", 2, "No module named 'net'; did you mean nets?"),
    ("model=nets:Nett", 2, "did you mean Net?"),
    ("model=nets:net", 2, "type the name of the class, or of a function that returns a new object"),
    ("model=nets:deep", 2, "tried Net(), Net(num_classes) or build(shape, classes)\ngive depth a default value"),
    ("model=nets:TenOfTwelve", 2, "must be 10, one per class\nqbench passes this number to your class or function"),
    ("model=nets:ForMnist", 2, "fails on images of shape (2, 1, 8, 8) (N, C, H, W): RuntimeError: mat1 and mat2"),
    ("model=nets:Net model.depth=3", 2, "model.depth: no such key"),
    # data of the user's own
    ("dataset=sets:one_split", 3, "expected: a Dataset, or (train, test) or (train, val, test), each of them (im"),
    ("dataset=sets:loaders", 3, "instead of a DataLoader, return its dataset"),
    ("dataset=sets:channels_last", 3, "images.permute(0, 3, 1, 2)"),
    ("dataset=sets:labels_from_one", 3, "to convert: labels - 1"),
    ("dataset=sets:of_folder", 2, "give folder a default value in the code; you can then type dataset.folder=VALUE"),
    ("dataset=photos", 2, "for a folder of images, type dataset=folder dataset.root=photos"),
    ("dataset=folder dataset.root=photos/train", 3, "dataset.test=0.2 for a folder that contains CLASS/IMAGE"),
    ("dataset=folder dataset.root=photos dataset.test=0.2", 3, "type dataset.test=auto, or dataset.test=NAME of the"),
    ("dataset=folder dataset.root=photo", 3, "expected in "),
    # files that are missing or something else
    ("dataset=cifar10", 3, "type dataset.download=true, or dataset.root=DIR"),
    ("init=nowhere.pt", 2, "allowed: auto, float, scratch, imagenet, or the path of a run's directory or a checkpoint"),
    ("init=weights.txt", 4, "allowed: tensors by name (a state_dict), written by torch.save"),
    ("init=other.pt", 4, "other shape: fc.weight (2, 3) for (10, 32)"),
    ("method=dorefa distill=kd distill.teacher=nowhere", 2, "allowed: baseline, or the directory of a finished run"),
    # words in another form
    ("train method=dorefa", 2, "to train, type only KEY=VALUE, such as: qbench method=dorefa"),
    ("--method dorefa", 2, "type method=dorefa"),
    ("--bits.w=2", 2, "type bits.w=2"),
    ("method: dorefa", 2, "type method=dorefa"),
    ("method = dorefa", 2, "type method=dorefa"),
    ("method=dorefa bits.w 2", 2, "type bits.w=2"),
    ("method==dorefa", 2, "type method=dorefa"),
    ("-M method=dorefa,lsq", 2, "did you mean -m?"),
    ("compar outputs", 2, "did you mean compare?"),
    # subcommands
    ("compare results", 2, "type a directory of runs, such as outputs"),
    ("compare . --htlm page.html", 2, "did you mean --html?"),
    ("compare . -html page.html", 2, "did you mean --html?"),
    ("export outputs/nothing", 2, "to list the runs below outputs: qbench list runs"),
    ("evaluate", 2, "evaluate needs exactly one run directory, found 0: qbench evaluate RUN"),
    ("export . ..", 2, "found 2: qbench export RUN\ntype one of them, such as ."),
    ("inspect outputs/nothing", 2, "to list the runs below outputs: qbench list runs"),
    ("list model", 2, "did you mean models?"),
    ("check nets:Net", 2, "returned a Net, not a Method"),
]  # fmt: skip


def never(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("training started")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working directory with code, weights and images of a user."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "nets.py").write_text(NETWORKS)
    (folder / "sets.py").write_text(DATA)
    (folder / "weights.txt").write_text("hello\n")
    torch.save({"fc.weight": torch.zeros(2, 3)}, folder / "other.pt")
    write_images(folder / "photos", count=2)
    return folder


def test_there_are_enough() -> None:
    assert len({words for words, _, _ in MISTAKES}) >= 30


@pytest.mark.parametrize(
    ("words", "status", "fix"),
    [long_tier(*mistake) if i % 2 else mistake for i, mistake in enumerate(MISTAKES)],
    ids=[words for words, _, _ in MISTAKES],
)
def test_the_message_holds_the_fix(
    words: str, status: int, fix: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    monkeypatch.setattr("qbench.experiment.run._train", never)
    assert cli(words.split()) == status
    out, err = capsys.readouterr()
    unsupported = "unsupported" in out  # is the row of the run, with the reason below it
    assert fix in (out if unsupported else err)
    assert "\\n" not in out, "a line break is not written as an escape sequence"
    assert len(err.splitlines()) <= 3
    assert "Traceback" not in err + out
    assert unsupported or (err.startswith("qbench: ") and not out)
