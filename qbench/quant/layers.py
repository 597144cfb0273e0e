"""Quantized layers: a method put into a float network in place, and taken out of it again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import Bits
from qbench.quant.graph import eval_mode_keeping_rng
from qbench.quant.ops import recompute_in_backward

# Shapes: N batch, C channels, H height, W width.


class IdentityOutput(nn.Module):
    """The output slot of a layer whose method has nothing to do there."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y."""
        return y


class NotFinite(ValueError):
    """What enters a quantizer holds inf or nan; most of them would turn it into an ordinary level in silence."""


def _finite(layer: "QLayer", what: str, x: Tensor) -> Tensor:
    """Return x. Raise `NotFinite` where it is not finite; on a GPU, or compiled, the question would cost too much."""
    if torch.compiler.is_compiling():
        return x
    if x.device.type == "cpu" and not isfinite(x.detach().sum(dtype=torch.float32).item()) and not x.isfinite().all():
        count = int((~x.isfinite()).sum())
        raise NotFinite(f"{layer.label}: {count} of {x.numel()} values of its {what} are inf or nan")
    return x


class QConv2d(nn.Conv2d):
    """A convolution with three quantizers; `weight` and `bias` stay the float layer's own (latent) parameters."""

    label: str
    bits: Bits
    input_q: nn.Module
    weight_q: nn.Module
    output_q: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the quantized input with the quantized weights."""
        x, w = _finite(self, "input", input), _finite(self, "weights", self.weight)
        if self.bits == Bits():
            return super().forward(x)
        x, w = self.input_q(x), self.weight_q(w)
        with recompute_in_backward(x):
            y = F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.output_q(y, input)  # type: ignore[no-any-return]


class QLinear(nn.Linear):
    """A linear layer with three quantizers; see `QConv2d`."""

    label: str
    bits: Bits
    input_q: nn.Module
    weight_q: nn.Module
    output_q: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the quantized input by the quantized weights."""
        x, w = _finite(self, "input", input), _finite(self, "weights", self.weight)
        if self.bits == Bits():
            return super().forward(x)
        x, w = self.input_q(x), self.weight_q(w)
        with recompute_in_backward(x):
            y = F.linear(x, w, self.bias)
        return self.output_q(y, input)  # type: ignore[no-any-return]


QLayer = QConv2d | QLinear
_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: QConv2d, nn.Linear: QLinear}
_PLAIN = {quantized: plain for plain, quantized in _QUANTIZED.items()}


def quantized_layers(model: nn.Module) -> dict[str, QLayer]:
    """Return the layers of which anything is quantized, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLayer) and m.bits != Bits()}


def is_quantizer_key(name: str) -> bool:
    """Whether a parameter or buffer of this name belongs to a quantizer, not to the float network."""
    return any(part in ("weight_q", "input_q", "output_q") for part in name.split("."))


def clamp_min_(model: nn.Module, kinds: dict[type[nn.Module], tuple[str, ...]], smallest: float) -> None:
    """Clamp learned scales in place: for every quantizer of a type, its parameters of these names."""
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            for site in (layer.weight_q, layer.input_q):
                for name in (name for kind, names in kinds.items() if isinstance(site, kind) for name in names):
                    site.get_parameter(name).clamp_(min=smallest)


def effective_weight(layer: QLayer) -> Tensor:
    """Return the weights that the layer computes with in evaluation, without gradient."""
    with eval_mode_keeping_rng(layer), torch.no_grad():
        return layer.weight_q(layer.weight).detach()  # type: ignore[no-any-return]


def fully_quantized(model: nn.Module) -> bool:
    """Whether every weight lies on its grid now. Incremental methods say so by `complete` of their modules."""
    return all(getattr(layer.weight_q, "complete", True) for layer in quantized_layers(model).values())


def reports(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what the quantizers say of their state: layer -> slot -> numbers and words; nothing for silent ones."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in quantized_layers(model).items():
        sites = (("w", layer.weight_q), ("a", layer.input_q), ("g", layer.output_q))
        said = {slot: site.report() for slot, site in sites if hasattr(site, "report")}  # type: ignore[operator]
        found |= {name: said} if said else {}
    return found


def fold_quantized_weights(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are the effective weights, with no weight quantizer left to run."""
    baked = copy.deepcopy(model)
    for layer in quantized_layers(baked).values():
        layer.weight.data = effective_weight(layer).clone()
        layer.weight_q = nn.Identity()
    return baked


@contextmanager
def float_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Let a network compute as the float one it was made from, on its latent weights, for a while."""
    swapped: list[tuple[Any, type[nn.Module]]] = []
    replaced = [m for m in model.modules() if isinstance(m, BypassedActivation)]
    try:
        for layer in model.modules():
            if type(layer) in _PLAIN:
                swapped.append((layer, type(layer)))
                layer.__class__ = _PLAIN[type(layer)]
        for module in replaced:
            module.active = True
        yield model
    finally:
        for layer, kind in swapped:
            layer.__class__ = kind
        for module in replaced:
            module.active = False


class BypassedActivation(nn.Module):
    """Stands where an activation function stood whose place the next layers' input quantizers took."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.active = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x (the activation itself only inside `float_mode`)."""
        return self.act(x) if self.active else x
