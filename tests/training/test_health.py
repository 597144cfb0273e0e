"""Health checks: each fault gives one warning or stops the run, and sound runs give no warning."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure
from helpers import quantizing_bits
from torch import Tensor, nn

from qbench.config import compose, groups
from qbench.errors import Diverged
from qbench.experiment import evidence
from qbench.experiment.context import RunContext
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.methods import dorefa, lsq
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.quantizer import IdentityQuantizer
from qbench.runs.progress import ProgressReporter
from qbench.runs.result import load_result
from qbench.training import health, monitor
from qbench.training.checkpoint import unpack
from qbench.training.epoch_record import EpochRecord
from qbench.training.layer_stats import trace_layers

STEP = 21  # an epoch has 18 steps: there is one checkpoint before it
LAYER = "layer2.0.conv1"
NAMED = "method=test_health:build"
WORDS = ["experiment=smoke", "runtime.tensorboard=false", "init=scratch", "epochs=3"]


class WeightWithPositiveStep(lsq.LSQWeight):
    positive_parameters = ("step",)


@pytest.fixture(autouse=True, scope="module")
def _observe_every_epoch() -> Iterator[None]:
    """Observe after every epoch, and do not warn of few training steps, although runs and epochs are short here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "MIN_STEPS_BETWEEN", 1)
        patch.setattr(evidence, "FEW_STEPS", 0)
        yield


def build(*, w: int = 2, a: int = 2, fault: str = "none", times: float = 1.0) -> Method:
    """Return LSQ with a fault in one layer from step `STEP` on."""
    method, steps = lsq.build(w=w, a=a), 0

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal steps
        steps += 1
        assert method.step
        method.step(model, optimizer)
        layer: Any = model.get_submodule(LAYER)
        with torch.no_grad():
            if fault == "scale" and steps >= STEP:
                layer.weight_q.step.fill_(-0.25)
            if fault == "weights" and steps >= STEP:
                layer.weight.fill_(0.5)
            if fault == "inputs" and steps >= STEP:
                model.get_submodule("layer2.0.bn1").bias.fill_(-1e3)  # type: ignore[union-attr,operator]
            if fault == "range" and steps == STEP:
                layer.weight.mul_(times)

    return replace(
        method, name="faulty", weight=lambda name, layer, bits: WeightWithPositiveStep(layer, bits), step=step
    )


def blind(shape: tuple[int, int, int], classes: int, *, width: int = 4) -> nn.Module:
    """A perceptron with a constant input, whatever the image."""
    return nn.Sequential(
        Zero(), nn.Flatten(), nn.Linear(shape.numel() if isinstance(shape, torch.Size) else 64, classes)
    )


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def warnings_of(config: Any) -> tuple[list[str], list[str]]:
    """Run a configuration; return the warnings in the result about training, and the warnings in log.txt."""
    result = run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    assert result.status == "done", result.reason
    log = (Path(result.run) / "log.txt").read_text().splitlines()
    others = (" has no effect, ", "in training, the network has state")  # the faults count their calls in attributes
    warnings = [text for text in result.warnings if not is_evidence(text) and not any(word in text for word in others)]
    return warnings, [line for line in log if " warning: " in line]


def is_evidence(warning: str) -> bool:
    """Whether a warning says that a run is too short, or its float baseline too weak, to mean anything."""
    return " training steps, but " in warning or warning.startswith("the float baseline is not clearly above chance")


FAULTS = {
    "weights": f"{LAYER}: all weights are on one of 4 levels, in epoch 1, step 36; probably the weights are small",
    "inputs": f"{LAYER}: the output is the same for all images, in epoch 1, step 36; "
    "probably because the layer's input is also the same",
}


LEVELS = [("inputs", "light")]
OTHERS = [("weights", "off"), ("weights", "light"), ("inputs", "off")]


@pytest.mark.parametrize(
    ("fault", "level"), [*LEVELS, *(pytest.param(*case, marks=pytest.mark.full) for case in OTHERS)]
)
def test_a_warning_appears_once_with_layer_step_and_cause(configure: Configure, fault: str, level: str) -> None:
    notes, log = warnings_of(configure(*WORDS, NAMED, f"method.fault={fault}", f"runtime.observe={level}"))
    assert [note[: len(FAULTS[fault])] for note in notes] == [FAULTS[fault]], notes
    assert [line.partition(" warning: ")[2] for line in log] == notes


def test_a_resumed_run_does_not_repeat_a_warning(configure: Configure) -> None:
    words = [*WORDS, NAMED, "method.fault=weights"]
    calls = 0

    def stop() -> int:
        nonlocal calls
        calls += 1
        return 15 if calls >= 45 else 0

    config = configure(*words)
    with pytest.raises(Exception, match="stopped by signal 15"):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True), stop))
    notes, log = warnings_of(config)
    assert (len(notes), len(log)) == (1, 1)


def test_growing_weights_give_a_warning_and_exploding_weights_stop_the_run(configure: Configure) -> None:
    notes, _ = warnings_of(configure(*WORDS, NAMED, "method.fault=range", "method.times=300"))
    assert len(notes) == 1
    assert notes[0].startswith(f"{LAYER}: the largest weight is ")
    assert "times the initial one or 1/sqrt(fan-in), whichever is larger, in epoch 1, step 36;" in notes[0]
    config = configure(*WORDS, NAMED, "method.fault=range", "method.times=3e4", "runtime.checkpoint_seconds=0")
    with pytest.raises(
        Diverged, match=f"{LAYER}: the largest weight is .*, in epoch 1, step {STEP}; probably"
    ) as caught:
        run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    assert caught.value.status == 6
    directory = planned_run(config).directory
    result = load_result(directory.path)
    assert result is not None
    assert result.status == "diverged"
    newest = unpack(directory.checkpoints()[0].read_bytes(), "")["state"]
    assert newest["counters"][2] == STEP - 1
    assert newest["model"][f"{LAYER}.weight"].abs().max() < 10, "the earlier checkpoint remains, and is sound"


def test_exploding_weights_stop_the_run_at_the_end_of_the_epoch_without_a_save(configure: Configure) -> None:
    config = configure(*WORDS, NAMED, "method.fault=range", "method.times=3e4", "runtime.observe=off")
    with pytest.raises(Diverged, match=f"{LAYER}: the largest weight is .*, in epoch 1, step 36; probably"):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    assert [path.name for path in planned_run(config).directory.checkpoints()] == ["state-18.pt"]


@pytest.mark.parametrize(("often", "step", "newest"), [("0", STEP, STEP - 1), ("1e9", 36, 18)])
def test_a_scale_below_zero_stops_the_run(configure: Configure, often: str, step: int, newest: int) -> None:
    config = configure(*WORDS, NAMED, "method.fault=scale", f"runtime.checkpoint_seconds={often}")
    expected = f"{LAYER}.weight_q.step is -0.25 in epoch 1, step {step}, but must be above 0; probably"
    with pytest.raises(Diverged, match=expected):
        run(planned_run(config), RunContext(ProgressReporter(quiet=True)))
    saved = unpack(planned_run(config).directory.checkpoints()[0].read_bytes(), "")["state"]
    assert saved["counters"][2] == newest
    assert saved["model"][f"{LAYER}.weight_q.step"] > 0, "the earlier checkpoint remains"


def test_accuracy_at_chance_gives_a_warning_after_enough_steps(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["experiment=smoke", "runtime.tensorboard=false", "method=float", "init=scratch", "pretrain.epochs=3"]
    monkeypatch.setattr(health, "MIN_STEPS", 30)
    notes, _ = warnings_of(configure(*words, "model=test_health:blind"))
    assert notes[1:] == [
        "parameters not trained: 2.weight had no gradient in the first 54 steps; probably forward() does not use "
        "them, detaches or copies a tensor, or clips all values that depend on them, as quantizers can"
    ]
    assert "%, which is not better than the share of the most frequent class (10." in notes[0]
    assert "%), in epoch 1, step 36; probably optim.lr" in notes[0]
    assert warnings_of(configure(*words))[0] == []


@pytest.mark.parametrize(
    ("top1", "images", "chance", "step", "warned"),
    [
        (12.9, 900, 0.1, 300, True),  # chance 0.1 plus three times 0.01, the standard error with 900 images
        (13.1, 900, 0.1, 300, False),
        (12.9, 900, 0.1, 299, False),
        (4.0, 900, 0.1, 300, True),
        (92.9, 900, 0.9, 300, True),  # 90 % of the images have the same class
        (93.1, 900, 0.9, 300, False),
        (0.1, 90_000, 0.001, 5000, True),  # 0.001 and three times 0.000105
        (0.14, 90_000, 0.001, 5000, False),
        (1.0, 900, 0.0, 300, False),  # the share is not known
        (100.0, 900, 1.0, 300, False),  # all images have the same class
    ],
)
def test_limit_of_chance_accuracy(top1: float, images: int, chance: float, step: int, warned: bool) -> None:
    record = EpochRecord(epoch=0, lr=0.1, train_loss=1.0, train_top1=top1, seconds=1.0, images=images)
    assert bool(health.at_chance(record, chance, step, "here")) == warned


def test_only_the_first_layer_with_constant_output_gives_a_warning() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    install(dorefa.build(w=2), model)
    images = torch.rand(8, 4)
    assert health.degenerate_layers(model, trace_layers(model, images), "") == {}
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(4))
        model[1].weight.zero_()
        model[1].weight_q = IdentityQuantizer()
    assert list(health.degenerate_layers(model, trace_layers(model, images), "")) == ["output 1"]


def test_growth_is_relative_to_the_initial_weights_or_to_the_inputs_if_those_are_zero() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    install(dorefa.build(w=2), model)
    with torch.no_grad():
        model[1].weight.zero_()
        model[0].weight.fill_(2.0)
    start = health.initial_magnitudes(model)
    assert (start["0"], start["1"]) == (2.0, 0.5)
    for factor, subjects in ((199.0, []), (201.0, ["range 0"])):
        with torch.no_grad():
            model[0].weight.fill_(factor)
            model[1].weight.fill_(-factor / 8)
        assert list(health.exploding_weights(model, start, "")) == subjects
    with torch.no_grad():
        model[1].weight.fill_(-5001.0)
    with pytest.raises(Diverged, match="1: the largest weight is 5e"):
        health.exploding_weights(model, start, "")


BASELINE = ["experiment=smoke", "runtime.tensorboard=false", "pretrain.epochs=4"]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output folder with the float baseline of the sound runs, which has no warnings
    either.
    """
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("baseline")
    (config,) = compose.configurations([*BASELINE, f"out={out}", "method=float"])
    assert warnings_of(config) == ([], [])
    return out


FAST = ("dorefa", "mlq")
METHODS = groups.option_names("method")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.full) for n in METHODS if n not in FAST)])
def test_a_sound_run_has_no_warnings(name: str, baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MIN_STEPS", 50)
    words = [f"method={name}", f"bits={quantizing_bits(name)}", "epochs=4"]
    (config,) = compose.configurations([*BASELINE, f"out={baseline}", *words])
    assert warnings_of(config) == ([], [])
