"""Quantizes a user's own networks from Python."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qbench.quant.method import Method
    from qbench.quant.policy import Policy

logger = logging.getLogger("qbench")

CALLS = {
    "prepare": "prepare(model, probe) once, before the training",
    "on_epoch": "on_epoch(model, epoch, epochs, probe) before each epoch",
    "step": "step(model, optimizer) instead of optimizer.step()",
}
"""Functions of a `Method` -> when a training loop must call them."""


def install(
    method: "Method",
    model: "nn.Module",
    policy: "Policy | None" = None,
    *,
    example: "Tensor | None" = None,
    act: str = "auto",
) -> "nn.Module":
    """Add a method's quantizers to a float network, in place, and return the network.

    `qbench.quant.install.install` describes the arguments and the errors. In addition, this function warns through the
    logger `qbench` about layers that stay in float because they do not run on the example, and about functions of the
    method that a training loop must call, because the network is not quantized without these calls.
    """
    from qbench.quant.graph import state_restored
    from qbench.quant.install import install as install_quantizers
    from qbench.quant.layers import quantized_layers
    from qbench.quant.policy import execution_order, quantizable

    install_quantizers(method, model, policy, example=example, act=act)
    calls = [call for name, call in CALLS.items() if getattr(method, name) is not None]
    if calls and not _quantized_at_once(method, model):
        logger.warning(
            "%s needs more than its quantizers: a training loop must call the method's %s; qbench.run does so",
            method.name,
            "; ".join(calls),
        )
    if example is not None:
        with state_restored(model):
            ran = set(execution_order(model, example))
        if idle := [name for name in quantizable(model) if name not in ran and name not in quantized_layers(model)]:
            logger.warning(
                "layers that do not run on the example stay in float: %s; if other images use them, pass more images",
                ", ".join(idle),
            )
    return model


def _quantized_at_once(method: "Method", model: "nn.Module") -> bool:
    """Return whether the weights of a network are quantized without a call of the functions in `CALLS`."""
    from qbench.bits import FLOAT
    from qbench.quant.graph import state_restored
    from qbench.quant.layers import effective_weight, fully_quantized, quantized_layers
    from qbench.quant.verify import NotQuantized, verify_weights

    if not method.needs_training or not fully_quantized(model):
        return False
    with state_restored(model):
        for name, layer in quantized_layers(model).items():
            if layer.bits.w < FLOAT:
                weights = effective_weight(layer)
                try:
                    verify_weights(name, layer, weights)
                except NotQuantized:
                    return False
                if weights.numel() > 1 and bool((weights == weights.flatten()[0]).all()):
                    return False
    return True
