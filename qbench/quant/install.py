"""Installing a method's quantizers into a float network."""

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.layers import _QUANTIZED, BypassedActivation, IdentityOutput, QLayer
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import levels_k, quantize_k
from qbench.quant.policy import Policy, assign, quantizable
from qbench.quant.quantizer import Grid


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
        act: "keep" or "fused" for the activation functions in front of input quantizers; "auto" as the method needs.

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
    if {act, needs} == {"keep", "fused"} and method.bits.a < FLOAT:
        raise Unsupported(f"{method.name} wants the activations in front of its quantizers {needs}, not {act}")
    if method.bits.a == FLOAT or "keep" in (act, needs):
        return
    feeds: dict[str, tuple[str, ...]] = getattr(model, "feeds", {})
    if not feeds and (needs == "fused" or act == "fused"):
        raise Unsupported(
            f"{method.name} takes the activation's place, but {type(model).__name__} does not say which layers its "
            "activations feed (attribute `feeds`); the networks of qbench do"
        )
    fed = {reader for readers in feeds.values() for reader in readers}
    if unknown := {*feeds, *fed} - dict(model.named_modules()).keys():
        raise Unsupported(f"{type(model).__name__} says in `feeds` what it does not have: {', '.join(sorted(unknown))}")
    image = next(iter(assigned))
    unfed = [name for name, bits in assigned.items() if bits.a < FLOAT and name not in fed and name != image]
    if needs == "fused" and unfed:
        raise Unsupported(
            f"{method.name} takes the activation's place, but in front of {unfed[0]} there is none that feeds it "
            "alone; leave its activations float"
        )
    for name, readers in feeds.items():
        quantized = [reader for reader in readers if assigned[reader].a < FLOAT]
        if len(quantized) == len(readers):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, BypassedActivation(model.get_submodule(name)))
        elif quantized and needs == "fused":
            kept = ", ".join(sorted(set(readers) - set(quantized)))
            raise Unsupported(f"{name} feeds {quantized[0]} (quantized) and {kept} (float): give both the same bits")
