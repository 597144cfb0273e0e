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
    logger `qbench` about the following:

    - functions of the method that a training loop must call, because the network is not quantized without these calls
    - what else a run with this method does, such as another batch normalization or a distillation loss
    - layers that stay in float because they do not run on the example
    - negative inputs that become 0 on the example
    """
    from qbench.quant.graph import state_restored
    from qbench.quant.install import install as install_quantizers
    from qbench.quant.layers import quantized_layers
    from qbench.quant.policy import execution_order, quantizable
    from qbench.quant.verify import negatives_warning

    install_quantizers(method, model, policy, example=example, act=act)
    calls = [call for name, call in CALLS.items() if getattr(method, name) is not None]
    if calls and not _quantized_at_once(method, model):
        logger.warning(
            "%s needs more than its quantizers: a training loop must call the method's %s; qbench.run does so",
            method.name,
            "; ".join(calls),
        )
    for difference in _differences_to_a_run(method, model):
        logger.warning("%s: %s", method.name, difference)
    if example is not None:
        with state_restored(model):
            ran = set(execution_order(model, example))
            negatives = "" if example.is_meta else negatives_warning(model, example)
        if negatives:
            logger.warning("%s", negatives)
        if idle := [name for name in quantizable(model) if name not in ran and name not in quantized_layers(model)]:
            logger.warning(
                "layers that do not run on the example stay in float: %s; if other images use them, pass more images",
                ", ".join(idle),
            )
    return model


def _differences_to_a_run(method: "Method", model: "nn.Module") -> list[str]:
    """Return what `qbench.run` does with this method, but a training loop of the user's own does not."""
    from qbench.models.normalization import batch_norms
    from qbench.quant.layers import quantized_layers

    requires, found = method.requires, []
    if requires.norm == "no_affine" and any(getattr(module, "affine", False) for module in batch_norms(model)):
        found.append(
            "the method needs batch normalization without scale and shift, but this network's batch normalization has "
            "them; build the network with nn.BatchNorm2d(..., affine=False), as qbench.run does"
        )
    quantizers = [layer.input_q for layer in quantized_layers(model).values()]
    if method.prepare and any(not getattr(quantizer, "seen", True) for quantizer in quantizers):
        found.append("activations have the range 0 to 1 until prepare(model, probe) or the first training batch")
    if requires.start == "scratch":
        found.append("the method trains from random weights, as qbench.run does")
    if requires.teacher:
        found.append("the method trains with a distillation loss and a float network as teacher, as qbench.run does")
    elif method.loss is not None:
        found.append("a training loop must use the method's loss(model, logits, batch), as qbench.run does")
    return found


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
