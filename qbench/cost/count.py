"""Counts a network's parameters, multiply-accumulates (MACs), BitOps, bytes and bits per weight.

BitOps are MACs x bits of the weights x bits of the activations, summed over convolutions and linear
layers. A float tensor counts as 32 bits. Bytes include parameters, scales and codebooks, but not
batch-norm statistics.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qbench.bits import FLOAT, Bits
from qbench.cost.network_cost import NetworkCost
from qbench.quant.layers import QLayer, is_quantizer_key, quantized_layers
from qbench.quant.policy import quantizable
from qbench.quant.quantizer import Storage


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the MACs of every convolution and linear layer of a float network, for one image.

    The MACs are counted on a copy of the network on the meta device. This needs no memory and no arithmetic.

    Args:
        shape: (C, H, W) of an image.
    """
    root = type(model).__name__
    try:
        counts = _flops(copy.deepcopy(model).to("meta"), torch.empty(1, *shape, device="meta"))
    except Exception:  # a user's network may make tensors on the CPU or read values
        counts = _flops(copy.deepcopy(model), torch.zeros(1, *shape))
    return {name: sum(counts.get(f"{root}.{name}", {}).values()) // 2 for name in quantizable(model)}


def _flops(model: nn.Module, images: torch.Tensor) -> Mapping[str, Mapping[object, int]]:
    """Return module -> operation -> number of floating-point operations. One MAC is two operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    counts: Mapping[str, Mapping[object, int]] = counter.get_flop_counts()
    return counts


def count_cost(model: nn.Module, macs: Mapping[str, int]) -> NetworkCost:
    """Return the cost of a network, quantized or float, given the MACs of each layer."""
    layers = quantized_layers(model)
    stored = {name: storage(layer) for name, layer in layers.items() if layer.bits.w < FLOAT}
    codes = sum(s.codes for s in stored.values())
    params = sum(p.numel() for n, p in model.named_parameters() if not is_quantizer_key(n))
    float_bytes = 4 * (params - sum(layers[name].weight.numel() for name in stored))
    bits = {name: layers[name].bits if name in layers else Bits() for name in macs}
    return NetworkCost(
        params=params,
        macs=sum(macs.values()),
        bitops=sum(count * bits[name].w * bits[name].a for name, count in macs.items()),
        bytes_float=4 * params,
        bytes_ideal=float_bytes + sum(s.ideal for s in stored.values()),
        bytes_packed=float_bytes + sum(s.packed for s in stored.values()),
        bits_per_weight=8 * sum(s.ideal for s in stored.values()) / codes if codes else float(FLOAT),
    )


def storage(layer: QLayer) -> Storage:
    """Return the storage of a layer's quantized weights, as declared by the weight quantizer."""
    with torch.no_grad():
        return layer.weight_q.bytes(layer.weight)
