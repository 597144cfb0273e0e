"""Quantized layers: a method put into a float network in place, and taken out of it again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.quant.method import FLOAT, Bits, Grid, Method, Unsupported, eval_mode_keeping_rng
from qbench.quant.ops import levels_k, quantize_k, recompute_in_backward
from qbench.quant.policy import Policy, assign, quantizable

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


class ImageQuantizer(nn.Module):
    """Rounds the network's input to 2^bits levels per channel, evenly over the range that images have.

    With 8 bits and images that were 8-bit files this changes nothing but float rounding.
    """

    low: Tensor
    span: Tensor

    def __init__(self, bits: int, low: tuple[float, ...], high: tuple[float, ...]) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low", torch.tensor(low).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("span", (torch.tensor(high) - torch.tensor(low)).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the rounded image; one that a perceptron flattened, (N, C H W), comes back flat."""
        x = self._in_channels(x_NCHW)
        scaled = ((x - self.low) / self.span).clamp(0, 1)
        return (quantize_k(scaled, self.bits) * self.span + self.low).reshape(x_NCHW.shape)

    def grid(self, x_NCHW: Tensor) -> Grid:
        """One scale group per channel."""
        points = levels_k(self.bits, x_NCHW) * self.span.reshape(-1, 1) + self.low.reshape(-1, 1)
        channels = points.shape[0]
        return Grid(points.unsqueeze(-1), lambda t: self._in_channels(t).movedim(1, 0).reshape(channels, -1, 1))

    def _in_channels(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.reshape(len(x), self.low.numel(), -1, 1)


class BypassedActivation(nn.Module):
    """Stands where an activation function stood whose place the next layers' input quantizers took."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.active = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x (the activation itself only inside `float_mode`)."""
        return self.act(x) if self.active else x


def install(
    method: Method,
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example: Tensor | None = None,
    act: str = "auto",
) -> nn.Module:
    """Put a method's quantizers into a float network, in place, and return it.

    Only exact `Conv2d` and `Linear` layers are changed, by class and by three new submodules; parameters keep their
    names and identity, so optimizers, hooks and float checkpoints go on working.

    Args:
        policy: which layers; first and last stay float by default.
        example: one image batch (N, C, H, W) to learn the execution order from; without it, order of registration.
        act: "kept" or "replaced" for the activation functions in front of input quantizers; "auto" as the method needs.

    Raises:
        Unsupported: the method does not know a width or the network does not fit it.
        PolicyError: a rule of the policy matches nothing.
    """
    policy = policy or Policy()
    layers = quantizable(model)
    if any(isinstance(layer, QLayer) for layer in layers.values()):
        raise Unsupported(f"{type(model).__name__} holds quantizers already; install into a float network")
    assigned = assign(model, method.bits, policy, example)
    image = next(iter(assigned))
    for name, bits in assigned.items():
        if bits != Bits():
            _check_layer(name, layers[name])
            method.check(bits._replace(a=FLOAT) if name == image else bits)
    _replace_activations(method, model, assigned, act)
    for name, bits in assigned.items():
        _swap(method, name, layers[name], bits, policy if name == image else None)
    return model


def _swap(method: Method, name: str, layer: nn.Module, bits: Bits, image: Policy | None) -> None:
    """Turn one float layer into its quantized class; `image` is given for the layer that reads the image."""
    layer.__class__ = _QUANTIZED.get(type(layer), type(layer))
    if not isinstance(layer, QLayer):
        return  # a subclass that the policy leaves float
    device = layer.weight.device
    layer.label, layer.bits = name, bits
    layer.weight_q = nn.Identity()
    layer.input_q = nn.Identity()
    layer.output_q = IdentityOutput()
    if bits.w < FLOAT and method.weight:
        layer.weight_q = method.weight(name, layer, bits.w).to(device)
    if bits.a < FLOAT and image:
        layer.input_q = ImageQuantizer(bits.a, *image.image_range).to(device)
    elif bits.a < FLOAT and method.input:
        layer.input_q = method.input(name, layer, bits.a).to(device)
    if bits != Bits() and method.output and (behind := method.output(name, layer, bits.g)) is not None:
        layer.output_q = behind.to(device)


def _check_layer(name: str, layer: nn.Module) -> None:
    if type(layer) not in _QUANTIZED:
        raise Unsupported(f"{name} is a {type(layer).__name__}; only exact Conv2d and Linear layers are quantized")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise Unsupported(f"{name} pads with {layer.padding_mode!r}; only zero padding is quantized")


def _replace_activations(method: Method, model: nn.Module, assigned: dict[str, Bits], act: str) -> None:
    """Take away the activation functions whose readers all have a quantizer that is the activation itself."""
    needs = method.requires.act
    if {act, needs} == {"kept", "replaced"} and method.bits.a < FLOAT:
        raise Unsupported(f"{method.name} wants the activations in front of its quantizers {needs}, not {act}")
    if method.bits.a == FLOAT or "kept" in (act, needs):
        return
    feeds: dict[str, tuple[str, ...]] = getattr(model, "feeds", {})
    if not feeds and (needs == "replaced" or act == "replaced"):
        raise Unsupported(
            f"{method.name} takes the activation's place, but {type(model).__name__} does not say which layers its "
            "activations feed (attribute `feeds`); the networks of qbench do"
        )
    fed = {reader for readers in feeds.values() for reader in readers}
    if unknown := {*feeds, *fed} - dict(model.named_modules()).keys():
        raise Unsupported(f"{type(model).__name__} says in `feeds` what it does not have: {', '.join(sorted(unknown))}")
    image = next(iter(assigned))
    unfed = [name for name, bits in assigned.items() if bits.a < FLOAT and name not in fed and name != image]
    if needs == "replaced" and unfed:
        raise Unsupported(
            f"{method.name} takes the activation's place, but in front of {unfed[0]} there is none that feeds it "
            "alone; leave its activations float"
        )
    for name, readers in feeds.items():
        quantized = [reader for reader in readers if assigned[reader].a < FLOAT]
        if len(quantized) == len(readers):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, BypassedActivation(model.get_submodule(name)))
        elif quantized and needs == "replaced":
            kept = ", ".join(sorted(set(readers) - set(quantized)))
            raise Unsupported(f"{name} feeds {quantized[0]} (quantized) and {kept} (float): give both the same bits")


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
