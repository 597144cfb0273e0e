"""Chooses the memory format of a network's weights and feature maps."""

from itertools import chain

import torch
from torch import Tensor, nn

BLOCK = 16
"""Maximum number of channels that oneDNN processes at once: 8 with AVX2, 16 with AVX-512."""


def use_channels_last(model: nn.Module) -> None:
    """Convert the weights of a network to channels_last, in place.

    oneDNN has a fault in the weight gradient of strided 1x1 convolutions in channels_last. If the layer has fewer input
    channels than oneDNN's kernel processes at once, the kernel writes past the end of its buffer. Gradients are then
    wrong, or the process aborts (oneDNN issue 6035, seen with torch 2.13). Such layers therefore read their input and
    their weights in the order (N, C, H, W), for which oneDNN has other kernels.
    """
    exceptions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and _meets_fault(layer)]
    for layer in exceptions:
        layer.register_forward_pre_hook(_contiguous)
    contiguous = {layer.weight for layer in exceptions}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dim() == 4 and tensor not in contiguous:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def _meets_fault(layer: nn.Conv2d) -> bool:
    return layer.in_channels // layer.groups < BLOCK and layer.kernel_size == (1, 1) and max(layer.stride) > 1


def _contiguous(_layer: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)
