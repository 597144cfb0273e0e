"""Every fault planted once: what is said, that it is said once, what stops. And nothing is said of sound runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure
from helpers import quantizing_bits
from torch import Tensor, nn

from qbench.config import groups
from qbench.errors import Diverged
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.methods import dorefa, lsq
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.quantizer import IdentityQuantizer
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import load_result
from qbench.training import health as sentinels
from qbench.training import monitor as lookout
from qbench.training.checkpoint import unpack
from qbench.training.layer_stats import trace_layers

STEP = 21  # of 18 an epoch: one checkpoint stands behind it
LAYER = "layer2.0.conv1"
NAMED = "method=test_health:build"
QUIET = ["experiment=smoke", "runtime.tensorboard=false", "init=scratch", "epochs=3"]


class Declared(lsq.LSQWeight):
    positive_parameters = ("step",)


@pytest.fixture(autouse=True, scope="module")
def _every_epoch() -> Iterator[None]:
    """Epochs are short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookout, "STEPS", 1)
        yield


def build(*, w: int = 2, a: int = 2, fault: str = "none", times: float = 1.0) -> Method:
    """Return LSQ that spoils one layer after step `STEP`, and from then on."""
    made, done = lsq.build(w=w, a=a), 0

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal done
        done += 1
        assert made.step
        made.step(model, optimizer)
        layer: Any = model.get_submodule(LAYER)
        with torch.no_grad():
            if fault == "scale" and done >= STEP:
                layer.weight_q.step.fill_(-0.25)
            if fault == "weights" and done >= STEP:
                layer.weight.fill_(0.5)
            if fault == "inputs" and done >= STEP:
                model.get_submodule("layer2.0.bn1").bias.fill_(-1e3)  # type: ignore[union-attr,operator]
            if fault == "range" and done == STEP:
                layer.weight.mul_(times)

    return replace(made, name="spoilt", weight=lambda name, layer, bits: Declared(layer, bits), step=step)


def blind(shape: tuple[int, int, int], classes: int, *, width: int = 4) -> nn.Module:
    """A perceptron that sees nothing of its images."""
    return nn.Sequential(
        Dark(), nn.Flatten(), nn.Linear(shape.numel() if isinstance(shape, torch.Size) else 64, classes)
    )


class Dark(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def said(config: Any) -> tuple[list[str], list[str]]:
    """Run; return the warnings in the result's notes and those in the log."""
    result = run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    assert result.status == "done", result.reason
    log = (Path(result.run) / "log.txt").read_text().splitlines()
    return [n for n in result.notes if n.startswith("warning")], [line for line in log if " warning: " in line]


FAULTS = {
    "weights": f"warning: {LAYER}: all its weights lie on one level of 4, in epoch 1, step 36; likely they are small",
    "inputs": f"warning: {LAYER}: all its outputs are equal whatever the image, in epoch 1, step 36; likely so is its",
}


@pytest.mark.parametrize("level", ["off", "light"])
@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_said_once_with_layer_step_and_cause(configure: Configure, fault: str, level: str) -> None:
    notes, log = said(configure(*QUIET, NAMED, f"method.fault={fault}", f"runtime.observe={level}"))
    assert [note[: len(FAULTS[fault])] for note in notes] == [FAULTS[fault]], notes
    assert [line.partition(" warning: ")[2] for line in log] == [note.removeprefix("warning: ") for note in notes]


def test_what_was_said_before_an_interruption_is_not_said_again(configure: Configure) -> None:
    words = [*QUIET, NAMED, "method.fault=weights"]
    asked = 0

    def stop() -> int:
        nonlocal asked
        asked += 1
        return 15 if asked >= 45 else 0

    config = configure(*words)
    with pytest.raises(Exception, match="stopped by signal 15"):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True), stop))
    notes, log = said(config)
    assert (len(notes), len(log)) == (1, 1)


def test_weights_that_grow_are_told_and_those_that_run_away_stop_the_run(configure: Configure) -> None:
    notes, _ = said(configure(*QUIET, NAMED, "method.fault=range", "method.times=300"))
    assert len(notes) == 1
    assert notes[0].startswith(f"warning: {LAYER}: its largest weight, ")
    assert "times what it started with, in epoch 1, step 36; likely optim.lr is too high" in notes[0]
    config = configure(*QUIET, NAMED, "method.fault=range", "method.times=3e4", "runtime.checkpoint_seconds=0")
    with pytest.raises(Diverged, match=f"{LAYER}: its largest weight, .*, in epoch 1, step {STEP}; likely") as caught:
        run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    assert caught.value.status == 6
    directory = planned_run(config).directory
    result = load_result(directory.path)
    assert result is not None
    assert result.status == "diverged"
    newest = unpack(directory.checkpoints()[0].read_bytes(), "")["state"]
    assert newest["counters"][2] == STEP - 1
    assert newest["model"][f"{LAYER}.weight"].abs().max() < 10, "the checkpoint before stays, and is sound"


def test_it_stops_at_the_end_of_the_epoch_where_nothing_is_saved_before(configure: Configure) -> None:
    config = configure(*QUIET, NAMED, "method.fault=range", "method.times=3e4", "runtime.observe=off")
    with pytest.raises(Diverged, match=f"{LAYER}: its largest weight, .*, in epoch 1, step 36; likely"):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    assert [path.name for path in planned_run(config).directory.checkpoints()] == ["state-18.pt"]


@pytest.mark.parametrize(("often", "step", "newest"), [("0", STEP, STEP - 1), ("1e9", 36, 18)])
def test_a_scale_below_zero_stops_the_run(configure: Configure, often: str, step: int, newest: int) -> None:
    config = configure(*QUIET, NAMED, "method.fault=scale", f"runtime.checkpoint_seconds={often}")
    expected = f"{LAYER}.weight_q.step is -0.25, and must be above 0, in epoch 1, step {step}; likely a step was too"
    with pytest.raises(Diverged, match=expected):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    saved = unpack(planned_run(config).directory.checkpoints()[0].read_bytes(), "")["state"]
    assert saved["counters"][2] == newest
    assert saved["model"][f"{LAYER}.weight_q.step"] > 0, "the checkpoint before stays"


def test_accuracy_at_chance_is_told_after_enough_steps(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=smoke", "runtime.tensorboard=false", "method=float", "init=scratch", "pretrain.epochs=3"]
    monkeypatch.setattr(sentinels, "LEARNT", 30)
    notes, _ = said(configure(*words, "model=test_health:blind"))
    assert len(notes) == 1
    assert "% of 10 classes, which is chance, in epoch 1, step 36; likely optim.lr" in notes[0]
    assert said(configure(*words))[0] == []


@pytest.mark.parametrize(
    ("top1", "images", "classes", "step", "told"),
    [
        (12.9, 900, 10, 300, True),  # chance 0.1 and three times 0.01, the standard error of 900 images
        (13.1, 900, 10, 300, False),
        (12.9, 900, 10, 299, False),
        (4.0, 900, 10, 300, True),
        (54.9, 900, 2, 300, True),  # 0.5 and three times 1/60
        (55.1, 900, 2, 300, False),
        (0.1, 90_000, 1000, 5000, True),  # 0.001 and three times 0.000105
        (0.14, 90_000, 1000, 5000, False),
        (1.0, 900, 0, 300, False),  # nobody knows how many classes
    ],
)
def test_chance_is_an_interval(top1: float, images: int, classes: int, step: int, told: bool) -> None:
    record = {"train_top1": top1, "images": images}
    assert bool(sentinels.at_chance(record, classes, step, "here")) == told


def test_only_the_layer_that_is_to_blame_is_named() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    install(dorefa.build(w=2), model)
    images = torch.rand(8, 4)
    assert sentinels.degenerate_layers(model, trace_layers(model, images), "") == {}
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(4))
        model[1].weight.zero_()
        model[1].weight_q = IdentityQuantizer()
    assert list(sentinels.degenerate_layers(model, trace_layers(model, images), "")) == ["output 1"]


def test_a_range_is_measured_by_the_start_and_by_the_inputs_where_that_is_zero() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    install(dorefa.build(w=2), model)
    with torch.no_grad():
        model[1].weight.zero_()
        model[0].weight.fill_(2.0)
    start = sentinels.starts(model)
    assert (start["0"], start["1"]) == (2.0, 0.5)
    for factor, found in ((199.0, []), (201.0, ["range 0"])):
        with torch.no_grad():
            model[0].weight.fill_(factor)
            model[1].weight.fill_(-factor / 8)
        assert list(sentinels.exploding_weights(model, start, "")) == found
    with torch.no_grad():
        model[1].weight.fill_(-5001.0)
    with pytest.raises(Diverged, match="1: its largest weight, 5e"):
        sentinels.exploding_weights(model, start, "")


SOUND = ("dorefa", "hwgq", "mlq", "ttq")
METHODS = groups.option_names("method")


@pytest.mark.parametrize(
    "name", [*SOUND, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in SOUND)]
)
def test_nothing_is_said_of_a_sound_run(name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentinels, "LEARNT", 50)
    words = [
        "experiment=smoke",
        "runtime.tensorboard=false",
        f"method={name}",
        f"bits={quantizing_bits(name)}",
        "epochs=4",
    ]
    assert said(configure(*words, "pretrain.epochs=4")) == ([], [])
