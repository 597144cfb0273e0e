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
    method that a training loop must call.
    """
    from qbench.quant.graph import state_restored
    from qbench.quant.install import install as install_quantizers
    from qbench.quant.layers import quantized_layers
    from qbench.quant.policy import execution_order, quantizable

    install_quantizers(method, model, policy, example=example, act=act)
    if calls := [call for name, call in CALLS.items() if getattr(method, name) is not None]:
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
