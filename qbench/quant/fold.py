"""Turns a quantized network into a float network whose parameters are the quantized weights."""

import copy

from torch import nn

from qbench.bits import FLOAT
from qbench.quant.layers import computed_weight, effective_weight, quantized_layers
from qbench.quant.quantizer import IdentityQuantizer
from qbench.quant.verify import NotQuantized, verify_weights


def fold_quantized_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the network without weight quantizers. The weights of the copy are the quantized weights.

    Layers that share latent weights get separate weights.

    Raises:
        ValueError: the weights of a layer are computed in every forward pass, or some weights are not on the levels of
            their quantizer. Some methods quantize weights in the functions `prepare`, `on_epoch` or `step` of `Method`.
            The second error then occurs if your training loop does not call these functions.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if remedy := computed_weight(layer):
            raise ValueError(f"{name}: the weight is computed in every forward pass\nfirst {remedy}")
    # All effective weights are computed before the first latent weight is replaced.
    weights = {name: effective_weight(layer).clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        if layer.bits.w < FLOAT:
            try:
                verify_weights(name, layer, weights[name])
            except NotQuantized as error:
                raise ValueError(
                    f"{error}\nthe method quantizes weights in its functions prepare, on_epoch or step\n"
                    "call these functions in your training loop, or train with qbench.run"
                ) from None
    folded = copy.deepcopy(model)
    for name, layer in quantized_layers(folded).items():
        layer.weight = nn.Parameter(weights[name], requires_grad=layer.weight.requires_grad)
        layer.weight_q = IdentityQuantizer()
    return folded
