"""Installs a method's quantizers in a float network."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import QUANTIZED_CLASS, BypassedActivation, FloatLayer, QLayer
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import levels_k, quantize_k
from qbench.quant.policy import Policy, assign, quantizable
from qbench.quant.quantizer import Grid, IdentityQuantizer, Quantizer


class ImageQuantizer(Quantizer):
    """Rounds the network's input to 2^bits evenly spaced levels over each channel's range.

    With 8 bits and images from 8-bit files, values change only by float rounding errors.

    Args:
        bits: width of the rounded values.
        low, high: smallest and largest value of each channel.
    """

    low: Tensor
    span: Tensor

    def __init__(self, bits: int, low: tuple[float, ...], high: tuple[float, ...]) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low", torch.tensor(low).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("span", (torch.tensor(high) - torch.tensor(low)).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return the rounded images, in the same shape.

        The shape is (N, C, H, W), or (N, C H W) before a linear layer.
        """
        x = self._in_channels(x_NCHW)
        scaled = ((x - self.low) / self.span).clamp(0, 1)
        return (quantize_k(scaled, self.bits) * self.span + self.low).reshape(x_NCHW.shape)

    def grid(self, x_NCHW: Tensor) -> Grid:
        """Return the grid, with one scale group per channel."""
        points = levels_k(self.bits, x_NCHW) * self.span.reshape(-1, 1) + self.low.reshape(-1, 1)
        channels = points.shape[0]
        return Grid(points.unsqueeze(-1), lambda t: self._in_channels(t).movedim(1, 0).reshape(channels, -1, 1))

    def _in_channels(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.reshape(len(x), self.low.numel(), -1, 1)


def install(
    method: Method,
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example: Tensor | None = None,
    act: str = "auto",
) -> nn.Module:
    """Put a method's quantizers into a float network, in place, and return it.

    Only layers whose class is exactly `Conv2d` or `Linear` change. Each of these layers gets
    another class and three new submodules. Parameters keep their names and identity, so optimizers,
    hooks and float checkpoints still work.

    Args:
        policy: which layers are quantized; by default all except the first and the last.
        example: one image batch (N, C, H, W), which is run to find the execution order. If None,
            the order of registration is used.
        act: what happens to the activation functions in front of input quantizers: "keep" or
            "fused" (see `Requires`). With "auto", the method decides.

    Raises:
        Unsupported: the method does not support a width, or the network does not fit it.
        PolicyError: a rule of the policy matches nothing.
        TypeError: the method makes a module that is not a `Quantizer`.
    """
    policy = policy or Policy()
    layers = quantizable(model)
    if any(isinstance(layer, QLayer) for layer in layers.values()):
        raise Unsupported(f"{type(model).__name__} already has quantizers; must be a float network")
    assigned = assign(model, method.bits, policy, example)
    image_layer = next(iter(assigned))
    for name, bits in assigned.items():
        if bits != Bits():
            _check_layer(name, layers[name])
            method.check(bits._replace(a=FLOAT) if name == image_layer else bits)
    _bypass_activations(method, model, assigned, act)
    for name, bits in assigned.items():
        _quantize_layer(method, name, layers[name], bits, policy if name == image_layer else None)
    return model


def _quantize_layer(method: Method, name: str, layer: FloatLayer, bits: Bits, image: Policy | None) -> None:
    """Turn one float layer into its quantized class.

    Args:
        image: the policy if this layer reads the image, else None.
    """
    layer.__class__ = QUANTIZED_CLASS.get(type(layer), type(layer))
    if not isinstance(layer, QLayer):
        return  # a layer of a subclass, which the policy leaves in float
    device = layer.weight.device
    layer.label, layer.bits = name, bits
    layer.weight_q, layer.input_q, layer.output_q = (IdentityQuantizer() for _ in range(3))
    if bits.w < FLOAT and method.weight:
        layer.weight_q = _checked(method, name, method.weight(name, layer, bits.w)).to(device)
    if bits.a < FLOAT and image:
        layer.input_q = ImageQuantizer(bits.a, *image.image_range).to(device)
    elif bits.a < FLOAT and method.input:
        layer.input_q = _checked(method, name, method.input(name, layer, bits.a)).to(device)
    if bits != Bits() and method.output and (output := method.output(name, layer, bits.g)) is not None:
        layer.output_q = _checked(method, name, output).to(device)


def _checked(method: Method, layer_name: str, quantizer: object) -> Quantizer:
    """Return `quantizer`; raise `TypeError` if a user's own method made something else."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"{method.name} makes a {type(quantizer).__name__} for {layer_name}, which is not a Quantizer\n"
            f"derive its class from qbench.quant.quantizer.Quantizer (a torch.nn.Module with defaults)"
        )
    return quantizer


def _check_layer(name: str, layer: FloatLayer) -> None:
    if type(layer) not in QUANTIZED_CLASS:
        raise Unsupported(f"{name} is a {type(layer).__name__}; only exact Conv2d and Linear layers are quantized")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise Unsupported(f"{name} pads with {layer.padding_mode!r}; only zero padding is quantized")


def feeds(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the network's attribute `feeds` (activation -> layers that read it), or {}."""
    declared: dict[str, tuple[str, ...]] = getattr(model, "feeds", {})
    return declared


def _bypass_activations(method: Method, model: nn.Module, assigned: Mapping[str, Bits], act: str) -> None:
    """Bypass the activation functions that quantizers replace.

    An activation function is replaced if every layer that reads it has an input quantizer.
    """
    needs = method.requires.act
    if {act, needs} == {"keep", "fused"} and method.bits.a < FLOAT:
        raise Unsupported(f"{method.name} requires the activations before its quantizers to be {needs}, not {act}")
    if method.bits.a == FLOAT or "keep" in (act, needs):
        return
    readers_of = feeds(model)
    _check_feeds(method, model, readers_of, assigned, act)
    for name, readers in readers_of.items():
        quantized = [reader for reader in readers if assigned[reader].a < FLOAT]
        if len(quantized) == len(readers):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, BypassedActivation(model.get_submodule(name)))
        elif quantized and needs == "fused":
            float_readers = ", ".join(sorted(set(readers) - set(quantized)))
            raise Unsupported(
                f"the activation {name} feeds {quantized[0]} (quantized) and {float_readers} (float)\n"
                f"set the same bits for all of them"
            )


def _check_feeds(
    method: Method,
    model: nn.Module,
    readers_of: Mapping[str, tuple[str, ...]],
    assigned: Mapping[str, Bits],
    act: str,
) -> None:
    """Raise `Unsupported` if `feeds` is not sufficient to replace the activation functions."""
    needs = method.requires.act
    if not readers_of and (needs == "fused" or act == "fused"):
        raise Unsupported(
            f"{method.name} replaces the activation function, but {type(model).__name__} has no attribute "
            f"`feeds`\nadd a dictionary from each activation to the layers that it feeds, as in the networks of qbench"
        )
    fed = {reader for readers in readers_of.values() for reader in readers}
    if unknown := {*readers_of, *fed} - dict(model.named_modules()).keys():
        raise Unsupported(f"{type(model).__name__}.feeds names modules that do not exist: {', '.join(sorted(unknown))}")
    image_layer = next(iter(assigned))
    unfed = [name for name, bits in assigned.items() if bits.a < FLOAT and name not in fed and name != image_layer]
    if needs == "fused" and unfed:
        raise Unsupported(
            f"{method.name} replaces the activation function, but no activation feeds only {unfed[0]}\n"
            f"leave the activations of this layer in float"
        )
