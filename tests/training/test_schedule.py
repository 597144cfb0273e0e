"""Learning rates of all schedules: worked out by hand, and compared with those of `torch.optim.lr_scheduler`."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from qbench.config.schema import Optim
from qbench.training.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "linear", "lr_end": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"schedule": "cosine"}, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
        ({"schedule": "exponential", "lr_end": 1e-4}, [1, 0.1, 0.01, 0.001]),
        ({"schedule": "step", "milestones": [0.5, 0.75], "gamma": 0.1}, [1, 1, 0.1, 0.01]),
    ],
)
def test_schedules_by_hand(schedule: dict[str, Any], expected: list[float]) -> None:
    rates = [learning_rate(Optim(lr=1.0, **schedule), step, 4) for step in range(4)]
    assert rates == pytest.approx(expected)


def test_adam_from_1e_4_falls_to_1e_6() -> None:
    rates = [learning_rate(Optim(lr=1e-4, schedule="exponential", lr_end=1e-6), s, 100) for s in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[50] == pytest.approx(1e-5)
    assert rates[100] == pytest.approx(1e-6)


def torch_rates(make: Any, steps: int) -> list[float]:
    """Return the rates of a scheduler of torch that `make` builds for an optimizer with the rate 0.1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():  # SequentialLR calls its members in a way that torch itself deprecates
            warnings.simplefilter("ignore")
            scheduler.step()
    return rates


def rates(steps: int, warmup: int = 0, **recipe: Any) -> list[float]:
    return [learning_rate(Optim(lr=0.1, **recipe), step, steps, warmup) for step in range(steps)]


@pytest.mark.parametrize("steps", [4, 10, 57])
def test_one_cycle_is_that_of_torch(steps: int) -> None:
    expected = torch_rates(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=steps, cycle_momentum=False, final_div_factor=0.1 / 25 / 1e-5
        ),
        steps - 1,
    )
    found = rates(steps, schedule="one_cycle", lr_end=1e-5)
    assert found[:-1] == pytest.approx(expected)
    assert found[-1] == pytest.approx(1e-5), "the last step has the last rate"
    assert max(found) <= 0.1


def test_one_cycle_has_a_rate_for_any_number_of_steps() -> None:
    for steps in range(1, 8):
        assert all(0.001 <= rate <= 0.1 for rate in rates(steps, schedule="one_cycle", lr_end=0.001)), steps


@pytest.mark.parametrize("warmup", [1, 5])
def test_warm_up_before_a_cosine_is_torchs_linear_warm_up(warmup: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 - warmup, eta_min=0.001)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])

    found = rates(20, warmup, schedule="cosine", lr_end=0.001)
    assert found[warmup - 1] == found[warmup] == pytest.approx(0.1)
    assert found == pytest.approx(torch_rates(make, 20))


def test_milestones_after_a_warm_up_divide_the_rest_of_the_phase() -> None:
    found = rates(12, 2, schedule="step", milestones=[0.5], gamma=0.1)
    assert found == pytest.approx([0.05, 0.1, *[0.1] * 5, *[0.01] * 5])


def test_factors_give_the_rate_of_each_piece() -> None:
    """TTQ's log: 2e-4 in the first of 400 epochs, then 0.1, 0.01, 0.001 and 2e-4."""
    ttq = {"schedule": "step", "milestones": [0.0025, 0.205, 0.3075, 0.75], "factors": [0.002, 1, 0.1, 0.01, 0.002]}
    found = rates(400, **ttq)
    expected = [2e-4, *[0.1] * 81, *[0.01] * 41, *[0.001] * 177, *[2e-4] * 100]
    assert found == pytest.approx(expected)
    multistep = {"schedule": "step", "milestones": [0.5, 0.75], "gamma": 0.1}
    assert rates(8, **multistep, factors=[1, 0.1, 0.01]) == pytest.approx(rates(8, **multistep))


def test_warm_up_is_counted_in_epochs() -> None:
    assert [warmup_steps(Optim(warmup=epochs), 10) for epochs in (0, 0.01, 0.5, 2)] == [0, 1, 5, 20]
