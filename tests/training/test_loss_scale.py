"""Training in float16: the loss scale changes no bit of the gradients, and an update that overflows is skipped."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Configure, tiered
from test_training import STEPS, make_state, make_task
from torch import Tensor, nn
from torch.amp import GradScaler

import qbench
from qbench.config import groups
from qbench.errors import ConfigError, Diverged
from qbench.experiment.planned_run import planned_run
from qbench.experiment.run import run
from qbench.experiment.setup import assemble
from qbench.quant.method import Loss
from qbench.training.digests import weights_sha256
from qbench.training.loop import train
from qbench.training.state import State
from qbench.training.task import Task

CHOSEN = ("dorefa", "inq", "lsq")
OPTIONS = {
    "dorefa g6": ["method=dorefa", "bits=w2a2g6"],
    "gupta": ["method=gupta", "bits.g=32"],
    "accumulated": ["method=dorefa", "optim.accumulate=4"],
    "clipped": ["method=dorefa", "optim.clip_norm=0.5"],
    "shards": ["method=uniform", "bits=w4a4", "batch_shards=2"],
    "distilled": ["method=lsq", "distill=kd"],
}
CASES = {name: [f"method={name}"] for name in groups.option_names("method")} | OPTIONS


def with_scaler(task: Task, scale: float) -> State:
    """Return the state with which a task begins, and a loss scale that starts at `scale`."""
    return replace(make_state(task), scaler=GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("name", tiered(CASES, [*CHOSEN, "accumulated"]))
def test_a_loss_scale_changes_no_bit(
    smoke: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    usual = run(planned_run(smoke(*CASES[name], f"out={tmp_path / 'usual'}")))
    made = []

    def scaler(*args: object) -> GradScaler:
        made.append(GradScaler("cpu", init_scale=2.0**10))
        return made[-1]

    monkeypatch.setattr("qbench.experiment.run.loss_scaler", scaler)
    scaled = run(planned_run(smoke(*CASES[name], f"out={tmp_path / 'scaled'}")))
    assert made
    assert all(one.get_scale() == 2**10 for one in made)
    assert scaled.weights_sha256 == usual.weights_sha256
    assert scaled.final == usual.final


def test_gradients_with_a_fixed_step_cannot_be_scaled(smoke: Configure) -> None:
    with pytest.raises(ConfigError, match=r"gupta w16a16g16 rounds gradients with a fixed step\n.*bits\.g=32"):
        assemble(smoke("method=gupta", "runtime.precision=fp16"))


def overflow(
    at: Callable[[int], bool],
) -> tuple[Loss, list[int]]:
    """Return a loss whose gradients are infinite in some calls, and the list of its calls."""
    calls: list[int] = []

    def loss(model: nn.Module, logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(calls))
        value = nn.functional.cross_entropy(logits, batch[1])
        if at(calls[-1]):
            value.register_hook(lambda gradient: gradient * torch.inf)
        return value

    return loss, calls


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_that_overflows_is_skipped_and_the_scale_is_halved(accumulate: int) -> None:
    updates: list[int] = []
    loss, calls = overflow(lambda call: call == 2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        updates.append(calls[-1])
        optimizer.step()

    task = make_task(epochs=1, accumulate=accumulate)
    task = replace(task, method=replace(task.method, step=step, loss=loss))
    state = with_scaler(task, 2.0**10)
    train(task, state)
    assert updates == ([0, 1, 3, 4] if accumulate == 1 else [1, 4])  # batches 2 and 3 are one update
    assert state.scaler is not None
    assert state.scaler.get_scale() == 2**9
    assert state.step == STEPS
    assert all(torch.isfinite(p).all() for p in task.model.parameters())


def test_gradients_that_no_scale_makes_finite_are_divergence() -> None:
    loss, calls = overflow(lambda call: True)
    task = make_task(epochs=3)
    task = replace(task, method=replace(task.method, loss=loss))
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    with pytest.raises(Diverged, match=r"the norm of the gradients .* step 3 .*runtime\.precision=bf16"):
        train(task, with_scaler(task, 8.0))
    assert calls == [0, 1, 2, 3]
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())


def test_the_scale_is_resumed() -> None:
    def task(loss: Loss) -> Task:
        made = make_task(epochs=2)
        return replace(made, method=replace(made.method, loss=loss))

    whole = task(overflow(lambda call: call in (1, 3))[0])
    expected = with_scaler(whole, 2.0**6)
    train(whole, expected)
    loss, _ = overflow(lambda call: call in (1, 3))
    early, late = task(loss), task(loss)
    first, state = with_scaler(early, 2.0**6), with_scaler(late, 2.0**16)
    train(replace(early, epochs=1), first)
    state.load(late.model, first.save(early.model))
    train(late, state)
    assert weights_sha256(late.model.state_dict()) == weights_sha256(whole.model.state_dict())
    assert state.scaler is not None
    assert expected.scaler is not None
    assert state.scaler.state_dict() == expected.scaler.state_dict()
    assert state.scaler.get_scale() == 2**4


@pytest.mark.full
def test_a_run_in_float16(smoke: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("experiment=smoke", "method=dorefa", "bits=w2a2", "runtime.precision=fp16")
    result = qbench.run(*words, out=tmp_path)
    assert result.status == "done"
    assert "runtime.precision=fp16 is slower than fp32 here" in caplog.text
    network = qbench.load_model(result)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = network(images)
    with torch.no_grad():
        assert torch.equal(network(images), expected)
    usual = run(planned_run(smoke("method=dorefa", "bits=w2a2", f"out={tmp_path / 'usual'}")))
    assert usual.weights_sha256 != result.weights_sha256
