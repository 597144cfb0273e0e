"""Computes the learning rate of each step. A step is an update of the weights.

The learning rate depends only on the number of the step, so a resumed run needs no stored scheduler state. For
schedules that `torch.optim` also has, tests compare the learning rates.
"""

import math

from qbench.config.schema import Optim

RISE = 0.3
"""Fraction of the steps in which the learning rate of `one_cycle` rises, as in torch's `OneCycleLR`."""

START_DIVISOR = 25.0
"""`one_cycle` starts at the highest learning rate divided by this number, as in torch's `OneCycleLR`."""


def learning_rate(optim: Optim, step: int, steps: int, warmup: int = 0) -> float:
    """Return the learning rate of one step in a phase with `steps` steps. Steps are counted from 0.

    During the first `warmup` steps, the rate rises linearly, and it reaches `lr` in the last of these steps. The
    schedule covers the remaining steps.

    A decreasing schedule would reach its final value at step number `steps`, one step after the last step. Only
    `one_cycle` reaches its final value in the last step, as in torch.
    """
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    step, steps = step - warmup, steps - warmup
    progress = step / steps
    low, high = optim.lr_end, optim.lr
    if optim.schedule == "linear":
        return high + (low - high) * progress
    if optim.schedule == "cosine":
        return _cosine(high, low, progress)
    if optim.schedule == "exponential":
        return float(high * (low / high) ** progress)
    if optim.schedule == "step":
        passed = sum(progress >= milestone for milestone in optim.milestones)
        return float(high * (optim.factors[passed] if optim.factors else optim.gamma**passed))
    if optim.schedule == "one_cycle":
        top = RISE * steps - 1
        if step <= top:
            return _cosine(high / START_DIVISOR, high, step / top)
        return _cosine(high, low, (step - top) / (steps - 1 - top))
    return high


def _cosine(start: float, end: float, progress: float) -> float:
    """Return the value at `progress` (0 to 1) of a half cosine wave that leads from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def updates_per_epoch(optim: Optim, batches: int) -> int:
    """Return the number of updates of the weights in an epoch.

    The last update may have fewer batches than the others.
    """
    return math.ceil(batches / optim.accumulate)


def warmup_steps(optim: Optim, steps: int) -> int:
    """Return the number of warm-up steps if an epoch has `steps` steps.

    If there is a warm-up, it has at least 1 step.
    """
    return max(1, round(optim.warmup * steps)) if optim.warmup else 0
