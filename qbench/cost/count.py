"""Counts a network's parameters, multiply-accumulates (MACs), BitOps, bytes and bits per weight.

The BitOps of a layer are its MACs x weight bits x activation bits, where float tensors have 32 bits. The bits are the
nominal widths; the codes of a layer can have more bits (`wide_codes`). The BitOps of a network are the sum over all
layers and over other matrix products, such as those in attention. Bytes include parameters, scales and codebooks of
weights, but neither batch-norm statistics nor the constants of activation quantizers (steps, clips, ranges).
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qbench.bits import FLOAT, Bits
from qbench.cost.network_cost import NetworkCost
from qbench.quant.graph import (
    Forward,
    Recorder,
    eval_mode_keeping_rng,
    intercepted_calls,
    read_without_call,
    recorded_calls,
)
from qbench.quant.layers import (
    FLOAT_CLASS,
    QUANTIZED_CLASS,
    FloatLayer,
    QLayer,
    computed_weight,
    is_quantizer_key,
    quantized_layers,
)
from qbench.quant.quantizer import Storage
from qbench.system.lazy_compiler import delay_import_of_compiler

MOST_NUMBERS_ON_CPU = 2**20
"""MACs are counted on the CPU if the network has at most this many weights and an image at most this many values."""

MOST_NAMES = 8
"""Maximum number of layers that a sentence of `coverage` or `idle_layers` names."""

NOT_USED = "layers that evaluation does not use; the size includes them as float layers"
NOT_REACHED = (
    "layers that an image of zeros does not reach; their operations are not counted, and the size includes them as "
    "float layers (a run says whether other images reach them)"
)

NOTED_SHARE = 0.01
"""A note is given if the number of values outside the parameters is at least this fraction of the parameter count."""


def _matrix_vector_flops(matrix: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of a matrix-vector product or a dot product."""
    return 2 * matrix.numel()


def _added_matrix_vector_flops(_: torch.Size, matrix: torch.Size, *__: object, **___: object) -> int:
    return 2 * matrix.numel()


def _bilinear_flops(first: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of `F.bilinear`, which has one MAC per weight and input row, like a linear layer."""
    return 2 * first[0] * weight.numel()


def _convolution_tbc_flops(_: torch.Size, weight: torch.Size, *__: object, out_shape: torch.Size, **___: object) -> int:
    """Return the FLOPs of `torch.conv_tbc`, whose weights have the shape (kernel, inputs, outputs)."""
    return 2 * out_shape.numel() * weight[0] * weight[1]


def _added_products_flops(_: torch.Size, first: torch.Size, second: torch.Size, *__: object, **___: object) -> int:
    """Return the FLOPs of `torch.addbmm`, the sum of the products of matrices (B, n, m) and (B, m, p)."""
    return 2 * first.numel() * second[2]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of attention with queries (..., L, d), keys (..., S, d) and values (..., S, e)."""
    return 2 * query.numel() * key[-2] + 2 * query.numel() // query[-1] * key[-2] * value[-1]


UNCOUNTED_BY_TORCH = {
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.dot: _matrix_vector_flops,
    torch.ops.aten.vdot: _matrix_vector_flops,
    torch.ops.aten.addmv: _added_matrix_vector_flops,
    torch.ops.aten.addbmm: _added_products_flops,
    torch.ops.aten.conv_tbc: _convolution_tbc_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._trilinear: _bilinear_flops,
}
"""Operation that torch's FLOP counter does not know -> function that returns the FLOPs for the arguments' shapes."""


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the MACs of every layer with weights in a float network, for one image.

    Layers with weights are all modules that have parameters with two or more dimensions, such as convolutions and
    linear layers. Modules that multiply matrices in their own forward function are included too. The network itself has
    the name "". The forward pass of a large network runs on the meta device, which needs no memory and no arithmetic.
    Networks that do not run on the meta device run on the CPU. Small networks also run on the CPU. For small networks,
    the CPU is faster, because torch imports many modules before it uses the meta device.

    Args:
        model: the float network. It is not changed.
        shape: shape (C, H, W) of an image.
    """
    numbers = max(sum(parameter.numel() for parameter in model.parameters()), prod(shape))
    has_values = not any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    device = "cpu" if has_values and numbers <= MOST_NUMBERS_ON_CPU else "meta"
    try:
        with _counted_on(device):
            # Each module occurs once, under its first name. With several names, torch would not restore its tensors.
            state = {
                f"{name}.{key}" if name else key: tensor.detach().to(device, copy=True)
                for name, module in model.named_modules()
                for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            }
            image = torch.zeros(1, *shape)
            counts = _own_macs(model, lambda: torch.func.functional_call(model, state, image, tie_weights=False))
    except Exception:  # a user's own network may need values, which meta tensors do not have
        with _counted_on("cpu"):
            counts = _own_macs(model, lambda: model(torch.zeros(1, *shape)))
    return {name: counts[name] for name, module in model.named_modules() if counts[name] or _has_weights(module)}


@contextmanager
def _counted_on(device: str) -> Iterator[None]:
    """Make new tensors on a device, and let the counter see all operations.

    The counter misses recurrent layers that oneDNN computes, so oneDNN is switched off. torch's warnings, for example
    about Intel's GPUs, are ignored.
    """
    with torch.device(device), warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        yield


def _own_macs(model: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """Return the MACs of every module, not counting the MACs of the modules inside it."""
    own: Counter[str] = Counter()
    delay_import_of_compiler()

    def call(
        name: str, module: nn.Module, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        before, inside_before = counter.get_total_flops() // 2, own.total()
        result = forward(*args, **kwargs)
        own[name] += counter.get_total_flops() // 2 - before - (own.total() - inside_before)
        return result

    names, fast = [name for name, _ in model.named_modules()], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter misses functions that compute many layers at once
    try:
        with (
            eval_mode_keeping_rng(model), intercepted_calls(model, names, call), torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=UNCOUNTED_BY_TORCH) as counter,
        ):  # fmt: skip
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return own


def _has_weights(module: nn.Module) -> bool:
    weights = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    return isinstance(module, FloatLayer) or (weights and "Norm" not in type(module).__name__)


def coverage(model: nn.Module, macs: Mapping[str, int]) -> str | None:
    """Return a sentence that names the float layers of a network, if some of these layers cannot be quantized.

    Return None if qbench can quantize all layers that are float, or if the whole network is float.
    """
    quantized, modules = quantized_layers(model), dict(model.named_modules())
    left = [name for name in macs if name not in quantized]
    kinds = {name: type(modules[name]) for name in left}
    other = [name for name in left if kinds[name] not in QUANTIZED_CLASS and kinds[name] not in FLOAT_CLASS]
    if not quantized or not other:
        return None
    words = [f"{name or 'the network itself'} ({kinds[name].__name__})" if name in other else name for name in left]
    return f"{len(macs) - len(left)} of {len(macs)} layers with weights are quantized; left in float: {_names(words)}"


def idle_layers(model: nn.Module, macs: Mapping[str, int], images: Tensor | None = None) -> list[str]:
    """Return sentences that name the layers that do not run on an image of zeros.

    The weights of such layers are float, and the network's size includes them. Their operations are not counted.

    Args:
        images: images (N, C, H, W) on which the network is run. The sentences then also say which of the layers run on
            some of these images, and which layers' weights are used without calling the layer. With None, these facts
            are unknown, and one sentence names all layers.
    """
    modules = dict(model.named_modules())
    idle = [name for name, count in macs.items() if not count and type(modules[name]) in QUANTIZED_CLASS]
    read: list[str] = []
    some: list[str] = []
    if images is not None and idle:
        with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, idle) as calls:
            model(images)
        some = list(dict.fromkeys(call.name for call in calls))
        read = read_without_call(model, images, [n for n in idle if n not in some and not computed_weight(modules[n])])
    unused = [name for name in idle if name not in read and name not in some and quantized_layers(model)]
    sentences = {
        "layers that are used without being called, so they stay in float and their operations are not counted": read,
        "layers that only some images reach, so they stay in float and their operations are not counted": some,
        NOT_USED if images is not None else NOT_REACHED: unused,
    }
    return [f"{sentence}: {_names(names)}" for sentence, names in sentences.items() if names]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def values_outside(model: nn.Module, images: Tensor) -> str | None:
    """Return a sentence about values that a network uses besides its parameters, or None if there are few.

    The network's size does not include such values. Parameters that are not registered, such as the parameters of
    layers in a Python list, are not trained either.

    Args:
        images: a few images of shape (N, C, H, W).
    """
    recorders = [Recorder(model, images), Recorder(model, images)]
    for recorder in recorders:
        with (
            eval_mode_keeping_rng(model), torch.no_grad(),
            intercepted_calls(model, quantized_layers(model), recorder.call_module), recorder,
        ):  # fmt: skip
            model(images)
    once, again = recorders
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # A tensor that both calls read existed before the calls. Other tensors of unknown origin are made in each
    # call.
    held = [
        t for key, t in once.foreign.items() if key in again.foreign and t.untyped_storage().data_ptr() not in memory
    ]
    if unregistered := [t for t in held if t.requires_grad]:
        return (
            f"parameters that are not registered ({len(unregistered)} with {sum(t.numel() for t in unregistered):,} "
            "values) are neither trained nor counted in the size; layers in a list need nn.ModuleList"
        )
    read = {name for operation in once.operations for name in operation.parameters}
    held += [b for name, b in model.named_buffers() if name in read and b.dim() > 1]
    count = sum(t.numel() for t in held if t.is_floating_point())
    if count < NOTED_SHARE * sum(p.numel() for p in model.parameters()):
        return None
    return f"the network computes with {count:,} values that are not parameters; the size does not include them"


def count_cost(model: nn.Module, macs: Mapping[str, int]) -> NetworkCost:
    """Return the cost of a quantized or float network whose layers have the given MACs."""
    layers = quantized_layers(model)
    stored = {name: storage(layer) for name, layer in layers.items() if layer.bits.w < FLOAT}
    weights = sum(layers[name].weight.numel() for name in stored)
    params = sum(p.numel() for n, p in model.named_parameters() if not is_quantizer_key(n, model))
    float_bytes = 4 * (params - weights)
    bits = {name: layers[name].bits if name in layers else Bits() for name in macs}
    return NetworkCost(
        params=params,
        macs=sum(macs.values()),
        bitops=sum(count * bits[name].w * bits[name].a for name, count in macs.items()),
        bytes_float=4 * params,
        bytes_ideal=float_bytes + sum(s.ideal for s in stored.values()),
        bytes_packed=float_bytes + sum(s.packed for s in stored.values()),
        bits_per_weight=8 * sum(s.ideal for s in stored.values()) / weights if weights else float(FLOAT),
    )


def wide_codes(model: nn.Module) -> str:
    """Return a note on layers whose weight codes have more bits than the nominal width, or an empty text."""
    layers = quantized_layers(model)
    stored = {name: storage(layer) for name, layer in layers.items() if layer.bits.w < FLOAT}
    bits = [
        s.code_bits for n, s in stored.items() if s.codes == layers[n].weight.numel() and s.code_bits > layers[n].bits.w
    ]
    if not bits:
        return ""
    return (
        f"weight codes of {len(bits)} layer{'s' * (len(bits) > 1)} have up to {max(bits)} bits; the size counts these "
        "bits, but BitOps count the nominal width"
    )


def storage(layer: QLayer) -> Storage:
    """Return the bytes that a layer's quantized weights need. The weight quantizer declares this number."""
    with torch.no_grad():
        return layer.weight_q.bytes(layer.weight)
