"""Builds optimizers and their parameter groups, and computes learning rates."""

import math

import torch
from torch import nn

from qbench.config.schema import Optim
from qbench.quant.layers import QLayer


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return an optimizer for all parameters of a network that require a gradient."""
    groups = parameter_groups(model, optim.weight_decay, optim.bias_lr)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)
    return torch.optim.Adam(groups, lr=optim.lr, eps=optim.eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float, bias_lr: float = 1.0) -> list[dict[str, object]]:
    """Return the parameters in groups of equal learning-rate factor and weight decay.

    Weight decay applies to weights with two or more dimensions. It does not apply to biases and batch
    normalization. `bias_lr` is the learning-rate factor of the biases of layers with such weights. A
    module with quantizer parameters sets their learning-rate factor by its attribute `lr_scale`
    (default 1), and their weight decay by its attribute `weight_decay` (default 0).
    """
    rules: dict[int, tuple[float, float]] = {}  # id of a parameter -> its learning-rate factor and decay
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if "bias" in own and "weight" in own and own["weight"].dim() > 1:
            rules[id(own["bias"])] = bias_lr, 0.0
    for layer in (m for m in model.modules() if isinstance(m, QLayer)):
        for quantizer in (layer.weight_q, layer.input_q, layer.output_q):
            for module in quantizer.modules():
                rule = float(getattr(module, "lr_scale", 1.0)), float(getattr(module, "weight_decay", 0.0))
                rules.update({id(p): rule for p in module.parameters(recurse=False)})
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            rule = rules.get(id(p), (1.0, weight_decay if p.dim() > 1 else 0.0))
            grouped.setdefault(rule, []).append(p)
    return [
        {"params": params, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), params in sorted(grouped.items(), key=lambda item: item[0])
    ]


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Return the learning rate of a step in a phase of `steps` steps. Steps are counted from 0.

    A decreasing schedule does not quite reach its final value in the last step. It would reach this value one step
    later, at step number `steps`.
    """
    progress = step / steps
    low, high = optim.lr_end, optim.lr
    if optim.schedule == "linear":
        return high + (low - high) * progress
    if optim.schedule == "cosine":
        return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
    if optim.schedule == "exponential":
        return float(high * (low / high) ** progress)
    if optim.schedule == "step":
        return float(high * optim.gamma ** sum(progress >= milestone for milestone in optim.milestones))
    return high


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to `rate` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
