"""Defines quantized layers: convolutions and linear layers, each with three quantizers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import Bits
from qbench.quant import elementwise
from qbench.quant.graph import eval_mode_keeping_rng
from qbench.quant.ops import named_transform, recompute_in_backward
from qbench.quant.quantizer import Quantizer
from qbench.quant.weights_first import WeightLayer, weight_of

# Shapes: N batch, C channels, H height, W width.

FloatLayer = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
)
"""A layer that can be quantized."""

TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
"""A layer whose weights have the shape (inputs, outputs / groups, ...).

In all other layers, outputs are the first axis.
"""


class NotFinite(ValueError):
    """Raised if the input of a quantizer contains inf or nan.

    Most quantizers would silently map inf and nan to an ordinary level.
    """


def _check_finite(layer: WeightLayer, what: str, x: Tensor) -> Tensor:
    """Return x, or raise `NotFinite` if a value is inf or nan.

    The check is done only on the CPU and outside of torch.compile. On another device, the check would make the CPU wait
    for the device in every step.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return x
    # Compute the sum in a single pass. If the sum is finite, every value is finite. Otherwise the sum may have
    # overflowed, so every value is checked. A sum of float16 numbers often overflows. All other types are summed in
    # their own type, because torch sums bfloat16 into float32 several times slower.
    try:
        total = x.detach().sum(dtype=torch.float32 if x.dtype == torch.float16 else None).item()
    except RuntimeError as error:
        raise named_transform(error) from None
    if not isfinite(total) and not x.isfinite().all():
        count = int((~x.isfinite()).sum())
        raise NotFinite(f"{layer.label}: {count} of {x.numel()} values of its {what} are inf or nan")
    return x


def _finite(layer: "QLayer", input: Tensor) -> Tensor:
    """Return the input of a layer. Raise `NotFinite` if the input or the weights contain inf or nan."""
    _check_finite(layer, "weights", layer.weight)
    return _check_finite(layer, "input", input)


def _quantized_input(layer: "QLayer", input: Tensor) -> Tensor:
    """Return the quantized input of a layer. Raise `NotFinite` if the input contains inf or nan.

    Compiled quantizers look for inf and nan while they read the input. For all other quantizers, the input is read
    a second time.
    """
    if torch.compiler.is_compiling():
        return layer.input_q(input)
    with elementwise.finite_input() as found:
        x = layer.input_q(input)
    if not found.is_finite(input):
        _check_finite(layer, "input", input)
    return x


def _quantized_weight(layer: WeightLayer) -> Tensor:
    """Return the quantized weights of a layer. Raise `NotFinite` if the weights contain inf or nan."""
    return layer.weight_q(_check_finite(layer, "weights", layer.weight))


def _quantized(layer: "QLayer", input: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the output of a layer, computed from its quantized input and quantized weights."""
    x, w = _quantized_input(layer, input), weight_of(layer, _quantized_weight)
    with recompute_in_backward(x):
        y = compute(x, w)
    return layer.output_q(y, input)


def _convolution(layer: "QConvolution", input: Tensor, convolve: Callable[..., Tensor]) -> Tensor:
    """Return the output of a quantized convolution. `convolve` is the torch function for this class of convolution."""
    return _quantized(
        layer,
        input,
        lambda x, w: convolve(x, w, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups),
    )


def _transposed_convolution(
    layer: "QTransposedConvolution", input: Tensor, output_size: list[int] | None, convolve: Callable[..., Tensor]
) -> Tensor:
    """Return the output of a quantized transposed convolution. `convolve` is the torch function for this class."""
    padding, extra = _padding(layer, input, output_size)
    return _quantized(
        layer,
        input,
        lambda x, w: convolve(x, w, layer.bias, layer.stride, padding, extra, layer.groups, layer.dilation),
    )


def _padding(
    layer: TransposedConvolution, x: Tensor, output_size: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding and the output padding of a transposed convolution, each with one number per axis."""
    padding, axes = layer.padding, len(layer.kernel_size)
    assert isinstance(padding, tuple)  # only other convolutions allow strings, such as "same"
    if output_size is None:
        return padding, tuple(layer.output_padding)
    options = zip(layer.stride, padding, layer.dilation, layer.kernel_size, strict=True)
    fixed = [step * (kernel - 1) + 1 - stride - 2 * pad for stride, pad, step, kernel in options]
    sizes = zip(output_size[-axes:], x.shape[-axes:], layer.stride, fixed, strict=True)
    return padding, tuple(wanted - size * stride - rest for wanted, size, stride, rest in sizes)


class _Quantizers:
    """Attributes of quantized layers that float layers do not have.

    `weight` and `bias` are the parameters of the float layer (latent weights). If nothing is quantized, a quantized
    layer computes the same output as the float layer.
    """

    label: str
    bits: Bits
    input_q: Quantizer
    weight_q: Quantizer
    output_q: Quantizer


class QConv1d(_Quantizers, nn.Conv1d):
    """A convolution over one axis with three quantizers."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the quantized input with the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input))
        return _convolution(self, input, F.conv1d)


class QConv2d(_Quantizers, nn.Conv2d):
    """A convolution with three quantizers."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the quantized input with the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input))
        return _convolution(self, input, F.conv2d)


class QConv3d(_Quantizers, nn.Conv3d):
    """A convolution over three axes with three quantizers."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the quantized input with the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input))
        return _convolution(self, input, F.conv3d)


class QConvTranspose1d(_Quantizers, nn.ConvTranspose1d):
    """A transposed convolution over one axis with three quantizers."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the transposed convolution to the quantized input with the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input), output_size)
        return _transposed_convolution(self, input, output_size, F.conv_transpose1d)


class QConvTranspose2d(_Quantizers, nn.ConvTranspose2d):
    """A transposed convolution with three quantizers."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the transposed convolution to the quantized input with the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input), output_size)
        return _transposed_convolution(self, input, output_size, F.conv_transpose2d)


class QConvTranspose3d(_Quantizers, nn.ConvTranspose3d):
    """A transposed convolution over three axes with three quantizers."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the transposed convolution to the quantized input with the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input), output_size)
        return _transposed_convolution(self, input, output_size, F.conv_transpose3d)


class QLinear(_Quantizers, nn.Linear):
    """A linear layer with three quantizers."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the quantized input by the quantized weights."""
        if self.bits == Bits():
            return super().forward(_finite(self, input))
        return _quantized(self, input, lambda x, w: F.linear(x, w, self.bias))


QConvolution = QConv1d | QConv2d | QConv3d
QTransposedConvolution = QConvTranspose1d | QConvTranspose2d | QConvTranspose3d
QLayer = QConvolution | QTransposedConvolution | QLinear

QUANTIZED_CLASS: Mapping[type[nn.Module], type[QLayer]] = {
    nn.Conv1d: QConv1d, nn.Conv2d: QConv2d, nn.Conv3d: QConv3d, nn.ConvTranspose1d: QConvTranspose1d,
    nn.ConvTranspose2d: QConvTranspose2d, nn.ConvTranspose3d: QConvTranspose3d, nn.Linear: QLinear,
}  # fmt: skip
"""Maps the class of a float layer to the class of the quantized layer."""

FLOAT_CLASS: Mapping[type[nn.Module], type[nn.Module]] = {q: float_class for float_class, q in QUANTIZED_CLASS.items()}
"""Maps the class of a quantized layer to the class of the float layer."""


def new_float_layer(kind: type[nn.Module], inputs: int, outputs: int, kernel: Sequence[int]) -> FloatLayer:
    """Return a float layer with initial weights, of the class `kind`.

    If `kind` is the class of a quantized layer, the float layer has the corresponding float class.
    """
    make: Callable[..., FloatLayer] = FLOAT_CLASS.get(kind, kind)  # type: ignore[assignment]
    return make(inputs, outputs) if issubclass(kind, nn.Linear) else make(inputs, outputs, tuple(kernel))


def quantized_layers(model: nn.Module) -> dict[str, QLayer]:
    """Return, by name, the layers in which weights, activations or gradients are quantized."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLayer) and m.bits != Bits()}


def quantized_parts(model: nn.Module) -> dict[str, str]:
    """Return, by name, the widths of each quantized layer as text, and `bypassed` for each bypassed activation.

    Two networks with equal parts have quantizers at the same places.
    """
    bypassed = {n: "bypassed" for n, m in model.named_modules() if isinstance(m, BypassedActivation)}
    return {name: str(layer.bits) for name, layer in quantized_layers(model).items()} | bypassed


def quantizers(layer: QLayer) -> dict[str, Quantizer]:
    """Return a layer's quantizers under the keys w (weights), a (activations) and g (gradients)."""
    return {"w": layer.weight_q, "a": layer.input_q, "g": layer.output_q}


def is_quantizer_key(name: str, model: nn.Module) -> bool:
    """Return whether a parameter or buffer of this name belongs to a quantizer of a layer.

    In a float network, the result says whether the name would belong to a quantizer after quantization. A submodule of
    a user's network with the name of a slot, such as `input_q`, is not a quantizer.
    """
    parts = name.split(".")
    slots = [i for i, part in enumerate(parts) if part in ("weight_q", "input_q", "output_q")]
    return any(isinstance(_submodule(model, parts[:i]), FloatLayer) for i in slots)


def _submodule(model: nn.Module, path: Sequence[str]) -> nn.Module | None:
    """Return the submodule at a path of names, or None if there is none."""
    try:
        return model.get_submodule(".".join(path))
    except AttributeError:
        return None


def clamp_min_(model: nn.Module, kinds: Mapping[type[nn.Module], tuple[str, ...]], smallest: float) -> None:
    """Clamp learned scales of quantizers from below, in place.

    Args:
        kinds: classes of weight or input quantizers, each with the names of its parameters to
            clamp.
        smallest: the lower bound of the parameters.
    """
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            for quantizer in (layer.weight_q, layer.input_q):
                for name in (name for kind, names in kinds.items() if isinstance(quantizer, kind) for name in names):
                    quantizer.get_parameter(name).clamp_(min=smallest)


def effective_weight(layer: QLayer) -> Tensor:
    """Return the weights that the layer uses in evaluation, without gradient."""
    with eval_mode_keeping_rng(layer), torch.no_grad():
        return layer.weight_q(layer.weight).detach()


def fully_quantized(model: nn.Module) -> bool:
    """Return whether every weight lies on the grid of its quantizer.

    The result is False while an incremental method leaves some weights in float.
    """
    return all(layer.weight_q.complete for layer in quantized_layers(model).values())


def reports(model: nn.Module) -> dict[str, dict[str, Mapping[str, float]]]:
    """Return the reports of all quantizers, by layer, slot (w, a or g) and name of the value.

    Empty reports are left out.
    """
    result = {}
    for name, layer in quantized_layers(model).items():
        if layer_report := {key: report for key, q in quantizers(layer).items() if (report := q.report())}:
            result[name] = layer_report
    return result


def computed_weight(layer: nn.Module) -> str | None:
    """If every forward pass computes a layer's weight, return advice on how to make the weight a parameter.

    The result is None if the weight is already a parameter.
    """
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    if "weight" in own:
        return None
    if hasattr(layer, "weight_mask"):
        return "call torch.nn.utils.prune.remove(layer, 'weight')"
    if "weight_g" in own:
        return "call torch.nn.utils.remove_weight_norm(layer)"
    if hasattr(layer, "weight_u"):
        return "call torch.nn.utils.remove_spectral_norm(layer)"
    if hasattr(layer, "parametrizations"):
        return "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    return "make `weight` a torch.nn.Parameter of the layer"


@contextmanager
def float_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Make a quantized network compute like the float network with the latent weights, within a `with` block.

    After the block, the layers are quantized again, also if an error was raised.
    """
    layers = [(m, type(m)) for m in model.modules() if type(m) in FLOAT_CLASS]
    # torch may change the class of a layer (`parametrize`): such a layer keeps its class, and its widths become 32
    others = [(m, m.bits) for m in model.modules() if isinstance(m, QLayer) and type(m) not in FLOAT_CLASS]
    activations = [(m, m.active) for m in model.modules() if isinstance(m, BypassedActivation)]
    try:
        for layer, kind in layers:
            layer.__class__ = FLOAT_CLASS[kind]
        for other, _ in others:
            other.bits = Bits()
        for activation, _ in activations:
            activation.active = True
        yield model
    finally:
        for layer, kind in layers:
            layer.__class__ = kind
        for other, bits in others:
            other.bits = bits
        for activation, active in activations:
            activation.active = active


class BypassedActivation(nn.Module):
    """Takes the place of an activation function that the input quantizers of the next layers replace.

    The module returns its input unchanged. Inside `float_mode`, it applies the activation function.

    Args:
        act: the activation function.
        readers: the names of the layers that read the activation's output.
    """

    def __init__(self, act: nn.Module, readers: Sequence[str]) -> None:
        super().__init__()
        self.act = act
        self.readers = tuple(readers)
        self.active = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or the activation of x inside `float_mode`."""
        y: Tensor = self.act(x) if self.active else x
        return y
