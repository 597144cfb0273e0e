"""Several batches in one update: the gradient is that of the mean loss over all their images."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_training import STEPS, X, Y, make_state, make_task
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.methods import float as float_method
from qbench.training.loop import train
from qbench.training.task import Task


def counting(task: Task) -> tuple[Task, list[float]]:
    """Return the task, and a list that gets the learning rate of each update."""
    rates: list[float] = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()

    return replace(task, method=replace(task.method, step=step)), rates


def without_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def with_batches(task: Task, size: int) -> Task:
    """Return the task with other batches of the same images in the same order."""
    batches = list(zip(X.split(size), Y.split(size), strict=True))
    return replace(task, train=lambda epoch, start: batches[start:], steps=len(batches))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"ema": 0.5, "name": "adam"}, {"warmup": 1.0}])
def test_small_batches_train_like_a_large_one_without_batch_norm(options: dict[str, Any]) -> None:
    recipe: dict[str, Any] = {"schedule": "cosine", "lr": 0.05, **options}
    torch.manual_seed(1)
    weights = without_norm().state_dict()
    results, updates = [], []
    for size, accumulate in ((50, 1), (10, 5)):
        model = without_norm()
        model.load_state_dict(weights)
        task, rates = counting(with_batches(make_task(model=model, accumulate=accumulate, **recipe), size))
        state = make_state(task)
        train(task, state)
        results.append(state.average.parameters() if state.average else dict(task.model.named_parameters()))
        updates.append(rates)
    assert len(updates[0]) == 3 * 2
    assert updates[1] == pytest.approx(updates[0])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_the_last_update_of_an_epoch_is_the_mean_of_the_batches_that_are_left() -> None:
    gradients: list[Tensor] = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        gradients.append(next(p.grad.clone() for p in model.parameters() if p.grad is not None))

    model = without_norm()
    task = make_task(replace(float_method.build(), step=step), epochs=1, model=model, accumulate=2)
    train(task, make_state(task))
    parameter = next(model.parameters())
    expected = []
    for images, labels in ((X[0:40], Y[0:40]), (X[40:80], Y[40:80]), (X[80:100], Y[80:100])):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), parameter)
        expected.append(gradient)
    assert len(gradients) == (STEPS + 1) // 2
    for found, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, want)


def test_batch_norm_sees_single_batches() -> None:
    norms = []
    for accumulate in (1, 2):
        task = make_task(epochs=1, lr=1e-30, accumulate=accumulate)
        train(task, make_state(task))
        norms.append({name: value for name, value in task.model.state_dict().items() if "running" in name})
    assert norms[0]
    for name, value in norms[0].items():
        assert torch.equal(value, norms[1][name]), name
