"""Builds optimizers and their parameter groups."""

import torch
from torch import nn

from qbench.config.schema import Optim
from qbench.quant.layers import QLayer

FULL_DECAY = "full_decay"
"""Key in a parameter group. Its value is the weight decay that the group has until `optim.decay_until`.

If weight decay does not end during training, the key is missing.
"""


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return an optimizer for all parameters of a network that require a gradient."""
    groups = parameter_groups(model, optim)
    if optim.decay_until < 1:
        groups = [group | {FULL_DECAY: group["weight_decay"]} for group in groups]
    if optim.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=True)
        if optim.momentum:
            sgd.register_step_pre_hook(_add_momentum_buffers)
        return sgd
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, eps=optim.eps, fused=True)
    if optim.name == "radam":  # torch has no fused form
        return torch.optim.RAdam(groups, lr=optim.lr, eps=optim.eps)
    return torch.optim.Adam(groups, lr=optim.lr, eps=optim.eps, fused=True)


def _add_momentum_buffers(sgd: torch.optim.Optimizer, *_: object) -> None:
    """Give a zero momentum buffer to each parameter that has its first gradient after others had theirs.

    torch's fused SGD raises an error if only some parameters have a buffer. Networks that skip layers in some steps, as
    with stochastic depth, have such parameters. A step from a zero buffer is the same as a step without a buffer.
    """
    parameters = [p for group in sgd.param_groups for p in group["params"]]
    if 0 < len(sgd.state) < len(parameters):
        for p in parameters:
            if p.grad is not None and p not in sgd.state:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, object]]:
    """Return groups of parameters. All parameters of a group have the same learning-rate factor and weight decay.

    Weight decay applies to parameters with two or more dimensions that do not belong to a normalization and are not
    biases. With `decay_norm_and_bias` it applies to all parameters. `bias_lr` is the learning-rate factor for the
    biases of all layers that have weights with two or more dimensions.

    Each quantizer module sets the learning-rate factor of its parameters in the attribute `lr_scale` (default 1), and
    their weight decay in the attribute `weight_decay` (default 0). `quantizer_lr` multiplies this factor, and
    `quantizer_decay` replaces this weight decay.
    """
    small_decay = optim.weight_decay if optim.decay_norm_and_bias else 0.0
    rules: dict[int, tuple[float, float]] = {}  # id of a parameter -> its learning-rate factor and decay
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):  # the other normalizations have parameters of one dimension
            rules |= {id(p): (1.0, small_decay) for p in module.parameters(recurse=False)}
        else:
            rules |= {id(bias): (optim.bias_lr, small_decay) for bias in layer_biases(module)}
    for layer in (m for m in model.modules() if isinstance(m, QLayer)):
        for quantizer in (layer.weight_q, layer.input_q, layer.output_q):
            for module in quantizer.modules():
                lr_scale = float(getattr(module, "lr_scale", 1.0)) * optim.quantizer_lr
                own_decay = float(getattr(module, "weight_decay", 0.0))
                decay = own_decay if optim.quantizer_decay is None else optim.quantizer_decay
                rules.update({id(p): (lr_scale, decay) for p in module.parameters(recurse=False)})
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            rule = rules.get(id(p), (1.0, optim.weight_decay if p.dim() > 1 else small_decay))
            grouped.setdefault(rule, []).append(p)
    return [
        {"params": params, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), params in sorted(grouped.items(), key=lambda item: item[0])
    ]


def layer_biases(module: nn.Module) -> list[nn.Parameter]:
    """Return the biases of a module if it has weights with two or more dimensions, else an empty list.

    A module may have several biases, such as `bias_ih_l0` of a recurrent layer and `in_proj_bias` of attention. Its
    parameters may be parametrized, as by `nn.utils.parametrizations.weight_norm`.
    """
    own = list(module.named_parameters(recurse=False))
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        own += [(name, p) for name, parts in parametrized.items() for p in parts.parameters(recurse=False)]
    if not any(p.dim() > 1 for name, p in own if "bias" not in name):
        return []
    return [p for name, p in own if name == "bias" or ("bias" in name.split("_") and p.dim() == 1)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *, decay: bool = True) -> None:
    """Set every group's learning rate to `rate` times the group's own factor.

    `decay` says whether this step has weight decay. If `optim.decay_until` is 1, this argument has no effect.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        if FULL_DECAY in group:
            group["weight_decay"] = group[FULL_DECAY] if decay else 0.0
