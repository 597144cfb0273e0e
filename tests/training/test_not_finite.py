"""inf and nan planted in every place: the run ends there, names step and part, and nothing of it is saved (R14)."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Configure
from helpers import qbench
from torch import Tensor, nn

from qbench.errors import Diverged
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.methods import lsq
from qbench.quant.method import Method
from qbench.quant.probe import Batch
from qbench.runs.result import load_result
from qbench.training.checkpoint import not_finite, unpack

VALUES = {"none": float("nan"), "up": float("inf"), "down": float("-inf")}
STEP = 21  # of 18 an epoch: one checkpoint stands behind it
LAYER = "layer2.0.conv1"
PLACES = {  # where -> what the message names
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
    """Return LSQ that spoils one number in step `STEP`."""
    made, planted, done, hooked = lsq.build(w=w, a=a), VALUES[value], 0, False

    def here(what: str) -> bool:
        return place == what and done == STEP

    def before(what: str) -> Any:
        def spoilt(module: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
            if not here(what) or not torch.is_grad_enabled():
                return None
            images = inputs[0].detach().clone()
            images[0, 0, 0, 0] = planted
            return images

        return spoilt

    def loss(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
        nonlocal hooked
        if not hooked:
            layer: Any = model.get_submodule(LAYER)
            layer.weight.register_hook(lambda grad: grad + planted if here("gradient") else grad)
            layer.register_forward_pre_hook(before("activation"))
            model.register_forward_pre_hook(before("input"))
            hooked = True
        found = nn.functional.cross_entropy(logits, batch[1])
        return found * planted if here("loss") else found

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal done
        assert made.step
        made.step(model, optimizer)
        done += 1
        layer: Any = model.get_submodule(LAYER)
        norm: Any = model.get_submodule("layer2.0.bn1")
        with torch.no_grad():
            if here("weight"):
                layer.weight[0, 0, 0, 0] = planted
            if here("scale"):
                layer.weight_q.step.fill_(planted)
            if here("statistics"):
                norm.running_mean[0] = planted
            if here("momentum"):
                optimizer.state[layer.weight]["exp_avg"][0, 0, 0, 0] = planted

    return replace(made, name="spoilt", loss=loss, step=step)


def words(place: str, value: str) -> list[str]:
    named = ["method=test_not_finite:build", f"method.place={place}", f"method.value={value}"]
    return ["experiment=smoke", "runtime.tensorboard=false", "bits=w2a2", "epochs=2", *named]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_the_run_ends_where_it_appears_and_saves_nothing_of_it(configure: Configure, place: str, value: str) -> None:
    config = configure(*words(place, value))
    with pytest.raises(Diverged) as caught:
        run(planned_run(config))
    said = str(caught.value)
    assert PLACES[place] in said, said
    if place != "statistics":  # which training does not read: found by validation, or when it is to be saved
        assert "in epoch 1" in said
        at = int(said.partition(", step ")[2].split(",")[0].split(";")[0])
        assert at == STEP + (place == "momentum"), said
    directory = planned_run(config).directory
    result = load_result(directory.path)
    assert result is not None
    assert result.status == "diverged"
    assert result.reason is not None
    assert PLACES[place] in result.reason
    states = directory.checkpoints()
    assert states, "the checkpoint before stays"
    for path in states:
        state = unpack(path.read_bytes(), str(path))["state"]
        parameters = {name: state["model"][name] for name in state["trainable"]}
        assert not_finite([parameters, state["optimizer"]]) is None
    assert not (directory.path / "best.pt").exists()


def test_without_a_plant_it_trains(configure: Configure) -> None:
    assert run(planned_run(configure(*words("none", "none")))).status == "done"


@pytest.mark.parametrize("method", ["float", "dorefa"])
def test_a_network_without_learned_scales_says_it_too(configure: Configure, method: str) -> None:
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


def test_the_command_ends_with_status_6(tmp_path: Path) -> None:
    done = qbench(
        *words("gradient", "none"),
        f"out={tmp_path}",
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), str(Path(__file__).parent)]),
    )
    assert done.returncode == 6, done.stderr
    assert f"in epoch 1, step {STEP}, first at the gradient of {LAYER}.weight" in done.stderr
    assert "try a lower optim.lr" in done.stderr


def test_the_same_line_goes_on_from_the_last_good_checkpoint(configure: Configure) -> None:
    config = configure(*words("loss", "none"))
    with pytest.raises(Diverged):
        run(planned_run(config))
    result = run(planned_run(config))  # counted from the checkpoint of step 18, nothing is planted before the end
    assert result.status == "done"
    unspoilt = run(planned_run(configure(*words("none", "none"))))
    assert result.weights_sha256 == unspoilt.weights_sha256
