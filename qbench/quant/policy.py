"""Decides which layers a method quantizes, and with how many bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits, weight_width
from qbench.quant.graph import eval_mode_keeping_rng, recorded_calls
from qbench.quant.layers import FloatLayer

Width = str | int
"""The width of a layer: `float`, `same` (the method's widths), a number of bits, or `w8` (8 bits for weights alone)."""


class PolicyError(ValueError):
    """Raised if a rule matches no layer or is invalid. `key` is the configuration key of the rule below `layers`."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules that determine the widths of layers.

    The first rule that matches a layer applies. Rules are tried in the order `rules`, `first`, `last`, `downsample`.
    Layers without a matching rule get `same`, which means the widths of the method. A number of bits sets the width of
    the weights. It also sets the width of activations if the method's activation width is below 32. `w8` sets 8 bits
    for the weights, and leaves the layer's input in float.

    Args:
        first, last: width of the first and of the last layer in execution order.
        downsample: width of 1x1 convolutions with `downsample` or `shortcut` in their name.
        input: width of the image in all layers that read it. Allowed are `same` (each layer's activation width),
            `float` and a number of bits. The image is rounded to evenly spaced levels over `image_range`, because the
            method's activation quantizer is not made for images.
        rules: maps patterns of layer names (fnmatch) to widths. The first matching pattern applies.
        order: the layers in the order of their first execution. If empty, the network is run to find this order.
        image_range: lowest and highest value of the network's input image. Each is one number for all channels, or one
            number per channel. The range is required if the image is rounded.
    """

    first: Width = "float"
    last: Width = "float"
    downsample: Width = "same"
    input: Width = "same"
    rules: Mapping[str, Width] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    image_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def quantizable(model: nn.Module) -> dict[str, FloatLayer]:
    """Return the convolutions and linear layers by name, in order of registration."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FloatLayer)}


def execution_order(model: nn.Module, example: Tensor | None) -> list[str]:
    """Return the names of the layers in the order of their first execution.

    Layers that do not run in eval mode (auxiliary heads) are left out.

    Args:
        example: images (N, C, H, W) on which the network runs. With None, the order of registration is returned.
    """
    names = list(quantizable(model))
    if example is None:
        return names
    with eval_mode_keeping_rng(model), torch.no_grad(), recorded_calls(model, names) as calls:
        model(example)
    return list(dict.fromkeys(call.name for call in calls))


def assign(model: nn.Module, bits: Bits, policy: Policy, example: Tensor | None = None) -> dict[str, Bits]:
    """Return the widths of every layer by name, in execution order. The rule `input` is not applied.

    Raises:
        PolicyError: a rule matches no layer.
    """
    layers = quantizable(model)
    order = list(policy.order) or execution_order(model, example)
    if not order:
        raise PolicyError("rules", f"{type(model).__name__} has no convolution or linear layer")
    rules: list[tuple[str, Width, list[str]]] = [
        (f"rules[{pattern}]", width, [n for n in order if fnmatchcase(n, pattern)])
        for pattern, width in policy.rules.items()
    ]
    rules += [("first", policy.first, order[:1]), ("last", policy.last, order[-1:])]
    if policy.downsample != "same":
        rules += [("downsample", policy.downsample, [n for n in order if _is_downsample(n, layers[n])])]
    assigned = dict.fromkeys(order, bits)
    for key, width, names in reversed(rules):  # reversed: the first rule overrides the others
        if not names:
            raise PolicyError(key, f"matches no layer; the layers are {', '.join(order)}")
        assigned.update({name: _widths(key, width, bits) for name in names})
    return assigned


def _is_downsample(name: str, layer: FloatLayer) -> bool:
    named = "downsample" in name or "shortcut" in name
    return named and isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


def _widths(key: str, width: Width, bits: Bits) -> Bits:
    if width == "float":
        return Bits()
    if width == "same":
        return bits
    if isinstance(width, int) and not isinstance(width, bool) and 1 <= width <= FLOAT:
        return bits._replace(w=width, a=width if bits.a < FLOAT else FLOAT)
    if isinstance(width, str) and (weights := weight_width(width)) is not None:
        return bits._replace(w=weights, a=FLOAT)
    raise PolicyError(key, f"got {width!r}; allowed: float, same, a number of bits from 1 to {FLOAT}, or w8")


def image_width(width: Width) -> int:
    """Return the width of the image, for the value of `Policy.input` (not `same`)."""
    if isinstance(width, str) and width != "float":
        raise PolicyError("input", f"got {width!r}; allowed: float, same, or a number of bits from 1 to {FLOAT}")
    return _widths("input", width, Bits(a=1)).a
