"""inf and nan in every place: the run stops, names the step and the place, and saves nothing of it
(R14).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Configure, tiered
from torch import Tensor, nn

from qbench.cli.main import main as cli
from qbench.errors import Diverged
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.methods import lsq
from qbench.quant.install import install
from qbench.quant.method import Method
from qbench.quant.probe import Batch
from qbench.runs.result import load_result
from qbench.training.checkpoint import first_nonfinite, unpack
from qbench.training.health import WITHOUT_TRAINING, check_scales

VALUES = {"none": float("nan"), "up": float("inf"), "down": float("-inf")}
STEP = 21  # an epoch has 18 steps: there is one checkpoint before it
LAYER = "layer2.0.conv1"
PLACES = {  # place of the value -> what the message names
    "input": "conv1: 1 of ",
    "activation": f"{LAYER}: 1 of ",
    "weight": f"{LAYER}: 1 of ",
    "gradient": f"the gradient of {LAYER}.weight",
    "loss": "the loss is not finite",
    "scale": f"{LAYER}.weight_q.step",
    "momentum": f"{LAYER}: 1 of ",
    "statistics": "layer2.0.bn1.running_mean",
}


def build(*, w: int = 2, a: int = 2, place: str = "none", value: str = "none") -> Method:
    """Return LSQ that sets one number to nan or inf in step `STEP`."""
    method, bad_value, steps, hooked = lsq.build(w=w, a=a), VALUES[value], 0, False

    def due(what: str) -> bool:
        return place == what and steps == STEP

    def input_hook(what: str) -> Any:
        def change_input(module: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
            if not due(what) or not torch.is_grad_enabled():
                return None
            images = inputs[0].detach().clone()
            images[0, 0, 0, 0] = bad_value
            return images

        return change_input

    def loss(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
        nonlocal hooked
        if not hooked:
            layer: Any = model.get_submodule(LAYER)
            layer.weight.register_hook(lambda grad: grad + bad_value if due("gradient") else grad)
            layer.register_forward_pre_hook(input_hook("activation"))
            model.register_forward_pre_hook(input_hook("input"))
            hooked = True
        value = nn.functional.cross_entropy(logits, batch[1])
        return value * bad_value if due("loss") else value

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal steps
        assert method.step
        method.step(model, optimizer)
        steps += 1
        layer: Any = model.get_submodule(LAYER)
        norm: Any = model.get_submodule("layer2.0.bn1")
        with torch.no_grad():
            if due("weight"):
                layer.weight[0, 0, 0, 0] = bad_value
            if due("scale"):
                layer.weight_q.step.fill_(bad_value)
            if due("statistics"):
                norm.running_mean[0] = bad_value
            if due("momentum"):
                optimizer.state[layer.weight]["exp_avg"][0, 0, 0, 0] = bad_value

    return replace(method, name="faulty", loss=loss, step=step)


def words(place: str, value: str) -> list[str]:
    method = ["method=test_not_finite:build", f"method.place={place}", f"method.value={value}"]
    return ["experiment=smoke", "runtime.tensorboard=false", "init=scratch", "bits=w2a2", "epochs=2", *method]


@pytest.mark.parametrize("value", tiered(VALUES, ["none"]))
@pytest.mark.parametrize("place", tiered(PLACES, ["gradient", "momentum", "statistics"]))
def test_the_run_stops_in_the_step_and_saves_nothing_of_it(configure: Configure, place: str, value: str) -> None:
    config = configure(*words(place, value))
    with pytest.raises(Diverged) as caught:
        run(planned_run(config))
    message = str(caught.value)
    assert PLACES[place] in message, message
    if place != "statistics":  # training does not read them: validation or saving finds them
        assert "in epoch 1" in message
        step = int(message.partition(", step ")[2].split(" ")[0].split(";")[0])
        assert step == STEP + (place == "momentum"), message
    directory = planned_run(config).directory
    result = load_result(directory.path)
    assert result is not None
    assert result.status == "diverged"
    assert result.reason is not None
    assert PLACES[place] in result.reason
    states = directory.checkpoints()
    assert states, "the earlier checkpoint remains"
    for path in states:
        state = unpack(path.read_bytes(), str(path))["state"]
        parameters = {name: state["model"][name] for name in state["trainable"]}
        assert first_nonfinite([parameters, state["optimizer"]]) is None
    assert not (directory.path / "best.pt").exists()


def test_without_a_bad_value_it_trains(configure: Configure) -> None:
    assert run(planned_run(configure(*words("none", "none")))).status == "done"


@pytest.mark.parametrize("method", ["float", "dorefa"])
def test_a_network_without_learned_scales_stops_too(configure: Configure, method: str) -> None:
    config = configure(
        "experiment=smoke",
        "runtime.tensorboard=false",
        f"method={method}",
        "init=scratch",
        "optim.lr=1e30",
        "pretrain.optim.lr=1e30",
    )
    with pytest.raises(Diverged, match=r"in epoch \d+, step \d+"):
        run(planned_run(config))


def test_the_command_ends_with_status_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([*words("gradient", "none"), f"out={tmp_path}"]) == 6
    errors = capsys.readouterr().err
    assert f"in epoch 1, step {STEP} (likely cause: the gradient of {LAYER}.weight" in errors
    assert "try a lower optim.lr" in errors


def test_the_same_command_resumes_from_the_last_good_checkpoint(configure: Configure) -> None:
    config = configure(*words("loss", "none"))
    with pytest.raises(Diverged):
        run(planned_run(config))
    result = run(
        planned_run(config)
    )  # steps are counted from the checkpoint of step 18: the bad value does not occur again
    assert result.status == "done"
    undisturbed = run(planned_run(configure(*words("none", "none"))))
    assert result.weights_sha256 == undisturbed.weights_sha256


class NanInEvaluation(nn.Module):
    """A network whose outputs are finite in training alone."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(shape[1] * shape[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(x.flatten(1))
        return y if self.training else y * torch.nan


class NegativeVariance(nn.Sequential):
    """A network whose batch normalization gives nan in evaluation."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        norm = nn.BatchNorm1d(16)
        assert norm.running_var is not None
        norm.running_var.fill_(-1)
        super().__init__(nn.Flatten(), nn.Linear(64, 16), norm, nn.Linear(16, 16), nn.Linear(16, classes))


@pytest.mark.parametrize("words", [
    ["model=test_not_finite:NegativeVariance", "method=ptq"],  # an input of a quantizer
    ["model=test_not_finite:NegativeVariance", "method=lsq", "epochs=0"],
    ["model=test_not_finite:NanInEvaluation", "method=ptq"],  # the outputs
])  # fmt: skip
def test_the_learning_rate_is_not_blamed_if_nothing_was_trained(configure: Configure, words: list[str]) -> None:
    with pytest.raises(Diverged, match=r"nothing was trained, so the cause is in the initial weights") as caught:
        run(planned_run(configure("init=scratch", "pretrain.epochs=1", "bits=w4a4", *words)))
    assert "optim.lr" not in str(caught.value)


def test_a_scale_that_is_not_positive_is_explained() -> None:
    model = install(lsq.build(w=4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    layer: Any = model.get_submodule("1")
    layer.weight_q.step.data.fill_(-1)
    with pytest.raises(Diverged, match=r"\n?try a lower optim\.lr"):
        check_scales(model, "in epoch 1, step 1")
    with pytest.raises(Diverged, match="must be above 0; nothing was trained"):
        check_scales(model, WITHOUT_TRAINING)


def test_outputs_that_are_not_finite_in_evaluation_stop_the_run(configure: Configure) -> None:
    """Without validation images, the first evaluation is the last one."""
    words = ["method=float", "model=test_not_finite:NanInEvaluation", "dataset.val=0", "epochs=1", "pretrain.epochs=1"]
    with pytest.raises(Diverged, match="outputs on the test or validation images are not finite"):
        run(planned_run(configure(*words)))
