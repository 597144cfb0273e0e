"""Networks that are rebuilt with code that has changed since their run: refused, or named in the result."""

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.analysis.evaluate import evaluate
from qbench.analysis.export import evaluate_file, export
from qbench.analysis.inspect import inspect
from qbench.analysis.sensitivity import sensitivity
from qbench.data.spec import InputFormat
from qbench.deploy.trace import NotExportable
from qbench.experiment.trained_network import example_outputs, other_outputs
from qbench.runs.result import Result
from qbench.training.checkpoint import unpack

SMOKE = ("experiment=smoke", "runtime.tensorboard=false", "model=changing_network:Net")
CHANGED = "with these weights, the rebuilt network has other outputs than the network that was trained"

HELPER = """
def act(x):
    return x.relu()
"""
NETWORK = """
import changing_helper
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(shape[0], 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = changing_helper.act(layer(x))
        return self.last(x.mean((2, 3)))
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Return a function that trains a network of one's own, whose file imports `changing_helper`."""
    (tmp_path / "changing_helper.py").write_text(HELPER)
    (tmp_path / "changing_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda *words: qbench.run(*SMOKE, *words, out=tmp_path / "out")
    for name in ("changing_helper", "changing_network"):
        importlib.sys.modules.pop(name, None)  # type: ignore[attr-defined]


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that changes what the imported module computes."""

    def change() -> None:
        helper = importlib.import_module("changing_helper")
        monkeypatch.setattr(helper, "act", lambda x: x.clamp(0, 0.05))

    return change


def test_other_outputs_are_named_by_every_command(
    train: Callable[..., Result], change: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(train("method=dorefa", "bits=w2a2", "distill=none").run)

    def notes(weights: str) -> list[bool]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qbench"):
            qbench.load_model(run, weights=weights, trust=True)
        texts = [evaluate(run, weights=weights).notes, inspect(run, weights=weights).notes]
        texts += [sensitivity(run, widths=(2,))[0].notes, caplog.messages]
        return [any(CHANGED in note for note in text) for text in texts]

    file = export(run).path
    assert not any(notes("last") + notes("best"))
    change()
    assert all(notes("last") + notes("best"))
    for form in ("packed", "onnx"):
        with pytest.raises(NotExportable, match=CHANGED):
            export(run, form)
    assert evaluate_file(file), "a file that was exported before does not depend on the code"


@pytest.mark.full
def test_a_baseline_and_a_teacher_with_other_outputs_are_named(
    train: Callable[..., Result], change: Callable[[], None]
) -> None:
    def named(result: Result) -> list[str]:
        return [warning for warning in result.warnings if CHANGED in warning]

    teacher = train("method=dorefa", "bits=w4a4")
    again = train("method=dorefa", "bits=w3a3", "distill=kd", f"distill.teacher={teacher.run}", "distill.trust=true")
    assert not named(teacher) + named(again)
    change()
    assert [text.partition(":")[0] for text in named(train("method=dorefa", "bits=w2a2"))] == [
        f"float baseline {Path(teacher.run).parent / Path(teacher.baseline.run).name}"  # type: ignore[union-attr]
    ]
    again = train("method=dorefa", "bits=w2a2", "distill=kd", f"distill.teacher={teacher.run}", "distill.trust=true")
    assert sum(f"distill.teacher={teacher.run}: best.pt" in text for text in named(again)) == 1


def test_an_exported_file_of_an_earlier_training_is_named(
    train: Callable[..., Result], change: Callable[[], None]
) -> None:
    """The identity does not change, because it does not contain modules that a user's file imports."""
    words = ("method=dorefa", "bits=w2a2", "init=scratch")
    run = Path(train(*words).run)
    paths = [
        export(
            run,
            weights=weights,
            out=run / f"{weights}.qbench",
        ).path
        for weights in ("last", "best")
    ]

    def named() -> list[bool]:
        return [any("was trained again after" in note for note in evaluate_file(path).notes) for path in paths]

    assert not any(named())
    train(*words, "rerun=true")
    assert not any(named()), "the same weights again"
    change()
    train(*words, "rerun=true")
    assert all(named())
    paths = [path.rename(path.parent.parent / path.name) for path in paths]
    assert not any(named()), "outside the directory, nothing is known of the run"


def test_checkpoints_contain_the_outputs_of_their_weights(train: Callable[..., Result]) -> None:
    run = Path(train("method=dorefa", "bits=w2a2").run)
    for weights in ("last", "best"):
        layers = unpack((run / f"{weights}.pt").read_bytes(), weights)["layers"]
        model = qbench.load_model(run, weights=weights, trust=True)
        assert torch.equal(layers["outputs"], example_outputs(model, layers["input"]))


FORMAT: InputFormat = {
    "dataset": "x",
    "shape": [2, 5, 7],
    "classes": 3,
    "mean": [0.5] * 2,
    "std": [0.25] * 2,
    "ends": [],
}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(70, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def test_example_images_span_the_range_of_pixels_and_leave_no_trace() -> None:
    seen: list[Tensor] = []
    model = Linear().train()
    model.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    random = torch.get_rng_state()
    outputs = example_outputs(model, FORMAT)
    assert outputs is not None
    assert outputs.shape == (8, 3)
    assert (seen[0].min(), seen[0].max()) == pytest.approx((-2, 2), abs=0.1), "(0 - 0.5) / 0.25 and (1 - 0.5) / 0.25"
    assert len(torch.unique(seen[0], dim=0)) == 8
    assert (model.calls.item(), model.seen, model.training) == (0, [], True)  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), random)
    example_outputs(model, FORMAT | {"ends": [[-3.0, 0.0], [5.0, 1.0]], "mean": [0.0] * 2, "std": [1.0] * 2})  # type: ignore[arg-type]
    channels = seen[1].view(8, 2, 35)
    assert channels.amin((0, 2)).tolist() == pytest.approx([-3, 0], abs=0.2)
    assert channels.amax((0, 2)).tolist() == pytest.approx([5, 1], abs=0.2)


def test_only_differences_above_rounding_errors_are_named() -> None:
    model = Linear()
    outputs = example_outputs(model, FORMAT)
    assert outputs is not None
    layers = {"input": FORMAT, "outputs": outputs}
    assert not other_outputs(model, layers, "a")
    assert not other_outputs(model, layers | {"outputs": outputs * 1.005}, "a")
    assert "a: with these weights" in other_outputs(model, layers | {"outputs": outputs * 1.02}, "a")
    few = outputs.clone()
    few[:3] = 0  # for example because an activation near a threshold changed in the last bit
    assert not other_outputs(model, layers | {"outputs": few}, "a")
    assert not other_outputs(model, {}, "a"), "files of other programs and of earlier versions contain no outputs"
    model.fc.weight.data.fill_(torch.nan)
    assert example_outputs(model, FORMAT) is None
