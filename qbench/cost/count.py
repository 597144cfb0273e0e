"""What a network costs: parameters, multiply-accumulates, BitOps, bytes, effective bits per weight.

BitOps are summed over convolutions and linear layers: MACs x bits of the weights x bits of the activations, 32 where
something is float. Bytes count parameters, not batch-norm statistics; scales and codebooks are charged.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qbench.bits import FLOAT, Bits
from qbench.cost.network_cost import NetworkCost
from qbench.quant.layers import QLayer, is_quantizer_key, quantized_layers
from qbench.quant.policy import quantizable
from qbench.quant.quantizer import Storage


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the multiply-accumulates of every convolution and linear layer of a float network, for one image.

    Counted on a copy without memory (meta tensors), so that any size costs nothing.
    """
    root = type(model).__name__
    try:
        counts = _flops(copy.deepcopy(model).to("meta"), torch.empty(1, *shape, device="meta"))
    except Exception:  # a network of the user's own may make tensors on the CPU, or look at values
        counts = _flops(copy.deepcopy(model), torch.zeros(1, *shape))
    return {name: sum(counts.get(f"{root}.{name}", {}).values()) // 2 for name in quantizable(model)}


def _flops(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    counts: dict[str, Any] = counter.get_flop_counts()
    return counts


def count_cost(model: nn.Module, macs: dict[str, int]) -> NetworkCost:
    """Return the costs of a (quantized) network, given the MACs of its layers."""
    layers = quantized_layers(model)
    stored = {name: storage(layer) for name, layer in layers.items() if layer.bits.w < FLOAT}
    codes = sum(s.codes for s in stored.values())
    params = sum(p.numel() for n, p in model.named_parameters() if not is_quantizer_key(n))
    floats = 4 * (params - sum(layers[name].weight.numel() for name in stored))
    bits = {name: layers[name].bits if name in layers else Bits() for name in macs}
    return NetworkCost(
        params=params,
        macs=sum(macs.values()),
        bitops=sum(count * bits[name].w * bits[name].a for name, count in macs.items()),
        bytes_float=4 * params,
        bytes_ideal=floats + sum(s.ideal for s in stored.values()),
        bytes_packed=floats + sum(s.packed for s in stored.values()),
        bits_per_weight=8 * sum(s.ideal for s in stored.values()) / codes if codes else float(FLOAT),
    )


def storage(layer: QLayer) -> Storage:
    """Return what a layer's quantized weights occupy, as its quantizer says."""
    with torch.no_grad():
        return layer.weight_q.bytes(layer.weight)  # type: ignore[operator,no-any-return]
