"""Installs a method's quantizers in a float network."""

import logging
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.feeds import bypass_activations
from qbench.quant.graph import call_inner_layers, read_without_call, state_restored
from qbench.quant.image import ImageQuantizer, image_quantizers
from qbench.quant.layers import (
    QUANTIZED_CLASS,
    FloatLayer,
    QLayer,
    TransposedConvolution,
    computed_weight,
    new_float_layer,
)
from qbench.quant.method import Method, Unsupported, float_rule
from qbench.quant.policy import Policy, assign, quantizable
from qbench.quant.quantizer import IdentityQuantizer, Quantizer

logger = logging.getLogger("qbench")


def install(
    method: Method,
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example: Tensor | None = None,
    act: str = "auto",
) -> nn.Module:
    """Add a method's quantizers to a float network, in place, and return the network.

    Only torch's own convolutions, transposed convolutions and `Linear` are changed, not classes derived from them. A
    changed layer gets another class and three new submodules, which are its quantizers. Parameters keep their names and
    identity, so hooks and float checkpoints still work. Quantizers can have parameters of their own, such as the steps
    of LSQ. An optimizer that was created before does not train these parameters.

    Args:
        policy: selects the layers that are quantized. By default, all layers except the first and the last are
            quantized.
        example: one batch of images (N, C, H, W). `install` runs the network on these images. The run shows the
            execution order, the layers that read the image, the activation functions before layers, and weights
            that are used without calling their layer. Layers that do not run on these images stay in float. With None,
            the network is not run, and layers are in the order of registration.
        act: whether activation functions before input quantizers are kept ("keep") or removed ("fused"). With
            "auto", the method decides (`Requires`).

    Raises:
        Unsupported: the method does not support a width, or the network does not fit the method.
        PolicyError: a rule of the policy matches nothing.
        TypeError: the method makes a module that is not a `Quantizer`.
    """
    policy = policy or Policy()
    layers = quantizable(model)
    if any(isinstance(layer, QLayer) for layer in layers.values()):
        raise Unsupported(f"{type(model).__name__} already has quantizers; the network must be a float network")
    call_inner_layers(model)
    with state_restored(model):
        assigned = assign(model, method.bits, policy, example)
        image = image_quantizers(model, assigned, policy, example)
    quantized = [name for name, bits in assigned.items() if bits != Bits()]
    for name in quantized:
        _check_layer(name, layers[name])
    _check_shared(model, quantized)
    if example is not None and not example.is_meta:
        _check_calls(model, quantized, example[:1])
    for name in quantized:
        method.check(assigned[name]._replace(a=FLOAT) if name in image else assigned[name])
    bypass_activations(method, model, assigned, image, act, example)
    for name, bits in assigned.items():
        _quantize_layer(method, name, layers[name], bits, image.get(name))
    if any(bits.g < FLOAT for bits in assigned.values()):
        _keep_outputs(model)
    return model


def _keep_outputs(model: nn.Module) -> None:
    """Make torch's modules return new tensors, because autograd refuses to change a quantizer's output in place."""
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn.") and getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def _quantize_layer(method: Method, name: str, layer: FloatLayer, bits: Bits, image: ImageQuantizer | None) -> None:
    """Turn one float layer into a quantized layer, in place.

    Args:
        image: the input quantizer if the layer reads the image, else None.
    """
    layer.__class__ = QUANTIZED_CLASS.get(type(layer), type(layer))
    if not isinstance(layer, QLayer):
        return  # a layer of a subclass, which the policy leaves in float
    device = layer.weight.device
    layer.label, layer.bits = name, bits
    layer.weight_q, layer.input_q, layer.output_q = (IdentityQuantizer() for _ in range(3))
    if bits.w < FLOAT and method.weight:
        if isinstance(layer, TransposedConvolution):
            _check_transposed(method, name, layer, bits.w)
        layer.weight_q = _checked(method, name, method.weight(name, layer, bits.w)).to(device)
    if image:
        layer.input_q = image.to(device)
    elif bits.a < FLOAT and method.input:
        layer.input_q = _checked(method, name, method.input(name, layer, bits.a)).to(device)
    if bits != Bits() and method.output and (output := method.output(name, layer, bits.g)) is not None:
        layer.output_q = _checked(method, name, output).to(device)


def _checked(method: Method, layer_name: str, quantizer: object) -> Quantizer:
    """Return `quantizer`. Raise `TypeError` if a user's method returned an object that is not a `Quantizer`."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"{method.name} makes a {type(quantizer).__name__} for {layer_name}, which is not a Quantizer\n"
            f"derive its class from qbench.quant.quantizer.Quantizer (a torch.nn.Module with defaults)"
        )
    return quantizer


def _check_layer(name: str, layer: FloatLayer) -> None:
    if remedy := computed_weight(layer):
        raise Unsupported(
            f"{name}: the weight is computed in every forward pass\nfirst {remedy}; or {float_rule(name)}"
        )
    if type(layer) not in QUANTIZED_CLASS:
        raise Unsupported(
            f"{name} is a {type(layer).__name__}; only torch's own classes are quantized, not subclasses: "
            f"{', '.join(kind.__name__ for kind in QUANTIZED_CLASS)}\n{float_rule(name)}"
        )
    if replaced := sorted({"forward", "_conv_forward"} & vars(layer).keys()):
        raise Unsupported(
            f"{name}: its method {replaced[0]} was replaced, and the quantized layer would not call the replacement\n"
            f"write a module of your own around the layer, or {float_rule(name)}"
        )
    if not isinstance(layer, nn.Linear) and layer.padding_mode != "zeros":
        raise Unsupported(
            f"{name} pads with {layer.padding_mode!r}; only zero padding is quantized\n{float_rule(name)}"
        )


def _check_shared(model: nn.Module, quantized: Collection[str]) -> None:
    """Raise `Unsupported` if a quantized layer and another module have the same weights.

    The other module would use the weights in float, or would quantize them with its own quantizer.
    """
    owners: dict[object, dict[int, str]] = {}  # memory of a parameter -> its modules, by identity
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        owners.setdefault(_memory(parameter), {}).setdefault(id(model.get_submodule(module)), module)
    for name in quantized:
        sharing = [other for other in owners[_memory(model.get_parameter(f"{name}.weight"))].values() if other != name]
        if sharing:
            raise Unsupported(
                f"{name} and {sharing[0] or 'the network itself'} share a weight; this weight cannot be "
                f"quantized for {name} alone\n{float_rule(name, *(other for other in sharing if other in quantized))}"
            )


def _memory(parameter: Tensor) -> object:
    return id(parameter) if parameter.is_meta or not parameter.numel() else (parameter.device, parameter.data_ptr())


def _check_calls(model: nn.Module, quantized: Collection[str], example: Tensor) -> None:
    """Raise `Unsupported` if evaluation or training uses weights without calling their layer."""
    images = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    with state_restored(model):
        _refuse_read(read_without_call(model, images, quantized), "")
        try:
            read = read_without_call(model, torch.cat([images, 1 - images]), quantized, training=True)
        except Exception as error:  # such as a network that needs labels for training
            logger.warning(
                "the network does not run on images alone in training mode (%s: %s); qbench therefore did not check "
                "whether training uses the weights of a quantized layer without calling the layer",
                type(error).__name__, str(error).partition("\n")[0],
            )  # fmt: skip
            return
    _refuse_read(read, " in training")


def _refuse_read(read: Sequence[str], when: str) -> None:
    if read:
        raise Unsupported(
            f"{read[0]}: the network also uses the weight without calling the layer{when}; this use would not be "
            "quantized\n"
            f"call the layer, or {float_rule(read[0])}"
        )


def _check_transposed(method: Method, name: str, layer: FloatLayer, bits: int) -> None:
    """Raise `Unsupported` if a method has separate scales for the outputs of a transposed convolution.

    Methods assume that the first axis of the weights is the axis of the outputs. In a transposed
    convolution, it is the axis of the inputs.
    """
    with torch.random.fork_rng(devices=[]):
        sample = new_float_layer(type(layer), 2, 3, layer.weight.shape[2:])
    weight = sample.weight.detach()
    quantizer = _checked(method, name, method.weight(name, sample, bits)) if method.weight else None
    grid = quantizer.grid(weight) if quantizer else None
    if grid is not None and (grid.points.shape[0] > 1 or grid.points.shape[2] > 1):
        raise Unsupported(
            f"{name} is a {type(sample).__name__}; {method.name} cannot quantize its weights, because {method.name} "
            f"has separate scales for parts of the weights\n{float_rule(name)}"
        )
