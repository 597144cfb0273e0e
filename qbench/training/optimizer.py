"""Optimizers, their parameter groups and the learning-rate schedules."""

import math

import torch
from torch import nn

from qbench.config.schema import Optim
from qbench.quant.layers import QLayer, quantizers
from qbench.quant.quantizer import Quantizer


def build(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters that want a gradient."""
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)
    return torch.optim.Adam(groups, lr=optim.lr, eps=optim.eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Part the parameters by learning-rate factor and decay.

    Weights of two and more dimensions decay; biases and batch normalization do not. A quantizer's parameters follow
    the attributes `lr_scale` (default 1) and `weight_decay` (default 0) of the module that holds them.
    """
    own: dict[int, tuple[float, float]] = {}
    for layer in (m for m in model.modules() if isinstance(m, QLayer)):
        for quantizer in quantizers(layer).values():
            for module in quantizer.modules():
                rule = (module.lr_scale, module.weight_decay) if isinstance(module, Quantizer) else (1.0, 0.0)
                own.update({id(p): rule for p in module.parameters(recurse=False)})
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            rule = own.get(id(p), (1.0, weight_decay if p.dim() > 1 else 0.0))
            grouped.setdefault(rule, []).append(p)
    return [
        {"params": params, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), params in sorted(grouped.items(), key=lambda item: item[0])
    ]


def learning_rate(optim: Optim, done: int, total: int) -> float:
    """Return the rate of step `done` (from 0) of a phase of `total` steps.

    The last step of a falling schedule stands one step before its end value, as a step of length 1/total would.
    """
    part = done / total
    low, high = optim.lr_end, optim.lr
    if optim.schedule == "linear":
        return high + (low - high) * part
    if optim.schedule == "cosine":
        return low + (high - low) * (1 + math.cos(math.pi * part)) / 2
    if optim.schedule == "exponential":
        return float(high * (low / high) ** part)
    if optim.schedule == "step":
        return float(high * optim.gamma ** sum(part >= mark for mark in optim.milestones))
    return high


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate to `rate` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
